"""How a command ends: a mistake of the user is one line and status 2, a failure one line and status 1."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import LinAttnError, UnsupportedTransformersError
from .checkpoints import FailureError

# What the command line itself raises. Typer has it from click, or in later releases as its own copy of click's.
UsageError: Any = typer.BadParameter.__base__

SUCCESS, FAILURE, MISTAKE = 0, 1, 2


class Program(TyperGroup):
    """The group of all commands. Without arguments it shows its help."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command and exit with its status; with `standalone_mode=False` errors are the caller's."""
        args = list(sys.argv[1:] if args is None else args) or ["--help"]
        run = functools.partial(super().main, args, prog_name, complete_var, False, windows_expand_args, **extra)
        if not standalone_mode:
            return run()
        try:
            status = run()
        except UsageError as error:
            status = _tell(error.format_message(), MISTAKE)
        except (UnsupportedTransformersError, FailureError, OSError) as error:
            status = _tell(error, FAILURE)
        except LinAttnError as error:
            status = _tell(error, MISTAKE)
        except typer.Abort:
            status = _tell("interrupted", FAILURE)
        sys.exit(status if isinstance(status, int) else SUCCESS)


def _tell(error: object, status: int) -> int:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return status
