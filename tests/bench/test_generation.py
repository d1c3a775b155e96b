"""Generation: what is counted, what is timed, and how it is shown; not how fast anything is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from caches import given_cache
from torch import nn
from transformers import BertConfig, BertForMaskedLM, DynamicCache, GPT2Config, GPT2LMHeadModel

from hf_linattn import FavorPlusConfig
from hf_linattn.bench import generation, report
from hf_linattn.bench.generation import fill, fill_at_random, held_bytes, run_generation
from hf_linattn.bench.kinds import KindOptions
from hf_linattn.bench.models import converted
from hf_linattn.bench.plan import Plan
from hf_linattn.bench.results import Results, Row, with_ratios
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
        model = converted(model, FavorPlusConfig(num_features=8, window_size=WINDOW), ids)
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
        assert row.mean
        assert row.minimum <= row.mean
        assert row.samples >= generation.MIN_ROUNDS
        assert row.tokens_per_second == 1 / row.mean
        assert row.settings is None or row.settings["window_size"] == WINDOW
        assert row.work.is_causal
        assert (row.settings or {}).get("max_chunks") == (4 if "at most" in row.name else None)
        softmax = next(r for r in rows if r.group == "softmax" and r.work.tokens == row.work.tokens)
        assert row.ratio == pytest.approx(softmax.mean / row.mean)


def test_the_size_of_the_cache_is_the_largest_in_a_window(rows: list[Row]) -> None:
    for row in rows:
        assert row.state > 0
        if row.group == "softmax":
            assert row.state == 2 * (row.work.tokens + WINDOW) * 16 * 4


def test_rounds_go_through_all_lengths_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row has the median of its rounds' means."""
    calls: list[tuple[str, int]] = []

    def mean_seconds(case: Any, ids: Any) -> float:
        calls.append((case.row.group, case.row.work.tokens))
        assert case.steps == 2 * WINDOW
        assert case.cache.get_seq_length() == case.row.work.tokens
        return 2.0 if len(calls) > 4 else 900.0

    monkeypatch.setattr(generation, "_mean_seconds", mean_seconds)
    found = [row for part in run_generation(tiny_plan(kinds=("favor_plus",))) for row in part]
    round = [(group, tokens) for group in ("softmax", "linear") for tokens in LENGTHS]
    assert calls[:12] == [*round, *round[::-1], *round]
    assert {(row.mean, row.minimum) for row in found} == {(2.0, 2.0)}


def test_a_step_leaves_the_filled_cache_alone() -> None:
    ids, model = torch.randint(40, (1, 40)), gpt2()
    case = generation._Case(Row("generation", "ours", "linear", Workload(24)), model, steps=16)
    with torch.inference_mode():
        generation._fill(case, ids, 8, tiny_plan(lengths=(24,)))
        assert generation._mean_seconds(case, ids) > 0
    assert case.cache.get_seq_length() == 24


def test_a_slow_row_takes_part_in_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        generation, "_mean_seconds", lambda case, ids: (5.0 if case.row.group == "softmax" else 0.1) / case.steps
    )
    rows = [row for part in run_generation(tiny_plan(kinds=("favor_plus",), seconds=1.0)) for row in part]
    assert {(row.group, row.samples) for row in rows} == {("softmax", 3), ("linear", 10)}


@pytest.mark.parametrize("where", ["fill", "_mean_seconds"])
def test_what_fails_has_a_reason(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    original = getattr(generation, where)

    def failing(case_or_model: Any, ids: torch.Tensor, *rest: Any) -> Any:
        tokens = ids.shape[1] if where == "fill" else case_or_model.row.work.tokens
        if tokens == LENGTHS[1] and (where == "fill" or case_or_model.row.group == "linear"):
            raise RuntimeError("no room")
        return original(case_or_model, ids, *rest)

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
    """Softmax slows down with the context and its cache grows; ours does neither. Medians are not what counts."""
    made: list[Row] = []
    for tokens in (1024, 65536):
        blank = Row("generation", "sdpa", "softmax", Workload(tokens, is_causal=True), "gpt2 (4 layers)", median=1e-9)
        made += with_ratios(
            [
                replace(blank, mean=tokens * 1e-6, state=tokens * 2048),
                replace(
                    blank, name="favor_plus", group="linear", mean=2e-3 if tokens == 1024 else 2.2e-3, state=2**18
                ),
                replace(blank, name="eva", group="linear", median=None, reason="out of memory"),
            ]
        )
    return Results(tuple(made), "hf-linattn bench generation", {}, {})


def test_tables_of_decoding(results: Results) -> None:
    text = report.markdown(results)
    assert "## Generation, gpt2 (4 layers), float32" in text
    assert "| sdpa | 977 (1.0x) | 15.3 (1.0x) | 64.00 |" in text
    assert "| favor_plus | 500 (0.51x) | 455 (30x) | 1.10 |" in text
    assert "| sdpa | 2.00 MiB | 128 MiB | 64.00 |" in text
    assert "| favor_plus | 256 KiB (12.50%) | 256 KiB (0.20%) | 1.00 |" in text
    assert "Not measured: eva: out of memory." in text
    assert len(report.terminal_tables(results)) == 2
    assert results.rows[0].cost == results.rows[0].mean
    assert results.rows[2].tokens_per_second is None
