"""Results as a picture: time, and speed beside softmax, over the number of tokens, both logarithmic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .report import title
from .results import BENCHMARKS, Panel, Results, Row, lengths, names

# Okabe and Ito's colours, told apart with any colour vision; black is softmax.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vP"
LINES = ("-", "--", ":", "-.", (0, (5, 1)))


def write_plots(results: Results, path: Path) -> list[Path]:
    """Write one picture per benchmark of the run; all but the first get its name before the file's ending.

    Raises: `ConfigError` if nothing was measured or matplotlib is not installed.
    """
    written: list[Path] = []
    for name in BENCHMARKS:
        panels = {panel: rows for panel, rows in results.panels(name).items() if any(row.cost for row in rows)}
        if panels:
            written.append(path.with_name(f"{path.stem}_{name}{path.suffix}") if written else path)
            _write(panels, styles(results.rows), written[-1])
    if not written:
        raise ConfigError("There is nothing to plot: no case could be measured.")
    return written


def _write(panels: dict[Panel, list[Row]], looks: dict[str, dict[str, Any]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure  # without pyplot: needs no display
    except ImportError as error:
        raise ConfigError("A plot needs matplotlib: pip install 'hf-linattn[cli]'.") from error
    columns = 2 if any(row.ratio for rows in panels.values() for row in rows) else 1
    figure = Figure(figsize=(6.5 * columns + 2, 4.6 * len(panels)), layout="constrained")
    for line, (panel, rows) in zip(figure.subplots(len(panels), columns, squeeze=False), panels.items(), strict=True):
        label, unit = ("MiB", 2.0**-20) if panel[0] == "memory" else ("milliseconds", 1e3)
        draw(line[0], rows, lambda row, unit=unit: row.cost and row.cost * unit, looks, label)
        line[0].set_title(title(panel), loc="left")
        if columns > 1:
            others = [row for row in rows if row.group != "softmax"]
            draw(line[1], others, lambda row: row.ratio, looks, "times faster than the fastest softmax")
            line[1].axhline(1.0, color="black", linewidth=1)
        handles, labels = line[0].get_legend_handles_labels()
        line[-1].legend(handles, labels, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Colour and marker of every contender: a colour per kind, a line per variant; softmax is black."""
    found: dict[str, dict[str, Any]] = {}
    members: dict[str, list[str]] = {}
    for name in names(rows):
        family = "sdpa" if name.startswith("sdpa") else name.split(",")[0]
        members.setdefault(family, []).append(name)
    others = [family for family in members if family != "sdpa"]
    for family, variants in members.items():
        index = others.index(family) if family in others else 0
        look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        for number, name in enumerate(variants):
            black = {"color": "black", "marker": "."} if family == "sdpa" else {}
            found[name] = {**look, **black, "linestyle": LINES[number % len(LINES)]}
    return found


def draw(
    axes: Any, rows: Sequence[Row], value: Callable[[Row], float | None], looks: dict[str, Any], label: str
) -> None:
    """One line for each contender, on logarithmic axes."""
    for name in names(rows):
        points = sorted((row.work.tokens, number) for row in rows if row.name == name and (number := value(row)))
        if points:
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.6, markersize=5, **looks[name])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = lengths(rows)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45 if len(ticks) > 6 else 0)
    axes.set(xlabel="tokens", ylabel=label)
    axes.grid(alpha=0.25)
