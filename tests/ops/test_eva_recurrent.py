"""Causal EVA a piece at a time gives what it gives on the whole sequence, whatever the pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers import assert_same, examples, random
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.functional import eva_attention
from hf_linattn.ops.eva import recurrent
from hf_linattn.ops.eva import state as states
from hf_linattn.ops.eva.recurrent import EvaRecurrence, eva_recurrence
from hf_linattn.ops.eva.state import EvaState
from hf_linattn.ops.recurrent.protocol import state_tensors

BATCH, HEADS, DIM, VALUE_DIM = 3, 2, 3, 4
SCALING = 0.7
quick = settings(max_examples=examples(80), derandomize=True, database=None)
Parts = Sequence[Tensor]


def inputs(tokens: int, mask: Tensor | None = None, batch: int = BATCH) -> list[Tensor]:
    """Query, key, value; NaN where there is padding, which must not be read."""
    parts = [random(batch, HEADS, tokens, dim, seed=i) * 1.3 for i, dim in enumerate((DIM, DIM, VALUE_DIM))]
    return parts if mask is None else [z.masked_fill(~mask[:, None, :, None], float("nan")) for z in parts]


def whole(parts: Parts, mask: Tensor | None = None, **options: Any) -> Tensor:
    return eva_attention(*parts, is_causal=True, scaling=SCALING, key_mask=mask, **options)


def read(
    recurrence: EvaRecurrence,
    parts: Parts,
    sizes: Sequence[int],
    mask: Tensor | None = None,
    *,
    static_tokens: int | None = None,
    is_fast: bool = True,
) -> tuple[Tensor, EvaState]:
    """All outputs, and the state behind the last token. `is_fast`: pieces of one token are steps."""
    state = recurrence.start(parts[1], parts[2], static_tokens=static_tokens)
    outputs, begin = [], 0
    for size in sizes:
        query, key, value = (z[:, :, begin : begin + size] for z in parts)
        seen = None if mask is None or bool(mask[:, begin : begin + size].all()) else mask[:, begin : begin + size]
        begin += size
        if size == 1 and is_fast and (seen is None or static_tokens is not None):
            output, state = recurrence.step(query, key, value, state, None if seen is None else seen[:, 0])
        else:
            output = recurrence.attend(query, key, value, seen, state)
            state = recurrence.absorb(query, key, value, seen, state)
        outputs.append(output)
    return torch.cat(outputs, dim=2), state


@st.composite
def settings_of_layers(draw: st.DrawFn) -> dict[str, Any]:
    window, chunk = draw(st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4), (6, 2), (6, 3), (8, 2)]))
    options: dict[str, Any] = {
        "window_size": window,
        "chunk_size": chunk,
        "overlap_window": draw(st.booleans()),
        "chunking": draw(st.sampled_from(["exclusive", "exclusive", "published"])),
        "proposals": draw(st.sampled_from(["sum", "mean", "key", "none"])),
        "weighting": draw(st.sampled_from(["none", "size", "spread"])),
    }
    if options["chunking"] == "exclusive":
        options["max_chunks"] = draw(st.sampled_from([None, 1, 2, 3, 5]))
    if draw(st.booleans()):
        maps = random(2, HEADS, DIM, DIM, seed=5) * 0.5
        options["key_map"] = lambda z: z + z @ maps[0]
        options["query_map"] = lambda z: z @ maps[1]
    if draw(st.booleans()):
        reach = window * (2 if draw(st.booleans()) else 1) if options["overlap_window"] else 0
        options["window_bias"] = random(draw(st.sampled_from([1, HEADS])), window, window + reach, seed=6)
    return options


@st.composite
def pieces(draw: st.DrawFn) -> tuple[list[int], Tensor | None]:
    """How a sequence is cut, and what of it is padding: nothing, the left, or anything."""
    sizes = draw(st.lists(st.one_of(st.just(1), st.integers(1, 19)), min_size=1, max_size=12))
    tokens = sum(sizes)
    kind = draw(st.sampled_from(["none", "left", "holes"]))
    if kind == "none":
        return sizes, None
    if kind == "left":
        padding = draw(st.lists(st.integers(0, tokens), min_size=BATCH, max_size=BATCH))
        return sizes, torch.arange(tokens) >= torch.tensor(padding)[:, None]
    share = draw(st.sampled_from([0.3, 0.8]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return sizes, torch.rand(BATCH, tokens, generator=generator) < share


@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
@quick
@given(options=settings_of_layers(), cut=pieces())
@torch.no_grad()
def test_pieces_equal_the_whole(
    is_static: bool, options: dict[str, Any], cut: tuple[list[int], Tensor | None]
) -> None:
    sizes, mask = cut
    parts = inputs(sum(sizes), mask)
    recurrence = eva_recurrence(**options, scaling=SCALING)
    ours, state = read(recurrence, parts, sizes, mask, static_tokens=sum(sizes) if is_static else None)
    assert_same(ours, whole(parts, mask, **options))
    storages = set()
    for tensor in state_tensors(state):
        assert not torch.isnan(tensor).any()
        # A view would keep all of what it is a view of; and tensors that are written to must not be the same.
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        storages.add(tensor.untyped_storage().data_ptr() if tensor.numel() else len(storages))
    assert len(storages) == len(list(state_tensors(state)))


@quick
@given(options=settings_of_layers(), sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6))
@torch.no_grad()
def test_steps_equal_pieces_of_one_token(options: dict[str, Any], sizes: list[int]) -> None:
    """The state too: whichever way tokens were taken in, as many summaries with the same contents are left."""
    tokens = sum(sizes)
    parts, recurrence = inputs(tokens), eva_recurrence(**options, scaling=SCALING)
    fast, first = read(recurrence, parts, [1] * tokens)
    slow, second = read(recurrence, parts, [1] * tokens, is_fast=False)
    _, third = read(recurrence, parts, sizes, is_fast=False)
    assert_same(fast, slow)
    for other in (second, third):
        assert other.counts == first.counts
        for ours, expected in zip(state_tensors(other), state_tensors(first), strict=True):
            assert_same(ours, expected)


def long_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    shared = {"window_size": 4, "chunk_size": 2, "proposals": "key"}
    yield "default", shared
    yield "overlap", {**shared, "overlap_window": True}
    yield "bounded", {**shared, "max_chunks": 5, "weighting": "spread"}
    yield "queries", {**shared, "proposals": "sum"}
    yield "published", {**shared, "chunking": "published", "proposals": "mean", "weighting": "none"}


LONG = [pytest.param(options, id=name) for name, options in long_rows()]


@pytest.mark.parametrize("options", LONG)
@torch.no_grad()
def test_one_by_one_over_many_windows(options: dict[str, Any]) -> None:
    parts = inputs(150)
    mask = torch.arange(150) >= torch.tensor([0, 30, 73])[:, None]
    recurrence = eva_recurrence(**options, scaling=SCALING)
    assert_same(read(recurrence, parts, [1] * 150)[0], whole(parts, **options))
    # Rows at different places of their windows, then steps.
    ours, _ = read(recurrence, parts, [80] + [1] * 70, mask)
    assert_same(ours, whole(parts, mask, **options))


@pytest.mark.parametrize("options", LONG)
@torch.no_grad()
def test_rows_can_be_picked(options: dict[str, Any]) -> None:
    parts, mask = inputs(60), torch.arange(60) >= torch.tensor([20, 7, 0])[:, None]
    recurrence, index = eva_recurrence(**options, scaling=SCALING), torch.tensor([2, 0, 2, 1])
    expected = whole([z[index] for z in parts], mask[index], **options)
    for static_tokens in (None, 60):
        _, state = read(recurrence, [z[:, :, :41] for z in parts], [41], mask[:, :41], static_tokens=static_tokens)
        state = state.rows(index)
        for t in range(41, 60):
            output, state = recurrence.step(*(z[index, :, t : t + 1] for z in parts), state)
            assert_same(output, expected[:, :, t : t + 1])


@pytest.mark.parametrize("options", LONG)
def test_gradients_reach_what_was_absorbed(options: dict[str, Any]) -> None:
    weight = random(BATCH, HEADS, 40, VALUE_DIM, seed=9)
    mask = torch.arange(40) >= torch.tensor([0, 3, 11])[:, None]

    def gradients(sizes: Sequence[int] | None, mask: Tensor | None) -> list[Tensor]:
        parts = [z.requires_grad_() for z in inputs(40)]
        recurrence = eva_recurrence(**options, scaling=SCALING)
        out = read(recurrence, parts, sizes, mask, is_fast=False)[0] if sizes else whole(parts, mask, **options)
        return list(torch.autograd.grad((out * weight).sum(), parts))

    for given_mask in (None, mask):
        for ours, expected in zip(gradients([13, 1, 7, 19], given_mask), gradients(None, given_mask), strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def test_tensors_that_are_written_to_are_not_shared() -> None:
    for _, options in long_rows():
        state = eva_recurrence(**options, scaling=SCALING).start(*inputs(5)[1:], static_tokens=30)
        assert len({z.data_ptr() for z in state_tensors(state)}) == len(list(state_tensors(state)))


@torch.no_grad()
def test_no_state_is_changed() -> None:
    parts = inputs(30)
    for _, options in long_rows():
        recurrence = eva_recurrence(**options, scaling=SCALING)
        for static_tokens in (None, 30):
            _, state = read(recurrence, [z[:, :, :23] for z in parts], [23], static_tokens=static_tokens)
            before = [z.clone() for z in state_tensors(state)]
            for size in (1, 6):
                new = [z[:, :, 23 : 23 + size] for z in parts]
                recurrence.attend(*new, None, state)
                recurrence.absorb(*new, None, state)
            recurrence.step(*(z[:, :, 23:24] for z in parts), state)
            for old, now in zip(before, state_tensors(state), strict=True):
                assert torch.equal(old, now)


@torch.no_grad()
def test_an_eighth_of_a_cache_of_keys_and_values() -> None:
    """Default window and chunks, 2048 tokens and more, in every dtype; each tensor has a storage of its own."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for weighting in ("size", "spread"):
            recurrence = eva_recurrence(
                window_size=32, chunk_size=16, proposals="key", weighting=weighting, scaling=0.125
            )
            for sizes in ([2048], [2048, *[1] * 31], [1000, 1000, 300]):
                parts = [torch.randn(1, 2, sum(sizes), 64, dtype=dtype) for _ in range(3)]
                _, state = read(recurrence, parts, sizes)
                stored = {z.untyped_storage().data_ptr(): z.untyped_storage().nbytes() for z in state_tensors(state)}
                assert sum(stored.values()) <= 2 * parts[1].nbytes / 8
                assert state.chunks.key_mean.dtype == state.chunks.value.dtype == dtype


@torch.no_grad()
def test_slot_dropout_drops_earlier_chunks_too() -> None:
    """Exact keys are never dropped: the window's values are 0, those of all chunks 1."""
    zero, one = torch.zeros(1, 1, 16, 2), torch.ones(1, 1, 16, 2)
    for bound in (None, 2):
        shared: dict[str, Any] = {"window_size": 4, "chunk_size": 2, "max_chunks": bound, "scaling": 1.0}
        recurrence = eva_recurrence(**shared, slot_dropout=0.5)
        state = recurrence.absorb(zero, zero, one, None, recurrence.start(zero, one))
        torch.manual_seed(0)
        new = zero[:, :, :1]
        seen = torch.cat([recurrence.attend(new, new, new, None, state) for _ in range(20)]).unique()
        assert seen.numel() > 1
        plain = eva_recurrence(**shared).attend(new, new, new, None, state)
        torch.testing.assert_close(plain, torch.full_like(plain, 16 / 17))


@torch.no_grad()
def test_a_bounded_state_does_not_grow() -> None:
    recurrence = eva_recurrence(
        window_size=8, chunk_size=4, max_chunks=6, proposals="key", weighting="spread", scaling=SCALING
    )
    key, value = random(1, HEADS, 8, DIM), random(1, HEADS, 8, VALUE_DIM)
    state, sizes = recurrence.start(key, value), set()
    for _ in range(40):
        state = recurrence.absorb(None, key, value, None, state)
        sizes.add(sum(z.nbytes for z in state_tensors(state)))
    assert len(sizes) == 1
    assert state.older is not None
    torch.testing.assert_close(state.older.log_weight.exp(), torch.full((1, HEADS, 1), (80 - 6) * 4.0).double())


@torch.no_grad()
def test_half_precision_keeps_what_fits() -> None:
    """Summaries are rounded to the model's dtype, as its keys are. Variances of large keys do not fit into float16."""
    options = {"window_size": 8, "chunk_size": 4, "weighting": "spread"}
    for bound in (None, 4):
        exact = whole(inputs(90), max_chunks=bound, **options)
        recurrence = eva_recurrence(**options, max_chunks=bound, scaling=SCALING)
        for dtype in (torch.bfloat16, torch.float16):
            parts = [z.to(dtype) for z in inputs(90)]
            plain = float((whole(parts, max_chunks=bound, **options).double() - exact).abs().max())
            for sizes in ([60] + [1] * 30, [30, 30, 30]):
                ours, state = read(recurrence, parts, sizes)
                assert ours.dtype == dtype
                assert float((ours.double() - exact).abs().max()) < 3 * plain + 1e-3
                large, state = read(recurrence, [z * 300 for z in parts], sizes)
                assert torch.isfinite(large).all()
                assert all(not torch.isnan(z).any() for z in state_tensors(state))


@torch.no_grad()
def test_more_tokens_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static shapes with too little room raise; nothing is dropped."""
    parts = inputs(60)
    recurrence = eva_recurrence(window_size=4, chunk_size=2, scaling=SCALING)
    read(recurrence, parts, [30] + [1] * 30, static_tokens=60)
    cuts = ([30] + [1] * 30, [60], [30, 30])
    for sizes in cuts:
        with pytest.raises(InputError, match="room for the chunks of 40 tokens; got more.*max_chunks"):
            read(recurrence, parts, sizes, static_tokens=40)
    for module in (recurrent, states):
        monkeypatch.setattr(module, "may_look", lambda _: False)  # as on a GPU
    for sizes in cuts:
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            read(recurrence, parts, sizes, static_tokens=40)


@pytest.mark.parametrize("options", LONG)
@torch.no_grad()
def test_without_looking_at_values(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (recurrent, states):
        monkeypatch.setattr(module, "may_look", lambda _: False)
    parts, mask = inputs(60), torch.arange(60) >= torch.tensor([0, 7, 20])[:, None]
    recurrence = eva_recurrence(**options, scaling=SCALING)
    ours, _ = read(recurrence, parts, [10] + [1] * 20 + [5] + [1] * 25, mask, static_tokens=60)
    assert_same(ours, whole(parts, mask, **options))


@torch.no_grad()
def test_compiled_steps() -> None:
    parts = [z.float() for z in inputs(45)]
    mask = torch.arange(45) >= torch.tensor([0, 5, 20])[:, None]
    for bound in (None, 2):
        options: dict[str, Any] = {"window_size": 4, "chunk_size": 2, "weighting": "spread", "max_chunks": bound}
        recurrence = eva_recurrence(**options, scaling=SCALING)
        _, state = read(recurrence, [z[:, :, :30] for z in parts], [30], mask[:, :30], static_tokens=45)
        step = torch.compile(recurrence.step, fullgraph=True, backend="eager")
        expected = whole(parts, mask, **options)
        for t in range(30, 45):
            output, state = step(*(z[:, :, t : t + 1] for z in parts), state, torch.ones(BATCH, dtype=torch.bool))
            torch.testing.assert_close(output, expected[:, :, t : t + 1])


def test_options_without_a_recurrent_form() -> None:
    shared: dict[str, Any] = {"window_size": 4, "scaling": 1.0}
    with pytest.raises(UnsupportedError, match="EVA needs a chunk_size to continue.*got None.*use_cache=False"):
        eva_recurrence(**shared, chunk_size=None, chunking="published")
    with pytest.raises(InputError, match="chunk_size must divide window_size"):
        eva_recurrence(**shared, chunk_size=3)
    with pytest.raises(UnsupportedError, match="max_chunks=3.*chunking='published'"):
        eva_recurrence(**shared, chunk_size=2, max_chunks=3, chunking="published")
    with pytest.raises(InputError, match=r"window_bias must be \[heads or 1, window_size, slots\] here; got \(4, 4\)"):
        eva_recurrence(**shared, chunk_size=2, window_bias=torch.zeros(4, 4))
    with pytest.raises(InputError, match="proposals must be one of"):
        eva_recurrence(**shared, chunk_size=2, proposals="keys")
