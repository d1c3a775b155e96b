"""Every learned tensor is in the graph of a training pass, used or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_linattn.modules import in_graph
from hf_linattn.modules.in_graph import with_tensors


@pytest.mark.parametrize("is_plain", [True, False], ids=["one function", "operations"])
def test_gradients_are_zero_and_the_output_is_what_it_was(is_plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_graph, "is_plain", lambda _: is_plain)
    unused, used, frozen = (nn.Parameter(torch.randn(3)) for _ in range(3))
    frozen.requires_grad_(False)
    output = torch.randn(2, 3) * used
    found = with_tensors(output, [unused, used, frozen])
    assert torch.equal(found, output)
    found.square().sum().backward()
    assert torch.equal(unused.grad, torch.zeros(3))  # type: ignore[arg-type]
    torch.testing.assert_close(used.grad, 2 * (output * output / used).sum(0))
    assert frozen.grad is None


def test_a_change_in_place_is_noticed() -> None:
    """What the backward pass has kept is in the same memory."""
    weight = nn.Parameter(torch.randn(3))
    found = with_tensors(weight.exp(), [weight])
    found.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()
