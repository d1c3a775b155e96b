"""The tests marked `gpu`, under pytest; in a rehearsal a few of Triton's tests in the interpreter instead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isolated import Finding

from .context import Context

ROOT = Path(__file__).resolve().parents[2]
MARK = "pytest.mark.gpu"
REHEARSED = "tests/kernels/test_triton_causal.py"
WORKERS = 5  # processes that share the GPU: most of the time goes into compiling kernels


class _Recorder:
    """A plugin of pytest that counts, and passes failures on while the others still run."""

    def __init__(self, found: queue.Queue[Finding | None]) -> None:
        self.found = found
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.outcome == "passed" and report.when != "call":
            return
        self.counts[report.outcome] += 1
        if report.outcome == "failed":
            text = str(report.longrepr).strip().splitlines()
            self.found.put({"test": report.nodeid, "failed": True, "message": text[-12:]})
        elif report.outcome == "passed" and self.counts["passed"] % 10 == 0:
            self.found.put({"progress": dict(self.counts)})

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            text = str(report.longrepr).strip().splitlines()
            self.found.put({"test": report.nodeid, "failed": True, "message": text[-12:]})


def gpu_tests(context: Context) -> Iterator[Finding]:
    """A finding for every failure, then the counts."""
    if context.is_rehearsal:
        chosen, mark = [REHEARSED], "not gpu and not slow"
    else:
        files = sorted((ROOT / "tests").rglob("test_*.py"), reverse=True)  # kernels before the models that use them
        chosen = [str(file.relative_to(ROOT)) for file in files if MARK in file.read_text(encoding="utf-8")]
        mark = "gpu"
    options = ["-m", mark, "-q", "--tb=short", "-p", "no:cacheprovider", "--timeout=120", f"--rootdir={ROOT}"]
    if not context.is_rehearsal:
        options += ["-n", str(WORKERS)]
    found: queue.Queue[Finding | None] = queue.Queue()
    recorder = _Recorder(found)
    status: list[int] = []

    def run() -> None:
        import os

        import pytest

        os.chdir(ROOT)
        status.append(int(pytest.main([*options, *chosen], plugins=[recorder])))
        found.put(None)

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    while (finding := found.get()) is not None:
        yield finding
    counts = recorder.counts
    yield {"tests": counts, "status": status[0], "failed": status[0] != 0 or not counts["passed"]}
