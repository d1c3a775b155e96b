"""Half precision that stays half, as on a GPU: the same attention up to a few roundings, with float32 logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_linattn.functional import eva_attention, favor_attention, favor_statistics
from hf_linattn.ops import precision

pytestmark = pytest.mark.usefixtures("road")

HALVES = [torch.float16, torch.bfloat16]
HEADS, DIM = 4, 32
MASK = torch.arange(100) < torch.tensor([[80], [100]])
GENERATOR = torch.Generator().manual_seed(0)
PROJECTION = torch.randn(HEADS, 64, DIM, generator=GENERATOR)
BIAS = torch.randn(HEADS, 16, 16, generator=GENERATOR)


def favor(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    return favor_attention(q, k, v, PROJECTION.to(torch.promote_types(q.dtype, torch.float32)), **options)


def favor_sharp(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    statistics = favor_statistics(q.detach().to(wide) * DIM**-0.25, k.detach().to(wide) * DIM**-0.25)
    return favor(q, k, v, statistics=statistics, **options)


def cases() -> list:
    shared = {
        "plain": {},
        "masked": {"key_mask": MASK},
        "window": {"window_size": 16},
        "small windows": {"window_size": 4, "key_mask": MASK},
        "overlap": {"window_size": 16, "overlap_window": True},
        "heavy": {"window_size": 8, "num_heavy_keys": 4},
        "global": {"window_size": 8, "num_global_tokens": 2},
        "dropout": {"slot_dropout": 0.1},
    }
    causal = {"causal": {"is_causal": True}, "causal window": {"is_causal": True, "window_size": 16}}
    eva = {
        "eva": {"window_size": 16, "num_chunks": 8},
        "eva long chunks": {"window_size": 16, "num_chunks": 3, "key_mask": MASK},
        "eva causal": {"window_size": 16, "chunk_size": 4, "is_causal": True},
        "eva spread, dropout": {"window_size": 16, "num_chunks": 4, "weighting": "spread", "slot_dropout": 0.1},
        "eva bias": {"window_size": 16, "num_chunks": 8, "window_bias": BIAS},
    }
    return [
        *(pytest.param(favor, options, id=f"favor {name}") for name, options in (shared | causal).items()),
        *(pytest.param(favor_sharp, options, id=f"favor sharp {name}") for name, options in shared.items()),
        *(pytest.param(eva_attention, options, id=name) for name, options in eva.items()),
    ]


def run(attend: Callable[..., Tensor], dtype: torch.dtype, half: torch.dtype, scale: float, options: dict) -> list:
    """Outputs and gradients on inputs that are rounded to `half`, computed in `dtype`."""
    generator = torch.Generator().manual_seed(1)
    q, k, v, grad = (torch.randn(2, HEADS, 100, DIM, generator=generator).to(half).to(dtype) for _ in range(4))
    tensors = [z.requires_grad_() for z in (q * scale, k * scale, v)]
    torch.manual_seed(2)  # of dropout
    out = attend(*tensors, **options)
    return [out, *torch.autograd.grad(out, tensors, grad)]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(("attend", "options"), cases())
def test_a_few_roundings_off(
    attend: Callable[..., Tensor], options: dict, half: torch.dtype, road: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(attend, torch.float32, half, 1.0, options)
    monkeypatch.setattr(precision, "stays_half", lambda dtype, device_type, devices: False)
    rounded = run(attend, half, half, 1.0, options)
    monkeypatch.setattr(precision, "stays_half", lambda dtype, device_type, devices: bool(devices) and dtype in HALVES)
    found = run(attend, half, half, 1.0, options)
    if attend is not eva_attention or road == "long":  # the short road of EVA is float32 throughout
        assert not torch.equal(found[0], rounded[0])  # it did stay half
    for ours, wide in zip(found, expected, strict=True):
        assert ours.dtype == half
        error = (ours.float() - wide).abs().max() / wide.abs().max()
        assert error <= 4 * torch.finfo(half).eps, error


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(("attend", "options"), cases())
def test_large_inputs_stay_finite(
    attend: Callable[..., Tensor], options: dict, half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "stays_half", lambda dtype, device_type, devices: bool(devices) and dtype in HALVES)
    for z in run(attend, half, half, 100.0, options):
        assert z.isfinite().all()
