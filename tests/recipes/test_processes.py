"""What a recipe says of its processes and its speed."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked_programs import run_forked
from hub_server import ROOT, environment

from parts.processes import COUNTS, Progress, describe_processes, missing_processes, strategy, tell_missing_processes


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name in COUNTS or name.startswith(("ACCELERATE_", "FSDP_", "MASTER_", "SLURM_")):
            monkeypatch.delenv(name)


def test_processes_that_share_sequences() -> None:
    found = describe_processes(training(world_size=4, context_parallel_size=2))
    assert found == "4 processes on cpu (DDP, 2 share a sequence), 16 rows a step (4 in a batch x 2 batches x 2)"


def training(**values: Any) -> Any:
    default = {
        "world_size": 1,
        "n_gpu": 0,
        "device": torch.device("cpu"),
        "fsdp": None,
        "deepspeed": None,
        "train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    return SimpleNamespace(**{**default, **values})


GPUS = {"world_size": 4, "n_gpu": 1, "device": torch.device("cuda", 0)}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.mark.parametrize(
    ("values", "environment", "expected"),
    [
        ({}, {}, "one process"),
        ({"world_size": 2}, {}, "DDP"),
        ({"world_size": 2}, FSDP, "DDP"),  # Accelerate has no FSDP on a CPU
        (GPUS, {}, "DDP"),
        (GPUS, FSDP, "FSDP2"),
        (GPUS, {**FSDP, "FSDP_VERSION": "1"}, "FSDP"),
        ({**GPUS, "fsdp": True}, {}, "FSDP"),
        (GPUS, ZERO, "DeepSpeed ZeRO-3"),
        ({**GPUS, "deepspeed": "file.json"}, {}, "DeepSpeed"),
        ({"world_size": 2}, ZERO, "DeepSpeed ZeRO-3"),
        ({"world_size": 2}, ZERO | {"ACCELERATE_USE_CPU": "true"}, "DDP"),  # nor DeepSpeed, where a CPU is asked for
        ({**GPUS, "world_size": 1, "n_gpu": 2}, {}, "DataParallel"),
    ],
)
def test_strategy(
    values: dict[str, Any], environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert strategy(training(**values)) == expected


def test_the_line_on_processes() -> None:
    assert describe_processes(training()) == "1 process on cpu, 8 rows a step (4 in a batch x 2 batches x 1)"
    line = describe_processes(training(**GPUS))
    assert line == "4 processes on cuda (DDP), 32 rows a step (4 in a batch x 2 batches x 4)"


ALONE = {"ACCELERATE_MIXED_PRECISION": "no"}  # accelerate launch of one process
MEANT = {**ALONE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # ... that was meant to be several


@pytest.mark.parametrize(
    ("environment", "processes", "expected"),
    [
        ({}, 1, None),
        (ALONE, 1, None),
        (MEANT, 1, "accelerate launch was asked for several processes, but started one"),
        ({**MEANT, "WORLD_SIZE": "1"}, 1, None),
        ({**MEANT, "WORLD_SIZE": "2"}, 2, None),
        ({"WORLD_SIZE": "2"}, 1, "WORLD_SIZE=2 asks for 2 processes, but this run has 1"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 1, "OMPI_COMM_WORLD_SIZE=4 asks for 4 processes, but this run has 1"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, 1, "SLURM_STEP_NUM_TASKS=2 asks for 2 processes, but this run has 1"),
        ({"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "16"}, 16, None),  # a task a node, eight processes in each
    ],
)
def test_processes_that_are_missing(
    environment: dict[str, str], processes: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert missing_processes(processes) == expected


@pytest.mark.parametrize(("name", "variable"), [("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", [*ZERO][0])])
def test_what_is_left_out(
    name: str, variable: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv(variable, "true")
    tell_missing_processes(training(world_size=2))
    assert caplog.messages == [f"{name} was asked for. On a CPU Accelerate leaves it out: this run is DDP"]


# -- speed ------------------------------------------------------------------------------------------------------------
def test_progress(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Steps of two seconds with 16 rows and 100 tokens, and three seconds of something else after the tenth."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    caplog.set_level(logging.INFO, "hf_linattn.recipes")
    args = training(world_size=2)
    state = SimpleNamespace(global_step=5, max_steps=25, num_input_tokens_seen=500, is_world_process_zero=True)
    progress = Progress()
    progress.on_log(args, state, None)  # of an evaluation before
    progress.on_train_begin(args, state, None)  # resumed after step 5
    for _ in range(20):
        progress.on_step_begin(args, state, None)
        now[0] += 2
        state.global_step += 1
        state.num_input_tokens_seen += 100
        progress.on_step_end(args, state, None)
        if state.global_step == 15:
            now[0] += 3
            progress.on_log(args, state, None)  # told already
        if state.global_step == 17:
            progress.on_log(args, state, None)
    progress.on_train_end(args, state, None)
    first, second, last = caplog.messages
    assert first.startswith("Step 15 of 25: 8.0 rows/s, 50 tokens/s, 0:00:20 left, until about ")
    assert second.startswith("Step 17 of 25: 8.0 rows/s, 50 tokens/s, 0:00:18 left, until about ")  # 27 / 12 * 8
    assert last == "Step 25 of 25: 8.0 rows/s, 50 tokens/s"


def test_one_process_tells_the_progress(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hf_linattn.recipes")
    state = SimpleNamespace(global_step=0, max_steps=2, num_input_tokens_seen=0, is_world_process_zero=False)
    progress = Progress()
    progress.on_train_begin(None, state, None)
    state.global_step = 2
    progress.on_train_end(None, state, None)
    assert not caplog.messages


# -- at the end -------------------------------------------------------------------------------------------------------
GROUP = """
import gc
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from parts import common


def threads():
    return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


def main():
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
    trainer = SimpleNamespace(group=torch.distributed.group.WORLD)
    trainer.callback = SimpleNamespace(trainer=trainer)
    print(threads(), "at work")


gc.disable()  # but for the one collection that is tested
common.run(main)
until = time.monotonic() + 10  # the kernel lists a thread for a moment after it was joined
while threads() and time.monotonic() < until:
    time.sleep(0.01)
print(threads(), "at the end")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="names of threads are read from /proc")
def test_no_thread_of_a_group_is_left(tmp_path: Path) -> None:
    """Such a thread can abort the process on exit. A trainer, which refers to itself, refers to the group.

    In a process of its own: groups that earlier tests left would count too.
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "recipes")])
    done = run_forked(["-c", GROUP, str(tmp_path / "meeting")], environment(PYTHONPATH=paths))
    at_work, at_end = (int(line.split()[0]) for line in done.stdout.splitlines())
    assert at_work > 0
    assert at_end == 0
