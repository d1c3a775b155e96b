"""Bidirectional EVA of a sequence shared by processes gives what one process gives, and exchanges what is planned."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_linattn.distributed.collectives import SequenceGroup
from hf_linattn.distributed.layers import attend_across
from hf_linattn.distributed.plan import SharedLayer, expected_traffic
from hf_linattn.errors import UnsupportedError
from hf_linattn.modules.base import LinearAttention
from hf_linattn.modules.contract import AttentionInputs
from hf_linattn.modules.training_place import TrainingPlace
from hf_linattn.ops.eva import short
from tests.distributed.sequence_cases import DIM, HEADS, Case, together
from tests.distributed.sequence_processes import processes
from tests.helpers import random

LAYERS: dict[str, dict[str, Any]] = {
    "sum": {},
    "mean": {"proposals": "mean", "weighting": "spread"},
    "key": {"proposals": "key", "weighting": "none", "proposal_map": "linear_norm"},
    "none": {"proposals": "none", "proposal_map": "none"},
    "dense": {"proposal_map": "dense_norm"},
    "learned": {"learned": True},
    "table": {"relative_position": "table"},
    "t5": {"relative_position": "t5", "weighting": "spread"},
}
WINDOW = 4
# Upper bounds of the number of chunks, for so many windows: chunks that are longer than a part, longer than a window
# (and cut by the borders of parts, or not), a window, half of one, and single tokens.
CHUNKS: dict[str, Callable[[int], int]] = {
    "row": lambda windows: 1,
    "long": lambda windows: max(2, -(-windows // 3)),
    "window": lambda windows: windows,
    "short": lambda windows: 2 * windows,
    "tokens": lambda windows: 100,
}


def cases(count: int) -> dict[str, Case]:
    """By name, for so many processes."""
    found = {}
    overlaps, masks = (False, True), ("whole", "ragged")
    for layer, overlap, chunks, blocks, mask in itertools.product(LAYERS, overlaps, CHUNKS, (1, 2, 3), masks):
        length = blocks * WINDOW
        total = count * length
        # Rows that end in the last part, after the first token of the second, in the first (so that the others are all
        # padding), in the first window, and before the first token.
        lengths = (total, total - length // 2, length + 1, length - 1, 1, 0) if mask == "ragged" else None
        options = {"window_size": WINDOW, "overlap_window": overlap, "num_chunks": CHUNKS[chunks](count * blocks)}
        name = f"{layer}-{'overlapping' if overlap else 'disjoint'}-{chunks}-{blocks}-{mask}"
        found[name] = Case("eva", False, length, lengths, {**options, **LAYERS[layer]})
    return found


ALL = {count: cases(count) for count in (2, 3, 4)}
# Every seventh: all values of all settings come up.
FEW = {count: list(named)[count::7] for count, named in ALL.items()}
PARAMETERS = [
    pytest.param(count, name, marks=[] if name in FEW[count] else [pytest.mark.slow])
    for count, named in ALL.items()
    for name in named
]


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int, Case], list[dict[str, Any]]]]:
    """What each of so many processes makes of a case; they start once."""
    with ExitStack() as stack:
        asked: dict[int, Callable[[Any], list[Any]]] = {}

        def shared(count: int, case: Case) -> list[dict[str, Any]]:
            if count not in asked:
                folder = tmp_path_factory.mktemp(f"eva-{count}")
                asked[count] = stack.enter_context(processes(count, lambda group, task: task.shared(group), folder))
            return asked[count](case)

        yield shared


def check(case: Case, parts: list[dict[str, Any]]) -> None:
    found, expected = together(parts), case.expected(len(parts))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    for rank, part in enumerate(parts):
        assert part["received"] == expected_traffic(plan_of(case), len(parts), rank)


def plan_of(case: Case) -> SharedLayer:
    options = case.settings
    return SharedLayer(
        kind="eva",
        is_causal=False,
        rows=len(case.lengths or (0, 0)),
        heads=HEADS,
        head_dim=DIM,
        length=case.length,
        slots=options["num_chunks"],
        window_size=options["window_size"],
        overlap_window=options["overlap_window"],
        num_global_tokens=options.get("num_global_tokens", 0),
        learned=options.get("learned", False),
        sends_queries=options.get("proposals", "sum") in ("sum", "mean"),
        has_spread=options.get("weighting") == "spread",
        is_masked=case.lengths is not None,
        is_random=bool(options.get("sample_noise") or options.get("slot_dropout")),
        token_bytes=8,
    )


@pytest.mark.parametrize(("count", "name"), PARAMETERS)
def test_shared_is_as_in_one_process_and_as_planned(share: Any, count: int, name: str) -> None:
    check(ALL[count][name], share(count, ALL[count][name]))


def test_windows_of_a_shorter_row_may_reach_further(share: Any) -> None:
    # Half a window in whole chunks: 3 tokens with chunks of 3, in the first row, but 4 with those of 2 in the second.
    options = {"window_size": 6, "overlap_window": True, "num_chunks": 8}
    case = Case("eva", False, 12, (24, 16), options)
    check(case, share(2, case))


@given(data=st.data())
@settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_shape(share: Any, data: st.DataObject) -> None:
    window, count = data.draw(st.integers(1, 6)), data.draw(st.sampled_from((1, 2, 3)))
    length = window * data.draw(st.integers(1, 4))
    total = count * length
    lengths = data.draw(st.none() | st.lists(st.integers(0, total), min_size=1, max_size=3).map(tuple))
    options = {
        "window_size": window,
        "overlap_window": data.draw(st.booleans()),
        "num_chunks": data.draw(st.integers(1, total + 1)),
        **LAYERS[data.draw(st.sampled_from(list(LAYERS)))],
    }
    case = Case("eva", False, length, lengths, options)
    check(case, share(count, case))


@dataclass(frozen=True)
class Measured:
    """A case, of which the output in bfloat16 and the memory kept for the backward pass are wanted."""

    case: Case

    def shared(self, group: SequenceGroup) -> tuple[Tensor, int]:
        part = slice(group.rank * self.case.length, (group.rank + 1) * self.case.length)
        layer, (tensors, mask) = self.case.layer(), self.case.tensors(group.size)
        layer.sequence_parallel = lambda layer, inputs: attend_across(layer, inputs, group)
        return measured(layer, [z[:, :, part] for z in tensors[:3]], None if mask is None else mask[:, part])


def measured(layer: LinearAttention[Any], tokens: list[Tensor], mask: Tensor | None) -> tuple[Tensor, int]:
    output = layer.bfloat16()(*(z.bfloat16() for z in tokens), mask)
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    leaves = [z.clone().requires_grad_() for z in tokens]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        layer.double()(*leaves, mask)
    return output.detach(), sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("mask", ["whole", "ragged"])
@pytest.mark.parametrize("layer", ["sum", "learned", "table"])
def test_memory_falls_with_the_number_of_processes(
    share: Any, layer: str, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short, "LONGEST", 0)  # the road that the parts take
    tokens, count = 384, 4
    lengths = None if mask == "whole" else (tokens, tokens - 90)
    options = {"window_size": 8, "num_chunks": 8, "overlap_window": layer == "sum", **LAYERS[layer]}
    whole = Case("eva", False, tokens, lengths, options)
    (*tensors, _), real = whole.tensors(1)
    expected, kept_alone = measured(whole.layer(), tensors, real)
    parts = share(count, Measured(replace(whole, length=tokens // count)))
    assert max(kept for _, kept in parts) < 0.35 * kept_alone
    # In half precision the difference is one of rounding, and the dtype stays.
    found = torch.cat([output for output, _ in parts], 2)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-3)


class Noisy(Case):
    """In a step of training; the first process knows the place of its batch, the others believe in another one."""

    def layer(self) -> LinearAttention[Any]:
        layer = super().layer()
        layer.training_place = TrainingPlace(torch.device("cpu"))
        layer.training_place.tell(11, 100 * dist.get_rank() if dist.is_initialized() else 0, None)
        return layer


@pytest.mark.parametrize("mask", ["whole", "ragged"])
@pytest.mark.parametrize("chunks", ["row", "long", "short"])
@pytest.mark.parametrize(
    "options",
    [
        {"sample_noise": True},
        {"sample_noise": True, "noise_scale": "published", "slot_dropout": 0.3, "overlap_window": True},
        {"learned": True, "slot_dropout": 0.5, "num_global_tokens": 2},
    ],
)
def test_random_numbers_are_those_of_one_process(share: Any, options: dict[str, Any], chunks: str, mask: str) -> None:
    length, count = 2 * WINDOW, 3
    lengths = None if mask == "whole" else (count * length, length + 3, 2)
    options = {"window_size": WINDOW, "overlap_window": False, "num_chunks": CHUNKS[chunks](2 * count), **options}
    case = Noisy("eva", False, length, lengths, options)
    check(case, share(count, case))
    other = Case("eva", False, length, lengths, {**options, "sample_noise": False, "slot_dropout": 0.0})
    assert not torch.allclose(case.expected(count)["output"], other.expected(count)["output"])


@pytest.mark.parametrize(
    ("options", "grid", "words"),
    [
        ({"chunking": "published"}, None, r"chunking='published'.*Set chunking='exclusive'"),
        ({}, (2, 4), r"grid=\(2, 4\)"),
    ],
)
def test_what_would_be_wrong_is_refused(options: dict[str, Any], grid: tuple[int, int] | None, words: str) -> None:
    case, tokens = Case("eva", False, 8, None, {"window_size": 4, **options}), random(1, HEADS, 8, DIM)
    inputs = AttentionInputs(tokens, tokens, tokens, None, 0.5, False, grid, training=True)
    with pytest.raises(UnsupportedError, match=words):
        attend_across(case.layer(), inputs, None)  # type: ignore[arg-type]
