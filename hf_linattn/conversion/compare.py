"""`compare`: how close a model with linear attention is to the same weights under softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigError, InputError, UnsupportedError
from ..integrations.batches import prepare_inputs, read_batches
from ..integrations.call import Call
from ..integrations.canary import check_model
from ..integrations.interface import linear_output, softmax_output
from ..integrations.observe import kind_of, observed_attention, restored
from ..integrations.seams import softmax_name
from ..integrations.wrappers import converted_parts, inside
from ..modules.registry import list_kinds
from ..ops.ablation import SLOT_SHARE, ablate
from .ablation import ablated, check_whole, possible_ablations
from .report import AblatedFidelity, Report
from .sums import LOGITS, LayerSums, ModelSums


def compare(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    max_batches: int | None = None,
    progress: bool = False,
    ablations: bool = False,
    score: Callable[[PreTrainedModel], float] | None = None,
) -> Report:
    """Compare a model, converted or with a kind as its `attn_implementation`, with softmax on the same weights.

    Each batch runs twice: under softmax, where every layer's linear attention and the share of its slots are computed
    beside it on the same inputs, and under linear attention end to end; with `ablations` once more for every part
    that can be taken away. Nothing is kept but sums, so `batches` may be as long as you like. The model's attention
    implementation and train mode are as before afterwards.

    Args:
        model: Converted, or stock with `attn_implementation=kind`.
        batches: Keyword arguments of the model's forward, as tensors: what a data loader gives. Labels are left out.
        max_batches: Stop after so many.
        progress: Show a progress bar.
        ablations: Also compare what is left with the window alone, the slots alone and shuffled slots, as far as the
            model has such parts (`conversion/ablation.py`). Converted models only.
        score: A measure of your own, such as accuracy or perplexity: `score(model)` is called for linear attention,
            for softmax, and for what is left with `ablations`, with the model in eval mode. It must not use a cache.
    Raises:
        ConfigError: The model uses softmax attention: there is nothing to compare. `ablations` of one not converted.
            `ablations` within `ablated`. A score that is no number.
        InputError: No batches, or not a series of dictionaries; one without a real token; outputs that are not finite.
    """
    model = inside(model, "compare")
    check_model(model)
    kind = kind_of(model)
    if kind not in list_kinds():
        raise ConfigError(
            f"compare needs a model with linear attention; {type(model).__name__} has attn_implementation {kind!r}."
            + (
                converted_parts(model)
                or " Convert it (hf_linattn.convert) or call model.set_attn_implementation(kind) with one of "
                f"{list_kinds()}."
            )
        )
    if ablations:
        check_whole(model, "compare(ablations=True)")
    layers: dict[nn.Module, LayerSums] = {}

    def on_call(module: nn.Module, call: Call) -> Tensor:
        exact = softmax_output(module, call)
        if not (call.on_softmax or call.is_cross):
            linear = linear_output(module, call)
            layers.setdefault(module, LayerSums()).add(
                exact, linear, _uniform(call), _slot_share(module, call), call.key_mask
            )
        return exact

    with torch.no_grad(), restored(model):
        model.eval()
        model.set_attn_implementation(kind)
        parts = possible_ablations(model) if ablations else []
        total = ModelSums()
        left = {name: (ModelSums(), ModelSums()) for name in parts}  # beside softmax, and beside linear attention
        for batch in read_batches(batches, max_batches, progress, "Comparing with softmax"):
            inputs, mask = prepare_inputs(model, batch)
            if mask is not None and not mask.any():
                raise InputError("A batch has no real token (its attention_mask is all 0). Leave such batches out.")
            with observed_attention(model, on_call):
                softmax = _run(model, inputs)
            linear = _run(model, inputs)
            total.add(softmax, linear, mask)
            for name in parts:
                with ablated(model, name):
                    found = _run(model, inputs)
                for sums, reference in zip(left[name], (softmax, linear), strict=True):
                    sums.add(reference, found, mask)
        if not total.rows:
            raise InputError("`batches` is empty: compare needs at least one batch of inputs.")
        if not math.isfinite(total.cosine):
            raise InputError(
                "The outputs of the model are not all finite (inf or NaN) on these batches: there is nothing to"
                " compare. Look at the inputs, or load the model in float32."
            )
        if not layers:
            raise UnsupportedError(
                f"No layer of {type(model).__name__} ran under {kind!r}: both runs were softmax, and there is nothing"
                " to compare. Its attention does not go through Transformers' AttentionInterface, or only in parts"
                " that these inputs do not reach."
            )
        scores = {} if score is None else _scores(model, score, parts)
    names = {module: name for name, module in model.named_modules()}
    return Report(
        kind=kind,
        layers=[sums.report(names[module]) for module, sums in layers.items()],
        hidden_cosine=total.hidden_cosine,
        logits_error=total.logits_error,
        argmax_agreement=total.argmax_agreement,
        rows=total.rows,
        tokens=total.tokens,
        logits_kl=total.logits_kl,
        ablations={name: _left(*left[name], scores.get(name)) for name in parts},
        score=scores.get(kind),
        softmax_score=scores.get("softmax"),
    )


def _left(softmax: ModelSums, linear: ModelSums, score: float | None) -> AblatedFidelity:
    """What is left, beside softmax and beside linear attention."""
    return AblatedFidelity(
        logits_kl=softmax.logits_kl,
        hidden_cosine=softmax.hidden_cosine,
        logits_change=linear.logits_kl,
        hidden_change=max(0.0, 1 - linear.hidden_cosine),
        score=score,
    )


def _scores(model: PreTrainedModel, score: Callable[[PreTrainedModel], float], parts: list[str]) -> dict[str, float]:
    """The user's measure by name: of softmax, of linear attention, and of what is left."""
    kind = kind_of(model)
    found = {kind: _number(score(model))}
    for name in parts:
        with ablated(model, name):
            found[name] = _number(score(model))
    with restored(model):
        model.set_attn_implementation(softmax_name(model.config))
        found["softmax"] = _number(score(model))
    return found


def _number(score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"score(model) must return a number; got {type(score).__name__}.") from None


# -- one batch -----------------------------------------------------------------------------------------------------
def _run(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Logits and last hidden state."""
    hidden: list[Tensor] = []
    handle = model.base_model.register_forward_hook(lambda module, args, output: hidden.append(output[0]))
    try:
        output = model(**inputs)
    finally:
        handle.remove()
    found = {name: output[name] for name in LOGITS if isinstance(output, Mapping) and name in output}
    return {"hidden": hidden[0], **found}


# -- inside a layer ------------------------------------------------------------------------------------------------
def _uniform(call: Call) -> Tensor:
    """Mean of the values a token may see, `[batch, tokens, heads, head_dim]`."""
    repeats = call.query.shape[1] // call.value.shape[1]
    value = call.value.repeat_interleave(repeats, dim=1).transpose(1, 2).double()
    real = value.new_ones(value.shape[:2]) if call.key_mask is None else call.key_mask.to(value.dtype)
    real = real[:, :, None, None]
    if call.is_causal:
        return (value * real).cumsum(1) / real.cumsum(1).clamp_min(1)
    return ((value * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)).expand_as(value)


def _slot_share(module: nn.Module, call: Call) -> Tensor | None:
    """How much of its weight every query gives to slots, `[batch, tokens, heads]`; `None` if the kind does not say."""
    with ablate(SLOT_SHARE) as asked:
        share = linear_output(module, call)
    return share.mean(-1) if asked.was_followed else None
