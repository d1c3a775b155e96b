"""`hf-linattn bench`: the command line of the benchmarks."""

from __future__ import annotations

import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ..bench import report
from ..bench.attention import run_attention
from ..bench.environment import describe
from ..bench.generation import CONTEXTS, LAYERS, run_generation
from ..bench.kinds import MODEL_SIZES, SIZES, KindOptions
from ..bench.memory import run_memory
from ..bench.models import BATCH, MOST_TOKENS, run_models
from ..bench.models import LENGTHS as MODEL_LENGTHS
from ..bench.peers import PEERS
from ..bench.plan import Plan
from ..bench.plot import write_plot
from ..bench.results import Results
from ..bench.workload import MODES, choose
from ..errors import ConfigError, LinAttnError
from ..modules.registry import list_kinds
from .values import name_list

RUNS = {"attention": run_attention, "memory": run_memory, "models": run_models, "generation": run_generation}
LENGTHS = tuple(2**power for power in range(8, 17))
CPU_SOFTMAX_LENGTH = 16384  # one core takes a minute and more for a training step beyond it
FILE_WIDTH = 160  # of tables that go to a file or a pipe


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in name_list(text))
    except ValueError:
        raise typer.BadParameter(f"integers separated by commas are needed; got {text!r}.") from None


def _listed(help: str, *names: str, parser: Any = name_list, **options: Any) -> Any:
    """An option that takes several values, separated by commas."""
    metavar = "INTEGERS" if parser is _integers else "NAMES"
    return typer.Option(*names, help=f"{help}, separated by commas.", parser=parser, metavar=metavar, **options)


def _size(help: str, name: str) -> Any:
    """An option for a number of slots."""
    default = f"{SIZES[name]}, in models {MODEL_SIZES[name]}, with learned maps the preset's"
    return typer.Option(min=1, help=help, show_default=default)


Count = Annotated[int, typer.Option(min=1)]


# Parameters have the names of the fields of `Plan` and `KindOptions`, which are filled from them.
def bench(
    context: typer.Context,
    what: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(RUNS)} or all; default: attention.")] = None,
    lengths: Annotated[
        Any, _listed("Numbers of tokens", parser=_integers, show_default="256 .. 65536, in models 128 .. 4096")
    ] = None,
    kinds: Annotated[Any, _listed("Kinds of attention", show_default="all")] = None,
    windows: Annotated[
        Any, _listed("Window sizes, 0 for none", "--window", parser=_integers, show_default="0, or the family's")
    ] = None,
    causal: Annotated[bool | None, typer.Option("--causal/--bidirectional", show_default="both")] = None,
    dtypes: Annotated[Any, _listed("float32, bfloat16, float16", "--dtype")] = "float32",
    mode: Annotated[str, typer.Option(help=f"Passes to time: {', '.join(MODES)} or both.")] = "both",
    peers: Annotated[Any, _listed("What to compare with", show_default=", ".join(PEERS))] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Rows.", show_default=f"1; models {BATCH}, of at most {MOST_TOKENS} tokens together"),
    ] = None,
    heads: Count = 4,
    head_dim: Count = 64,
    learned: Annotated[
        bool | None,
        typer.Option("--learned/--random", help="Learned maps, or random ones.", show_default="random, models both"),
    ] = None,
    exact_below: Annotated[
        int, typer.Option(min=0, help="Also with exact softmax for shorter inputs than that; 0 for not.")
    ] = 0,
    num_features: Annotated[int | None, _size("Of FAVOR+, FAVOR# and the peers.", "num_features")] = None,
    num_landmarks: Annotated[int | None, _size("Of LARA.", "num_landmarks")] = None,
    num_chunks: Annotated[int | None, _size("Of bidirectional EVA.", "num_chunks")] = None,
    eva_chunk_size: Annotated[
        int, typer.Option("--chunk-size", min=1, help="Of causal EVA; a divisor of its window.")
    ] = 16,
    eva_window: Annotated[int, typer.Option(min=1, help="Window of EVA where --window is 0.")] = 64,
    models: Annotated[Any, _listed("Models", show_default=", ".join(Plan.models))] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Fewer layers.", show_default=f"the models', {LAYERS} in generation")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--model", help="GPT-2 for generation.", show_default="random weights")
    ] = None,
    max_chunks: Annotated[int, typer.Option(min=0, help="In generation, EVA with at most so many; 0 for not.")] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for each contender in each case.")] = 2.0,
    max_softmax_length: Annotated[
        int | None,
        typer.Option(min=1, help="Longest softmax.", show_default=f"{CPU_SOFTMAX_LENGTH} on a CPU, none on a GPU"),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture here (PNG).")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write all tables here.")] = None,
    from_json: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Measure nothing; show earlier results.")
    ] = None,
) -> None:
    """Measure the attention kinds beside softmax attention and other libraries."""
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    try:
        results = Results.read(from_json) if from_json else _measure(context.params, json)
        for table in report.terminal_tables(results):
            console.print(table)
        console.print(report.setting(results), highlight=False)
        if json is not None:
            results.write(json)
        if markdown is not None:
            markdown.parent.mkdir(parents=True, exist_ok=True)
            markdown.write_text(report.markdown(results), encoding="utf-8")
        if plot is not None:
            write_plot(results, plot)
    except (LinAttnError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    for path in filter(None, (json, markdown, plot)):
        console.print(f"written: {path}", soft_wrap=True)


def make_plan(benchmark: str, given: dict[str, Any]) -> Plan:
    """The plan of one benchmark from the parameters of the command."""
    is_generation, is_model = benchmark == "generation", benchmark in ("models", "generation")
    limit = CPU_SOFTMAX_LENGTH if given["device"] == "cpu" and not is_generation else None  # a step's cost is linear
    defaults: dict[str, Any] = {
        "lengths": {"generation": CONTEXTS, "models": MODEL_LENGTHS}.get(benchmark, LENGTHS),
        "batch": BATCH if benchmark == "models" else 1,
        "kinds": tuple(list_kinds()),
        "windows": (None,) if is_model else (0,),
        "peers": PEERS,
        "models": Plan.models,
        "max_softmax_length": limit,
    }
    chosen = {name: defaults.get(name) if value is None else value for name, value in given.items()}
    chosen["causal"] = (False, True) if given["causal"] is None else (given["causal"],)
    chosen["modes"] = MODES if given["mode"] == "both" else (given["mode"],)
    if benchmark == "models" and given["batch"] is None:
        chosen["most_tokens"] = MOST_TOKENS
    chosen["options"], *beside = _settings(benchmark, chosen)
    return Plan(**_of(Plan, {**chosen, "beside": tuple(beside)}))


def _settings(benchmark: str, given: dict[str, Any]) -> list[KindOptions]:
    """The options that every kind runs with: random or learned maps, or both, and those exact below a length."""
    common = {name: value for name, value in _of(KindOptions, given).items() if name not in ("learned", "exact_below")}
    sizes = MODEL_SIZES if benchmark == "models" else SIZES
    chosen = {name: size for name, size in sizes.items() if common.get(name) is None}
    random, learned = KindOptions(**{**common, **chosen}), KindOptions(**common, learned=True)
    both = [random, learned] if benchmark == "models" else [random]
    made = both if given["learned"] is None else [learned if given["learned"] else random]
    return [*made, replace(made[0], exact_below=given["exact_below"])] if given["exact_below"] else made


def _of(record: type, given: dict[str, Any]) -> dict[str, Any]:
    """What is given of the fields of a dataclass."""
    return {field.name: given[field.name] for field in fields(record) if field.name in given}


def _measure(given: dict[str, Any], json: Path | None) -> Results:
    """Run the benchmarks, and after every case write what there is so far: a run of an hour may be cut short."""
    asked = [choose("what", name, [*RUNS, "all"]) for name in given["what"] or ["attention"]]
    choose("mode", given["mode"], [*MODES, "both"])
    plans = {name: make_plan(name, given) for name in RUNS if name in asked or "all" in asked}
    if given["device"] == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a GPU that PyTorch can use, and there is none. Use --device cpu.")
    torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    first = next(iter(plans.values()))
    results = Results((), " ".join(["hf-linattn", *sys.argv[1:]]), describe(first.device), asdict(first))
    with Console(stderr=True).status("starting") as status:
        for name, plan in plans.items():
            for rows in RUNS[name](plan, status.update):
                results = replace(results, rows=(*results.rows, *rows))
                if json is not None:
                    replace(results, is_complete=False).write(json)
    return results
