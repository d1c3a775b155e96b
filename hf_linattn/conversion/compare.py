"""`compare`: how close a model with linear attention is to the same weights under softmax."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
from ..integrations.wrappers import converted_parts, inside
from ..modules.registry import list_kinds
from .report import LayerFidelity, Report

LOGITS = ("logits", "prediction_logits", "start_logits", "end_logits")


def compare(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    max_batches: int | None = None,
    progress: bool = False,
) -> Report:
    """Compare a model, converted or with a kind as its `attn_implementation`, with softmax on the same weights.

    Each batch runs twice: under softmax, where every layer's linear attention is computed beside it on the same
    inputs, and under linear attention end to end. Nothing is kept but sums, so `batches` may be as long as you like.
    The model's attention implementation and train mode are as before afterwards.

    Args:
        model: Converted, or stock with `attn_implementation=kind`.
        batches: Keyword arguments of the model's forward, as tensors: what a data loader gives. Labels are left out.
        max_batches: Stop after so many.
        progress: Show a progress bar.
    Raises:
        ConfigError: The model uses softmax attention: there is nothing to compare.
        InputError: No batches, or not a series of dictionaries.
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
    layers: dict[nn.Module, _LayerSums] = {}
    total = _ModelSums()

    def on_call(module: nn.Module, call: Call) -> Tensor:
        exact = softmax_output(module, call)
        if not (call.on_softmax or call.is_cross):
            linear = linear_output(module, call)
            layers.setdefault(module, _LayerSums()).add(exact, linear, _uniform(call), call.key_mask)
        return exact

    with torch.no_grad(), restored(model):
        model.eval()
        model.set_attn_implementation(kind)
        for batch in read_batches(batches, max_batches, progress, "Comparing with softmax"):
            inputs, mask = prepare_inputs(model, batch)
            with observed_attention(model, on_call):
                softmax = _run(model, inputs)
            total.add(softmax, _run(model, inputs), mask)
    if not total.rows:
        raise InputError("`batches` is empty: compare needs at least one batch of inputs.")
    if not layers:
        raise UnsupportedError(
            f"No layer of {type(model).__name__} ran under {kind!r}: both runs were softmax, and there is nothing to "
            "compare. Its attention does not go through Transformers' AttentionInterface, or only in parts that these "
            "inputs do not reach."
        )
    names = {module: name for name, module in model.named_modules()}
    return total.report(kind, [sums.report(names[module]) for module, sums in layers.items()])


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


@dataclass
class _LayerSums:
    off: float = 0.0
    uniform_off: float = 0.0
    size: float = 0.0
    cosine: float = 0.0
    count: int = 0

    def add(self, exact: Tensor, linear: Tensor, uniform: Tensor, mask: Tensor | None) -> None:
        exact, linear, uniform = (x.double() if mask is None else x.double()[mask] for x in (exact, linear, uniform))
        cosine = nn.functional.cosine_similarity(exact, linear, dim=-1)
        self.off += float((linear - exact).square().sum())
        self.uniform_off += float((uniform - exact).square().sum())
        self.size += float(exact.square().sum())
        self.cosine += float(cosine.sum())
        self.count += cosine.numel()

    def report(self, name: str) -> LayerFidelity:
        return LayerFidelity(
            name=name,
            error=_ratio(self.off, self.size),
            uniform_error=_ratio(self.uniform_off, self.size),
            cosine=self.cosine / max(1, self.count),
        )


# -- end to end ----------------------------------------------------------------------------------------------------
@dataclass
class _ModelSums:
    rows: int = 0
    tokens: int = 0
    cosine: float = 0.0
    off: float = 0.0
    size: float = 0.0
    equal: int = 0
    predictions: int = 0

    def add(self, softmax: dict[str, Tensor], linear: dict[str, Tensor], mask: Tensor | None) -> None:
        exact, other = (_pool(outputs["hidden"].double(), mask) for outputs in (softmax, linear))
        self.rows += exact.shape[0]
        self.tokens += softmax["hidden"].shape[:2].numel() if mask is None else int(mask.sum())
        self.cosine += float(nn.functional.cosine_similarity(exact, other, dim=-1).sum())
        for name in softmax.keys() - {"hidden"}:
            exact, other = softmax[name].double(), linear[name].double()
            if mask is not None and exact.shape[:2] == mask.shape:  # a prediction, or a start or end logit, per token
                if exact.ndim == 2:
                    exact, other = exact.masked_fill(~mask, -1e9), other.masked_fill(~mask, -1e9)
                    self._count(exact, other)
                    exact, other = exact[mask], other[mask]
                else:
                    exact, other = exact[mask], other[mask]
                    self._count(exact, other)
            else:
                self._count(exact, other)
            self.off += float((other - exact).square().sum())
            self.size += float(exact.square().sum())

    def _count(self, exact: Tensor, other: Tensor) -> None:
        equal = exact.argmax(-1) == other.argmax(-1)
        self.equal += int(equal.sum())
        self.predictions += equal.numel()

    def report(self, kind: str, layers: list[LayerFidelity]) -> Report:
        return Report(
            kind=kind,
            layers=layers,
            hidden_cosine=self.cosine / self.rows,
            logits_error=_ratio(self.off, self.size) if self.predictions else None,
            argmax_agreement=self.equal / self.predictions if self.predictions else None,
            rows=self.rows,
            tokens=self.tokens,
        )


def _pool(hidden: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(1)
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)


def _ratio(off: float, size: float) -> float:
    return (off / size) ** 0.5 if size else 0.0
