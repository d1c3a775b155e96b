"""Results as tables, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from rich.table import Table

from .results import UPPER_SPAN, Results, Row, by_name, lengths, reasons, slope

NOTHING = "–"
Grid = tuple[list[str], list[list[str]]]  # header and lines
SECONDS = (("s", 1.0), ("ms", 1e-3))
BYTES = (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10))
RATE = (("k", 1e3), ("", 1.0))
LEGEND = (
    "Times are medians; in brackets how many times faster than the fastest softmax backend at that length (below 1:"
    " slower). The slope is the exponent of the growth with the number of tokens over the upper lengths: 0 is"
    " constant, 1 linear, 2 quadratic. In generation lengths are those of the context, costs are per token, and times"
    " are means over whole windows of steps."
)


# -- cells ------------------------------------------------------------------------------------------------------------
def quantity(value: float, units: Sequence[tuple[str, float]]) -> str:
    """Three digits in the largest unit that is not above the value: 0.85 ms, 12.3 ms, 4.10 s."""
    unit, size = next((entry for entry in units if value >= entry[1]), units[-1])
    value /= size
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}".rstrip()


def ratio_text(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 1 else f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"


def _cell(row: Row) -> str:
    """The measured number, and the ratio if there is one."""
    if row.cost is None:
        return NOTHING
    if row.benchmark == "memory":
        return quantity(row.cost, BYTES)
    rate = quantity(row.tokens_per_second or 0.0, RATE)
    shown = {"models": f"{rate} tok/s", "generation": rate}.get(row.benchmark) or quantity(row.cost, SECONDS)
    return shown if row.ratio is None else f"{shown} ({ratio_text(row.ratio)})"


# -- tables -----------------------------------------------------------------------------------------------------------
def grids(rows: Sequence[Row]) -> list[Grid]:
    """The tables of a panel; in generation tokens per second, and the size of the cache."""
    if rows[0].benchmark != "generation":
        return [_grid(rows)]
    sizes = [replace(row, benchmark="memory", peak=row.state) for row in rows]
    return [_grid(rows, "tokens per second"), _grid(sizes, "cache per layer")]


def _grid(rows: Sequence[Row], what: str = "") -> Grid:
    """Contenders down, lengths across, and how each grows over the upper lengths."""
    columns = lengths(rows)
    start = next(tokens for tokens in columns if tokens >= columns[-1] // UPPER_SPAN)
    lines = []
    for name, found in by_name(rows).items():
        cells, exponent = {row.work.tokens: _cell(row) for row in found}, slope(found, start)
        growth = NOTHING if exponent is None else f"{exponent:.2f}"
        lines.append([name, *(cells.get(tokens, "") for tokens in columns), growth])
    return [what, *map(str, columns), f"slope from {start}"], lines


# -- what shows them --------------------------------------------------------------------------------------------------
def rich_table(title: str, header: Sequence[str], lines: Iterable[Sequence[str]], caption: str = "") -> Table:
    """Numbers to the right of the first column."""
    table = Table(title=title, title_justify="left", caption=caption or None)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def terminal_tables(results: Results) -> list[Table]:
    panels = results.panels().items()
    return [rich_table(panel, *grid, "; ".join(reasons(rows))) for panel, rows in panels for grid in grids(rows)]


def markdown_table(made: Grid) -> str:
    header, lines = made
    rule = ["---", *["---:" for _ in header[1:]]]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def markdown_panels(rows: Sequence[Row], heading: str = "##") -> list[str]:
    """Paragraphs: for each panel a heading, its tables, and what was not measured and why."""
    parts = []
    for panel, members in Results(tuple(rows)).panels().items():
        parts += [f"{heading} {panel.capitalize()}", *map(markdown_table, grids(members))]
        parts += [f"Not measured: {'; '.join(missing)}." for missing in [reasons(members)] if missing]
    return parts


def markdown(results: Results) -> str:
    """Everything that was measured, table by table."""
    return "\n\n".join(["# Performance", setting(results), LEGEND, *markdown_panels(results.rows)]) + "\n"


def setting(results: Results) -> str:
    """One paragraph: on what machine, with which versions and sizes, by which command."""
    hardware, versions = results.environment.get("hardware", {}), results.environment.get("versions", {})
    place = hardware.get("gpu") or f"{hardware.get('cpu', 'unknown processor')}, {hardware.get('threads')} thread(s)"
    options = {**results.options, **results.options.get("options", {})}
    shown = ("batch", "heads", "head_dim", "num_features", "num_landmarks", "num_chunks")
    shape = ", ".join(f"{name} {options[name]}" for name in shown if options.get(name) is not None)
    software = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions)
    end = "" if results.is_complete else " The run was cut short: cases at its end are missing."
    return f"{place}; {software}; {shape}. Made by `{results.command}`.{end}"
