"""Check the library against the Hugging Face Hub, with the models that people use.

    python scripts/hub_check.py                # needs a network, and a token that may write (`hf auth login`)
    python scripts/hub_check.py --rehearse     # the same on a small Hub of this machine, with small random checkpoints

bert-base-uncased, gpt2 and vit-base-patch16-224 with every kind of attention: load, convert, compare with softmax,
train 20 steps, push to a private repository, load back in a new process, delete. Every part is on its own: one that
fails is recorded, and the rest is done. Repositories are deleted whatever happens, Ctrl-C included.
"""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(1, str(ROOT))  # the library and the local Hub of this checkout

import typer
from rich.console import Console
from rich.table import Table

from hub_parts.record import FAILED, OK, Part, Record
from hub_parts.setup import announce, be_quiet, fill, local_hub, pick_device, split_names, versions, who

KINDS = ("favor_plus", "favor_sharp", "lara", "eva")
MODELS = ("bert", "gpt2", "vit")
STEPS = ("native", "convert", "direct", "compare", "train", "push", "reload", "delete")
COLUMNS = {
    "load": "weights of the stock model",
    "native": "native",
    "convert": "converted",
    "direct": "loaded as converted",
    "compare": "cosine to softmax",
    "train": "loss",
    "push": "pushed",
    "reload": "loaded back",
    "delete": "deleted",
}
REHEARSAL = (
    "**A rehearsal**: small checkpoints with random weights and the file layout of the real ones, on a Hub inside the"
    " process. It says that this check works, and nothing about the real Hub or the real models."
)

console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def main(
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Use a small Hub of this machine and small checkpoints; no network.")
    ] = False,
    models: Annotated[str, typer.Option(help="Models, separated by commas.")] = ",".join(MODELS),
    kinds: Annotated[str, typer.Option(help="Kinds of attention, separated by commas.")] = ",".join(KINDS),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 20,
    fail: Annotated[
        list[str] | None,
        typer.Option(metavar="PART", help="Make a part fail on purpose, like bert/eva/convert. Repeatable."),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(help="The results; a table goes beside them.", show_default="hub_check[_rehearsal].json"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="a GPU if there is one")] = None,
) -> None:
    """Load, convert, compare, train, push, load back and delete, with every model and kind.

    It asks nothing, but says first what it will do. It makes private repositories of random names in your account and
    deletes them; no other repository is changed.
    """
    chosen = split_names(models, MODELS, "--models"), split_names(kinds, KINDS, "--kinds")
    parts = [part for model in chosen[0] for part in _parts(model, chosen[1])]
    if unknown := [name for name in fail or [] if name not in parts]:
        raise typer.BadParameter(
            f"--fail {unknown[0]}: there is no such part in this run. Parts are called {chosen[0][0]}/load or "
            f"{chosen[0][0]}/{chosen[1][0]}/STEP, with one of the steps {', '.join(STEPS)}"
        )
    with ExitStack() as stack:
        hub = local_hub(stack) if rehearse else None
        be_quiet()
        user = who()
        if hub is not None:
            fill(hub)
        device = pick_device(device)
        failed = _check(chosen, user, device, steps, fail or [], json, rehearse)
    raise typer.Exit(1 if failed else 0)


def _check(
    chosen: tuple[list[str], list[str]],
    user: str,
    device: str,
    steps: int,
    fail: list[str],
    json: Path | None,
    rehearse: bool,
) -> bool:
    """Run all parts. Returns whether something failed or is left behind."""
    from huggingface_hub import HfApi

    from hub_parts.models import MODELS as HUB_MODELS
    from hub_parts.repositories import Repositories
    from hub_parts.steps import Settings

    settings = Settings(device, steps, learning_rate=5e-3 if rehearse else 5e-5)
    repositories = Repositories(HfApi(), user, secrets.token_hex(4))
    path = json or Path("hub_check_rehearsal.json" if rehearse else "hub_check.json")
    record = Record(
        path,
        title="Rehearsal of the check against the Hub" if rehearse else "Check against the Hugging Face Hub",
        facts={
            "rehearsal": rehearse,
            "command": shlex.join(["python", "scripts/hub_check.py", *sys.argv[1:]]),
            "endpoint": os.environ.get("HF_ENDPOINT", "https://huggingface.co"),
            "versions": versions(device),
        },
        columns=COLUMNS,
        fail=fail,
        on_part=_tell,
    )

    def keep() -> None:
        record.facts["repositories"] = repositories.to_dict()
        record.write()

    repositories.changed = keep
    models = [HUB_MODELS[name] for name in chosen[0]]
    announce(console, models, chosen[1], repositories, rehearse, path)
    with _told_to_stop_by_exception():
        try:
            for model in models:
                _check_model(model, chosen[1], settings, repositories, record)
            record.finish()
        finally:
            left = _clean_up(repositories)
            record.facts["left_behind"] = left
            keep()
            table = path.with_suffix(".md")
            table.write_text(record.markdown(_introduction(record, left)), encoding="utf-8")
            _show(record)
            console.print(f"written: {path}, {table}", soft_wrap=True)
    return bool(record.failed or left)


def _check_model(model: Any, kinds: list[str], settings: Any, repositories: Any, record: Record) -> None:
    from hub_parts.steps import KindCheck, ModelCheck

    stock = ModelCheck(model, settings)
    load = f"{model.name}/load"
    with _status(load):
        record.run(load, stock.load)
    for kind in kinds:
        check = KindCheck(stock, kind, repositories)
        needs = {"native": [load], "convert": [load], "reload": ["push"]}
        for step in STEPS:
            name = f"{model.name}/{kind}/{step}"
            wanted = needs.get(step, ["convert"])
            if step == "delete":
                wanted = [] if check.repo in repositories.left else ["push"]
            with _status(name):
                record.run(name, getattr(check, step), [w if "/" in w else f"{model.name}/{kind}/{w}" for w in wanted])


def _parts(model: str, kinds: list[str]) -> Iterator[str]:
    yield f"{model}/load"
    for kind in kinds:
        yield from (f"{model}/{kind}/{step}" for step in STEPS)


# -- meanwhile and after ---------------------------------------------------------------------------------------------
@contextmanager
def _status(name: str) -> Iterator[None]:
    if not console.is_terminal:
        yield
        return
    with console.status(name):
        yield


def _tell(part: Part) -> None:
    style = {OK: "green", FAILED: "red"}.get(part.status, "yellow")
    text = part.cell().replace("**", "") + (f": {part.error}" if part.status == FAILED else "")
    console.print(f"[{style}]{part.status:8}[/] {part.name:28} {part.seconds:6.1f} s  ", end="")
    console.print(text, markup=False, soft_wrap=True)


@contextmanager
def _told_to_stop_by_exception() -> Iterator[None]:
    """A polite request to end (SIGTERM) is like Ctrl-C: what is in `finally` is done."""

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _clean_up(repositories: Any) -> dict[str, str]:
    """Delete what is left; a second Ctrl-C does not stop it."""
    if not repositories.left:
        return {}
    kept: list[tuple[int, Callable[..., Any] | int | None]] = [
        (number, signal.signal(number, signal.SIG_IGN)) for number in (signal.SIGINT, signal.SIGTERM)
    ]
    try:
        console.print(f"deleting {len(repositories.left)} repositories; please wait")
        left = repositories.delete_all()
    finally:
        for number, handler in kept:
            signal.signal(number, handler)
    for name, reason in left.items():
        console.print(f"NOT DELETED: {name} ({reason}); delete it with `hf repos delete {name}`", soft_wrap=True)
    return left


def _introduction(record: Record, left: dict[str, str]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in record.facts["versions"].items() if name != "device")
    lines = [REHEARSAL] if record.facts["rehearsal"] else []
    where = f"{record.facts['endpoint']}, {record.started}"
    lines.append(f"`{record.facts['command']}` with {where}; {versions}; {record.facts['versions']['device']}.")
    lines += [f"**Left behind**: `{name}` ({reason})." for name, reason in left.items()]
    return "\n\n".join(lines)


def _show(record: Record) -> None:
    for head, *rows in record.grids():
        table = Table(title=record.title)
        for number, heading in enumerate(head):
            table.add_column(heading, no_wrap=number == 0)
        for row in rows:
            table.add_row(*(cell.replace("**", "") for cell in row))
        console.print(table)
    bad = [part.name + " (on purpose)" * part.on_purpose for part in record.failed]
    console.print(f"{len(bad)} failed: {', '.join(bad)}" if bad else "nothing failed")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
    app.command()(main)
    app()
