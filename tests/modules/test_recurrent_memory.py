"""A layer that reads a sequence piece by piece with a memory gives what it gives on the whole sequence."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import CAUSAL_KINDS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.kernels.backend import use_backend
from hf_linattn.modules.base import AttentionInputs, LayerShape, LinearAttention
from hf_linattn.modules.memory import RecurrentMemory
from hf_linattn.modules.registry import get_kind
from hf_linattn.ops.recurrent.pending import fingerprint

BATCH, HEADS, DIM, TOKENS = 3, 2, 8, 45
SCALING = DIM**-0.5

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "favor_plus": ("favor_plus", {"window_size": 0}),
    "favor_plus-window": ("favor_plus", {"window_size": 4}),
    "favor_plus-overlap": ("favor_plus", {"window_size": 4, "overlap_window": True}),
    "favor_plus-shared": ("favor_plus", {"window_size": 5, "shared_projection": True}),
    "relu": ("favor_plus", {"kernel": "relu"}),
    "relu-without-epsilon": ("favor_plus", {"kernel": "relu", "kernel_epsilon": 0.0}),
    "favor_sharp": ("favor_sharp", {"window_size": 0, "variant": "dense"}),
    "favor_sharp-window": ("favor_sharp", {"window_size": 6}),
    "lara": ("lara", {"window_size": 0}),
    "lara-window": ("lara", {"window_size": 4}),
    "lara-overlap": ("lara", {"window_size": 4, "overlap_window": True}),
    "eva": ("eva", {"window_size": 8, "chunk_size": 4}),
    "eva-overlap": ("eva", {"window_size": 4, "chunk_size": 2, "overlap_window": True}),
    "eva-sum-spread": ("eva", {"window_size": 6, "chunk_size": 3, "proposals": "sum", "weighting": "spread"}),
    "eva-bounded": ("eva", {"window_size": 4, "chunk_size": 2, "max_chunks": 3}),
    "eva-positions": ("eva", {"window_size": 4, "chunk_size": 2, "relative_position": "table"}),
    "eva-published": ("eva", {"window_size": 4, "chunk_size": 2, "conventions": "published"}),
}
CASES |= {
    kind: (kind, {"window_size": 4}) for kind in CAUSAL_KINDS if kind not in {kind for kind, _ in CASES.values()}
}
_SMALL = {"lara": {"num_landmarks": 6}, "eva": {}}


def build(name: str) -> LinearAttention:
    """A layer in float64 with learned parameters and statistics that are not at their first values."""
    kind, changes = CASES[name]
    declared = get_kind(kind)
    config = declared.config_cls(**{**_SMALL.get(kind, {declared.size_field: 16}), **changes})
    layer = declared.module_cls(config, LayerShape(HEADS, DIM, is_causal=True)).double().eval()
    generator = torch.Generator().manual_seed(7)
    calibration = layer.new_calibration()
    if calibration is not None:
        parts = (torch.randn(4, HEADS, 100, DIM, generator=generator).double() for _ in range(3))
        calibration.update(AttentionInputs(*parts, None, scaling=SCALING, is_causal=True))
        layer.set_buffers(calibration.result())
    for buffer in list(layer._buffers):
        layer._buffers[buffer] = layer._buffers[buffer].double()  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return layer


LAYERS: dict[str, LinearAttention] = {}


def get_layer(name: str) -> LinearAttention:
    return LAYERS.setdefault(name, build(name))


def inputs(
    tokens: int = TOKENS, *, mask: Tensor | None = None, seed: int = 0, dtype: Any = torch.float64
) -> list[Tensor]:
    """Query, key, value; NaN where there is padding, which must not be read."""
    generator = torch.Generator().manual_seed(seed)
    parts = [1.5 * torch.randn(BATCH, HEADS, tokens, DIM, generator=generator, dtype=dtype) for _ in range(3)]
    return parts if mask is None else [z.masked_fill(~mask[:, None, :, None], float("nan")) for z in parts]


def in_pieces(
    layer: LinearAttention, parts: list[Tensor], sizes: Any, mask: Tensor | None = None, memory: Any = None
) -> tuple[Tensor, RecurrentMemory]:
    """The layer's output, read in pieces of `sizes` tokens, and the memory."""
    memory = RecurrentMemory() if memory is None else memory
    outputs, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        seen = None if mask is None or bool(mask[:, part].all()) else mask[:, part]
        outputs.append(layer(*(z[:, :, part] for z in parts), seen, scaling=SCALING, memory=memory))
        start += size
    return torch.cat(outputs, dim=2), memory


@st.composite
def pieces(draw: Any) -> tuple[list[int], Tensor | None]:
    """How a sequence is cut, and what of it is padding: nothing, the left, or anything."""
    sizes = draw(st.lists(st.one_of(st.just(1), st.integers(1, 14)), min_size=1, max_size=9))
    tokens = sum(sizes)
    kind = draw(st.sampled_from(["none", "left", "holes"]))
    if kind == "none":
        return sizes, None
    if kind == "left":
        padding = draw(st.lists(st.integers(0, tokens), min_size=BATCH, max_size=BATCH))
        return sizes, torch.arange(tokens) >= torch.tensor(padding)[:, None]
    bits = draw(st.lists(st.booleans(), min_size=BATCH * tokens, max_size=BATCH * tokens))
    return sizes, torch.tensor(bits).view(BATCH, tokens)


@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=12)
@given(cut=pieces())
@torch.no_grad()
def test_pieces_equal_the_whole(name: str, is_static: bool, cut: tuple[list[int], Tensor | None]) -> None:
    sizes, mask = cut
    layer, parts = get_layer(name), inputs(sum(sizes), mask=mask)
    whole = layer(*parts, mask, scaling=SCALING)
    memory = RecurrentMemory(static_tokens=sum(sizes) if is_static else None)
    read, _ = in_pieces(layer, parts, sizes, mask, memory)
    torch.testing.assert_close(read, whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_one_step_is_attend_and_absorb(name: str) -> None:
    """The fast path for one token, against the general one (taken under autograd)."""
    layer, parts = get_layer(name), inputs()
    with torch.no_grad():
        fast, _ = in_pieces(layer, parts, [20] + [1] * 25)
    slow, _ = in_pieces(layer, [z.requires_grad_() for z in parts], [20] + [1] * 25)
    assert slow.requires_grad
    torch.testing.assert_close(fast, slow.detach(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_gradients_through_pieces(name: str) -> None:
    layer = build(name)
    weight = torch.randn(BATCH, HEADS, TOKENS, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def gradients(sizes: Any) -> list[Tensor]:
        parts = [z.requires_grad_() for z in inputs()]
        layer.zero_grad()
        output = in_pieces(layer, parts, sizes)[0] if sizes else layer(*parts, scaling=SCALING)
        (output * weight).sum().backward()
        return [z.grad for z in (*parts, *layer.parameters()) if z.grad is not None]  # type: ignore[misc]

    whole, pieced = gradients(None), gradients([13, 1, 19, 12])
    assert len(whole) == len(pieced) >= 3
    for expected, found in zip(whole, pieced, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


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


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_memory_in_half_precision(name: str) -> None:
    """bfloat16 inputs: near tokens stay bfloat16, slots float32; as close to the whole as rounding allows."""
    layer = copy.deepcopy(get_layer(name)).float()
    layer._buffers = {k: None if b is None else b.float() for k, b in layer._buffers.items()}
    parts = inputs(dtype=torch.float32)
    exact = layer(*parts, scaling=SCALING)
    half = [z.bfloat16() for z in parts]
    read, memory = in_pieces(layer, half, [20] + [1] * 25)
    whole = layer(*half, scaling=SCALING)
    assert read.dtype == torch.bfloat16
    assert memory.state.near.key.dtype == torch.bfloat16
    error = (whole.float() - exact).norm() / exact.norm()
    assert (read.float() - exact).norm() / exact.norm() < 1.5 * error + 1e-3
    huge, _ = in_pieces(layer, [100 * z for z in half], [20] + [1] * 25)
    assert bool(huge.isfinite().all())


@pytest.mark.parametrize("name", ["favor_plus", "favor_sharp", "lara"])
@torch.no_grad()
def test_step_on_triton(name: str) -> None:
    """Without a window a step is one kernel there (run in Triton's interpreter)."""
    pytest.importorskip("triton")
    layer = copy.deepcopy(get_layer(name)).float()
    layer._buffers = {k: None if b is None else b.float() for k, b in layer._buffers.items()}
    parts = inputs(dtype=torch.float32)
    expected, _ = in_pieces(layer, parts, [40, 1, 1, 1])
    with use_backend("triton"):
        found, _ = in_pieces(layer, parts, [40, 1, 1, 1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# -- what must not go unnoticed --------------------------------------------------------------------------------------


@torch.no_grad()
def test_another_layer_or_batch() -> None:
    layer, parts = get_layer("favor_plus-window"), inputs()
    _, memory = in_pieces(layer, parts, [45])
    with pytest.raises(InputError, match="belongs to another layer: .*window_size=4 and window_size=0"):
        in_pieces(get_layer("favor_plus"), parts, [1], memory=memory)
    with pytest.raises(InputError, match="filled by 'favor_plus', given to 'lara'"):
        in_pieces(get_layer("lara"), parts, [1], memory=memory)
    with pytest.raises(InputError, match="holds 3 sequences; got a batch of 2"):
        in_pieces(layer, [z[:2] for z in parts], [1], memory=memory)
    with pytest.raises(InputError, match="same, new tokens"):
        layer(parts[0][:, :, :1], parts[1], parts[2], memory=memory)


@torch.no_grad()
def test_taking_back_what_is_absorbed() -> None:
    _, memory = in_pieces(get_layer("favor_plus"), inputs(), [45])
    with pytest.raises(UnsupportedError, match="activate_past_recording"):
        memory.crop(1)
    memory.crop(0)


@torch.no_grad()
def test_a_mask_that_changes_its_mind() -> None:
    mask = torch.arange(TOKENS) >= torch.tensor([0, 3, 7])[:, None]
    _, memory = in_pieces(get_layer("lara"), inputs(mask=mask), [20, 25], mask)
    memory.check_past(fingerprint(mask))
    other, moved = mask.clone(), mask.clone()
    other[2, 30] = False
    moved[1, 2], moved[1, 20] = True, False
    for wrong, row in ((other, 2), (moved, 1)):
        with pytest.raises(InputError, match=rf"in rows \[{row}\]"):
            memory.check_past(fingerprint(wrong))
    with pytest.raises(InputError, match=r"in rows \[1, 2\]"):
        memory.check_past(None)
    memory.rows(torch.tensor([2, 0, 2]))
    memory.check_past(fingerprint(mask[[2, 0, 2]]))


@torch.no_grad()
def test_a_mask_of_what_was_all_real() -> None:
    _, memory = in_pieces(get_layer("lara"), inputs(), [45])
    everything = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    memory.check_past(None)
    memory.check_past(fingerprint(everything))
    everything[0, 0] = False
    with pytest.raises(InputError, match=r"in rows \[0\]"):
        memory.check_past(fingerprint(everything))


@torch.no_grad()
def test_the_past_after_cropping() -> None:
    mask = torch.arange(TOKENS) >= torch.tensor([0, 3, 7])[:, None]
    memory = RecurrentMemory()
    memory.is_recording = True
    in_pieces(get_layer("lara"), inputs(mask=mask), [5, 20, 20], mask, memory)
    memory.crop(31)
    memory.check_past(fingerprint(mask[:, :14]))


def test_a_layer_that_sees_later_tokens() -> None:
    layer = get_kind("favor_plus").module_cls(get_kind("favor_plus").config_cls(), LayerShape(HEADS, DIM))
    with pytest.raises(UnsupportedError, match="sees later tokens"):
        layer(*inputs(dtype=torch.float32), memory=RecurrentMemory())


def test_noise_over_several_calls() -> None:
    config = get_kind("lara").config_cls(num_landmarks=6, sample_noise=True, window_size=4)
    layer = get_kind("lara").module_cls(config, LayerShape(HEADS, DIM, is_causal=True)).double()
    layer._buffers.update({k: b.double() for k, b in get_layer("lara-window")._buffers.items() if b is not None})
    layer.invalidate()
    with torch.no_grad(), pytest.raises(UnsupportedError, match="sample_noise"):
        in_pieces(layer.train(), inputs(), [20, 25])


@torch.no_grad()
def test_changed_tensors_are_noticed() -> None:
    """The slots are prepared once for many steps; a layer that got other directions prepares them anew."""
    layer, parts = build("favor_plus"), inputs()
    _, memory = in_pieces(layer, parts, [1] * 45)
    before = memory._recurrence
    in_pieces(layer, parts, [1], memory=memory)
    assert memory._recurrence is before
    layer.projection.mul_(1.1)  # type: ignore[operator, union-attr]
    in_pieces(layer, parts, [1], memory=memory)
    assert memory._recurrence is not before


def test_cases_name_every_causal_kind() -> None:
    assert {kind for kind, _ in CASES.values()} == set(CAUSAL_KINDS)
