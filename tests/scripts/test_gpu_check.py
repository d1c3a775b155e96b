"""The GPU check without a GPU: a rehearsal runs to its end, and its results say what they are."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import ROOT

sys.path.append(str(ROOT / "scripts"))

from gpu_parts.kernels import Case, _compare  # noqa: E402
from hf_linattn.functional import current_backend  # noqa: E402

SCRIPT = ROOT / "scripts" / "gpu_check.py"
RESULTS = sorted((ROOT / "experiments" / "results" / "gpu").glob("*.json"))
RESULTS = [path for path in RESULTS if path.stem != "tuning"]


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def rehearse(folder: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, results and table."""
    out = folder / "found.json"
    done = check("--rehearse", "--out", str(out), *arguments)
    assert out.is_file(), done.stderr[-2000:]
    return done.returncode, json.loads(out.read_text()), out.with_suffix(".md").read_text()


def test_a_failing_part_is_recorded_and_the_rest_is_done(tmp_path: Path) -> None:
    code, found, table = rehearse(tmp_path, "--parts", "profile,training", "--fail", "training")
    assert code == 1
    parts = {part["name"]: part for part in found["parts"]}
    assert list(parts) == ["training", "profile"]
    assert parts["training"]["status"] == "failed"
    assert "on purpose" in parts["training"]["reason"]
    assert parts["profile"]["status"] == "passed"
    assert len(parts["profile"]["findings"]) == 20
    assert found["is_rehearsal"]
    assert found["is_complete"]
    assert found["command"].endswith("--rehearse --out found.json --parts profile,training --fail training")
    assert "No figure here is from a GPU" in table
    assert "| training | failed |" in table
    text = json.dumps(found)
    assert str(ROOT) not in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("fault", [0.0, 0.1, float("nan")])
def test_a_kernel_that_is_wrong_is_told(fault: float) -> None:
    """The comparison with float64: of a product that is off in the backend that is checked."""

    def product(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x * (3.0 + (fault if current_backend() == "triton" else 0.0)),)

    found = _compare(Case("product", product, {"x": torch.randn(4, 5, dtype=torch.float64)}), "bfloat16")
    assert bool(found.get("failed")) == (fault != 0)
    assert not fault or "less exact" in found["reason"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_whole_rehearsal(tmp_path: Path) -> None:
    code, found, _ = rehearse(tmp_path, "--minutes", "40")
    assert [(part["name"], part["status"]) for part in found["parts"] if part["status"] != "passed"] == []
    assert code == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = check()
    assert done.returncode == 2
    assert "--rehearse" in done.stderr


def test_an_unknown_part_is_named() -> None:
    done = check("--rehearse", "--parts", "speed")
    assert done.returncode == 2
    assert "'speed'" in done.stderr


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_tables_are_those_of_committed_results(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name
    copy.write_text(path.read_text())
    importlib.import_module("gpu_check").main(from_json=copy)
    assert copy.with_suffix(".md").read_text() == path.with_suffix(".md").read_text()
