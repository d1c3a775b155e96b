"""`hf-linattn eval`: lm-evaluation-harness or MTEB on a checkpoint, beside softmax if asked."""

from __future__ import annotations

import importlib.metadata
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench.workload import choose
from ..errors import ConfigError
from ..hub import Measurement, write_results
from ..hub.results import CARD, check_card
from . import options
from .checkpoints import AS_SAVED, model_class, read_config
from .output import note, print_json, print_table, write_json
from .suites import Evaluation, Found, run_lm_eval, run_mteb
from .values import name_list

EXAMPLE = "Example: hf-linattn eval gpt2-trained --tasks lambada_openai,piqa --limit 200 --baseline"

SUITES = {"lm-eval": run_lm_eval, "mteb": run_mteb}


def evaluate(
    model: options.Model,
    tasks: Annotated[
        str,
        typer.Option(
            help="Names of tasks, separated by commas; or files: a task of lm-eval (yaml), or for MTEB pairs of texts "
            "(columns sentence1, sentence2, score).",
            show_default=False,
        ),
    ],
    suite: Annotated[
        str | None,
        typer.Option(help="lm-eval or mteb.", show_default="lm-eval for a language model, mteb for others"),
    ] = None,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Evaluate also the same weights under softmax attention.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of every task (lm-eval).")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in every prompt (lm-eval).")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an input.", show_default="the model's")
    ] = None,
    batch_size: options.BatchSize = 8,
    output: Annotated[Path | None, typer.Option(help="Write the result here, as JSON.", dir_okay=False)] = None,
    eval_results: Annotated[
        bool,
        typer.Option(
            "--eval-results",
            help="Write the metrics of data sets on the Hub into MODEL: as .eval_results, and into its model card.",
        ),
    ] = False,
    tokenizer: options.Tokenizer = None,
    device: options.Device = None,
    dtype: options.Dtype = AS_SAVED,
    revision: options.Revision = "main",
    json: options.Json = False,
) -> None:
    """Run tasks of lm-evaluation-harness or of MTEB on a checkpoint. They have to be installed.

    Embeddings are those of sentence-transformers: with the pooling of the checkpoint, or the mean.
    """
    names = name_list(tasks)
    if not names:
        raise ConfigError(f"--tasks must name at least one task; got {tasks!r}.")
    if suite is None:
        is_language_model = model_class(read_config(model, revision)).__name__.endswith(("LMHeadModel", "CausalLM"))
        suite = "lm-eval" if is_language_model else "mteb"
    choose("--suite", suite, SUITES)
    if output is not None and not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {str(output)!r} cannot be written: its folder is not there.")
    if eval_results:
        if not Path(model).is_dir():
            raise ConfigError(f"--eval-results writes into the folder of the checkpoint; {model!r} is none.")
        check_card(Path(model))
    asked = Evaluation(
        model, names, baseline, limit, fewshot, batch_size, max_length, tokenizer, device, dtype, revision
    )
    found = SUITES[suite](asked)
    scores = found.scores
    result: dict[str, Any] = {"model": model, "suite": suite, "tasks": names, "limit": limit, "scores": scores}
    result["versions"] = {name: importlib.metadata.version(name) for name in (suite, "transformers", "torch")}
    if output is not None:
        write_json(output, result)
        note(f"written: {output}")
    if eval_results:
        _write_results(asked, found)
    if json:
        print_json(result)
    else:
        _show(scores)


def _write_results(asked: Evaluation, found: Found) -> None:
    """The checkpoint's own metrics, for the Hub. Standard errors are no metrics: they go into the notes."""
    attention, tasks = next(iter(found.scores.items()))
    how = f"{attention} attention" + ("" if asked.limit is None else f", first {asked.limit} examples")
    how += "" if asked.fewshot is None else f", {asked.fewshot} examples in the prompt"
    for task, metrics in tasks.items():
        source = found.sources.get(task)
        if source is None:
            note(f"{task!r} has no data set on the Hub, so it gets no entry in .eval_results.")
            continue
        measured = []
        for name, value in metrics.items():
            metric, comma, filtered = name.partition(",")  # of lm-eval: "exact_match,strict-match"
            error = metrics.get(f"{metric}_stderr{comma}{filtered}")
            if math.isfinite(value) and not metric.endswith("_stderr"):
                notes = how if error is None else f"standard error {error:.4g}; {how}"
                measured.append(Measurement(name, value, **asdict(source), notes=notes))
        written = write_results(Path(asked.model), task, measured)
        note(f"written: {', '.join(map(str, written))}")
    if not Path(asked.model, CARD).is_file():
        note(f"There is no model card in {asked.model!r}, so none gets the results.")


def _show(scores: dict[str, dict[str, dict[str, float]]]) -> None:
    """A row for every metric of every task, a column for every attention."""
    first = next(iter(scores.values()))
    rows = [
        (task, metric, *(f"{found[task][metric]:.4f}" for found in scores.values()))
        for task, metrics in first.items()
        for metric in metrics
    ]
    print_table(("task", "metric", *scores), rows)
