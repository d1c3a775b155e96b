"""Products by oneDNN, and the attention that is written with them: the same results as with torch's own."""

from __future__ import annotations

import pytest
import torch
from references import INF, dense_attend
from torch import Tensor

from hf_linattn.kernels import cpu_matmul as products
from hf_linattn.kernels.attend import flash_onednn as streamed
from hf_linattn.kernels.attend import torch_kernel as portable

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN to compare with"
)


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """All products go to oneDNN, in tiles of 32 logits; the shapes of the left factors."""
    seen: list[tuple[int, ...]] = []
    multiply = products.matrix_product

    def counted(left: Tensor, right: Tensor) -> Tensor:
        seen.append(tuple(left.shape))
        return multiply(left, right)

    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "LARGE", 1)
    monkeypatch.setattr(portable, "LARGE", 1)
    monkeypatch.setattr(products, "matrix_product", counted)
    monkeypatch.setattr(streamed, "matrix_product", counted)
    monkeypatch.setattr(streamed, "_TILE", 32)
    monkeypatch.setattr(streamed, "_KEYS", 8)
    monkeypatch.setattr(portable, "_TILE_ALONE", 32)
    return seen


def inputs(queries: int, keys: int, dim: int, head_dim: int, masked: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = [(2, 3, queries, dim), (2, 3, keys, dim), (2, 3, keys, head_dim), (2, 3, keys)]
    q, k, v, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    if masked:
        bias[0, :, : keys // 2 + 1] = -INF  # whole tiles at the front
        bias[1, 1] = -INF  # a head that sees nothing
    return [q, k, v, bias]


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 40), (40, 5), (17, 33)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dim", "head_dim"), [(4, 4), (6, 3)])
def test_results_and_gradients(
    queries: int, keys: int, masked: bool, dim: int, head_dim: int, by_onednn: list[tuple[int, ...]]
) -> None:
    tensors = inputs(queries, keys, dim, head_dim, masked)
    wide = [z.double().requires_grad_() for z in tensors]
    output, mass = dense_attend(*wide)
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(z.shape, generator=generator) for z in (output, mass)]
    seen = mass > -INF
    loss = (output * grads[0]).sum() + (mass.masked_fill(~seen, 0.0) * grads[1]).sum()
    expected = [output, mass, *torch.autograd.grad(loss, wide)]

    ours = portable.attend_forward(*tensors, None)
    assert by_onednn
    assert all(rows * columns <= 32 or rows == 1 for rows, columns in by_onednn[1::2])  # weights of a tile
    found = portable.attend_backward(*grads, *tensors, None, *ours, [True] * 4)
    for ours_one, expected_one in zip([*ours, *found], expected, strict=True):
        torch.testing.assert_close(ours_one, expected_one.float(), rtol=1e-4, atol=1e-5)


def test_large_logits_do_not_overflow(by_onednn: list[tuple[int, ...]]) -> None:
    q, k, v, bias = inputs(9, 30, 4, 4, False)
    output, mass = portable.attend_forward(q * 100, k * 100, v, bias, None)
    expected = dense_attend(*(z.double() for z in (q * 100, k * 100, v, bias)))
    torch.testing.assert_close(output, expected[0].float(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(mass, expected[1].float(), rtol=1e-5, atol=1e-2)


def test_only_large_float32_products_on_such_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    matrix = torch.ones(1, 256)
    assert products.suits_onednn(matrix, products.LARGE)
    assert not products.suits_onednn(matrix, products.LARGE - 1)
    assert not products.suits_onednn(matrix.double(), products.LARGE)
    assert not products.suits_onednn(matrix.bfloat16(), products.LARGE)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    assert not products.suits_onednn(matrix, products.LARGE)


def test_matrices_with_gaps_are_made_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models hand over rows that are a part of longer ones; oneDNN takes a thousand times longer for these."""
    given: list[Tensor] = []
    multiply = torch.ops.mkldnn._linear_pointwise

    class Spy:
        @staticmethod
        def _linear_pointwise(left: Tensor, right: Tensor, *rest: object) -> Tensor:
            given.extend([left, right])
            return multiply(left, right, *rest)

    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(*shape, generator=generator) for shape in ((9, 16), (7, 16)))
    expected = left[:, :4] @ right[:, :4].mT
    monkeypatch.setattr(torch.ops, "mkldnn", Spy)
    for a, b in ((left[:, :4], right[:, :4].mT), (left.mT[:4].mT, right.mT[:4])):
        torch.testing.assert_close(products.matrix_product(a, b), expected)
    assert all(z.is_contiguous() or z.mT.is_contiguous() for z in given)


@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (2, 3)])
def test_leading_dimensions(lead: tuple[int, ...], by_onednn: list[tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(*lead, *shape, generator=generator) for shape in ((5, 4), (4, 7)))
    torch.testing.assert_close(products.product(left, right), left @ right)
    torch.testing.assert_close(products.product(right.mT, left.mT), right.mT @ left.mT)
    assert bool(by_onednn) == (left.numel() == 20)
