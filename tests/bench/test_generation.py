"""Generation: what is counted, what is timed, and how it is shown; not how fast anything is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from caches import given_cache
from torch import nn
from torch.utils.benchmark import Measurement
from torch.utils.benchmark.utils.common import TaskSpec
from transformers import BertConfig, BertForMaskedLM, DynamicCache, GPT2Config, GPT2LMHeadModel

from hf_linattn import FavorPlusConfig
from hf_linattn.bench import generation, report
from hf_linattn.bench.generation import GenerationRun, fill, fill_at_random, held_bytes, run_generation
from hf_linattn.bench.kinds import KindOptions
from hf_linattn.bench.models import converted
from hf_linattn.bench.plan import Plan
from hf_linattn.bench.results import Results, Row, with_ratios
from hf_linattn.bench.timing import ROUNDS, SLOW_ROUNDS
from hf_linattn.bench.workload import Workload
from hf_linattn.errors import ConfigError
from hf_linattn.modules.registry import list_kinds

KINDS = tuple(list_kinds())
LENGTHS = (24, 72)
WINDOW = 8


def tiny_plan(**changes: Any) -> Plan:
    options = KindOptions(num_features=8, num_landmarks=4, eva_chunk_size=4)
    fields = {"lengths": LENGTHS, "kinds": KINDS, "heads": 2, "head_dim": 8, "options": options, "seconds": 1e-3}
    limits = {"windows": (WINDOW,), "layers": 1, "max_softmax_length": None, "max_chunks": 4, "piece": 32}
    return Plan(**{**fields, **limits, **changes})


def gpt2(**changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 96, "vocab_size": 40}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **changes})).eval()


# -- bytes ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class State:
    slots: tuple[torch.Tensor, ...]
    window: dict[str, torch.Tensor | None]


class Layer:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def test_bytes_are_found_wherever_they_are_held_and_count_once() -> None:
    whole = torch.zeros(10, 4)
    state = State(
        slots=(torch.zeros(3), torch.zeros(5, dtype=torch.float64)), window={"key": whole[:2], "value": None}
    )
    layer = Layer(state=state, again=[whole[5:], state.slots[0]], seen=7, kind=Layer, module=nn.Linear(50, 50))
    layer.itself = layer
    wanted = 12 + 40 + 160  # a view holds all of its storage
    assert held_bytes(layer) == wanted
    assert held_bytes(layer, layer, state) == wanted
    assert held_bytes(layer, Layer(own=torch.zeros(2, dtype=torch.bfloat16))) == wanted + 4
    assert held_bytes(Layer()) == held_bytes() == 0
    module = torch.nn.Linear(3, 2)
    assert held_bytes(Layer(own=module.weight), state, model=module) == held_bytes(state)


@torch.inference_mode()
def test_a_cache_of_keys_and_values() -> None:
    model, ids = gpt2(), torch.randint(40, (2, 30))
    for cache in (fill(model, ids, piece=7), fill_at_random(model, ids)):
        assert cache.get_seq_length() == 30
        assert held_bytes(*cache.layers) == 2 * 2 * 2 * 30 * 16 * 4  # layers, keys and values, batch, tokens, ...
    assert isinstance(cache, DynamicCache)


@torch.inference_mode()
@pytest.mark.parametrize("kind", [None, "favor_plus"])
def test_a_cache_filled_piece_by_piece_knows_all_tokens(kind: str | None) -> None:
    model, ids = gpt2(initializer_range=0.2), torch.randint(40, (1, 41))
    if kind is not None:
        model = converted(model, FavorPlusConfig(num_features=8, window_size=WINDOW), {"input_ids": ids})
    whole = model(ids).logits[:, -1]
    cache = fill(model, ids[:, :40], piece=17)
    last = model(ids[:, 40:], **given_cache(cache), use_cache=True).logits[:, -1]
    assert float((last - whole).abs().max()) < 1e-4


# -- a run ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def rows() -> list[Row]:
    parts = list(run_generation(tiny_plan()))
    assert [{row.work.tokens for row in part} for part in parts] == [{tokens} for tokens in LENGTHS]
    return [row for part in parts for row in part]


def test_every_kind_at_every_length(rows: list[Row]) -> None:
    assert [row.reason for row in rows] == [""] * len(rows)
    names = {"sdpa", *(f"{kind}, window 8" for kind in KINDS), "eva, window 8, at most 4 chunks"}
    assert {(row.name, row.work.tokens) for row in rows} == {(name, n) for name in names for n in LENGTHS}
    for row in rows:
        assert row.median
        assert row.minimum <= row.median
        assert row.samples >= SLOW_ROUNDS
        assert row.tokens_per_second == 1 / row.median
        assert row.settings is None or row.settings["window_size"] == WINDOW
        assert row.work.is_causal
        assert (row.settings or {}).get("max_chunks") == (4 if "at most" in row.name else None)
        softmax = next(r for r in rows if r.group == "softmax" and r.work.tokens == row.work.tokens)
        assert row.ratio == pytest.approx(softmax.median / row.median)


def test_the_size_of_the_cache_is_the_largest_in_a_window(rows: list[Row]) -> None:
    for row in rows:
        assert row.state > 0
        if row.group == "softmax":
            assert row.state == 2 * (row.work.tokens + WINDOW) * 16 * 4


def test_a_row_has_the_median_of_the_means_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is two windows of steps behind the whole context; all rows of a length take turns."""
    calls: list[str] = []

    def time_steps(run: GenerationRun, seconds: float) -> Measurement:
        calls.append("linear" if run.model.config.model_type == "linattn_gpt2" else "softmax")
        assert run.steps == run.ids.shape[1] == 2 * WINDOW
        assert run.cache.get_seq_length() == 24
        return Measurement(run.steps, [run.steps * float(len(calls))], TaskSpec("", ""))

    monkeypatch.setattr(generation, "_time_steps", time_steps)
    (rows,) = run_generation(tiny_plan(kinds=("favor_plus",), lengths=(24,), seconds=1e3))
    assert calls == ["softmax", "linear"] * ROUNDS
    assert [(row.group, row.median, row.minimum) for row in rows] == [("softmax", 5.0, 1.0), ("linear", 6.0, 2.0)]


@torch.inference_mode()
def test_a_step_leaves_the_filled_cache_alone() -> None:
    ids, model = torch.randint(40, (1, 40)), gpt2()
    run = GenerationRun(model, fill(model, ids[:, :24], 8), ids[:, 24:], steps=16)
    assert generation._time_steps(run, 1.0).mean > 0
    assert run.most_bytes(16) == 2 * 40 * 16 * 4
    assert run.cache.get_seq_length() == 24


@pytest.mark.parametrize("where", ["fill", "_time_steps"])
def test_what_fails_has_a_reason(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    original = getattr(generation, where)

    def failing(given: Any, *rest: Any) -> Any:
        tokens = rest[0].shape[1] if where == "fill" else given.cache.get_seq_length()
        if tokens == LENGTHS[1]:
            raise RuntimeError("no room")
        return original(given, *rest)

    monkeypatch.setattr(generation, where, failing)
    plan = tiny_plan(kinds=("favor_plus",), max_softmax_length=LENGTHS[0])
    rows = [row for part in run_generation(plan) for row in part]
    reasons = {(row.group, row.work.tokens): row.reason for row in rows}
    assert reasons[("linear", LENGTHS[1])] == "RuntimeError: no room"
    assert "24 tokens set for softmax" in reasons[("softmax", LENGTHS[1])]
    assert reasons[("linear", LENGTHS[0])] == reasons[("softmax", LENGTHS[0])] == ""
    report.markdown(Results(tuple(rows)))


def test_a_checkpoint(tmp_path: Any) -> None:
    """Its sizes are its own; it gets the positions that it lacks."""
    gpt2(n_positions=30).save_pretrained(tmp_path / "decoder")
    plan = tiny_plan(kinds=("favor_plus",), lengths=(24, 32), checkpoint=str(tmp_path / "decoder"))
    rows = [row for part in run_generation(plan) for row in part]
    assert {(row.model, row.work.heads, row.work.head_dim, row.reason) for row in rows} == {("decoder", 2, 8, "")}
    BertForMaskedLM(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "encoder"
    )
    with pytest.raises(ConfigError, match="stock GPT-2; got model_type 'bert'"):
        list(run_generation(replace(plan, checkpoint=str(tmp_path / "encoder"))))


# -- tables -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def results() -> Results:
    """Softmax slows down with the context and its cache grows; ours does neither."""
    made: list[Row] = []
    for tokens in (4096, 65536):
        blank = Row("generation", "sdpa", "softmax", Workload(tokens, is_causal=True), "gpt2 (4 layers)")
        made += with_ratios(
            [
                replace(blank, median=tokens * 1e-6, state=tokens * 2048),
                replace(
                    blank, name="favor_plus", group="linear", median=2e-3 if tokens == 4096 else 2.2e-3, state=2**18
                ),
                replace(blank, name="eva", group="linear", reason="out of memory"),
            ]
        )
    return Results(tuple(made), "hf-linattn bench generation", {}, {})


def test_tables_of_decoding(results: Results) -> None:
    text = report.markdown(results)
    assert "## Generation, gpt2 (4 layers), float32" in text
    assert "| sdpa | 244 (1.0x) | 15.3 (1.0x) | 1.00 |" in text
    assert "| favor_plus | 500 (2.0x) | 455 (30x) | 0.03 |" in text
    assert "| sdpa | 8.00 MiB | 128 MiB | 1.00 |" in text
    assert "| favor_plus | 256 KiB | 256 KiB | 0.00 |" in text
    assert "Not measured: eva: out of memory." in text
    assert len(report.terminal_tables(results)) == 2
    assert results.rows[2].tokens_per_second is None
