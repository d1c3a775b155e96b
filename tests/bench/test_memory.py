"""Peak memory, against tensors of known size."""

from __future__ import annotations

import sys
from dataclasses import asdict

import pytest
import torch

from hf_linattn.bench import memory
from hf_linattn.bench.cases import Workload
from hf_linattn.bench.ours import KindOptions

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="the mark can be reset on Linux only")


@linux
@pytest.mark.parametrize("mebibytes", [64, 16, 128, 32])  # also after a larger one
def test_a_tensor_of_known_size(mebibytes: int) -> None:
    def step() -> None:
        torch.ones(mebibytes * MIB, dtype=torch.uint8)

    assert memory.peak_bytes(step) == pytest.approx(mebibytes * MIB, abs=4 * MIB)


@linux
def test_the_most_at_once_counts_not_the_sum() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            tensor = torch.ones(32 * MIB, dtype=torch.uint8)
            del tensor

    def together() -> list[torch.Tensor]:
        return [torch.ones(32 * MIB, dtype=torch.uint8) for _ in range(3)]

    assert memory.peak_bytes(one_after_the_other) == pytest.approx(32 * MIB, abs=4 * MIB)
    assert memory.peak_bytes(together) == pytest.approx(96 * MIB, abs=4 * MIB)


def request(name: str, works: list[Workload], options: KindOptions | None = None) -> dict:
    return {
        "name": name,
        "options": asdict(options) if options else None,
        "works": [work.to_dict() for work in works],
        "threads": 1,
        "num_features": 32,
    }


@linux
def test_softmax_with_all_its_weights_is_quadratic_and_a_kind_is_not() -> None:
    """The kind in a process of its own, as in a run; what such a process does for softmax here."""
    works = [Workload(tokens, heads=2, head_dim=32, mode="forward+backward") for tokens in (512, 2048)]
    short, long = (found["bytes"] for found in memory.answer(request("sdpa:math", works)))
    assert long > 2 * 2 * 2048**2 * 4  # logits and weights of two heads, float32
    assert long / short > 8
    (_, peak, reason), (work, ours, _) = memory.measure_peaks("favor_plus", KindOptions(num_features=32), works)
    assert reason == ""
    assert work is works[1]
    assert peak < ours < long / 4


def test_failures_have_reasons() -> None:
    (found,) = memory.answer(request("flash-linear-attention", [Workload(16, is_causal=True)]))
    assert found["bytes"] is None
    assert found["reason"] in ("not installed", "needs a GPU")
    assert list(memory.measure_peaks("sdpa", None, [])) == []


def test_a_child_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came before is kept, the rest says what happened."""
    dies = 'print(\'{"bytes": 5, "reason": ""}\', flush=True); import os, signal; os.kill(os.getpid(), signal.SIGKILL)'
    run = memory.subprocess.run
    monkeypatch.setattr(
        memory.subprocess, "run", lambda command, **options: run([sys.executable, "-c", dies], **options)
    )
    monkeypatch.setattr(memory, "can_reset", lambda: True)
    found = memory.measure_peaks("sdpa", None, [Workload(n) for n in (8, 16, 32)])
    assert [(peak, reason) for _, peak, reason in found] == [
        (5, ""),
        (None, "out of memory"),
        (None, "an earlier length failed"),
    ]


def test_a_child_that_takes_too_long() -> None:
    ((_, peak, reason),) = memory.measure_peaks("sdpa", None, [Workload(8)], timeout=0.05)
    assert (peak, reason) == (None, "longer than 0 s")


def test_without_a_mark_to_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark of the whole life only grows: a process per length."""
    monkeypatch.setattr(memory, "can_reset", lambda: False)
    asked = []
    monkeypatch.setattr(
        memory, "_ask", lambda request, timeout: (asked.append(request) or [{"bytes": 1, "reason": ""}], "")
    )
    works = [Workload(8), Workload(16)]
    assert [work for work, _, _ in memory.measure_peaks("sdpa", None, works)] == works
    assert [len(request["works"]) for request in asked] == [1, 1]


@linux
def test_the_mark_of_the_whole_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "can_reset", lambda: False)
    before = memory._lifetime_peak()
    kept = memory.peak_bytes(lambda: torch.ones(before + 64 * MIB, dtype=torch.uint8))
    assert kept > 60 * MIB
    assert memory.peak_bytes(lambda: torch.ones(8, dtype=torch.uint8)) < 4 * MIB
