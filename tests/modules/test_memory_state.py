"""The state of a memory: its size, its rows, copies, tokens that are taken back, dtypes."""

from __future__ import annotations

import copy

import pytest
import torch
from memory_layers import BATCH, CASES, DIM, HEADS, SCALING, get_layer, in_pieces, inputs

from hf_linattn.modules.memory import RecurrentMemory


@pytest.mark.parametrize("name", CASES)
def test_a_training_step_makes_no_state(name: str) -> None:
    """Transformers makes a cache in training as well; only a next call pays for it. Rows can be picked before that."""
    layer, parts = get_layer(name), [z.requires_grad_() for z in inputs()]
    memory = RecurrentMemory()
    in_pieces(layer, [z[:, :, :30] for z in parts], [30], memory=memory)
    assert memory.state is None
    assert memory.batch == BATCH
    memory.rows(torch.tensor([2, 0, 1]))
    read, _ = in_pieces(layer, [z[[2, 0, 1], :, 30:] for z in parts], [1, 14], memory=memory)
    assert memory.state is not None
    torch.testing.assert_close(read, layer(*parts, scaling=SCALING)[[2, 0, 1], :, 30:], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("eva") or "bounded" in name])
@torch.no_grad()
def test_state_does_not_grow(name: str) -> None:
    layer, bytes_after = get_layer(name), set()
    memory = RecurrentMemory()
    for seed in range(6):
        in_pieces(layer, inputs(60, seed=seed), [37, *[1] * 23], memory=memory)
        bytes_after.add(memory.nbytes)
    assert len(bytes_after) == 1, bytes_after


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("eva") or "bounded" in name])
@torch.no_grad()
def test_a_long_piece_is_not_kept_alive(name: str) -> None:
    """The tokens that stay are copies, not views of all tokens of the piece. (Both lengths end at one place.)"""
    sizes = {in_pieces(get_layer(name), inputs(tokens), [tokens])[1].nbytes for tokens in (63, 123)}
    assert len(sizes) == 1, sizes


@torch.no_grad()
def test_eva_keeps_one_summary_per_chunk() -> None:
    layer, memory = get_layer("eva"), RecurrentMemory()
    in_pieces(layer, inputs(64), [64], memory=memory)
    half = memory.nbytes
    in_pieces(layer, inputs(64), [64], memory=memory)
    summaries = BATCH * HEADS * (64 // 4) * 2 * DIM * 8
    assert 0 <= memory.nbytes - half - summaries <= summaries // 4


@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_rows_follow_their_beams(name: str, is_static: bool) -> None:
    """Rows out of phase are reordered and repeated; every one goes on as itself."""
    mask = torch.arange(20) >= torch.tensor([0, 3, 14])[:, None]
    layer, first, then = get_layer(name), inputs(20, mask=mask), inputs(15, seed=1)
    memory = RecurrentMemory(static_tokens=40 if is_static else None)
    in_pieces(layer, first, [20], mask, memory)
    order = torch.tensor([2, 2, 0])
    memory.rows(order)
    read, _ = in_pieces(layer, then, [1] * 9 + [6], memory=memory)
    joined = [torch.cat([a[order], b], dim=2) for a, b in zip(first, then, strict=True)]
    whole = layer(*joined, torch.cat([mask[order], torch.ones(3, 15, dtype=torch.bool)], dim=1), scaling=SCALING)
    torch.testing.assert_close(read, whole[:, :, 20:], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_taking_tokens_back(name: str) -> None:
    """While recording tokens can be cropped: what follows is as if they had never been read."""
    layer, parts, other = get_layer(name), inputs(), inputs(30, seed=5)
    memory = RecurrentMemory()
    memory.is_recording = True
    in_pieces(layer, [z[:, :, :20] for z in parts], [11, 9], memory=memory)
    memory.crop(0)
    for wrong, kept in ((4, 1), (1, 0), (5, 5)):
        in_pieces(layer, other, [wrong], memory=memory)
        in_pieces(layer, other, [2], memory=memory)
        memory.crop(wrong + 2)
        start = {1: 20, 0: 21, 5: 21}[kept]
        if kept:
            in_pieces(layer, [z[:, :, start : start + kept] for z in parts], [kept], memory=memory)
            memory.crop(0)
    memory.is_recording = False
    read, _ = in_pieces(layer, [z[:, :, 26:] for z in parts], [1] * 10 + [9], memory=memory)
    torch.testing.assert_close(read, layer(*parts, scaling=SCALING)[:, :, 26:], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["favor_plus-window", "eva"])
@torch.no_grad()
def test_copies_are_independent(name: str) -> None:
    layer, parts = get_layer(name), inputs()
    whole = layer(*parts, scaling=SCALING)
    _, memory = in_pieces(layer, [z[:, :, :30] for z in parts], [30])
    twin = copy.deepcopy(memory)
    in_pieces(layer, inputs(9, seed=9), [9], memory=memory)
    read, _ = in_pieces(layer, [z[:, :, 30:] for z in parts], [1] * 15, memory=twin)
    torch.testing.assert_close(read, whole[:, :, 30:], rtol=0, atol=1e-11)


@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["favor_plus", "lara-window", "eva-bounded", "eva"])
@torch.no_grad()
def test_memory_after_a_reset(name: str, is_static: bool) -> None:
    layer, parts = get_layer(name), inputs()
    memory = RecurrentMemory(static_tokens=50 if is_static else None)
    in_pieces(layer, inputs(seed=3), [30, 1, 14], memory=memory)
    memory.reset()
    read, _ = in_pieces(layer, parts, [20, 1, 24], memory=memory)
    torch.testing.assert_close(read, layer(*parts, scaling=SCALING), rtol=0, atol=1e-11)
