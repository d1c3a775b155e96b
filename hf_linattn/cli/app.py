"""The sub-commands of `hf-linattn`."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from . import bench

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Linear attention for Transformers models."""


app.command("bench")(bench.bench)
