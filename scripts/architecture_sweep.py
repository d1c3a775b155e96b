"""What every kind does in every model type of Transformers, each built tiny: docs/model_types.md.

    python scripts/architecture_sweep.py                     # all types, and the page: some six minutes on one core
    python scripts/architecture_sweep.py --types bert,llama  # these anew, the others as they were found before
    python scripts/architecture_sweep.py --resume            # those that the results file lacks
    python scripts/architecture_sweep.py --only-page         # the page from the results file

Each type runs in a process of its own, with limits of time and memory. The results file is written after every type.
Exits with 1 if a name is taken and ignored, a result is wrong, an error is not one of this library's, or advice in an
error does not work (`sweep_parts.check`).
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # from a checkout, where nothing is installed
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
import typer
from rich.console import Console

from isolated import write_atomically
from sweep_parts import check, configs, table

RESULTS = ROOT / "experiments" / "results" / "model_types.json"
PAGE = ROOT / "docs" / "model_types.md"
SECONDS, BYTES = 60, 12 << 30


def main(
    types: Annotated[str, typer.Option(help="Model types, separated by commas.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Only types that the results file lacks.")] = False,
    only_page: Annotated[bool, typer.Option("--only-page", help="Run nothing.")] = False,
    out: Annotated[Path, typer.Option(help="JSON of the results.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="The page to write.")] = PAGE,
    seconds: Annotated[float, typer.Option(help="End after this time; --resume goes on.")] = 3600.0,
) -> None:
    """What every kind does in every model type of Transformers."""
    console, start = Console(), time.monotonic()
    known = json.loads(out.read_text()) if out.exists() else {}
    results: dict[str, Any] = known.get("types", {}) if types or resume or only_page else {}
    wanted = types.split(",") if types else configs.all_types()
    if unknown := sorted(set(wanted) - set(configs.all_types())):
        raise typer.BadParameter(f"no model types of Transformers {transformers.__version__}: {unknown}")
    if resume:
        wanted = [name for name in wanted if name not in results]
    if not only_page:
        prepare()
        for name in wanted:
            if time.monotonic() - start > seconds:
                console.print(f"{seconds:.0f} s are over: go on with --resume")
                break
            results[name] = in_child(name)
            console.print(f"{name}: {table.group(results[name])}", highlight=False)
            save(out, results)
    found = json.loads(out.read_text())
    write_atomically(page, table.render(found, tolerance=check.TOLERANCE))
    wrong = table.faults(results)
    for fault in wrong:
        console.print(f"FAULT {fault}", highlight=False, markup=False)
    raise typer.Exit(bool(wrong))


def save(out: Path, results: dict[str, Any]) -> None:
    kept = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "known": len(configs.all_types()),
        "types": dict(sorted(results.items())),
    }
    write_atomically(out, json.dumps(kept, indent=1) + "\n")


def prepare() -> None:
    """Import and compute once what every child needs."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    check.warm_up()
    gc.collect()
    gc.freeze()


def in_child(model_type: str) -> dict[str, Any]:
    """The findings about a type, from a forked process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run(model_type, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return (
        json.loads(said) if said else {"built": False, "broken": f"ended, or took more than {SECONDS} s or its memory"}
    )


def _run(model_type: str, pipe: int) -> None:
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        try:
            found = check.sweep_one(model_type)
        except Exception as error:  # of the sweep itself
            found = {"built": False, "broken": f"the sweep ended in {type(error).__name__}: {str(error)[:300]}"}
        said = json.dumps(found).encode()
        while said:
            said = said[os.write(pipe, said) :]
    finally:
        os._exit(0)


if __name__ == "__main__":
    typer.run(main)
