"""Rows, ratios, JSON, tables and pictures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_linattn.bench import report
from hf_linattn.bench.environment import describe
from hf_linattn.bench.plot import write_plot
from hf_linattn.bench.results import Results, Row, by_name, reasons, slope, with_ratios
from hf_linattn.bench.workload import Workload
from hf_linattn.errors import CheckpointError, ConfigError

ROOT = Path(__file__).resolve().parents[2]
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
def test_ratios_to_softmax(times: list[tuple[str, float]]) -> None:
    """The fastest softmax has 1, no other softmax more; a ratio above 1 is a time below that of the fastest."""
    rows = with_ratios([row(name, 64, seconds) for name, seconds in times])
    softmax = [r for r in rows if r.group == "softmax"]
    if not softmax:
        assert all(r.ratio is None for r in rows)
        return
    assert max(r.ratio for r in softmax) == 1.0
    best = min(r.median for r in softmax)
    assert all(r.ratio * r.median == pytest.approx(best) and (r.ratio > 1) == (best / r.median > 1) for r in rows)


@given(
    exponent=st.floats(-3, 3),
    factor=st.floats(1e-6, 1e6),
    tokens=st.lists(st.integers(1, 10**6), min_size=2, unique=True),
)
def test_slope_is_the_exponent_of_a_power_law(exponent: float, factor: float, tokens: list[int]) -> None:
    rows = [row("ours", n, factor * n**exponent) for n in tokens]
    found = slope(rows)
    spread = math.log(max(tokens) / min(tokens))
    assert found == pytest.approx(exponent, abs=1e-9 / spread + 1e-9)
    assert slope(rows[:1]) is None


def test_slope_of_a_contender(results: Results) -> None:
    rows = by_name(results.panels()["attention, bidirectional, float32, forward"])
    ours, softmax = rows["favor_plus"], rows["sdpa"]
    assert slope(ours) == pytest.approx(1.0)
    assert slope(softmax) is None  # not measured at all lengths
    assert slope(softmax[:2]) == pytest.approx(2.0)
    assert slope(ours, 16384) is None


def test_reasons_of_missing_results(results: Results) -> None:
    assert reasons([r for r in results.rows if r.benchmark == "attention"]) == [
        "fla: needs a GPU",
        "sdpa: too long",
        "sdpa:math: too long",
    ]


def test_json_round_trip(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path / "new" / "results.json")
    assert Results.read(tmp_path / "new" / "results.json") == results
    content = json.loads((tmp_path / "new" / "results.json").read_text(encoding="utf-8"))
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
def test_files_of_something_else(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        Results.read(tmp_path / "results.json")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments" / "results").glob("cpu*.json")), ids=lambda path: path.stem
)
def test_committed_results_are_read(path: Path) -> None:
    results = Results.read(path)
    assert all(row.cost or row.reason for row in results.rows)
    assert "favor_plus" in report.markdown(results)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (report.quantity(8.5e-4, report.SECONDS), "0.85 ms"),
        (report.quantity(0.01234, report.SECONDS), "12.3 ms"),
        (report.quantity(0.4567, report.SECONDS), "457 ms"),
        (report.quantity(4.1, report.SECONDS), "4.10 s"),
        (report.quantity(33 * 2**20, report.BYTES), "33.0 MiB"),
        (report.quantity(512.3, report.RATE), "512"),
        (report.quantity(51234, report.RATE), "51.2 k"),
        (report.ratio_text(0.994), "0.99x"),
        (report.ratio_text(1.26), "1.3x"),
        (report.ratio_text(13.1), "13x"),
    ],
)
def test_rounding_of_numbers(text: str, expected: str) -> None:
    assert text == expected


def test_markdown_tables(results: Results) -> None:
    text = report.markdown(results)
    assert "| favor_plus | 2.05 ms (0.51x) | 8.19 ms (2.0x) | 32.8 ms | 1.00 |" in text
    assert "| favor_plus | 4.00 MiB | 16.0 MiB | 64.0 MiB | 1.00 |" in text
    assert "fla: needs a GPU" in text


def test_an_unfinished_run_says_so(results: Results) -> None:
    assert "cut short" in report.markdown(replace(results, is_complete=False))
    assert "cut short" not in report.markdown(results)


def test_pictures_of_results(results: Results, tmp_path: Path) -> None:
    write_plot(results, tmp_path / "new" / "speed.png")
    assert (tmp_path / "new" / "speed.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="nothing to plot"):
        write_plot(replace(results, rows=(row("sdpa", 8, None, reason="no"),)), tmp_path / "none.png")
