"""Peak memory, against tensors of known size."""

from __future__ import annotations

import sys

import pytest
import torch

from hf_linattn.bench.kinds import KindOptions
from hf_linattn.bench.memory import peak_bytes, run_memory
from hf_linattn.bench.plan import Plan

MIB = 2**20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the mark can be reset on Linux only")


@pytest.mark.parametrize("is_held", [False, True])
def test_the_most_at_once_counts_not_the_sum(is_held: bool) -> None:
    """Three tensors one after the other, or together; also after larger ones."""

    def step(size: int) -> list[torch.Tensor]:
        held: list[torch.Tensor] = []
        for _ in range(3):
            if not is_held:
                held.clear()
            held.append(torch.ones(size * MIB, dtype=torch.uint8))
        return held

    for size in (16, 64, 32):
        step(size)
        found = peak_bytes(lambda size=size: step(size))
        assert found == pytest.approx(size * (3 if is_held else 1) * MIB, abs=4 * MIB)


def test_memory_of_softmax_is_quadratic_and_of_a_kind_linear() -> None:
    plan = Plan((512, 2048), ("favor_plus",), causal=(False,), heads=2, head_dim=32, options=KindOptions(32))
    peaks = {(row.name, row.work.tokens): row.peak for rows in run_memory(plan) for row in rows}
    short, long = (peaks["sdpa:math", tokens] for tokens in plan.lengths)
    assert long > 2 * 2 * 2048**2 * 4  # logits and weights of two heads, float32
    assert long / short > 8
    assert peaks["favor_plus", 512] < peaks["favor_plus", 2048] < long / 4


def test_what_has_no_peak_says_why() -> None:
    plan = Plan((16, 32), peers=("sdpa", "flash-linear-attention"), max_softmax_length=16, causal=(True,))
    (_, *_, fla), (sdpa, *_) = run_memory(plan)
    assert (fla.peak, sdpa.peak) == (None, None)
    assert "32" not in fla.reason
    assert sdpa.reason == "longer than the 16 tokens set for softmax"
