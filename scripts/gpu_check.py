"""What only a GPU can show, in one command of at most eight minutes that downloads nothing.

    python scripts/gpu_check.py --out gpu.json             # on a machine with a GPU
    python scripts/gpu_check.py --rehearse                 # on a CPU, small, kernels in Triton's interpreter
    python scripts/gpu_check.py --parts kernels,attention  # some of it

Parts run in this order, each in a process of its own with a time limit. A failure is recorded and the rest goes on;
the results file is written after every finding. Beside it comes a table in Markdown of the same name.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # from a checkout, where nothing is installed

import typer
from rich.console import Console

from isolated import Finding, Outcome, Part, run_child, run_parts, write_atomically

RESULTS = ROOT / "experiments" / "results" / "gpu"


def _lazily(module: str, function: str) -> Any:
    """A part's function, imported in the part's own process: an import that fails fails one part."""

    def run(context: Any) -> Any:
        import importlib

        return getattr(importlib.import_module(f"gpu_parts.{module}"), function)(context)

    return run


PARTS = (
    Part("tests", "tests marked gpu", 110, _lazily("tests", "gpu_tests"), is_timed=False),
    Part("kernels", "kernels against float64", 110, _lazily("kernels", "kernels"), is_timed=False),
    Part("kinds", "whole attention functions against float64", 110, _lazily("kernels", "kinds"), is_timed=False),
    Part("warm-up", "kernels compiled for what follows", 110, _lazily("speed", "warm_up"), is_timed=False),
    Part("attention", "attention beside softmax, bfloat16", 85, _lazily("speed", "attention")),
    Part("models", "whole models, bfloat16", 60, _lazily("speed", "models")),
    Part("generation", "generation, one token at a time", 40, _lazily("speed", "generation")),
    Part("compiled", "torch.compile, reduce-overhead", 75, _lazily("compiled", "compiled")),
    Part("training", "the Trainer in bfloat16", 40, _lazily("training", "training")),
    Part("recipe", "the text classification recipe", 45, _lazily("recipe", "recipe")),
    Part("profile", "where the time goes", 30, _lazily("profile", "profiled")),
    Part("lengths", "other lengths and dtypes", 40, _lazily("speed", "other_lengths")),
)


def main(
    out: Annotated[Path | None, typer.Option(help="JSON of the results; the table goes beside it.")] = None,
    minutes: Annotated[float, typer.Option(help="For all parts together.", min=0.05)] = 8.0,
    parts: Annotated[str, typer.Option(help="Names of parts, separated by commas.")] = "",
    model: Annotated[Path | None, typer.Option(help="A checkpoint for the part 'recipe'.")] = None,
    rehearse: Annotated[bool, typer.Option(help="On a CPU, in Triton's interpreter: no figure counts.")] = False,
    fail: Annotated[str, typer.Option(help="A part to fail on purpose.")] = "",
    from_json: Annotated[Path | None, typer.Option(help="Make the table of earlier results again, and end.")] = None,
    child: Annotated[str, typer.Option(hidden=True)] = "",
    pipe: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Check and measure everything that needs a GPU."""
    names = [part.name for part in PARTS]
    chosen = [name.strip() for name in parts.split(",") if name.strip()] or names
    for name in [*chosen, *([fail] if fail else [])]:
        if name not in names:
            raise typer.BadParameter(f"Parts are {', '.join(names)}; got {name!r}.")
    if from_json is not None:
        _write_table(from_json)
        return
    # Many processes compile side by side; each with a thread per core, they would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    if child:
        raise typer.Exit(_child(child, pipe, rehearse, model, child == fail))
    _require(rehearse, model)
    out = out or RESULTS / ("rehearsal.json" if rehearse else "check.json")
    given = [out.name if argument == str(out) else argument for argument in sys.argv[1:]]
    command = " ".join(["python", "scripts/gpu_check.py", *given])
    _Run(out, command, rehearse).run([part for part in PARTS if part.name in chosen], 60 * minutes)


def _child(name: str, pipe: int, rehearse: bool, model: Path | None, must_fail: bool) -> int:
    from gpu_parts.context import Context

    part = next(part for part in PARTS if part.name == name)
    return run_child(part, Context(rehearse, model), pipe, must_fail=must_fail)


def _require(rehearse: bool, model: Path | None) -> None:
    import torch

    if not rehearse and not torch.cuda.is_available():
        raise typer.BadParameter("PyTorch finds no GPU here. Use --rehearse to try the parts on a CPU.")
    if model is not None and not (model / "config.json").is_file():
        raise typer.BadParameter(f"--model must be a folder with a config.json; got {model}.")


def _write_table(results: Path) -> None:
    from gpu_parts.report import markdown

    write_atomically(results.with_suffix(".md"), markdown(json.loads(results.read_text(encoding="utf-8"))))


class _Run:
    """One run: what it writes, and what it says on the way."""

    def __init__(self, out: Path, command: str, is_rehearsal: bool) -> None:
        from hf_linattn.bench.environment import describe

        self.out, self.console = out, Console()
        self.head: dict[str, Any] = {
            "command": command,
            "is_rehearsal": is_rehearsal,
            "date": time.strftime("%Y-%m-%d"),
            "environment": describe("cpu" if is_rehearsal else "cuda"),
        }

    def run(self, parts: list[Part], seconds: float) -> None:
        given = [argument for argument in sys.argv[1:] if argument != ""]

        def command(part: Part, pipe: int) -> list[str]:
            return [sys.executable, __file__, *given, "--child", part.name, "--pipe", str(pipe)]

        outcomes = run_parts(parts, command, seconds=seconds, save=self.save, report=self.report)
        self.save(outcomes, is_complete=True)
        _write_table(self.out)
        self.console.print(f"Results: {self.out} and {self.out.with_suffix('.md')}", soft_wrap=True)
        raise typer.Exit(1 if any(outcome.is_failure for outcome in outcomes) else 0)

    def save(self, outcomes: list[Outcome], is_complete: bool = False) -> None:
        content = self.head | {"is_complete": is_complete, "parts": [outcome.to_dict() for outcome in outcomes]}
        text = json.dumps(content, indent=1) + "\n"
        for place, name in ((str(ROOT), "."), (sys.prefix, "python")):  # results are for everybody to read
            text = text.replace(place, name)
        write_atomically(self.out, text)

    def report(self, outcome: Outcome) -> None:
        if outcome.status == "running":
            self.say(f"{outcome.name}: {outcome.title} (at most {outcome.limit:.0f} s)")
            return
        failures = [finding for finding in outcome.findings if finding.get("failed")]
        self.say(
            f"{outcome.name}: {outcome.status} after {outcome.seconds} s, {len(outcome.findings)} findings,"
            f" {len(failures)} failed{'. ' + outcome.reason if outcome.reason else ''}"
        )
        for finding in failures[:5]:
            self.say(f"    {_short(finding)}")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _short(finding: Finding) -> str:
    return ", ".join(f"{name}={value}" for name, value in finding.items() if name not in ("failed", "settings"))[:300]


if __name__ == "__main__":
    typer.run(main)
