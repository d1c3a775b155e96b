"""Inputs of a few thousand tokens: every loop over tiles, groups, segments and windows runs more than once.

The references are the formulas without any stabilisation, in float64 on small numbers: one matrix of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_linattn.functional import (
    draw_projection,
    eva_attention,
    favor_attention,
    lara_attention,
    sample_proposals,
    softmax_attention,
)
from hf_linattn.ops.lara.features import mixture_log_ratio

both_roads = pytest.mark.usefixtures("road")

HEADS, DIM, SLOTS = 2, 16, 32
PROJECTION = draw_projection(HEADS, SLOTS, DIM, seed=1).double()
# Two proposals with as many samples as there are slots.
PROPOSALS = sample_proposals(PROJECTION[:, :2] / 4, PROJECTION)


def draw(tokens: int, value_dim: int = DIM, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    dims = (DIM, DIM, value_dim)
    return [torch.randn(batch, HEADS, tokens, d, generator=generator, dtype=torch.float64) for d in dims]


def assert_same(ours: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Outputs and the gradients of all inputs."""
    weight = torch.randn(*inputs[2].shape, generator=torch.Generator().manual_seed(0), dtype=inputs[2].dtype)
    found = []
    for function in (ours, reference):
        tensors = [z.clone().requires_grad_() for z in inputs]
        out = function(*tensors)
        found.append([out, *torch.autograd.grad(out, tensors, weight)])
    for name, left, right in zip(("output", "query", "key", "value"), *found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def scaled(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(z * DIM**-0.25 for z in tensors)


def features(z: Tensor, directions: Tensor) -> Tensor:
    return (z @ directions.mT - z.square().sum(-1, keepdim=True) / 2).exp()


def favor_kernel(x: Tensor, y: Tensor, projection: Tensor = PROJECTION) -> Tensor:
    return features(x, projection) @ features(y, projection).mT / projection.shape[-2]


def lara_kernel(x: Tensor, y: Tensor) -> Tensor:
    count = PROPOSALS.samples.shape[-2]
    mixture = mixture_log_ratio(*PROPOSALS)[1].exp() * count / PROPOSALS.centroids.shape[-2]
    return (features(x, PROPOSALS.samples) / mixture.unsqueeze(-2)) @ features(y, PROPOSALS.samples).mT


def near(tokens: int, window: int, overlap: bool, is_causal: bool) -> Tensor:
    """Which keys a query sees exactly, `[queries, keys]`."""
    place, start = torch.arange(tokens), torch.arange(tokens) // max(window, 1) * window
    left = (window if is_causal else window // 2) if overlap else 0
    right = 0 if is_causal or not overlap else window // 2
    return (place >= (start - left)[:, None]) & (place < (start + window + right)[:, None])


def averaged(weights: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    weights = weights.tril() if is_causal else weights
    return weights @ value / weights.sum(-1, keepdim=True)


def favor(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return favor_attention(q, k, v, PROJECTION, **options)


def lara(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return lara_attention(q, k, v, proposals=PROPOSALS, **options)


LAYOUTS = [(False, 0, False), (False, 16, False), (False, 100, True), (True, 0, False), (True, 7, False)]
LAYOUTS += [(True, 64, True)]
NARROW = [LAYOUTS[1], LAYOUTS[5]]  # by default with values of another dimension
LARGE = [
    pytest.param(kind, dim, *layout, marks=[] if dim == DIM or layout in NARROW else pytest.mark.slow)
    for layout in LAYOUTS
    for kind, dim in ((favor, DIM), (favor, 9), (lara, DIM))
]


@both_roads
@pytest.mark.parametrize(("kind", "value_dim", "is_causal", "window", "overlap"), LARGE)
def test_slots_of_large_inputs(
    kind: Callable[..., Tensor], value_dim: int, is_causal: bool, window: int, overlap: bool
) -> None:
    tokens = 2113  # 34 causal chunks, which are three segments; 133 windows of 16

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kind(q, k, v, is_causal=is_causal, window_size=window, overlap_window=overlap)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x, y = scaled(q, k)
        kernel = favor_kernel(x, y) if kind is favor else lara_kernel(x, y)
        exact = near(tokens, window, overlap, is_causal)
        return averaged(torch.where(exact, (x @ y.mT).exp(), kernel), v, is_causal)

    assert_same(ours, reference, draw(tokens, value_dim))


@pytest.mark.parametrize("value_dim", [DIM, 9])
def test_many_slots(value_dim: int) -> None:
    projection = draw_projection(HEADS, 1200, DIM, seed=1).double()  # 2.5 million logits per head

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return averaged(favor_kernel(*scaled(q, k), projection), v, False)

    assert_same(lambda q, k, v: favor_attention(q, k, v, projection), reference, draw(2113, value_dim))


@pytest.mark.parametrize("chunk", [1, 16, 256])
def test_causal_chunks_and_many_groups(chunk: int) -> None:
    tokens, batch = 700, 9
    inputs = [z[:, :1].expand(-1, HEADS, -1, -1) for z in draw(tokens, batch=batch)]

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return averaged(favor_kernel(*scaled(q, k)), v, True)

    assert_same(lambda q, k, v: favor(q, k, v, is_causal=True, chunk_size=chunk), reference, inputs)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("value_dim", [DIM, 9])
def test_exact_tiles(is_causal: bool, value_dim: int) -> None:
    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x, y = scaled(q, k)
        return averaged((x @ y.mT).exp(), v, is_causal)

    inputs = draw(1729, value_dim)  # 3 million logits per head
    assert_same(lambda q, k, v: softmax_attention(q, k, v, is_causal=is_causal), reference, inputs)


@pytest.mark.parametrize("lengths", [None, (2113, 901)])
@pytest.mark.parametrize(("is_causal", "overlap"), [(False, False), (False, True), (True, False), (True, True)])
def test_windows_and_chunks(is_causal: bool, overlap: bool, lengths: tuple[int, ...] | None) -> None:
    tokens, window, chunk = 2113, 64, 8  # 34 windows; the last one and the last chunk have a single token
    place = torch.arange(tokens)
    mask = None if lengths is None else place < torch.tensor(lengths)[:, None]
    real = torch.ones(1, tokens, dtype=torch.bool) if mask is None else mask

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = {"window_size": window, "chunk_size": chunk, "is_causal": is_causal, "overlap_window": overlap}
        return eva_attention(q, k, v, key_mask=mask, **options)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x, y = scaled(q, k)
        count = -(-tokens // chunk)
        member = (place // chunk == torch.arange(count)[:, None]) & real[:, None]  # [batch, chunks, tokens]
        size = member.sum(-1)[:, None]
        mean = (member.to(x) / size.clamp_min(1).squeeze(1).unsqueeze(-1)).unsqueeze(1)
        y_mean, mu = mean @ y, mean @ x + mean @ y
        of_chunk = torch.where(member[:, None], (mu @ y.mT - y.square().sum(-1).unsqueeze(-2) / 2).exp(), 0.0)
        chunk_value = of_chunk @ v / of_chunk.sum(-1, keepdim=True).clamp_min(1e-300)

        exact = near(tokens, window, overlap, is_causal)
        touched = exact.to(x) @ member.any(0).to(x).mT > 0
        if is_causal:
            touched = touched | (torch.arange(count) * chunk > place[:, None])
            exact = exact.tril()
        seen = torch.where(exact & real[:, None, None], (x @ y.mT).exp(), 0.0)
        far = torch.where(~touched, (x @ y_mean.mT).exp() * size.unsqueeze(-2), 0.0)
        total = (seen.sum(-1) + far.sum(-1)).unsqueeze(-1)
        return ((seen @ v + far @ chunk_value) / total).masked_fill(~real[:, None, :, None], 0.0)

    assert_same(ours, reference, draw(tokens, batch=len(lengths or (1,))))
