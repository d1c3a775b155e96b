"""`hf-linattn bench`: the command line of the benchmarks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..bench import report
from ..bench.attention import Plan, run_attention, run_memory
from ..bench.cases import MODES
from ..bench.environment import describe
from ..bench.generation import LENGTHS as CONTEXTS
from ..bench.generation import Decoder, run_generation
from ..bench.models import MODELS, run_models
from ..bench.ours import KindOptions
from ..bench.peers import PEERS
from ..bench.plot import write_plots
from ..bench.results import BENCHMARKS, Results, Row
from ..errors import ConfigError, LinAttnError

LENGTHS = ",".join(str(2**power) for power in range(8, 17))
KINDS = "favor_plus,favor_sharp,lara,eva"
CPU_SOFTMAX_LENGTH = 16384  # one core takes a minute and more for a training step beyond it
FILE_WIDTH = 160  # of tables that go to a file or a pipe

What = Enum("What", {name: name for name in (*BENCHMARKS, "all")}, type=str)  # type: ignore[misc]
Mode = Enum("Mode", {name: name for name in (*MODES, "both")}, type=str)  # type: ignore[misc]
Device = Enum("Device", {"cpu": "cpu", "cuda": "cuda"}, type=str)


def bench(
    what: Annotated[
        list[What] | None, typer.Argument(help="What to measure; several may be given. By default: attention.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Numbers of tokens, separated by commas.",
            show_default=f"{LENGTHS}; in generation {','.join(map(str, CONTEXTS))}",
        ),
    ] = None,
    kinds: Annotated[str, typer.Option(help="Kinds of attention, separated by commas.")] = KINDS,
    window: Annotated[
        str | None,
        typer.Option(
            help="Window sizes, separated by commas; 0 for none.",
            show_default="0; in models and generation that of the family",
        ),
    ] = None,
    causal: Annotated[bool | None, typer.Option("--causal/--bidirectional", show_default="both")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, separated by commas.")] = "float32",
    mode: Annotated[Mode, typer.Option(help="Which passes to time.")] = Mode.both,  # type: ignore[attr-defined]
    peers: Annotated[str, typer.Option(help="What to compare with, separated by commas.")] = ",".join(PEERS),
    batch: Annotated[int, typer.Option(min=1)] = 1,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    head_dim: Annotated[int, typer.Option(min=1)] = 64,
    num_features: Annotated[int, typer.Option(min=1, help="Of FAVOR+, FAVOR# and the peers.")] = 256,
    num_landmarks: Annotated[int, typer.Option(min=1, help="Of LARA.")] = 64,
    num_chunks: Annotated[int, typer.Option(min=1, help="Of bidirectional EVA.")] = 64,
    chunk_size: Annotated[int, typer.Option(min=1, help="Of causal EVA; a divisor of its window.")] = 16,
    eva_window: Annotated[int, typer.Option(min=1, help="Window of EVA where --window is 0.")] = 64,
    models: Annotated[str, typer.Option(help="Models, separated by commas.")] = ",".join(MODELS),
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Fewer layers than the models have.", show_default=f"{Decoder.layers} in generation"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="GPT-2 checkpoint for generation.", show_default="random weights")
    ] = None,
    max_chunks: Annotated[
        int, typer.Option(min=0, help="In generation also EVA with at most so many summaries; 0 for not.")
    ] = 64,
    device: Annotated[Device, typer.Option()] = Device.cpu,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for each implementation in each case.")] = 2.0,
    max_softmax_length: Annotated[
        int | None,
        typer.Option(
            min=1, help="Longest input for softmax.", show_default=f"{CPU_SOFTMAX_LENGTH} on a CPU, none on a GPU"
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture here (PNG).")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write all tables here.")] = None,
    readme: Annotated[Path | None, typer.Option(help="Rewrite the performance section of this file.")] = None,
    from_json: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Measure nothing; show earlier results. Several files may be given, for --markdown and --readme.",
        ),
    ] = None,
) -> None:
    """Measure the attention kinds beside softmax attention and other libraries."""
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    try:
        if readme is not None:
            report.check_readme(readme)
        if from_json:
            found = [Results.read(path) for path in from_json]
        else:
            windows = None if window is None else _integers(window, "--window")
            chosen = [entry.value for entry in what or [What("attention")]]
            plan = Plan(
                lengths=_integers(LENGTHS if lengths is None else lengths, "--lengths"),
                kinds=_names(kinds),
                windows=windows or (0,),
                causal=(False, True) if causal is None else (causal,),
                dtypes=_names(dtype),
                modes=MODES if mode.value == "both" else (mode.value,),
                peers=_names(peers),
                batch=batch,
                heads=heads,
                head_dim=head_dim,
                options=KindOptions(
                    num_features=num_features,
                    num_landmarks=num_landmarks,
                    num_chunks=num_chunks,
                    eva_window=eva_window,
                    eva_chunk_size=chunk_size,
                ),
                device=device.value,
                threads=threads,
                seconds=seconds,
                max_softmax_length=_softmax_limit(max_softmax_length, device.value),
            )
            run = Run(
                plan=plan,
                generation=replace(
                    plan,
                    lengths=plan.lengths if lengths else CONTEXTS,
                    max_softmax_length=max_softmax_length,  # a step's cost is linear
                ),
                decoder=Decoder(layers or Decoder.layers, model, max_chunks or None),
                models=_names(models),
                layers=layers,
                windows=windows or (None,),
            )
            found = [_run(run, chosen, json)]
        written = _write(found, from_json or [], json, plot, markdown, readme)
        for results in found:
            for table in report.terminal_tables(results):
                console.print(table)
            console.print(report.setting(results), highlight=False)
    except (LinAttnError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    for path in written:
        console.print(f"written: {path}", soft_wrap=True)


def _write(
    found: list[Results],
    sources: list[Path],
    json: Path | None,
    plot: Path | None,
    markdown: Path | None,
    readme: Path | None,
) -> list[Path]:
    """Write the files that were asked for and return their paths."""
    if len(found) > 1 and (json or plot):
        raise ConfigError("--json and --plot are of one run; got several --from-json. Give them one by one.")
    written: list[Path] = []
    if json is not None:
        found[0].write(json)
        written.append(json)
    if plot is not None:
        written += write_plots(found[0], plot)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text("\n".join(report.markdown(results) for results in found), encoding="utf-8")
        written.append(markdown)
    if readme is not None:
        pictures = [plot] if plot else [path.with_suffix(".png") for path in sources]  # beside earlier results
        sections = [
            report.readme_section(results, _relative(picture, readme))
            for results, picture in zip_longest(found, pictures[: len(found)])
        ]
        report.write_readme(readme, "\n\n".join(sections))
        written.append(readme)
    return written


def _relative(picture: Path | None, readme: Path) -> str | None:
    if picture is None or not picture.exists():
        return None
    return Path(os.path.relpath(picture, readme.parent)).as_posix()


@dataclass(frozen=True)
class Run:
    """What the command line says of each benchmark.

    Args:
        plan: Of all but generation, which has its own lengths and no limit for softmax.
    """

    plan: Plan
    generation: Plan
    decoder: Decoder
    models: tuple[str, ...]
    layers: int | None
    windows: tuple[int | None, ...]

    def options(self, chosen: Sequence[str]) -> dict[str, Any]:
        """What the results say about the run."""
        both = {"models": self.models, "layers": self.layers, "decoder": asdict(self.decoder)}
        return {**(self.generation if list(chosen) == ["generation"] else self.plan).to_dict(), **both}

    def parts(self, name: str, say: Callable[[str], None]) -> Iterator[list[Row]]:
        """The rows of one benchmark, as they come."""
        if name == "generation":
            return run_generation(self.generation, self.decoder, windows=self.windows, report=say)
        if name == "models":
            return run_models(self.plan, self.models, layers=self.layers, windows=self.windows, report=say)
        return run_attention(self.plan, say) if name == "attention" else run_memory(self.plan, say)


def _run(run: Run, chosen: Sequence[str], json: Path | None) -> Results:
    """Measure, and after every case write what there is so far: a run of an hour may be cut short."""
    plan = run.plan
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a GPU that PyTorch can use, and there is none. Use --device cpu.")
    torch.set_num_threads(plan.threads)
    torch.manual_seed(0)
    rows: list[Row] = []
    command = " ".join(["hf-linattn", *sys.argv[1:]])
    results = Results((), command, describe(plan.device), run.options(chosen))
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def say(text: str) -> None:
            progress.update(task, description=text)

        for name in BENCHMARKS:
            if name in chosen or "all" in chosen:
                for found in run.parts(name, say):
                    rows += found
                    if json is not None:
                        replace(results, rows=tuple(rows), is_complete=False).write(json)
    return replace(results, rows=tuple(rows))


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _integers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _names(text))
    except ValueError as error:
        raise ConfigError(f"{option} must be integers separated by commas; got {text!r}.") from error


def _softmax_limit(given: int | None, device: str) -> int | None:
    return CPU_SOFTMAX_LENGTH if given is None and device == "cpu" else given
