"""Peak memory, against tensors of known size, in the child process that a run uses."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch

from hf_linattn.bench.kinds import KindOptions, kind_contender
from hf_linattn.bench.memory import measure_peaks
from hf_linattn.bench.peers import peer_contenders
from hf_linattn.bench.workload import Contender, Workload

MIB = 2**20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the mark can be reset on Linux only")


def known_sizes(work: Workload):
    """`tokens` MiB three times: one after the other in one batch, together in two."""

    def attention(query, key, value):
        held = []
        for _ in range(3):
            if work.batch == 1:
                held.clear()
            held.append(torch.ones(work.tokens * MIB, dtype=torch.uint8))
        return query

    return attention


def dies(work: Workload):
    if work.tokens == 16:
        os.kill(os.getpid(), signal.SIGKILL)
    return lambda query, key, value: query


def test_the_most_at_once_counts_not_the_sum() -> None:
    """Also after a larger one."""
    contender = Contender("known", "peer", known_sizes)
    works = [Workload(tokens, batch, heads=1, head_dim=1) for batch in (1, 2) for tokens in (16, 64, 32)]
    for work, peak, reason in measure_peaks(contender, works):
        assert reason == ""
        wanted = work.tokens * (3 if work.batch == 2 else 1)
        assert peak == pytest.approx(wanted * MIB, abs=4 * MIB), work


def test_memory_of_softmax_is_quadratic_and_of_a_kind_linear() -> None:
    works = [Workload(tokens, heads=2, head_dim=32, mode="forward+backward") for tokens in (512, 2048)]
    math = next(peer for peer in peer_contenders(["sdpa"], "cpu", 32) if peer.name == "sdpa:math")
    (_, short, _), (_, long, _) = measure_peaks(math, works)
    assert long > 2 * 2 * 2048**2 * 4  # logits and weights of two heads, float32
    assert long / short > 8
    (_, peak, reason), (work, ours, _) = measure_peaks(
        kind_contender("favor_plus", KindOptions(num_features=32)), works
    )
    assert (reason, work) == ("", works[1])
    assert peak < ours < long / 4


def test_a_child_that_dies() -> None:
    """What came before is kept, the rest says what happened."""
    works = [Workload(tokens, heads=1, head_dim=1) for tokens in (8, 16, 32)]
    found = list(measure_peaks(Contender("dies", "peer", dies), works))
    assert [reason for _, _, reason in found] == ["", *2 * ["the process ended, probably out of memory"]]
    assert found[0][1] is not None
