"""What `compare` finds out, as numbers, as a table and as a picture."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


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
