"""The sub-commands of `hf-linattn`."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from . import bench, calibrate, compare, convert, eval, info, push, transfer
from .program import Program

app = typer.Typer(cls=Program, add_completion=False, pretty_exceptions_show_locals=False)


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
    """Linear attention for Transformers models.

    Every command ends with status 0; with 2, and one line that says why, if something is wrong with what was asked;
    with 1 if something failed.
    """


app.command("convert", epilog=convert.EXAMPLE)(convert.convert)
app.command("calibrate", epilog=calibrate.EXAMPLE)(calibrate.calibrate)
app.command("transfer", epilog=transfer.EXAMPLE)(transfer.transfer)
app.command("compare", epilog=compare.EXAMPLE)(compare.compare)
app.command("eval", epilog=eval.EXAMPLE)(eval.evaluate)
app.command("push", epilog=push.EXAMPLE)(push.push)
app.command("info", epilog=info.EXAMPLE)(info.info)
app.command("bench")(bench.bench)
