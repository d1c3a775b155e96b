"""Every kernel compiles for the GPUs we care about, and fits: no GPU is needed for that, only Triton's compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import hf_linattn.kernels as kernels

SCRIPT = Path(__file__).with_name("compile_kernels.py")
MODULES = [
    "attend.triton_launch",
    "block_slots.triton_launch",
    "causal_slots.triton_launch",
    "decode.triton_launch",
    "half_norm.triton_launch",
    "window_chunks.triton_launch",
]
# Bytes of shared memory that one block may have (CUDA C++ Programming Guide, technical specifications).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
# Bytes that go to local memory for want of registers, in modules whose blocks were chosen for that. Few cost little;
# many mean that accumulators do not fit. Those of the other modules are printed.
SPILLED = {"attend.triton_launch": 512, "decode.triton_launch": 0, "half_norm.triton_launch": 0}


def compile_all(*arguments: str) -> list[dict[str, object]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(kernels.__file__).parents[2])
    found = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return [json.loads(line) for line in found.stdout.splitlines()]


def check(launches: list[dict[str, object]]) -> None:
    assert launches
    for launch in launches:
        print(launch)
        assert launch["shared"] <= SHARED_MEMORY[launch["arch"]], launch  # type: ignore[operator,index]
        assert launch["spilled"] <= SPILLED.get(str(launch["module"]), 1 << 20), launch  # type: ignore[operator]


@pytest.mark.slow
def test_one_case_of_every_module() -> None:
    launches = compile_all("--first")
    check(launches)
    assert sorted({str(launch["module"]) for launch in launches}) == MODULES


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("module", MODULES)
def test_every_case(module: str) -> None:
    check(compile_all(module))


def test_hopper_gets_its_own_matrix_instructions() -> None:
    launches = compile_all("attend.triton_launch", "--arch", "90", "--first")
    check(launches)
    assert {launch["kernel"] for launch in launches if launch["wgmma"]} == {"forward", "of_queries", "of_keys"}
