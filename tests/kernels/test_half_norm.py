"""Half of the squared length of tokens: the kernel, the formula, and which of them runs."""

from __future__ import annotations

import pytest
import torch

from hf_linattn.kernels.backends import use_backend
from hf_linattn.kernels.half_norm import half_norm

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 64), (1, 2, 700, 80), (2, 1, 1, 1), (1, 1, 33, 256)], ids=str)
def test_kernel_is_the_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    for given in (x, x.transpose(1, 2).contiguous().transpose(1, 2), x.expand(2, *shape[1:]) if shape[0] == 1 else x):
        with use_backend("triton"):
            found = half_norm(given)
        expected = given.double().square().sum(-1) / 2
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradient_of_half_norm(backend: str) -> None:
    x = torch.randn(2, 3, 20, 16, device=DEVICE, requires_grad=True)
    with use_backend(backend):
        (grad,) = torch.autograd.grad(half_norm(x).sum(), x)
    torch.testing.assert_close(grad, x.detach())


def test_vmap_runs_the_kernel() -> None:
    x = torch.randn(4, 2, 3, 20, 16, device=DEVICE)
    with use_backend("triton"):
        found = torch.func.vmap(half_norm)(x)
    torch.testing.assert_close(found, x.square().sum(-1) / 2)


@pytest.mark.parametrize("shape", [(7, 4), (2, 3, 5, 6, 8), (1, 1, 2, 300)], ids=str)
def test_shapes_without_a_kernel_take_the_formula(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device=DEVICE)
    with use_backend("triton"):
        torch.testing.assert_close(half_norm(x), x.square().sum(-1) / 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_on_a_gpu(dtype: torch.dtype) -> None:
    x = torch.randn(8, 3000, 12, 64, device="cuda").to(dtype).transpose(1, 2)
    expected = x.double().square().sum(-1) / 2
    torch.testing.assert_close(half_norm(x).double(), expected, rtol=1e-6, atol=1e-6)
