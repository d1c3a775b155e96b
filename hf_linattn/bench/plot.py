"""Results as a picture: time, and speed beside softmax, over the number of tokens, both logarithmic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .results import BENCHMARKS, Results, by_name, lengths

# Okabe and Ito's colours, told apart with any colour vision; black is softmax.
COLOURS = ("black", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
LINES = ("-", "--", ":", "-.", (0, (5, 1)))


def write_plots(results: Results, path: Path) -> list[Path]:
    """Write one picture per benchmark of the run; all but the first get its name before the file's ending.

    Raises: `ConfigError` if nothing was measured or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: needs no display
    except ImportError as error:
        raise ConfigError("A plot needs matplotlib: pip install 'hf-linattn[cli]'.") from error
    written: list[Path] = []
    looks = styles(by_name(results.rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in BENCHMARKS:
        panels = {panel: rows for panel, rows in results.panels(name).items() if any(row.cost for row in rows)}
        if not panels:
            continue
        figure = Figure(figsize=(15, 4.6 * len(panels)), layout="constrained")
        label, unit = ("MiB", 2.0**-20) if name == "memory" else ("milliseconds", 1e3)
        pairs = figure.subplots(len(panels), 2, squeeze=False)
        for (left, right), (panel, rows) in zip(pairs, panels.items(), strict=True):
            for contender, found in by_name(rows).items():
                _draw(left, contender, [(row.work.tokens, row.cost * unit) for row in found if row.cost], looks)
                if found[0].group != "softmax":
                    _draw(right, contender, [(row.work.tokens, row.ratio) for row in found if row.ratio], looks)
            for axes in (left, right):
                _logarithmic(axes, lengths(rows))
            right.axhline(1.0, color="black", linewidth=1)
            left.set(title=panel, ylabel=label)
            right.set(ylabel="times faster than the fastest softmax")
            right.legend(*left.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
        written.append(path.with_name(f"{path.stem}_{name}{path.suffix}") if written else path)
        figure.savefig(written[-1], dpi=110)
    if not written:
        raise ConfigError("There is nothing to plot: no case could be measured.")
    return written


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour per kind and a line per variant; softmax is black."""
    families: dict[str, list[str]] = {"sdpa": []}
    for name in names:
        families.setdefault("sdpa" if name.startswith("sdpa") else name.split(",")[0], []).append(name)
    return {
        name: {"color": COLOURS[index % len(COLOURS)], "linestyle": LINES[number % len(LINES)], "marker": "."}
        for index, members in enumerate(families.values())
        for number, name in enumerate(members)
    }


def _draw(axes: Any, name: str, points: Sequence[tuple[int, float]], looks: dict[str, Any]) -> None:
    if points:
        axes.plot(*zip(*sorted(points), strict=True), label=name, **looks[name])


def _logarithmic(axes: Any, ticks: list[int]) -> None:
    axes.set(xscale="log", yscale="log", xlabel="tokens")
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.grid(alpha=0.25)
