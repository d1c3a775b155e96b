"""Results as a picture: time, and speed beside softmax, over the number of tokens, both logarithmic."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .results import Results, by_name, lengths

# Okabe and Ito's colours, told apart with any colour vision; black is softmax.
COLOURS = ("black", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
LINES = ("-", "--", ":", "-.", (0, (5, 1)))


def write_plot(results: Results, path: Path) -> None:
    """Write a picture with a line of axes for each table of the run.

    Raises: `ConfigError` if nothing was measured or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: needs no display
    except ImportError as error:
        raise ConfigError("A plot needs matplotlib: pip install 'hf-linattn[cli]'.") from error
    panels = {panel: rows for panel, rows in results.panels().items() if any(row.cost for row in rows)}
    if not panels:
        raise ConfigError("There is nothing to plot: no case could be measured.")
    looks = styles(by_name(results.rows))
    figure = Figure(figsize=(15, 4.6 * len(panels)), layout="constrained")
    pairs = figure.subplots(len(panels), 2, squeeze=False)
    for (left, right), (panel, rows) in zip(pairs, panels.items(), strict=True):
        label, unit = ("MiB", 2.0**-20) if rows[0].benchmark == "memory" else ("milliseconds", 1e3)
        for name, found in by_name(rows).items():
            found = sorted((row for row in found if row.cost), key=lambda row: row.work.tokens)
            if not found:
                continue
            tokens, costs = [row.work.tokens for row in found], [row.cost * unit for row in found if row.cost]
            left.plot(tokens, costs, label=name, **looks[name])
            if any(row.group != "softmax" and row.ratio for row in found):
                right.plot(tokens, [row.ratio for row in found], **looks[name])
        for axes, what in ((left, label), (right, "times faster than the fastest softmax")):
            axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=what)
            axes.set_xticks(lengths(rows), map(str, lengths(rows)))
            axes.minorticks_off()
            axes.grid(alpha=0.25)
        left.set(title=panel)
        right.axhline(1.0, color="black", linewidth=1)
        right.legend(*left.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


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
