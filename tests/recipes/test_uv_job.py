"""The script for `uv run` and `hf jobs uv run`: what it needs, and what it launches."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hub_server import ROOT

import uv_job

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")

# https://packaging.python.org/en/latest/specifications/inline-script-metadata/
BLOCK = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")


def metadata() -> dict[str, Any]:
    found = BLOCK.findall((ROOT / "recipes" / "uv_job.py").read_text())
    assert [kind for kind, *_ in found] == ["script"]
    return tomllib.loads("\n".join(line.removeprefix("# ").removeprefix("#") for line in found[0][1].splitlines()))


def test_it_needs_what_the_recipes_need() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {*project["dependencies"], *project["optional-dependencies"]["recipes"]}
    assert set(metadata()["dependencies"]) == needed
    assert metadata()["requires-python"] == project["requires-python"]


class Runner:
    """In place of `subprocess.run`."""

    def __call__(self, line: list[str], cwd: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        self.line, self.env = line, env
        return subprocess.CompletedProcess(line, 3)


@pytest.mark.parametrize(
    ("flags", "gpus", "config", "processes"),
    [
        ([], 0, "single_gpu", 1),
        ([], 1, "single_gpu", 1),
        ([], 4, "ddp", 4),
        (["--processes", "2"], 0, "cpu", 2),
        (["--accelerate", "fsdp2"], 8, "fsdp2", 8),
        (["--accelerate", str(ROOT / "recipes/configs/accelerate/zero3.yaml"), "--processes", "2"], 8, "zero3", 2),
    ],
)
def test_what_it_launches(flags: list[str], gpus: int, config: str, processes: int) -> None:
    run = Runner()
    own = ["--model_name_or_path", "M", "--processes", "of the recipe"]
    assert uv_job.main([*flags, "language_modeling", *own], run=run, gpus=gpus) == 3
    at = run.line.index("--config_file") + 1
    assert Path(run.line[at]) == ROOT / f"recipes/configs/accelerate/{config}.yaml"
    assert run.line[at + 1 : at + 3] == ["--num_processes", str(processes)]
    assert run.line[at + 3 :] == [str(ROOT / "recipes/language_modeling.py"), *own]
    assert run.env["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert ("ACCELERATE_USE_CPU" in run.env) == (not gpus)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "Name a script of recipes/"),
        (["--checkout", "/nowhere", "text_classification"], "/nowhere/recipes/text_classification.py"),
        (["--accelerate", "dpp", "text_classification"], "got 'dpp'"),
    ],
)
def test_mistakes_of_a_job(argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=f"error: .*{re.escape(message)}"):
        uv_job.main(argv, run=Runner(), gpus=0)
