"""Short inputs in unusual calls: without a row, and where new tensors go to another device than the tokens are on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_linattn.functional import eva_attention, favor_attention, lara_attention
from hf_linattn.kernels.short_slots.reading import _others

KINDS = {
    "favor": lambda q, k, v, **given: favor_attention(q, k, v, q.new_ones(q.shape[1], 3, q.shape[-1]), **given),
    "lara": lambda q, k, v, **given: lara_attention(q, k, v, num_landmarks=4, **given),
    "eva": lambda q, k, v, **given: eva_attention(q, k, v, num_chunks=4, **given),
}


def _results(kind: str, rows: int, heads: int, tokens: int = 22, **given: Tensor) -> list[Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(0)
    inputs = [torch.randn(rows, heads, tokens, 4, device="cpu", generator=generator) for _ in range(3)]
    for z in inputs:
        z.requires_grad_()
    output = KINDS[kind](*inputs, window_size=4, **given)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "heads"), [(0, 2), (2, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_gives_an_empty_result(kind: str, rows: int, heads: int, masked: bool) -> None:
    """As the road of long inputs does, and `scaled_dot_product_attention`."""
    given = {"key_mask": torch.ones(rows, 22, dtype=torch.bool)} if masked else {}
    for result in _results(kind, rows, heads, **given):
        assert result.shape == (rows, heads, 22, 4)


@pytest.mark.parametrize("case", ["plain", "large", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_default_device_changes_nothing(kind: str, case: str) -> None:
    """`torch.set_default_device` says where a user's new tensors go, not where those of a call are."""
    given = {"cu_seqlens": torch.tensor([0, 9, 22])} if case == "packed" else {}
    shape = {"plain": (2, 2, 22), "large": (4, 8, 512), "packed": (1, 2, 22)}[case]
    expected = _results(kind, *shape, **given)
    _others.cache_clear()  # what is kept was made outside
    with torch.device("meta"):
        found = _results(kind, *shape, **given)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
