"""Rows, ratios, JSON, tables and pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_linattn.bench import report
from hf_linattn.bench.cases import Workload
from hf_linattn.bench.environment import describe
from hf_linattn.bench.measure import Failure, Timing
from hf_linattn.bench.plot import LABEL_HEIGHT, spread, write_plots
from hf_linattn.bench.results import Results, Row, crossover, growth, reasons, timed, with_ratios
from hf_linattn.errors import CheckpointError, ConfigError, InputError

SECONDS = st.floats(1e-6, 1e3)
LENGTHS = (1024, 4096, 16384)


def row(name: str, tokens: int, seconds: float | None, **fields) -> Row:
    group = "softmax" if name.startswith("sdpa") else "linear"
    return Row("attention", name, group, Workload(tokens), median=seconds, minimum=seconds, **fields)


@pytest.fixture
def results() -> Results:
    """Ours is linear and wins from 4096 on; softmax is quadratic and was not measured at the longest length."""
    rows = []
    for tokens in LENGTHS:
        long = tokens == LENGTHS[-1]
        softmax = row("sdpa", tokens, None if long else tokens**2 * 1e-9, reason="too long" if long else "")
        slow = row("sdpa:math", tokens, None if long else tokens**2 * 2e-9, reason="too long" if long else "")
        rows += with_ratios(
            [softmax, slow, row("favor_plus", tokens, tokens * 2e-6), row("fla", tokens, None, reason="needs a GPU")]
        )
        rows.append(
            Row("memory", "favor_plus", "linear", Workload(tokens, mode="forward+backward"), peak=tokens * 2**12)
        )
        model = Row(
            "models", "eva, native", "linear", Workload(tokens), "minilm", median=1e-3, minimum=1e-3, samples=3
        )
        rows.append(replace(model, ratio=0.5))
    return Results(tuple(rows), "hf-linattn bench", describe(), {"heads": 4, "head_dim": 64, "batch": 1})


@given(times=st.lists(st.tuples(st.sampled_from(["sdpa", "sdpa:flash", "ours", "theirs"]), SECONDS), max_size=6))
def test_ratios(times: list[tuple[str, float]]) -> None:
    """The fastest softmax has 1, no other softmax more; a ratio above 1 is a time below that of the fastest."""
    rows = with_ratios([row(name, 64, seconds) for name, seconds in times])
    softmax = [r for r in rows if r.group == "softmax"]
    if not softmax:
        assert all(r.ratio is None for r in rows)
        return
    assert max(r.ratio for r in softmax) == 1.0
    best = min(r.median for r in softmax)
    assert all(r.ratio * r.median == pytest.approx(best) and (r.ratio > 1) == (best / r.median > 1) for r in rows)


def test_what_a_timing_becomes() -> None:
    blank = row("ours", 64, None)
    done = timed(blank, Timing((3.0, 1.0, 2.0)))
    assert (done.median, done.minimum, done.samples, done.tokens_per_second) == (2.0, 1.0, 3, 32.0)
    assert timed(blank, Failure("out of memory")).reason == "out of memory"
    assert blank.tokens_per_second is None


def test_growth_and_crossover(results: Results) -> None:
    rows = results.panels("attention")[("attention", "", False, "float32", "forward")]
    assert growth(rows, "favor_plus") == pytest.approx(1.0)
    assert growth(rows, "sdpa") is None  # not measured at all upper lengths
    assert growth([r for r in rows if r.work.tokens < 16384], "sdpa") == pytest.approx(2.0)
    assert crossover(rows, "favor_plus") == 4096
    slower = [replace(r, ratio=0.9) if r.ratio else r for r in rows]
    assert crossover(slower, "favor_plus") is None


def test_a_win_in_between_is_no_crossover() -> None:
    rows = [row("ours", n, 1.0, ratio=ratio) for n, ratio in ((1, 2.0), (2, 0.5), (4, 1.5), (8, 3.0))]
    assert crossover(rows, "ours") == 4


def test_reasons(results: Results) -> None:
    assert reasons([r for r in results.rows if r.benchmark == "attention"]) == [
        "fla: needs a GPU",
        "sdpa at 16384 tokens: too long",
        "sdpa:math at 16384 tokens: too long",
    ]


def test_json_round_trip(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path / "new" / "results.json")
    assert Results.read(tmp_path / "new" / "results.json") == results
    content = json.loads(results.to_json())
    assert content["schema"] == 1
    assert content["environment"]["hardware"]["threads"] >= 1
    for name in ("python", "torch", "transformers", "hf_linattn", "numpy", "performer-pytorch"):
        assert content["environment"]["versions"][name], name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not benchmark results"),
        ("[]", "not benchmark results"),
        ('{"rows": []}', "not benchmark results"),
        ('{"schema": 99, "rows": []}', "got 99"),
        ('{"schema": 1}', "incomplete"),
        ('{"schema": 1, "rows": [{"name": "x"}]}', "incomplete"),
        ('{"schema": 1, "rows": [], "unknown": 1}', "incomplete"),
    ],
)
def test_files_of_something_else(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Results.from_json(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (report.seconds_text(8.5e-4), "0.85 ms"),
        (report.seconds_text(0.01234), "12.3 ms"),
        (report.seconds_text(0.4567), "457 ms"),
        (report.seconds_text(4.1), "4.10 s"),
        (report.ratio_text(0.994), "0.99x"),
        (report.ratio_text(1.26), "1.3x"),
        (report.ratio_text(13.1), "13x"),
        (report.bytes_text(33 * 2**20), "33 MiB"),
        (report.bytes_text(3 * 2**30), "3.0 GiB"),
        (report.rate_text(512.3), "512"),
        (report.rate_text(51234), "51.2k"),
        (report.slope_text(None), "–"),
    ],
)
def test_numbers(text: str, expected: str) -> None:
    assert text == expected


def test_markdown_tables(results: Results) -> None:
    text = report.markdown(results)
    assert "| favor_plus | 2.05 ms (0.51x) | 8.19 ms (2.0x) | 32.8 ms | 1.00 | 4096 |" in text
    assert "| favor_plus | 4 MiB | 16 MiB | 64 MiB | 1.00 |" in text
    assert "fla: needs a GPU" in text
    widths = {line.count("|") for block in text.split("\n\n") if block.startswith("|") for line in block.splitlines()}
    assert len(widths) == 2  # timed tables, and memory without the last column


def test_readme_section_shows_wins_and_losses(results: Results) -> None:
    text = report.readme_section(results, "docs/speed.png")
    assert "| softmax, fastest backend | 1.05 ms | 16.8 ms | – | – |  |" in text
    assert "| favor_plus | 0.51x | **2.0x** | 32.8 ms | 1.00 | 4096 |" in text
    assert "| eva, native | 0.50x | 0.50x | 0.50x |" in text
    assert "never" in text
    assert "](docs/speed.png)" in text
    assert "fla: needs a GPU" in text
    assert "`hf-linattn bench`" in text


def test_an_unfinished_run_says_so(results: Results) -> None:
    unfinished = Results.from_json(replace(results, is_complete=False).to_json())
    for text in (report.readme_section(unfinished), report.markdown(unfinished)):
        assert "cut short" in text
    assert "cut short" not in report.readme_section(results)


def test_two_modes_share_a_cell(results: Results) -> None:
    both = [r for r in results.rows if r.benchmark == "attention"]
    both += [replace(r, work=replace(r.work, mode="forward+backward"), ratio=r.ratio and 2 * r.ratio) for r in both]
    text = report.readme_section(replace(results, rows=tuple(both)))
    assert "| favor_plus | 0.51x / **1.0x** | **2.0x** / **4.1x** |" in text
    assert "| 4096 / 1024 |" in text


@given(heights=st.lists(st.floats(0, 1), max_size=12))
def test_labels_do_not_overlap(heights: list[float]) -> None:
    given_heights = {str(index): height for index, height in enumerate(heights)}
    placed = spread(given_heights)
    assert placed.keys() == given_heights.keys()
    ordered = sorted(placed.values())
    assert all(b - a >= LABEL_HEIGHT - 1e-9 for a, b in zip(ordered, ordered[1:], strict=False))
    by_height = sorted(given_heights, key=lambda name: given_heights[name])
    assert sorted(placed, key=lambda name: placed[name]) == by_height
    if len(heights) == 1:
        assert placed["0"] == heights[0]


@given(columns=st.lists(st.integers(1, 10**5), unique=True, max_size=20))
def test_thinning_keeps_the_longest(columns: list[int]) -> None:
    columns = sorted(columns)
    kept = report.thin(columns)
    assert len(kept) <= 6
    assert set(kept) <= set(columns)
    assert kept[-1:] == columns[-1:]


def test_readme_is_rewritten_between_the_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    for section in ("new", "newer"):
        report.write_readme(readme, section)
        expected = f"before\n{report.BEGIN}\n{section}\n{report.END}\nafter\n"
        assert readme.read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("text", ["", report.BEGIN, f"{report.END}{report.BEGIN}", f"{report.BEGIN * 2}{report.END}"])
def test_readme_without_markers(text: str, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="performance:begin"):
        report.write_readme(readme, "new")
    assert readme.read_text(encoding="utf-8") == text


def test_pictures(results: Results, tmp_path: Path) -> None:
    written = write_plots(results, tmp_path / "new" / "speed.png")
    assert [path.name for path in written] == ["speed.png", "speed_memory.png", "speed_models.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    with pytest.raises(ConfigError, match="nothing to plot"):
        write_plots(replace(results, rows=(row("sdpa", 8, None, reason="no"),)), tmp_path / "none.png")
