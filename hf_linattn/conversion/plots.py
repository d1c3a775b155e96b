"""Pictures of what `compare` finds out. They need matplotlib."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import InputError


def plot_report(report: Any, path: str | os.PathLike[str]) -> Path:
    """Save heat maps of layers and heads: errors, and the shares of the slots where they are known."""
    layers = report.layers
    maps = {"relative error": [(*layer.head_errors, layer.error) for layer in layers]}
    if all(layer.slot_shares is not None for layer in layers):
        maps["share of the slots"] = [(*(layer.slot_shares or ()), layer.slot_share or 0.0) for layer in layers]
    columns = len(maps["relative error"][0])
    size = max(3.0, 0.5 * columns + 1.5)
    figure = _figure(size * len(maps), max(2.5, 0.4 * len(layers) + 1.5))
    for axes, (title, rows) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0.0, vmax=None if "error" in title else 1.0)
        axes.set_xticks(range(columns), [*map(str, range(columns - 1)), "mean"])
        axes.set_yticks(range(len(layers)))
        axes.axvline(columns - 1.5, color="white", linewidth=2)
        axes.set(xlabel="head", ylabel="layer", title=f"{report.kind}: {title}")
        figure.colorbar(image, ax=axes)
    figure.savefig(path)
    return Path(path)


def plot_error_against_cost(
    points: Iterable[tuple[str, float, Any]], path: str | os.PathLike[str], *, cost: str = "slots"
) -> Path:
    """Save a picture of error against cost, of several reports.

    Args:
        points: Name of a line, cost, and the report of a model of that cost. Points of one name are joined.
        path: Its suffix says the format.
        cost: What the costs are, such as "slots" or "milliseconds".
    Raises: InputError for no points, or a cost that is not positive.
    """
    lines: dict[str, list[tuple[float, float, float | None]]] = {}
    for name, value, report in points:
        if not value > 0:
            raise InputError(f"A cost must be > 0, for a logarithmic axis; got {value!r} of {name!r}.")
        lines.setdefault(name, []).append((value, report.mean_layer_error, report.logits_kl))
    if not lines:
        raise InputError("plot_error_against_cost needs at least one point; got none.")
    labels = ["mean relative error of the layers"]
    if all(kl is not None for found in lines.values() for _, _, kl in found):
        labels.append("KL of predictions")
    figure = _figure(4.5 * len(labels), 3.5)
    for index, (axes, label) in enumerate(zip(figure.subplots(1, len(labels), squeeze=False)[0], labels, strict=True)):
        for name, found in lines.items():
            found = sorted(found, key=lambda point: point[0])
            axes.plot([x[0] for x in found], [x[1 + index] for x in found], marker="o", label=name)
        axes.set(xscale="log", xlabel=cost, ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.legend()
    figure.savefig(path)
    return Path(path)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Report.plot needs matplotlib. Run `pip install 'hf-linattn[plot]'`.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
