"""Results as tables, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

from .results import Panel, Results, Row, crossover, growth, lengths, names, reasons

NOTHING = "–"
Grid = tuple[list[str], list[list[str]]]  # header and lines
SECONDS = (("s", 1.0), ("ms", 1e-3))
BYTES = (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10))
RATE = (("k", 1e3), ("", 1.0))
LEGEND = (
    "Times are medians; in brackets how many times faster than the fastest softmax backend at that length (below 1:"
    " slower). The slope is the exponent of the growth with the number of tokens over the upper lengths: 1 is linear,"
    ' 2 quadratic. "Wins from": the shortest length from which on it is at least as fast as softmax. In generation'
    " lengths are those of the context, times are means over whole windows of steps, and in brackets behind a size is"
    " its share of softmax's cache; the last column is time per token, or size, behind the longest context over that"
    " behind the shortest."
)


# -- cells ------------------------------------------------------------------------------------------------------------
def quantity(value: float, units: Sequence[tuple[str, float]]) -> str:
    """Three digits in the largest unit that is not above the value: 0.85 ms, 12.3 ms, 4.10 s."""
    unit, size = next((entry for entry in units if value >= entry[1]), units[-1])
    value /= size
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}".rstrip()


def ratio_text(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 1 else f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"


def _fraction(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _cell(row: Row | None) -> str:
    """The measured number, and the ratio if there is one."""
    if row is None or row.cost is None:
        return NOTHING if row else ""
    if row.benchmark == "memory":
        return quantity(row.cost, BYTES)
    rate = quantity(row.tokens_per_second or 0.0, RATE)
    shown = {"models": f"{rate} tok/s", "generation": rate}.get(row.benchmark) or quantity(row.cost, SECONDS)
    return shown if row.ratio is None else f"{shown} ({ratio_text(row.ratio)})"


def _wins(rows: Sequence[Row]) -> str:
    compared = [row for row in rows if row.ratio is not None]
    if not compared:
        return NOTHING
    return "" if compared[0].group == "softmax" else str(crossover(rows) or "never")


# -- tables -----------------------------------------------------------------------------------------------------------
def title(panel: Panel) -> str:
    benchmark, model, is_causal, dtype, mode = panel
    if benchmark == "generation":
        return f"generation, {model}, {dtype}"
    what = {"attention": "attention", "memory": "peak memory of a training step"}.get(benchmark, model)
    direction = "causal" if is_causal else "bidirectional"
    return ", ".join([what, direction, dtype, *([] if benchmark == "memory" else [mode])])


def grids(rows: Sequence[Row]) -> list[Grid]:
    """The tables of a panel: contenders down, lengths across, then what follows from a line as a whole."""
    columns, is_timed = lengths(rows), rows[0].benchmark != "memory"
    if rows[0].benchmark == "generation":
        return _generation_grids(rows, columns)
    start = next(tokens for tokens in columns if tokens >= columns[-1] // 16)
    lines = []
    for name in names(rows):
        found = {row.work.tokens: row for row in rows if row.name == name}
        ends = [_fraction(growth(rows, name)), *([_wins(list(found.values()))] if is_timed else [])]
        lines.append([name, *(_cell(found.get(tokens)) for tokens in columns), *ends])
    return [(["", *map(str, columns), f"slope from {start}", *(["wins from"] if is_timed else [])], lines)]


def _generation_grids(rows: Sequence[Row], columns: list[int]) -> list[Grid]:
    """Tokens per second, and the size of the cache beside that of softmax."""
    softmax = {row.work.tokens: row.state for row in rows if row.group == "softmax"}
    speeds, sizes = [], []
    for name in names(rows):
        found = {row.work.tokens: row for row in rows if row.name == name}
        states = {tokens: row.state for tokens, row in found.items()}
        seconds = {tokens: row.mean for tokens, row in found.items()}
        shares = {} if any(row.group == "softmax" for row in found.values()) else softmax
        speeds.append([name, *(_cell(found.get(tokens)) for tokens in columns), _last_over_first(seconds, columns)])
        cells = (_state_cell(states.get(tokens), shares.get(tokens)) for tokens in columns)
        sizes.append([name, *cells, _last_over_first(states, columns)])
    header = [*map(str, columns), f"{columns[-1]} : {columns[0]}"]
    return [(["tokens per second", *header], speeds), (["cache per layer", *header], sizes)]


def _state_cell(state: int | None, softmax: int | None) -> str:
    if state is None:
        return NOTHING
    return quantity(state, BYTES) + (f" ({state / softmax:.2%})" if softmax else "")


def _last_over_first(values: Mapping[int, float | None], columns: list[int]) -> str:
    first, last = values.get(columns[0]), values.get(columns[-1])
    return _fraction(last / first if first and last else None)


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
    return [
        rich_table(title(panel), *grid, "; ".join(reasons(rows))) for panel, rows in panels for grid in grids(rows)
    ]


def markdown_table(made: Grid) -> str:
    header, lines = made
    rule = ["---", *["---:" for _ in header[1:]]]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def markdown(results: Results) -> str:
    """Everything that was measured, table by table, with what was not and why."""
    parts = ["# Performance", setting(results), LEGEND]
    for panel, rows in results.panels().items():
        parts += [f"## {title(panel).capitalize()}", *map(markdown_table, grids(rows))]
        parts += [f"Not measured: {'; '.join(missing)}." for missing in [reasons(rows)] if missing]
    return "\n\n".join(parts) + "\n"


def setting(results: Results) -> str:
    """One paragraph: on what machine, with which versions and sizes, by which command."""
    hardware, versions = results.environment.get("hardware", {}), results.environment.get("versions", {})
    place = hardware.get("gpu") or f"{hardware.get('cpu', 'unknown processor')}, {hardware.get('threads')} thread(s)"
    options = {**results.options, **results.options.get("options", {})}
    shown = ("batch", "heads", "head_dim", "num_features", "num_landmarks", "num_chunks")
    shape = ", ".join(f"{name} {options[name]}" for name in shown if name in options)
    software = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions)
    end = "" if results.is_complete else " The run was cut short: cases at its end are missing."
    return f"{place}; {software}; {shape}. Made by `{results.command}`.{end}"
