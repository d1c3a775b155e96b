"""What `compare` finds out, as numbers, as a table and as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..ops.ablation import SHUFFLED_SLOTS, WINDOW_ALONE

# A model is a sliding window in disguise below these: the mean share of the slots in every layer, and what becomes of
# the predictions without the slots, or with those of others, in parts of what linear attention itself changes.
SMALLEST_SHARE = 0.01
SMALLEST_CHANGE = 0.1

_WORDS = {WINDOW_ALONE: "the window alone", SHUFFLED_SLOTS: "shuffled slots"}


@dataclass(frozen=True)
class LayerFidelity:
    """One layer on the inputs it has under softmax.

    Args:
        name: Of the attention module in the model.
        error: `|linear - softmax| / |softmax|` of the attention output over all real tokens.
        uniform_error: The same for plain averaging of the values a token may see: what ignoring the keys would give.
        cosine: Mean cosine of a token's output (one head's) in both forms.
        head_errors: `error` of every head.
        slot_shares: How much of its weight a query gives to what it reads through slots, in every head: a mean over
            real tokens, from 0 to 1. `None` for a kind that does not say.
    """

    name: str
    error: float
    uniform_error: float
    cosine: float
    head_errors: tuple[float, ...] = ()
    slot_shares: tuple[float, ...] | None = None

    @property
    def slot_share(self) -> float | None:
        """The mean of `slot_shares`."""
        return None if self.slot_shares is None else sum(self.slot_shares) / len(self.slot_shares)


@dataclass(frozen=True)
class AblatedFidelity:
    """What is left of a model without one part of its attention (`conversion/ablation.py`).

    Args:
        logits_kl, hidden_cosine: As in `Report`, of softmax and what is left.
        logits_change: KL divergence of the predictions, from linear attention to what is left; in nats.
        hidden_change: 1 - the mean cosine of the pooled last hidden states under linear attention and of what is left.
        score: What `score` gave; `None` without one.
    """

    logits_kl: float | None
    hidden_cosine: float
    logits_change: float | None
    hidden_change: float
    score: float | None = None


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
        logits_kl: Mean KL divergence from softmax's predictions, in nats per prediction (of a real token, or of a
            row); `None` for a model without a head, or with a single logit.
        ablations: With `ablations=True`, by name: what is left without a part of the attention.
        score, softmax_score: What `score` gave under linear attention, and under softmax; `None` without one.
    """

    kind: str
    layers: list[LayerFidelity]
    hidden_cosine: float
    logits_error: float | None
    argmax_agreement: float | None
    rows: int
    tokens: int
    logits_kl: float | None = None
    ablations: Mapping[str, AblatedFidelity] = field(default_factory=dict)
    score: float | None = None
    softmax_score: float | None = None

    @property
    def mean_layer_error(self) -> float:
        return sum(layer.error for layer in self.layers) / len(self.layers)

    @property
    def is_window_in_disguise(self) -> bool | None:
        """Whether these inputs are read as by a sliding window, and what is in the slots does not matter.

        True if the slots have less than 1 % of the weight in every layer; or if taking the slots away, or shuffling
        them, changes the predictions by less than a tenth of what linear attention itself changes: `KL(linear ||
        without) < 0.1 KL(softmax || linear)`, of a model without a head `1 - cosine` of its hidden states. A model
        that reads no key exactly is no window. `None`: not known, because nothing was ablated.
        """
        if self._has_empty_slots:
            return True
        if not self.ablations:
            return None
        return WINDOW_ALONE in self.ablations and self._least_change()[1] <= SMALLEST_CHANGE * self._distance

    @property
    def _has_empty_slots(self) -> bool:
        """Whether the slots have next to none of the weight, in every layer."""
        shares = [layer.slot_share for layer in self.layers]
        return all(share is not None and share < SMALLEST_SHARE for share in shares)

    @property
    def _distance(self) -> float:
        """From softmax to linear attention."""
        return 1 - self.hidden_cosine if self.logits_kl is None else self.logits_kl

    def _least_change(self) -> tuple[str, float]:
        """The part, of those that make a window of the model or show that it is one, that matters least."""
        changes = {}
        for name in (WINDOW_ALONE, SHUFFLED_SLOTS):
            if name in self.ablations:
                left = self.ablations[name]
                changes[name] = left.hidden_change if left.logits_change is None else left.logits_change
        name = min(changes, key=changes.__getitem__)
        return name, changes[name]

    def verdict(self) -> str:
        """`is_window_in_disguise` in words."""
        disguised = "This model is a sliding window in disguise on these inputs"
        if self._has_empty_slots:
            return f"{disguised}: in every layer less than {SMALLEST_SHARE:.0%} of the weight goes through slots."
        if not self.ablations:
            return "Whether its slots matter is not known: nothing was taken away (ablations=True)."
        measure = "1 - cosine" if self.logits_kl is None else "KL"
        name, change = self._least_change()
        told = (
            f"with {_WORDS[name]} the predictions move by {change:.2g}, softmax and linear attention are"
            f" {self._distance:.2g} apart ({measure})."
        )
        if WINDOW_ALONE not in self.ablations:
            return f"This model reads every key through slots: {told}"
        return f"{disguised if self.is_window_in_disguise else 'Its slots matter'}: {told}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        told = {"mean_layer_error": self.mean_layer_error, "is_window_in_disguise": self.is_window_in_disguise}
        return {**asdict(self), **told}

    def to_markdown(self, *, heads: bool = False) -> str:
        """A table of the layers and one of the whole model, and with ablations one of these.

        Args:
            heads: Also tables of the errors and of the slots' shares, head by head.
        """
        lines = ["| layer | error | uniform error | cosine | worst head | slot share |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {layer.name} | {layer.error:.4f} | {layer.uniform_error:.4f} | {layer.cosine:.4f}"
            f" | {max(layer.head_errors, default=layer.error):.4f} | {_number(layer.slot_share)} |"
            for layer in self.layers
        ]
        if heads:
            lines += _heads("error", {layer.name: layer.head_errors for layer in self.layers})
            lines += _heads("slot share", {layer.name: layer.slot_shares or () for layer in self.layers})
        whole = {
            "mean layer error": f"{self.mean_layer_error:.4f}",
            "cosine of pooled hidden states": f"{self.hidden_cosine:.4f}",
            "error of logits": None if self.logits_error is None else f"{self.logits_error:.4f}",
            "KL of predictions": None if self.logits_kl is None else f"{self.logits_kl:.4f}",
            "equal predictions": None if self.argmax_agreement is None else f"{self.argmax_agreement:.1%}",
            "rows": str(self.rows),
            "tokens": str(self.tokens),
        }
        lines += ["", f"| `{self.kind}` against softmax | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in whole.items() if value is not None]
        if self.ablations or self.score is not None:
            lines += self._parts()
        if self.is_window_in_disguise is not None:
            lines += ["", self.verdict()]
        return "\n".join(lines) + "\n"

    def _parts(self) -> list[str]:
        lines = ["", "| | KL to softmax | cosine | score |", "|---|---|---|---|"]
        if self.softmax_score is not None:
            lines.append(f"| softmax | 0 | 1 | {self.softmax_score:.4f} |")
        own = (self.logits_kl, self.hidden_cosine, self.score)
        left = {name: (x.logits_kl, x.hidden_cosine, x.score) for name, x in self.ablations.items()}
        for name, values in {f"`{self.kind}`": own, **left}.items():
            lines.append(
                f"| {name.replace('_', ' ') if name in left else name} | {' | '.join(map(_number, values))} |"
            )
        return lines

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Save heat maps of layers and heads, errors and the shares of the slots, with the mean of every layer.

        The format follows the file's suffix. Needs matplotlib.
        """
        from .plots import plot_report

        return plot_report(self, path)


def _heads(title: str, rows: Mapping[str, tuple[float, ...]]) -> list[str]:
    count = max(map(len, rows.values()))
    if not count:
        return []
    lines = ["", f"| {title} | {' | '.join(map(str, range(count)))} |", "|---|" + "---|" * count]
    return lines + [f"| {name} | {' | '.join(map(_number, values))} |" for name, values in rows.items()]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
