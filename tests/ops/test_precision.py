"""Half precision, extreme inputs and shapes: finite, and as close to float64 as float32 gets on the same input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from variants import BIDIRECTIONAL, VARIANTS, Variant, name_of

from hf_linattn.ops import precision

every = pytest.mark.parametrize("attend", VARIANTS, ids=name_of)
HALF = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on processors that would keep half precision; `test_half.py` is about those."""
    monkeypatch.setattr(precision, "stays_half", lambda dtype, device_type, devices: False)


def inputs(tokens: int = 21, dim: int = 8, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens + dim)
    q, k, v = (torch.randn(2, 2, tokens, dim, generator=generator) for _ in range(3))
    return [(q * scale).to(dtype), (k * scale).to(dtype), v.to(dtype)]


def in_dtype(attend: Variant, tensors: list[Tensor], dtype: torch.dtype, **options: object) -> Tensor:
    return attend(*(z.to(dtype) for z in tensors), **options)


def assert_as_good_as_float32(attend: Variant, tensors: list[Tensor], **options: object) -> None:
    """The error in the dtype of the inputs is that of float32, plus the rounding of the result."""
    exact = in_dtype(attend, tensors, torch.float64, **options)
    plain = in_dtype(attend, tensors, torch.float32, **options)
    ours = attend(*tensors, **options)
    assert ours.dtype == tensors[0].dtype
    assert ours.isfinite().all()
    assert plain.isfinite().all()
    error, plain_error = ((z.double() - exact).abs().max() for z in (ours, plain))
    rounding = torch.finfo(ours.dtype).eps * exact.abs().max()
    assert error <= 2 * plain_error + rounding, f"off by {error:.1e}, float32 by {plain_error:.1e}"


@every
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_error_in_half_precision(attend: Variant, dtype: torch.dtype, window: int, scale: float) -> None:
    assert_as_good_as_float32(attend, inputs(scale=scale, dtype=dtype), window_size=window)
    mask = torch.arange(21) < torch.tensor([[9], [21]])
    assert_as_good_as_float32(attend, inputs(scale=scale, dtype=dtype), window_size=window, key_mask=mask)


@every
@pytest.mark.parametrize("window", [0, 4])
def test_float32_is_close_to_float64(attend: Variant, window: int) -> None:
    # At x100 the logits reach 1e5, where float32 resolves 1e-2: the reference in float32 is off by as much.
    for scale, limit in ((1.0, 1e-5), (4.0, 1e-3), (100.0, 2e-2)):
        tensors = inputs(scale=scale)
        exact = in_dtype(attend, tensors, torch.float64, window_size=window)
        ours = attend(*tensors, window_size=window)
        assert (ours - exact).abs().max() < limit, scale


@every
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("which", [0, 1])  # a query or a key
def test_one_huge_token(attend: Variant, dtype: torch.dtype, window: int, which: int) -> None:
    tensors = inputs()
    tensors[which][:, :, 7] = 3000.0
    tensors = [z.to(dtype).requires_grad_() for z in tensors]
    out = attend(*tensors, window_size=window)
    assert out.isfinite().all()
    assert (out.abs() <= tensors[2].abs().amax() * 1.01).all()
    for grad in torch.autograd.grad(out.float().sin().sum(), tensors):
        assert grad.isfinite().all()
    assert_as_good_as_float32(attend, [z.detach() for z in tensors], window_size=window)
    if attend.is_causal:  # nothing before it may notice
        calm = [torch.cat([z[:, :, :7], z[:, :, 7:] * 0], 2) for z in tensors]
        # Up to rounding: how weights are summed may depend on how far apart the keys of a chunk are.
        torch.testing.assert_close(attend(*calm, window_size=window)[:, :, :7], out[:, :, :7])


@every
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("kind", ["equal keys", "equal queries", "zero keys", "all zero", "equal values"])
def test_degenerate_inputs(attend: Variant, dtype: torch.dtype, kind: str) -> None:
    q, k, v = inputs(dtype=dtype)
    if kind == "equal keys":
        k = k[:, :, :1].expand_as(k).contiguous()
    elif kind == "equal queries":
        q = q[:, :, :1].expand_as(q).contiguous()
    elif kind == "zero keys":
        k = k * 0
    elif kind == "all zero":
        q, k = q * 0, k * 0
    else:
        v = v[:, :, :1].expand_as(v).contiguous()
    for window in (0, 4):
        tensors = [z.clone().requires_grad_() for z in (q, k, v)]
        out = attend(*tensors, window_size=window)
        assert out.isfinite().all()
        for grad in torch.autograd.grad(out.float().sin().sum(), tensors):
            assert grad.isfinite().all()
        assert_as_good_as_float32(attend, [q, k, v], window_size=window)
        count = torch.arange(1, 22)[:, None]
        mean = v.double().cumsum(2) / count if attend.is_causal else v.double().mean(2, keepdim=True).expand_as(v)
        # All keys weigh the same. (With a window FAVOR's random features stand beside exact weights.)
        if kind == "all zero" and ("favor" not in attend.name or window == 0):
            torch.testing.assert_close(out.double(), mean, rtol=0, atol=20 * torch.finfo(dtype).eps)


@every
@pytest.mark.parametrize("dim", [1, 3, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_for_every_head_dim(attend: Variant, dim: int, dtype: torch.dtype) -> None:
    for window in (0, 4):
        assert_as_good_as_float32(attend, inputs(9, dim, dtype=dtype), window_size=window)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_one_token_gives_its_value(attend: Variant, dtype: torch.dtype) -> None:
    for scale in (1.0, 100.0):
        q, k, v = inputs(1, scale=scale, dtype=dtype)
        for window in (0, 1, 4):
            torch.testing.assert_close(attend(q, k, v, window_size=window), v)
        if not attend.is_causal:
            torch.testing.assert_close(attend(q, k, v, window_size=4, num_global_tokens=1), v)


@every
def test_autocast_changes_nothing(attend: Variant) -> None:
    tensors = inputs(dtype=torch.bfloat16)
    for given in (tensors, [z.float() for z in tensors]):
        plain = attend(*given, window_size=4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = attend(*given, window_size=4)
        assert inside.dtype == plain.dtype
        assert torch.equal(inside, plain)


@pytest.mark.parametrize("attend", BIDIRECTIONAL, ids=name_of)
def test_global_tokens_in_half_precision(attend: Variant) -> None:
    for dtype in HALF:
        assert_as_good_as_float32(attend, inputs(scale=30.0, dtype=dtype), window_size=4, num_global_tokens=2)
