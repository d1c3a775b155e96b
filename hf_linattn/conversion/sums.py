"""What `compare` adds up, batch after batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .report import LayerFidelity

LOGITS = ("logits", "prediction_logits", "start_logits", "end_logits")
# Logits that are in float64 at a time.
_ENTRIES = 2**22


@dataclass
class LayerSums:
    """Of one layer; `[heads]` or numbers."""

    off: Tensor | float = 0.0
    uniform_off: float = 0.0
    size: Tensor | float = 0.0
    cosine: float = 0.0
    share: Tensor | float | None = 0.0
    tokens: int = 0
    count: int = 0

    def add(self, exact: Tensor, linear: Tensor, uniform: Tensor, share: Tensor | None, mask: Tensor | None) -> None:
        """One call: outputs `[batch, tokens, heads, head_dim]`, the slots' share without `head_dim`."""
        exact, linear, uniform = (_real(x, mask).double() for x in (exact, linear, uniform))
        cosine = nn.functional.cosine_similarity(exact, linear, dim=-1)
        self.off = self.off + (linear - exact).square().sum((0, 2)).cpu()
        self.uniform_off += float((uniform - exact).square().sum())
        self.size = self.size + exact.square().sum((0, 2)).cpu()
        self.cosine += float(cosine.sum())
        self.count += cosine.numel()
        self.tokens += len(exact)
        if share is None or self.share is None:
            self.share = None
        else:
            self.share = self.share + _real(share, mask).double().sum(0).cpu()

    def report(self, name: str) -> LayerFidelity:
        off, size = (torch.as_tensor(z).flatten() for z in (self.off, self.size))
        shares = None
        if self.share is not None:
            shares = tuple((torch.as_tensor(self.share).flatten() / max(1, self.tokens)).clamp(0, 1).tolist())
        return LayerFidelity(
            name=name,
            error=_ratio(float(off.sum()), float(size.sum())),
            uniform_error=_ratio(self.uniform_off, float(size.sum())),
            cosine=self.cosine / max(1, self.count),
            head_errors=tuple(_ratio(*pair) for pair in zip(off.tolist(), size.tolist(), strict=True)),
            slot_shares=shares,
        )


@dataclass
class ModelSums:
    """Of the outputs of a model in two forms."""

    rows: int = 0
    tokens: int = 0
    cosine: float = 0.0
    off: float = 0.0
    size: float = 0.0
    equal: int = 0
    predictions: int = 0
    divergence: float = 0.0
    distributions: int = 0

    def add(self, reference: dict[str, Tensor], other: dict[str, Tensor], mask: Tensor | None) -> None:
        """One batch: "hidden", the last hidden state, and logits by name."""
        first, second = (_pool(outputs["hidden"].double(), mask) for outputs in (reference, other))
        self.rows += first.shape[0]
        self.tokens += reference["hidden"].shape[:2].numel() if mask is None else int(mask.sum())
        self.cosine += float(nn.functional.cosine_similarity(first, second, dim=-1).sum())
        for name in reference.keys() - {"hidden"}:
            first, second, real = reference[name], other[name], None
            if mask is not None and first.shape[:2] == mask.shape:  # a prediction, or a start or end logit, per token
                if first.ndim == 2:
                    real = mask
                else:
                    first, second = first[mask], second[mask]
            self._add_logits(first, second, real)

    def _add_logits(self, first: Tensor, second: Tensor, real: Tensor | None) -> None:
        """Logits `[..., classes]`; `real`: which of them count, where the classes are tokens."""
        for one, two, seen in _pieces(first, second, real):
            if seen is not None:
                one, two = one.masked_fill(~seen, -1e9), two.masked_fill(~seen, -1e9)
            equal = one.argmax(-1) == two.argmax(-1)
            self.equal += int(equal.sum())
            self.predictions += equal.numel()
            if one.shape[-1] > 1:
                one_log, two_log = one.log_softmax(-1), two.log_softmax(-1)
                self.divergence += float((one_log.exp() * (one_log - two_log)).sum())
                self.distributions += equal.numel()
            difference, size = (two - one).square(), one.square()
            if seen is not None:
                difference, size = difference[seen], size[seen]
            self.off += float(difference.sum())
            self.size += float(size.sum())

    @property
    def hidden_cosine(self) -> float:
        return self.cosine / self.rows

    @property
    def logits_error(self) -> float | None:
        return _ratio(self.off, self.size) if self.predictions else None

    @property
    def argmax_agreement(self) -> float | None:
        return self.equal / self.predictions if self.predictions else None

    @property
    def logits_kl(self) -> float | None:
        return max(0.0, self.divergence / self.distributions) if self.distributions else None


def _pieces(first: Tensor, second: Tensor, real: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Some predictions at a time, in float64."""
    if real is not None:
        yield first.double(), second.double(), real
        return
    first, second = (z.reshape(-1, z.shape[-1]) for z in (first, second))
    step = max(1, _ENTRIES // max(1, first.shape[-1]))
    for one, two in zip(first.split(step), second.split(step), strict=True):
        yield one.double(), two.double(), None


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    """`[tokens, ...]`: those that are real."""
    return x.flatten(0, 1) if mask is None else x[mask]


def _pool(hidden: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or mask.shape != hidden.shape[:2]:
        return hidden.mean(1)
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)


def _ratio(off: float, size: float) -> float:
    return (off / size) ** 0.5 if size else 0.0
