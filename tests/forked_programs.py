"""Run Python programs without their imports: forked from a process that has Transformers and this package in it.

A program of `hub_server.run` spends most of its time importing them. Whether a program imports all that it needs is
not seen here: `hub_server.run` shows that, once for each kind of program.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import random
import runpy
import subprocess
import sys
import tempfile
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = ["hf_linattn", "transformers.trainer", "huggingface_hub.hf_api"]


def run_forked(
    arguments: list[str], env: dict[str, str], check: bool = True, timeout: float = 300, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """As `hub_server.run`: Python with `arguments` (a script, -c or -m); a failure shows what it printed."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        program = server.Process(target=_program, args=(arguments, env, cwd, out, err))
        program.start()
        program.join(timeout)
        if program.exitcode is None:
            program.kill()
            program.join()
            raise subprocess.TimeoutExpired(arguments, timeout, out.read_text(), err.read_text())
        done = subprocess.CompletedProcess(arguments, program.exitcode, out.read_text(), err.read_text())
    assert not check or done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done


def _program(arguments: list[str], env: dict[str, str], cwd: Path, out: Path, err: Path) -> None:
    for path, number in ((out, 1), (err, 2)):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    _read_settings_again()
    random.seed()
    first = {"-c": "", "-m": str(cwd)}.get(arguments[0], str(Path(arguments[0]).parent))
    own = [first, *env["PYTHONPATH"].split(os.pathsep)]
    sys.path[:] = own + [path for path in sys.path if "site-packages" in path or ROOT not in Path(path, "x").parents]
    try:
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
        elif arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(arguments)
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def _read_settings_again() -> None:
    """Those that the client of the Hub and Transformers read from the environment when they are imported."""
    import torch
    from huggingface_hub import constants, hf_api
    from transformers.utils import hub

    torch.set_num_threads(1)
    importlib.reload(constants)
    hf_api.api.endpoint = constants.ENDPOINT
    hub.HF_MODULES_CACHE = os.path.join(constants.HF_HOME, "modules")
