"""Results as a picture: time, and speed beside softmax, over the number of tokens, both logarithmic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .report import title
from .results import BENCHMARKS, Results, Row, lengths, names

# Okabe and Ito's colours, told apart with any colour vision; black is softmax.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
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
    looks = styles(results.rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in BENCHMARKS:
        panels = [(panel, rows) for panel, rows in results.panels(name).items() if any(row.cost for row in rows)]
        if not panels:
            continue
        figure = Figure(figsize=(15, 4.6 * len(panels)), layout="constrained")
        label, unit = ("MiB", 2.0**-20) if name == "memory" else ("milliseconds", 1e3)
        for (left, right), (panel, rows) in zip(figure.subplots(len(panels), 2, squeeze=False), panels, strict=True):
            draw(left, rows, lambda row: row.cost, looks, unit)
            draw(right, [row for row in rows if row.group != "softmax"], lambda row: row.ratio, looks)
            right.axhline(1.0, color="black", linewidth=1)
            left.set(title=title(panel), xlabel="tokens", ylabel=label)
            right.set(xlabel="tokens", ylabel="times faster than the fastest softmax")
            right.legend(*left.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
        written.append(path.with_name(f"{path.stem}_{name}{path.suffix}") if written else path)
        figure.savefig(written[-1], dpi=110)
    if not written:
        raise ConfigError("There is nothing to plot: no case could be measured.")
    return written


def styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """A colour per kind and a line per variant; softmax is black."""
    families: dict[str, list[str]] = {"sdpa": []}
    for name in names(rows):
        families.setdefault("sdpa" if name.startswith("sdpa") else name.split(",")[0], []).append(name)
    colours = ["black", *(COLOURS[index % len(COLOURS)] for index in range(len(families)))]
    return {
        name: {"color": colour, "linestyle": LINES[number % len(LINES)], "marker": "."}
        for colour, members in zip(colours, families.values(), strict=False)
        for number, name in enumerate(members)
    }


def draw(
    axes: Any, rows: Sequence[Row], value: Callable[[Row], float | None], looks: dict[str, Any], unit: float = 1.0
) -> None:
    """One line for each contender, on logarithmic axes."""
    for name in names(rows):
        found = ((row.work.tokens, value(row)) for row in rows if row.name == name)
        points = sorted((tokens, number * unit) for tokens, number in found if number)
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **looks[name])
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(lengths(rows), map(str, lengths(rows)))
    axes.minorticks_off()
    axes.grid(alpha=0.25)
