"""`compare`: how close a model with linear attention is to the same weights under softmax."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigError, InputError, UnsupportedError
from ..integrations.canary import check_model
from ..integrations.families import is_converted
from ..integrations.interface import attend, causality
from ..integrations.masks import linattn_mask
from ..integrations.seams import attention_of, register_attention
from ..integrations.token_mask import token_mask
from ..integrations.wrappers import converted_parts, inside
from ..modules.registry import list_kinds
from .batches import exact_attention, prepare_inputs, read_batches, restored

# Attention that computes both forms, goes on with softmax and writes the difference down.
PROBE = "linattn_probe"
LOGITS = ("logits", "prediction_logits", "start_logits", "end_logits")


@dataclass(frozen=True)
class LayerFidelity:
    """One layer on the inputs it has under softmax.

    Args:
        name: Of the attention module in the model.
        error: `|linear - softmax| / |softmax|` of the attention output over all real tokens.
        uniform_error: The same for plain averaging of the values a token may see: what ignoring the keys would give.
        cosine: Mean cosine of a token's output (one head's) in both forms.
    """

    name: str
    error: float
    uniform_error: float
    cosine: float


@dataclass(frozen=True)
class Report:
    """Fidelity of a model to its softmax form.

    Args:
        kind: Attention kind compared with softmax.
        layers: Per layer, in the order in which they run.
        hidden_cosine: Mean cosine of the mean-pooled last hidden state of a row, end to end.
        logits_error: `|linear - softmax| / |softmax|` of the logits of real tokens; `None` for a model without a head.
        argmax_agreement: Share of equal predictions; `None` for a model without a head.
        rows, tokens: How many were compared (tokens: real ones).
    """

    kind: str
    layers: list[LayerFidelity]
    hidden_cosine: float
    logits_error: float | None
    argmax_agreement: float | None
    rows: int
    tokens: int

    @property
    def mean_layer_error(self) -> float:
        return sum(layer.error for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "mean_layer_error": self.mean_layer_error}

    def to_markdown(self) -> str:
        """A table of the layers and one of the whole model."""
        lines = ["| layer | error | uniform error | cosine |", "|---|---|---|---|"]
        lines += [
            f"| {layer.name} | {layer.error:.4f} | {layer.uniform_error:.4f} | {layer.cosine:.4f} |"
            for layer in self.layers
        ]
        whole = {
            "mean layer error": f"{self.mean_layer_error:.4f}",
            "cosine of pooled hidden states": f"{self.hidden_cosine:.4f}",
            "error of logits": None if self.logits_error is None else f"{self.logits_error:.4f}",
            "equal predictions": None if self.argmax_agreement is None else f"{self.argmax_agreement:.1%}",
            "rows": str(self.rows),
            "tokens": str(self.tokens),
        }
        lines += ["", f"| `{self.kind}` against softmax | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in whole.items() if value is not None]
        return "\n".join(lines) + "\n"

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Save a bar chart of the layers' errors; the format follows the file's suffix. Needs matplotlib."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Report.plot needs matplotlib. Run `pip install 'hf-linattn[plot]'`.") from error
        figure = Figure(figsize=(max(4.0, 0.6 * len(self.layers) + 2), 3.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        index = range(len(self.layers))
        axes.bar(index, [layer.error for layer in self.layers], label=self.kind)
        axes.plot(index, [layer.uniform_error for layer in self.layers], "k_", markersize=14, label="uniform")
        axes.set_xticks(list(index))
        axes.set(xlabel="layer", ylabel="relative error of attention output", title=f"{self.kind} against softmax")
        axes.legend()
        figure.savefig(path)
        return Path(path)


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
    kind = _kind_of(model)
    layers: dict[nn.Module, _LayerSums] = {}
    total = _ModelSums()
    register_attention(PROBE, _probe, linattn_mask)
    with restored(model), torch.no_grad():
        model.eval()
        for batch in read_batches(batches, max_batches, progress, "Comparing with softmax"):
            inputs, mask = prepare_inputs(model, batch)
            token = _RECORDER.set((kind, layers))
            try:
                softmax = _run(model, inputs, PROBE)
            finally:
                _RECORDER.reset(token)
            total.add(softmax, _run(model, inputs, kind), mask)
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
def _kind_of(model: PreTrainedModel) -> str:
    config = model.config
    kind = config.linear_attention["kind"] if is_converted(config) else attention_of(config)
    if kind not in list_kinds():
        raise ConfigError(
            f"compare needs a model with linear attention; {type(model).__name__} has attn_implementation {kind!r}."
            + (
                converted_parts(model)
                or " Convert it (hf_linattn.convert) or call model.set_attn_implementation(kind) with one of "
                f"{list_kinds()}."
            )
        )
    return str(kind)


def _run(model: PreTrainedModel, inputs: dict[str, Any], implementation: str) -> dict[str, Tensor]:
    """Logits and last hidden state under one attention implementation."""
    hidden: list[Tensor] = []
    handle = model.base_model.register_forward_hook(lambda module, args, output: hidden.append(output[0]))
    model.set_attn_implementation(implementation)
    try:
        output = model(**inputs)
    finally:
        handle.remove()
    found = {name: output[name] for name in LOGITS if isinstance(output, Mapping) and name in output}
    return {"hidden": hidden[0], **found}


# -- inside a layer ------------------------------------------------------------------------------------------------
_RECORDER: ContextVar[tuple[str, dict[nn.Module, _LayerSums]]] = ContextVar("recorder")


def _probe(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax attention that compares itself with the linear attention of the same layer."""
    kind, layers = _RECORDER.get()
    attention_mask = token_mask(attention_mask, query.device)
    is_causal = causality(module, kwargs)
    exact = exact_attention(module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal)
    stays_softmax = is_converted(getattr(module, "config", None)) and getattr(module, "linattn", None) is None
    if stays_softmax or getattr(module, "is_cross_attention", False):
        return exact, None
    linear, _ = attend(kind, module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    uniform = _uniform(value, attention_mask, is_causal, query.shape[1])
    layers.setdefault(module, _LayerSums()).add(exact, linear, uniform, attention_mask)
    return exact, None


def _uniform(value: Tensor, mask: Tensor | None, is_causal: bool, heads: int) -> Tensor:
    """Mean of the values a token may see, `[batch, tokens, heads, head_dim]`."""
    value = value.repeat_interleave(heads // value.shape[1], dim=1).transpose(1, 2).double()
    real = value.new_ones(value.shape[:2]) if mask is None else mask.to(value.dtype)
    real = real[:, :, None, None]
    if is_causal:
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
