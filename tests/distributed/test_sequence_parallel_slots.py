"""A sequence shared by processes gives what one process gives: slots bidirectional, every kind causal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_linattn.distributed import states
from hf_linattn.distributed.layers import attend_across
from hf_linattn.distributed.plan import SharedLayer, expected_traffic
from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.modules.contract import AttentionInputs
from hf_linattn.modules.memory import RecurrentMemory
from tests.distributed.sequence_cases import DIM, HEADS, Case, together
from tests.distributed.sequence_processes import processes
from tests.helpers import random

WINDOW, CHUNK = 4, 2
SIZES: dict[str, dict[str, Any]] = {
    "favor_plus": {"num_features": 6},
    "favor_sharp": {"num_features": 6},
    "lara": {"num_landmarks": 5},
    "eva": {"chunk_size": CHUNK, "num_chunks": 5},
}
# Settings by name; those of "both" are bidirectional and causal.
LAYERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "global": ("favor_plus", "bidirectional", {"num_global_tokens": 3}),
    "global-row": ("favor_sharp", "bidirectional", {"num_global_tokens": 2}),
    "global-lara": ("lara", "bidirectional", {"proposal_source": "calibrated", "num_global_tokens": 1}),
    "global-learned": ("favor_plus", "bidirectional", {"learned": True, "num_global_tokens": 2}),
    "global-eva": ("eva", "bidirectional", {"chunk_size": None, "proposals": "sum", "num_global_tokens": 2}),
    "global-eva-learned": ("eva", "bidirectional", {"chunk_size": None, "learned": True, "num_global_tokens": 3}),
    "favor_plus": ("favor_plus", "both", {}),
    "learned": ("favor_plus", "both", {"learned": True}),
    "learned-kernel": ("favor_plus", "both", {"learned": True, "normalizer": "kernel"}),
    "relu": ("favor_plus", "both", {"kernel": "relu"}),
    "row": ("favor_sharp", "bidirectional", {}),
    "row-dense": ("favor_sharp", "bidirectional", {"variant": "dense"}),
    "row-sderf": ("favor_sharp", "bidirectional", {"variant": "sderf", "centring": False}),
    "calibrated": ("favor_sharp", "both", {"statistics": "calibrated"}),
    "sharp-learned": ("favor_sharp", "both", {"learned": True}),
    "sharp-learned-kernel": ("favor_sharp", "both", {"learned": True, "normalizer": "kernel"}),
    "lara": ("lara", "both", {"proposal_source": "calibrated"}),
    "lara-learned": ("lara", "both", {"learned": True}),
    "eva": ("eva", "causal", {}),
    "eva-sum": ("eva", "causal", {"proposals": "sum"}),
    "eva-spread": ("eva", "causal", {"weighting": "spread"}),
    "eva-bounded": ("eva", "causal", {"max_chunks": 3, "weighting": "spread"}),
    "eva-learned": ("eva", "causal", {"learned": True}),
    "eva-learned-bounded": ("eva", "causal", {"learned": True, "max_chunks": 1}),
    "eva-published": ("eva", "causal", {"chunking": "published"}),
    "eva-positions": ("eva", "causal", {"relative_position": "t5"}),
}
WINDOWS = {"alone": (0, False), "disjoint": (WINDOW, False), "overlapping": (WINDOW, True)}
MASKS = ("whole", "ragged")


def case_of(layer: str, direction: str, window: str, blocks: int, mask: str, count: int) -> Case | None:
    """`None` for what does not exist. With a window a process has so many blocks, without one a number of its own."""
    kind, directions, options = LAYERS[layer]
    size, overlaps = WINDOWS[window]
    has_none = (kind == "eva" and not size) or (size and options.get("kernel"))
    if directions not in ("both", direction) or has_none:
        return None
    length = size * blocks if size else 2 * blocks + 1
    total = count * length
    # Rows that end in the last part, in the first (so that others are all padding), and before the first token.
    lengths = (total, total - length // 2 - 1, length - 1, 0) if mask == "ragged" else None
    options = {**SIZES[kind], "window_size": size, "overlap_window": overlaps, **options}
    return Case(kind, direction == "causal", length, lengths, options)


def cases(count: int, blocks: list[int], masks: tuple[str, ...]) -> dict[str, Case]:
    """By name, for so many processes."""
    found = {}
    for layer in LAYERS:
        for direction in ("bidirectional", "causal"):
            for window in WINDOWS:
                for number in blocks:
                    for mask in masks:
                        case = case_of(layer, direction, window, number, mask, count)
                        if case is not None:
                            found[f"{layer}-{direction}-{window}-{number}-{mask}"] = case
    return found


# So that all numbers of blocks come up: with one the first is the last, with two none is between these. By default the
# numbers of processes go round, so that every one meets every layer, direction and window.
EACH = {2: cases(2, [3], ("ragged",)), 3: cases(3, [1], ("whole",)), 4: cases(4, [2], ("ragged",))}
FEW: dict[int, list[str]] = {count: [] for count in EACH}
for number, layer in enumerate(LAYERS):
    for place, (count, named) in enumerate(EACH.items()):
        own = [name for name in named if name.startswith((f"{layer}-bidirectional", f"{layer}-causal"))]
        FEW[count] += own[(place + number) % 3 :: 3] or own[:1]
ALL = {count: cases(count, [1, 2, 3], MASKS) for count in FEW}
IDS = [(count, name) for count, named in FEW.items() for name in named]
SLOW_IDS = [(count, name) for count, named in ALL.items() for name in named if name not in FEW[count]]
PARAMETERS = [*IDS, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW_IDS)]


Runs = Callable[[int, Case], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """What so many processes make of a case; they are started once."""
    folder, started = tmp_path_factory.mktemp("sequence"), {}
    with ExitStack() as stack:

        def run(count: int, case: Case) -> list[dict[str, Any]]:
            if count not in started:
                work = processes(count, lambda group, task: task.shared(group), folder / str(count))
                started[count] = stack.enter_context(work)
            return started[count](case)

        yield run


def assert_same(case: Case, count: int, parts: list[dict[str, Any]]) -> None:
    found, expected = together(parts), case.expected(count)
    assert found.keys() == expected.keys()
    # A row of fewer tokens than dimensions has principal axes that rounding turns.
    atol = 1e-8 if case.settings.get("variant") else 1e-11
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def plan_of(case: Case) -> SharedLayer:
    options, learned = case.settings, bool(case.settings.get("learned"))
    is_row = case.kind == "favor_sharp" and not (case.is_causal or learned or options.get("statistics"))
    slots = options.get("num_features") or options.get("num_chunks")
    # LARA draws two samples of every calibrated proposal, and their negatives.
    slots = slots or options["num_landmarks"] * (1 if learned else 4)
    return SharedLayer(
        kind=case.kind,
        is_causal=case.is_causal,
        rows=len(case.lengths or (0, 0)),
        heads=HEADS,
        head_dim=DIM,
        length=case.length,
        # LARA draws two samples of every calibrated proposal, and their negatives.
        slots=options.get("num_features")
        or options.get("num_chunks")
        or options["num_landmarks"] * (1 if learned else 4),
        window_size=options["window_size"],
        overlap_window=options["overlap_window"],
        chunk_size=options.get("chunk_size", 1),
        max_chunks=options.get("max_chunks"),
        num_global_tokens=options.get("num_global_tokens", 0),
        statistics=options.get("variant", "saderf") if is_row else None,
        is_generalized="kernel" in options,
        learned=learned,
        sends_queries=options.get("proposals") == "sum",
        has_spread=options.get("weighting") == "spread",
        is_masked=case.lengths is not None,
        token_bytes=8,
    )


@pytest.mark.parametrize(("count", "name"), PARAMETERS)
def test_it_is_what_one_process_gives_with_the_planned_exchanges(runs: Runs, count: int, name: str) -> None:
    case = ALL[count][name]
    parts = runs(count, case)
    assert_same(case, count, parts)
    for rank, part in enumerate(parts):
        assert part["received"] == expected_traffic(plan_of(case), count, rank)


def test_many_processes_merge_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "GATHERED", 3)
    with processes(4, lambda group, task: task.shared(group), tmp_path / "many") as ask:
        for direction, window in itertools.product(("bidirectional", "causal"), WINDOWS):
            for blocks in (1, 2):
                case = ALL[4][f"favor_plus-{direction}-{window}-{blocks}-ragged"]
                parts = ask(case)
                assert_same(case, 4, parts)
                for rank, part in enumerate(parts):
                    assert part["received"] == expected_traffic(plan_of(case), 4, rank)
                    assert "gather" not in part["received"]


@given(data=st.data())
@settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_shape(runs: Runs, data: st.DataObject) -> None:
    layer, direction = data.draw(st.sampled_from(["favor_plus", "row", "lara", "learned", "eva"])), "bidirectional"
    kind, directions, options = LAYERS[layer]
    if directions == "causal" or (directions == "both" and data.draw(st.booleans())):
        direction = "causal"
    window = 2 * data.draw(st.integers(1 if kind == "eva" else 0, 3))
    length = data.draw(st.integers(1, 9 // max(1, window) + 1)) * max(1, window)
    lengths = data.draw(st.none() | st.lists(st.integers(0, 3 * length), min_size=1, max_size=3).map(tuple))
    options = {"window_size": window, "overlap_window": bool(window) and data.draw(st.booleans()), **options}
    case = Case(kind, direction == "causal", length, lengths, {**SIZES[kind], **options})
    assert_same(case, 3, runs(3, case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["favor_plus-bidirectional-alone", "row-bidirectional-overlapping", "eva-causal-overlapping"]
)
def test_in_other_dtypes(runs: Runs, name: str, dtype: torch.dtype) -> None:
    case = replace(ALL[2][f"{name}-2-ragged"], dtype=dtype)
    parts, expected = runs(2, case), case.expected(2)
    atol = 1e-4 if dtype == torch.float32 else 0.1
    for key, value in together(parts).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=atol)  # and of the same dtype


REFUSED: dict[str, tuple[str, bool, dict[str, Any], str]] = {
    "heavy": ("favor_plus", False, {"num_heavy_keys": 3}, "num_heavy_keys=3.*Set it to 0"),
    "dropout": ("favor_plus", True, {"slot_dropout": 0.1}, "slot_dropout=0.1 in training.*Set it to 0"),
    "landmarks": ("lara", False, {}, "landmarks.*Set proposal_source='calibrated'"),
    "noise": ("lara", True, {"sample_noise": True}, "sample_noise=True in training.*Set it to False"),
    "convolution": ("favor_plus", False, {"learned": True, "value_convolution": True}, "value_convolution=True"),
    "chunks": ("eva", True, {"chunking": "published", "chunk_size": None}, "Set chunk_size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused(name: str) -> None:
    kind, is_causal, options, words = REFUSED[name]
    case = Case(kind, is_causal, 8, None, {**SIZES[kind], "window_size": 4, **options})
    layer, tokens = case.layer(), random(1, HEADS, 8, DIM)
    with pytest.raises(UnsupportedError, match=words):
        attend_across(layer, AttentionInputs(tokens, tokens, tokens, None, 0.5, is_causal, training=True), None)  # type: ignore[arg-type]


def test_parts_that_do_not_fit_are_refused() -> None:
    case = Case("favor_plus", False, 8, None, {"num_features": 6, "window_size": 4})
    layer, tokens, other = case.layer(), random(1, HEADS, 6, DIM), random(1, HEADS, 8, DIM)
    wide = Case("favor_plus", False, 8, None, {"num_features": 6, "window_size": 2, "num_global_tokens": 7}).layer()
    with pytest.raises(InputError, match="num_global_tokens=7; got parts of 6 tokens"):
        attend_across(wide, AttentionInputs(tokens, tokens, tokens, None, 0.5, False), None)  # type: ignore[arg-type]
    for query, grid, words in (
        (tokens, None, "multiple of window_size=4 tokens; got 6"),
        (other, None, "got 8 queries and 6 keys"),
        (tokens, (2, 3), r"not images; got grid=\(2, 3\)"),
    ):
        inputs = AttentionInputs(query, tokens, tokens, None, 0.5, False, grid)
        with pytest.raises((InputError, UnsupportedError), match=words):
            attend_across(layer, inputs, None)  # type: ignore[arg-type]


def test_memory_and_ablation_are_refused_beside_it() -> None:
    layer, tokens = Case("favor_plus", True, 8, None, {"num_features": 6}).layer(), random(1, HEADS, 8, DIM)
    layer.sequence_parallel = lambda layer, inputs: inputs.query
    with pytest.raises(UnsupportedError, match="use_cache=False"):
        layer(tokens, tokens, tokens, memory=RecurrentMemory())
    layer.ablation = "window_alone"
    with pytest.raises(UnsupportedError, match=r"Leave ablated"):
        layer(tokens, tokens, tokens)
