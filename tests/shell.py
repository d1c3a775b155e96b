"""Commands of `hf-linattn` in this process, on tiny checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from hf_linattn.cli.app import app

_runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})


def shell(*arguments: str | Path, exit_code: int = 0) -> Result:
    """Run a command; its end is the expected one."""
    result = _runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, f"{result.output}\n{result.exception!r}"
    return result


def told(*arguments: str | Path) -> dict[str, Any]:
    """What a command prints with `--json`: nothing else is on stdout."""
    return json.loads(shell(*arguments, "--json").stdout)


def mistake(*arguments: str | Path) -> str:
    """The line that a mistake gets. Nothing else is printed after what was loaded before, and there is no result."""
    result = shell(*arguments, exit_code=2)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.rstrip("\n").endswith(lines[0]), result.stderr
    return lines[0]
