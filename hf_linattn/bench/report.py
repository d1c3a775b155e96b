"""Results as tables: for the terminal, in Markdown, and as the README's section."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from ..errors import InputError
from .measure import upper_lengths
from .results import BENCHMARKS, Results, Row, cost, crossover, growth, lengths, names, reasons

BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
README_COLUMNS = 6
NOTHING = "–"
ATTENTION_BENCHMARKS = tuple(name for name in BENCHMARKS if name != "generation")
Grid = tuple[list[str], list[list[str]]]


# -- numbers ----------------------------------------------------------------------------------------------------------
def seconds_text(seconds: float) -> str:
    """Three digits with a unit: 0.85 ms, 12.3 ms, 4.10 s."""
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def ratio_text(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 1 else f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"


def bytes_text(count: int) -> str:
    mebibytes = count / 2**20
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1024 else f"{mebibytes:.0f} MiB"


def rate_text(rate: float) -> str:
    return f"{rate / 1e3:.{1 if rate < 1e5 else 0}f}k" if rate >= 1e3 else f"{rate:.{1 if rate < 10 else 0}f}"


def state_text(count: int) -> str:
    return f"{count / 2**10:.0f} KiB" if count < 2**20 else f"{count / 2**20:.{1 if count < 100 * 2**20 else 0}f} MiB"


def share_text(share: float) -> str:
    return f"{share:.{2 if share < 0.01 else 1 if share < 0.1 else 0}%}"


def slope_text(slope: float | None) -> str:
    return NOTHING if slope is None else f"{slope:.2f}"


# -- full tables ------------------------------------------------------------------------------------------------------
def title(panel: tuple[str, str, bool, str, str]) -> str:
    benchmark, model, is_causal, dtype, mode = panel
    if benchmark == "generation":
        return f"generation, {model}, {dtype}"
    direction = "causal" if is_causal else "bidirectional"
    what = {"attention": "attention", "memory": "peak memory of a training step", "models": model}[benchmark]
    return f"{what}, {direction}, {dtype}" + ("" if benchmark == "memory" else f", {mode}")


def cell(row: Row | None, between: str = " ") -> str:
    """What a full table shows of a row: the measured number, and the ratio if there is one."""
    if row is None:
        return ""
    if row.peak is not None:
        return bytes_text(row.peak)
    if row.median is None:
        return NOTHING
    if row.benchmark == "models":
        shown = f"{rate_text(row.tokens_per_second or 0)} tok/s"
    else:
        shown = seconds_text(row.median)
    return shown if row.ratio is None else f"{shown}{between}({ratio_text(row.ratio)})"


def grid(rows: Sequence[Row], between: str = " ") -> Grid:
    """Header and lines of one panel's table: implementations down, lengths across, then the slope."""
    columns = lengths(rows)
    start = next((n for n in columns if n >= upper_lengths(columns)), 0)
    header = ["", *map(str, columns), f"slope from {start}", *([] if rows[0].benchmark == "memory" else ["wins from"])]
    found = {(row.name, row.work.tokens): row for row in rows}
    lines = []
    for name in names(rows):
        line = [
            name,
            *(cell(found.get((name, tokens)), between) for tokens in columns),
            slope_text(growth(rows, name)),
        ]
        if rows[0].benchmark != "memory":
            line.append(_wins(rows, name))
        lines.append(line)
    return header, lines


def _wins(rows: Sequence[Row], name: str) -> str:
    compared = [row for row in rows if row.name == name and row.ratio is not None]
    if not compared:
        return NOTHING
    if compared[0].group == "softmax":
        return ""
    start = crossover(rows, name)
    return "never" if start is None else str(start)


def generation_grids(rows: Sequence[Row], between: str = " ", is_bold: bool = False) -> list[Grid]:
    """Two tables of a panel of generation: tokens per second, and the size of the cache, each beside softmax's.

    The last column is the time per token (the bytes) behind the longest context over that behind the shortest.

    Args:
        is_bold: Mark, in Markdown, what is at least as fast as softmax.
    """
    columns = lengths(rows)
    found = {(row.name, row.work.tokens): row for row in rows}
    softmax = {row.work.tokens: row.state for row in rows if row.group == "softmax" and row.state}

    def speed(row: Row) -> str:
        shown = NOTHING if row.tokens_per_second is None else rate_text(row.tokens_per_second)
        if row.ratio is None or row.group == "softmax":
            return shown
        return f"{shown}{between}({ratio_cell(row) if is_bold else ratio_text(row.ratio)})"

    def size(row: Row) -> str:
        if row.state is None:
            return NOTHING
        whole = softmax.get(row.work.tokens)
        share = "" if row.group == "softmax" or whole is None else f"{between}({share_text(row.state / whole)})"
        return state_text(row.state) + share

    made: list[Grid] = []
    for what, show, number in (
        ("tokens per second", speed, cost),
        ("cache per layer", size, lambda row: row.state),
    ):
        header = [what, *map(str, columns), *([f"{columns[-1]} : {columns[0]}"] if len(columns) > 1 else [])]
        lines = []
        for name in names(rows):
            members = [found.get((name, tokens)) for tokens in columns]
            line = [
                "softmax" if name == "sdpa" else name,
                *("" if row is None else show(row) for row in members),
            ]
            if len(columns) > 1:
                ends = [number(row) if row is not None else None for row in (members[0], members[-1])]
                line.append(f"{ends[1] / ends[0]:.2f}" if ends[0] and ends[1] else NOTHING)
            lines.append(line)
        made.append((header, lines))
    return made


def grids(rows: Sequence[Row], between: str = " ") -> list[Grid]:
    """All full tables of a panel."""
    return generation_grids(rows, between) if rows[0].benchmark == "generation" else [grid(rows, between)]


def terminal_tables(results: Results) -> list[Table]:
    made = []
    for panel, rows in results.panels().items():
        for header, lines in grids(rows, between="\n"):
            table = Table(title=title(panel), title_justify="left", caption="; ".join(reasons(rows)) or None)
            for index, name in enumerate(header):
                table.add_column(name, justify="right" if index else "left", overflow="fold")
            for line in lines:
                table.add_row(*line)
            made.append(table)
    return made


def markdown_table(made: Grid) -> str:
    header, lines = made
    rule = ["---", *["---:" for _ in header[1:]]]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))


def markdown(results: Results) -> str:
    """Everything that was measured, table by table, with what was not and why."""
    parts = ["# Performance", setting(results), LEGEND]
    for panel, rows in results.panels().items():
        parts.append(f"## {title(panel).capitalize()}")
        parts += [markdown_table(made) for made in grids(rows)]
        parts += [f"Not measured: {'; '.join(missing)}." for missing in [reasons(rows)] if missing]
    return "\n\n".join(parts) + "\n"


LEGEND = (
    "Times are medians; in brackets how many times faster than the fastest softmax backend at that length (below 1:"
    " slower). The slope is the exponent of the growth with the number of tokens over the upper lengths: 1 is linear,"
    ' 2 quadratic. "Wins from": the shortest length from which on it is at least as fast as softmax. In generation'
    " lengths are those of the context, times are means over whole windows of steps, and in brackets behind a size is"
    " its share of softmax's cache; the last column is time per token, or size, behind the longest context over that"
    " behind the shortest."
)


def setting(results: Results) -> str:
    """One paragraph: on what machine, with which versions and sizes, by which command."""
    hardware, versions = results.environment.get("hardware", {}), results.environment.get("versions", {})
    options = results.options
    place = hardware.get("gpu") or f"{hardware.get('cpu', 'unknown processor')}, {hardware.get('threads')} thread(s)"
    sizes = {**options, **options.get("options", {})}
    shown = (
        ("batch", "batch {}"),
        ("heads", "{} heads"),
        ("head_dim", "head_dim {}"),
        ("num_features", "{} features"),
        ("num_landmarks", "{} landmarks"),
        ("num_chunks", "{} chunks"),
    )
    shape = ", ".join(text.format(sizes[key]) for key, text in shown if key in sizes)
    software = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions)
    end = "" if results.is_complete else " The run was cut short: cases at its end are missing."
    return f"{place}; {software}; {shape}. Made by `{results.command}`.{end}"


README_LEGEND = (
    'Numbers that are not bold are losses: there the fastest softmax backend of that length is faster. "Wins from"'
    " is the shortest measured length from which on a row is at least as fast; the slope is the exponent of the growth"
    " of the time with the tokens over the upper lengths (1: linear, 2: quadratic). Times without an x stand where"
    " softmax was not measured."
)

GENERATION_LEGEND = (
    "one token at a time behind contexts of several lengths (times softmax's speed; share of softmax's cache); last,"
    " time per token or size behind the longest context over that behind the shortest"
)


# -- the README's section ---------------------------------------------------------------------------------------------
def readme_section(results: Results, plot: str | None = None) -> str:
    """The part of the README between the markers: fewer columns, both modes in one cell, and where softmax wins.

    Args:
        plot: Path of the picture, relative to the README.
    """
    parts = [setting(results)]
    if plot:
        parts.append(f"![Time and speed-up over the number of tokens]({plot})")
    for benchmark in ATTENTION_BENCHMARKS:
        groups: dict[tuple[str, bool, str], list[Row]] = {}
        for row in results.rows:
            if row.benchmark == benchmark:
                groups.setdefault((row.model, row.work.is_causal, row.work.dtype), []).append(row)
        for (model, is_causal, dtype), rows in groups.items():
            modes = list(dict.fromkeys(row.work.mode for row in rows))
            direction = "causal" if is_causal else "bidirectional"
            heading = {"attention": "Attention", "memory": "Peak memory of a training step", "models": model}[
                benchmark
            ]
            what = "" if benchmark == "memory" else f", {' / '.join(modes)}: times faster than softmax"
            parts.append(f"**{heading}, {direction}, {dtype}**{what}")
            parts.append(markdown_table(compact(rows, modes)))
    for panel, rows in results.panels("generation").items():
        name = title(panel)
        parts.append(f"**{name[0].upper()}{name[1:]}**: {GENERATION_LEGEND}")
        parts += [markdown_table(made) for made in generation_grids(rows, is_bold=True)]
    if any(row.ratio for row in results.rows if row.benchmark != "generation"):
        parts.append(README_LEGEND)
    missing = reasons(list(results.rows))
    if missing:
        parts.append("Not measured: " + "; ".join(missing) + ".")
    return "\n\n".join(parts)


def compact(rows: Sequence[Row], modes: Sequence[str]) -> Grid:
    """A small table of a panel's modes together: the fastest softmax in absolute numbers, the others as ratios."""
    is_memory = rows[0].benchmark == "memory"
    columns = thin(lengths(rows))
    found = {(row.name, row.work.mode, row.work.tokens): row for row in rows}
    softmax = [row for row in rows if row.group == "softmax"]

    def joined(of: Callable[[str, int], str]) -> list[str]:
        cells = [" / ".join(of(mode, tokens) for mode in modes) for tokens in columns]
        return [NOTHING if set(text) <= set(f"{NOTHING} /") else text for text in cells]

    def best(mode: str, tokens: int) -> str:
        values = [row for row in softmax if row.work.mode == mode and row.work.tokens == tokens and row.median]
        return cell_short(min(values, key=lambda row: row.median or 0)) if values else NOTHING

    lines = []
    if softmax and not is_memory:
        slopes = _slopes(rows, modes, _fastest(softmax))
        lines.append(["softmax, fastest backend", *joined(best), slopes, ""])
    for name in names(row for row in rows if row.group != "softmax" or (is_memory and row.name == "sdpa")):
        if all(row.reason for row in rows if row.name == name):
            continue  # said below the tables

        def ours(mode: str, tokens: int, name: str = name) -> str:
            return ratio_cell(found.get((name, mode, tokens)))

        wins = [] if is_memory else [" / ".join(_wins([r for r in rows if r.work.mode == m], name) for m in modes)]
        lines.append([name, *joined(ours), _slopes(rows, modes, name), *wins])
    return ["tokens", *map(str, columns), "slope", *([] if is_memory else ["wins from"])], lines


def _fastest(softmax: Sequence[Row]) -> str:
    """The softmax implementation that is fastest at the longest length measured."""
    measured = [row for row in softmax if row.median]
    if not measured:
        return softmax[0].name
    longest = max(row.work.tokens for row in measured)
    return min((row for row in measured if row.work.tokens == longest), key=lambda row: row.median or 0).name


def _slopes(rows: Sequence[Row], modes: Sequence[str], name: str) -> str:
    return " / ".join(slope_text(growth([row for row in rows if row.work.mode == mode], name)) for mode in modes)


def cell_short(row: Row) -> str:
    if row.benchmark == "models":
        return f"{rate_text(row.tokens_per_second or 0)} tok/s"
    return seconds_text(row.median or 0)


def ratio_cell(row: Row | None) -> str:
    """A ratio, bold from 1 on; a memory size; the plain number where softmax was not measured."""
    if row is None or (row.median is None and row.peak is None):
        return NOTHING
    if row.peak is not None:
        return bytes_text(row.peak)
    if row.ratio is None:
        return cell_short(row)
    return f"**{ratio_text(row.ratio)}**" if row.ratio >= 1 else ratio_text(row.ratio)


def thin(columns: Sequence[int], most: int = README_COLUMNS) -> list[int]:
    """At most so many of the lengths, the longest always among them."""
    step = -(-len(columns) // most) if columns else 1
    return list(columns)[::-1][::step][::-1]


def write_readme(path: Path, section: str) -> None:
    """Replace what stands between the markers. Raises `InputError` as `check_readme` does."""
    text = check_readme(path)
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{section}\n{END}{after}", encoding="utf-8")


def check_readme(path: Path) -> str:
    """The file's text. Raises `InputError` if it does not have each marker once and in order."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(f"{path} must have the lines {BEGIN} and {END}, each once and in this order. Add them.")
    return text
