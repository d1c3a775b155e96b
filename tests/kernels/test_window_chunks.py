"""Windows and chunks under one softmax: both implementations against one dense softmax in float64, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.kernels.backends import use_backend
from hf_linattn.kernels.window_chunks import torch_kernel as portable
from hf_linattn.kernels.window_chunks import window_chunk_attention
from hf_linattn.kernels.window_chunks.torch_kernel import WindowChunkInputs

INF = float("inf")
NAMES = ("output", "mass", "query", "key", "value", "chunk key", "chunk bias", "chunk value")
GRADIENTS = (0, 1, 2, 5, 6, 7)
both = pytest.mark.parametrize("backend", ["torch", "triton"])


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def case(
    length: int = 5,
    keys: int = 7,
    chunks: int = 9,
    dim: int = 4,
    width: int = 3,
    *,
    causal: bool = False,
    **options: Any,
) -> list[Any]:
    """Three windows that hide no chunk, some, and all of them."""
    groups, scale = options.get("groups", 2), options.get("scale", 1.0)
    windows = 4
    start = torch.arange(windows) * chunks // windows
    hidden = (start, torch.tensor([chunks] * windows)) if causal else (start, start + chunks // 2)
    return [
        random(groups, windows, length, dim, seed=0, scale=scale),
        random(groups, windows, keys, dim, seed=1, scale=scale),
        random(groups, windows, keys, width, seed=2),
        options.get("visible"),
        causal,
        random(groups, chunks, dim, seed=3, scale=scale),
        random(groups, chunks, seed=4),
        random(groups, chunks, width, seed=5),
        *hidden,
    ]


def dense(
    query: Tensor, key: Tensor, value: Tensor, visible: Any, causal: bool, chunk_key: Tensor, chunk_bias: Tensor,
    chunk_value: Tensor, hidden_from: Tensor, hidden_to: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    groups, windows, length, _ = query.shape
    keys, chunks = key.shape[2], chunk_key.shape[1]
    hidden = torch.zeros(groups, windows, length, keys, dtype=torch.bool, device=query.device)
    if visible is not None:
        hidden = hidden | ~visible
    if causal:
        hidden = hidden | torch.ones(length, keys, device=query.device).triu(keys - length + 1).bool()
    chunk = torch.arange(chunks, device=query.device)
    away = (chunk >= hidden_from[..., None]) & (chunk < hidden_to[..., None])
    away = away.expand(groups, windows, chunks).unsqueeze(2) | (chunk_bias == -INF)[:, None, None]
    far = (
        torch.einsum("gwld,gcd->gwlc", query, chunk_key) + chunk_bias.masked_fill(chunk_bias == -INF, 0)[:, None, None]
    )
    logits = torch.cat([query @ key.mT, far], -1)
    hidden = torch.cat([hidden, away.expand(-1, -1, length, -1)], -1)
    empty = hidden.all(-1, keepdim=True)
    logits = logits.masked_fill(hidden & ~empty, -INF)
    weights = logits.softmax(-1).masked_fill(empty, 0.0)
    output = weights[..., :keys].to(value) @ value
    output = output + torch.einsum("gwlc,gce->gwle", weights[..., keys:].to(value), chunk_value)
    return output, logits.logsumexp(-1).masked_fill(empty.squeeze(-1), -INF)


def differentiated(function: Any, inputs: list[Any], grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    inputs = [z.detach().requires_grad_() if i in GRADIENTS else z for i, z in enumerate(inputs)]
    output, mass = function(*inputs)
    seen = mass > -INF
    found = torch.autograd.grad(
        (output, mass[seen]), [inputs[i] for i in GRADIENTS], (grads[0].to(output), grads[1].to(mass)[seen])
    )
    return [output.detach(), mass.detach(), *found]


def wide(inputs: list[Any]) -> list[Any]:
    return [z.double() if isinstance(z, Tensor) and z.is_floating_point() else z for z in inputs]


def cotangents(inputs: list[Any]) -> tuple[Tensor, Tensor]:
    query, value = inputs[0], inputs[2]
    shape = query.shape[:3]
    return random(*shape, value.shape[-1], seed=6).to(value), random(*shape, seed=7).to(query.device)


def check(backend: str, inputs: list[Any], limit: float = 2e-5) -> list[Tensor]:
    grads = cotangents(inputs)
    with use_backend(backend):
        found = differentiated(window_chunk_attention, inputs, grads)
    expected = differentiated(dense, wide(inputs), grads)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert not a.isnan().any(), name
        torch.testing.assert_close(a.double(), b, rtol=limit, atol=limit, msg=lambda m, n=name: f"{n}: {m}")
    return found


@both
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("length", "keys", "chunks", "dim", "width"),
    [(1, 1, 1, 1, 1), (5, 5, 40, 4, 3), (17, 33, 6, 20, 16), (3, 20, 70, 3, 5)],
)
def test_is_one_softmax(backend: str, causal: bool, length: int, keys: int, chunks: int, dim: int, width: int) -> None:
    check(backend, case(length, keys, chunks, dim, width, causal=causal))


HIDDEN = [(0, 0), (0, 70), (70, 70), (16, 48), (5, 39), (33, 64), (60, 100), (40, 10), (-3, 3)]


@pytest.mark.parametrize("hidden", HIDDEN)
def test_hidden_ranges(hidden: tuple[int, int]) -> None:
    """Tiles that are hidden as a whole, in part, not at all; ranges that are empty or end beyond the chunks."""
    inputs = case(3, 4, 70)
    inputs[8:] = [torch.tensor([h] * 4) for h in hidden]
    check("torch", inputs)
    inputs[8:] = [torch.tensor([[h, h, 1, 20], [0, h, h, 69]]) for h in hidden]  # of each group its own
    check("torch", inputs)


@both
@pytest.mark.parametrize("of", ["windows", "groups"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_window_hides_its_own_range(backend: str, number: int, of: str) -> None:
    inputs, some = case(3, 4, 70), [HIDDEN[i % len(HIDDEN)] for i in range(4 * number, 4 * number + 4)]
    inputs[8:] = [torch.tensor(h) for h in zip(*some, strict=True)]
    if of == "groups":
        inputs[8:] = [torch.stack([h, h.roll(1)]) for h in inputs[8:]]
    check(backend, inputs)


# A window at a time, two of the four, all of one group, and of several groups.
@pytest.mark.parametrize("tile", [1, 160, 320, 640, 960])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_tiles_are_added_up(tile: int, causal: bool, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case(5, 7, 9, causal=causal, groups=5, visible=random(5, 4, 5, 7, seed=9) > -1)
    if own:  # of each group its own hidden chunks
        inputs[8:] = [torch.stack([z.roll(i) for i in range(5)]) for z in inputs[8:]]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setitem(portable._TILE, "cpu", tile)
    tiles = list(
        portable._tiles(WindowChunkInputs(*inputs[:4], *inputs[5:8], *(z.expand(5, 4) for z in inputs[8:])), causal)
    )
    assert len(tiles) == {1: 20, 160: 10, 320: 5, 640: 3, 960: 2}[tile]
    check("torch", inputs)


@both
@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (1, 4, 1, 7), (1, 1, 5, 7), (2, 4, 1, 7)])
def test_masks_of_windows(backend: str, shape: tuple[int, ...]) -> None:
    check(backend, case(visible=random(*shape, seed=9) > 0, causal=shape[1] == 4))


@both
@pytest.mark.parametrize("causal", [False, True])
def test_rows_that_see_nothing(backend: str, causal: bool) -> None:
    visible = torch.ones(2, 4, 5, 7, dtype=torch.bool)
    visible[0, 3, 2] = visible[1, 1] = False
    inputs = case(visible=visible, causal=causal)
    inputs[6][0] = inputs[6][1, :3] = -INF  # chunk bias: no chunk at all, and no first ones
    inputs[8][1], inputs[9][1] = 3, 99
    found = check(backend, inputs)
    empty = found[1] == -INF
    assert empty[0, 3, 2]
    assert empty[1, 1].all()
    assert (found[0][empty] == 0).all()
    assert (found[2][empty] == 0).all()
    assert (found[6][inputs[6] == -INF] == 0).all()


@both
def test_gradients_of_rows_that_see_nothing(backend: str) -> None:
    """What comes back through a mass of -inf is often NaN."""
    visible = torch.ones(2, 4, 5, 7, dtype=torch.bool)
    visible[0, 3, 2] = False
    inputs = [
        z.float() if i in GRADIENTS else z for i, z in enumerate(case(visible=visible))
    ]  # Triton takes no float64
    inputs[6][0] = -INF
    leaves = [z.requires_grad_() if i in GRADIENTS else z for i, z in enumerate(inputs)]
    with use_backend(backend):
        result, grads = window_chunk_attention(*leaves), cotangents(inputs)
    grads[1][0, 3, 2] = 0.0
    given = [leaves[i] for i in GRADIENTS]
    expected = torch.autograd.grad(tuple(result), given, grads, retain_graph=True)
    grads[1][0, 3, 2] = float("nan")
    assert all(map(torch.equal, torch.autograd.grad(tuple(result), given, grads), expected))


@both
def test_huge_values(backend: str) -> None:
    # Logits of 1e4, which float32 resolves to 1e-3.
    check(backend, case(scale=50.0), limit=5e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both
def test_half_precision_is_no_worse_than_torch(backend: str, dtype: torch.dtype) -> None:
    inputs = [z.to(dtype) if i in GRADIENTS and i != 6 else z for i, z in enumerate(case(8, 16, 20, 8, 8))]
    grads = cotangents(inputs)
    expected, plain = differentiated(dense, wide(inputs), grads), differentiated(dense, inputs, grads)
    with use_backend(backend):
        found = differentiated(window_chunk_attention, inputs, grads)
    for name, a, b, c in zip(NAMES, found, plain, expected, strict=True):
        assert a.dtype == (torch.float32 if name in ("mass", "chunk bias") else dtype), name
        ours_off, plain_off = ((z.double() - c).abs().max() for z in (a, b))
        # Gradients are computed from the result as it was rounded, which those of plain torch are not.
        rounding = 2 * torch.finfo(dtype).eps * c.abs().max()
        assert ours_off <= 2 * plain_off + rounding, f"{name}: off by {ours_off:.1e}, torch by {plain_off:.1e}"


@both
def test_overlapping_windows_are_views(backend: str) -> None:
    inputs = case(4, 8, 6, causal=True)
    tokens = random(2, 20, 4, seed=8)
    inputs[1] = tokens.unfold(1, 8, 4).transpose(-1, -2)
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    check(backend, inputs)


def test_operators_are_well_behaved() -> None:
    inputs = wide(case(2, 3, 4))
    arguments = [z.requires_grad_() if i in GRADIENTS else z for i, z in enumerate(inputs)]
    torch.autograd.gradcheck(lambda *z: tuple(window_chunk_attention(*z)), arguments)
    flat = [*inputs[:4], *inputs[5:8], *(z.expand(2, 4) for z in inputs[8:]), False, "torch"]
    plain = [z.detach() if isinstance(z, Tensor) else z for z in flat]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.hf_linattn.window_chunks.default, plain, test_utils=tests)
    output, mass = window_chunk_attention(*[z.detach() if isinstance(z, Tensor) else z for z in inputs])
    for needs in ([True] * 6, [True, False, False, False, True, False]):
        backward = [output, mass, *plain[:-2], output, mass, needs, False, "torch"]
        torch.library.opcheck(torch.ops.hf_linattn.window_chunks_backward.default, backward, test_utils=tests)


@both
def test_gradients_one_at_a_time(backend: str) -> None:
    inputs = [z.requires_grad_() if i in GRADIENTS else z for i, z in enumerate(case())]
    leaves, grads = [inputs[i] for i in GRADIENTS], cotangents(inputs)
    with use_backend(backend):
        result = tuple(window_chunk_attention(*inputs))
    whole = torch.autograd.grad(result, leaves, grads, retain_graph=True)
    for leaf, expected in zip(leaves, whole, strict=True):
        (alone,) = torch.autograd.grad(result, leaf, grads, retain_graph=True)
        assert torch.equal(alone, expected)


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(InputError, match="got 4 and 5"):
        window_chunk_attention(*case(5, 4, causal=True))
    with use_backend("triton"), pytest.raises(UnsupportedError, match="float64"):
        window_chunk_attention(*wide(case()))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_window_chunks_on_a_gpu(dim: int, causal: bool) -> None:
    inputs = case(64, 128, 300, dim, dim, causal=causal, scale=dim**-0.25)
    inputs = [z.cuda() if isinstance(z, Tensor) else z for z in inputs]
    first, again = check("triton", inputs, limit=2e-4), check("triton", inputs, limit=2e-4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
