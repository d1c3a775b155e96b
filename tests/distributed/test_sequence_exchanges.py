"""What processes exchange, and the gradients of it: as if all tensors were on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_linattn.distributed.collectives import SequenceGroup
from tests.distributed.sequence_cases import NoValueRead
from tests.distributed.sequence_processes import run_processes
from tests.helpers import random

COUNT = 3


def expected(parts: Tensor, name: str, rank: int) -> Tensor:
    """The same from the tensors of all processes."""
    none = torch.zeros_like(parts[0])
    return {
        "gather": parts,
        "reduce": parts.sum(0),
        "maximum": parts.amax(0).detach(),
        "from_left": parts[rank - 1] if rank else none,
        "from_right": parts[rank + 1] if rank + 1 < COUNT else none,
    }[name]


NAMES = ("gather", "reduce", "from_left", "from_right")


def work(group: SequenceGroup) -> dict[str, Any]:
    found: dict[str, Any] = {"place": (group.size, group.rank)}
    for name in (*NAMES, "maximum"):
        x = random(COUNT, 2, 3, seed=1)[group.rank].requires_grad_()
        beside = torch.zeros_like(expected(random(COUNT, 3, 2), name, 0), requires_grad=True)
        older = beside * 1.0  # whose gradient is used after that of the exchange
        y = getattr(group, name)(x.mT)  # not contiguous
        found[name] = y.detach()
        if name == "maximum":
            continue
        # One gradient for the exchange and for what is added to it: neither may change it.
        weight = random(COUNT, *y.shape, seed=2)[group.rank]
        ((y + older) * weight).sum().backward()
        found[f"{name} grad"], found[f"{name} beside"] = x.grad, beside.grad
    found["received"] = dict(group.traffic.received)
    return found


def test_exchanges_and_their_gradients(tmp_path: Path) -> None:
    parts = run_processes(COUNT, work, tmp_path / "exchanges")
    for name in NAMES:
        x = random(COUNT, 2, 3, seed=1).requires_grad_()
        outputs = [expected(x.mT, name, rank) for rank in range(COUNT)]
        weights = random(COUNT, *outputs[0].shape, seed=2)
        sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)).backward()
        for rank, part in enumerate(parts):
            assert part["place"] == (COUNT, rank)
            torch.testing.assert_close(part[name], outputs[rank].detach())
            torch.testing.assert_close(part[f"{name} grad"], x.grad[rank])
            torch.testing.assert_close(part[f"{name} beside"], weights[rank])
    for part in parts:
        torch.testing.assert_close(part["maximum"], random(COUNT, 2, 3, seed=1).mT.amax(0))


def test_an_inner_process_receives_more_than_one_at_an_end(tmp_path: Path) -> None:
    size = 2 * 3 * 8
    ends = {"gather": COUNT * size, "reduce": size, "maximum": size, "neighbour": size}
    ends |= {f"{name} backward": ends[name] for name in ("gather", "reduce", "neighbour")}
    inner = {**ends, "neighbour": 2 * size, "neighbour backward": 2 * size}
    found = [part["received"] for part in run_processes(COUNT, work, tmp_path / "received")]
    assert found == [ends, inner, ends]


def test_a_read_value_is_found() -> None:
    with pytest.raises(AssertionError, match="a value is read"), NoValueRead():
        torch.ones(3).sum().item()
