"""Results as a picture: time, and speed beside softmax, over the number of tokens, both logarithmic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .report import title
from .results import BENCHMARKS, Results, Row, cost, names

# Okabe and Ito's colours, told apart with any colour vision; black is softmax.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vP"
LINES = ("-", "--", ":", "-.")
SOFTMAX_STYLES = {"sdpa": "-", "sdpa:flash": "--", "sdpa:math": ":", "sdpa:efficient": "-.", "sdpa:cudnn": (0, (5, 1))}
LABEL_HEIGHT = 0.055  # of the axis: labels nearer to each other are moved apart


def write_plots(results: Results, path: Path) -> list[Path]:
    """Write one picture per benchmark of the run; all but the first get its name before the file's ending.

    Raises: `ConfigError` if nothing was measured or matplotlib is not installed.
    """
    found = {name: results.panels(name) for name in BENCHMARKS}
    measured = {
        name: {panel: rows for panel, rows in panels.items() if any(cost(row) for row in rows)}
        for name, panels in found.items()
    }
    written: list[Path] = []
    for name, panels in measured.items():
        if panels:
            written.append(path.with_name(f"{path.stem}_{name}{path.suffix}") if written else path)
            shown = [row for rows in panels.values() for row in rows]
            _write(panels, style(shown, [kind_of(name) for name in names(results.rows)]), written[-1])
    if not written:
        raise ConfigError("There is nothing to plot: no case could be measured.")
    return written


def _write(panels: dict[Any, list[Row]], styles: dict[str, dict[str, Any]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure  # without pyplot: needs no display
    except ImportError as error:
        raise ConfigError("A plot needs matplotlib: pip install 'hf-linattn[cli]'.") from error
    columns = 2 if any(row.ratio for rows in panels.values() for row in rows) else 1
    figure = Figure(figsize=(7.5 * columns, 4.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), columns, squeeze=False)
    for (panel, rows), line in zip(panels.items(), axes, strict=True):
        is_memory = panel[0] == "memory"
        label, unit = ("MiB", 2.0**-20) if is_memory else ("milliseconds", 1e3)
        draw(line[0], _series(rows, cost), styles, label, unit)
        line[0].set_title(title(panel), loc="left")
        ratios = _series([row for row in rows if row.group != "softmax"], lambda row: row.ratio)
        if ratios:
            line[1].axhline(1.0, color="black", linewidth=1)
            draw(line[1], ratios, styles, "times faster than the fastest softmax", 1.0)
        elif columns > 1:
            line[1].set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def kind_of(name: str) -> str:
    """What stands before the variant in an implementation's name."""
    return name.split(",")[0]


def style(rows: Sequence[Row], kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of every implementation: a colour per kind, in the order of `kinds`; a line per variant."""
    found: dict[str, dict[str, Any]] = {}
    order = [kind for kind in dict.fromkeys(kinds) if not kind.startswith("sdpa")]
    for index, kind in enumerate(order):
        for number, name in enumerate(name for name in names(rows) if kind_of(name) == kind):
            found[name] = {
                "color": COLOURS[index % len(COLOURS)],
                "marker": MARKERS[index % len(MARKERS)],
                "linestyle": LINES[number % len(LINES)],
            }
    for name, line in SOFTMAX_STYLES.items():
        found[name] = {"color": "black", "linestyle": line, "marker": "."}
    return found


def _series(rows: Sequence[Row], value: Any) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        number = value(row)
        if number:
            found.setdefault(row.name, []).append((row.work.tokens, number))
    return {name: sorted(points) for name, points in found.items()}


def draw(
    axes: Any, series: dict[str, list[tuple[int, float]]], styles: dict[str, Any], label: str, unit: float
) -> None:
    """Lines on logarithmic axes, each labelled at its right end instead of in a legend."""
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for name, points in series.items():
        axes.plot([x for x, _ in points], [y * unit for _, y in points], linewidth=1.6, markersize=5, **styles[name])
    ticks = sorted({x for points in series.values() for x, _ in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.tick_params(axis="x", labelrotation=45 if len(ticks) > 6 else 0)
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_ylim(low, high)
    axes.grid(alpha=0.25)
    axes.set(xlabel="tokens", ylabel=label)
    spread_out = spread({name: _height(points[-1][1] * unit, low, high) for name, points in series.items()})
    left, right = axes.get_xlim()
    for name, height in spread_out.items():
        x, y = series[name][-1][0], _height(series[name][-1][1] * unit, low, high)
        end = (math.log(x) - math.log(left)) / (math.log(right) - math.log(left))
        axes.annotate(
            name,
            xy=(end, y),
            xytext=(1.02, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=styles[name]["color"],
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": styles[name]["color"], "linewidth": 0.5, "alpha": 0.6},
        )


def _height(value: float, low: float, high: float) -> float:
    return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))


def spread(heights: dict[str, float], gap: float = LABEL_HEIGHT) -> dict[str, float]:
    """Heights at least `gap` apart, in the same order, as near to the given ones as that allows."""
    ordered = sorted(heights, key=lambda name: heights[name])
    groups: list[tuple[list[str], float]] = []  # neighbours that touch, and where their middle wants to be
    for name in ordered:
        members, middle = [name], heights[name]
        while groups and middle - groups[-1][1] < gap * (len(members) + len(groups[-1][0])) / 2:
            before, _ = groups.pop()
            members = before + members
            middle = sum(heights[member] for member in members) / len(members)
        groups.append((members, middle))
    return {
        name: middle + gap * (index - (len(members) - 1) / 2)
        for members, middle in groups
        for index, name in enumerate(members)
    }
