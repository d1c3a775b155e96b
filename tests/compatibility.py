"""The selection of tests that tells whether a release of Transformers is supported, and what a run of it writes down.

A test takes part through `@pytest.mark.compat("topic", ...)`. With `--compat-json PATH` the run leaves a file from
which `scripts/compatibility_table.py` makes a row of `docs/compatibility.md`.
"""

from __future__ import annotations

import json
import platform
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

TOPICS = (
    "convert",
    "native",
    "train",
    "padding",
    "save and load",
    "cache",
    "no cache",
    "static",
    "beams",
    "compare",
    "resume",
)
PACKAGES = ("transformers", "torch", "huggingface_hub", "tokenizers", "safetensors", "accelerate", "numpy")
PROPERTY = "compat"


def topics_of(item: pytest.Item) -> list[str]:
    """The topics that a test belongs to; an error for one that the table has no column for."""
    marks = list(item.iter_markers("compat"))
    found = [topic for mark in marks for topic in mark.args]
    if marks and (not found or not set(found) <= set(TOPICS)):
        raise pytest.UsageError(f"{item.nodeid}: compat takes topics out of {TOPICS}; got {found}")
    return found


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


class Record:
    """Counts outcomes by topic, in the process that reports (with pytest-xdist, the one that runs no tests)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = time.monotonic()
        self.outcomes: dict[str, tuple[list[str], str]] = {}
        self.uncollected: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        topics = dict(report.user_properties).get(PROPERTY)
        if not topics:
            return
        _, before = self.outcomes.get(report.nodeid, (topics, ""))
        if report.failed or before == "failed":
            outcome = "failed"
        elif report.skipped or before == "skipped":
            outcome = "skipped"
        else:
            outcome = "passed"
        self.outcomes[report.nodeid] = (topics, outcome)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and report.nodeid not in self.uncollected:
            self.uncollected.append(report.nodeid)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        values = self.summary(int(exitstatus))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(values, indent=2) + "\n")

    def summary(self, exit_status: int) -> dict[str, Any]:
        import torch  # not before the tests: Triton looks at the environment when it is imported

        counts = {topic: {"passed": 0, "failed": 0, "skipped": 0} for topic in TOPICS}
        for topics, outcome in self.outcomes.values():
            for topic in topics:
                counts[topic][outcome] += 1
        failures = sorted(test for test, (_, outcome) in self.outcomes.items() if outcome == "failed")
        return {
            "format": 1,
            "versions": versions(),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
            "date": datetime.now(timezone.utc).date().isoformat(),
            "seconds": round(time.monotonic() - self.start, 1),
            "exit": exit_status,
            "tests": len(self.outcomes),
            "topics": counts,
            "failures": [*(f"{name} (not collected)" for name in self.uncollected), *failures],
        }


def add_option(parser: pytest.Parser) -> None:
    parser.addoption("--compat-json", type=Path, metavar="PATH", help="write the outcomes of tests marked compat here")


def configure(config: pytest.Config) -> None:
    path = config.getoption("--compat-json")
    if path is not None and not hasattr(config, "workerinput"):  # a worker of pytest-xdist reports to the controller
        config.pluginmanager.register(Record(config.invocation_params.dir / path), "compat-json")


def mark_topics(items: list[pytest.Item]) -> None:
    """Topics travel with a test's reports, also from a worker process."""
    for item in items:
        if topics := topics_of(item):
            item.user_properties.append((PROPERTY, topics))
