"""Run code with the real client against a local Hub. It reads its settings on import: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from forked_programs import run_forked

from recipes.local_hub import LocalHub

ROOT = Path(__file__).resolve().parents[1]


def environment(**changes: str) -> dict[str, str]:
    """Of a child process: this repository importable, few threads, no leftovers of this process's Hub settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        **changes,
    }


def run(
    arguments: list[str], env: dict[str, str], check: bool = True, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments`; a failure shows what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments], env=env, cwd=ROOT, text=True, capture_output=True, timeout=timeout
    )
    assert not check or done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done


def run_with_hub(code: str, home: Path) -> LocalHub:
    """Run `code` with the real client talking to a fresh local Hub. Returns the Hub, stopped, for a look inside."""
    with LocalHub() as hub:
        run_forked(["-c", code], environment(**hub.environment(home), HF_HUB_OFFLINE="0"))
    return hub
