"""`hf-linattn eval`: lm-evaluation-harness or MTEB on a checkpoint, beside softmax if asked."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench.workload import choose
from ..errors import ConfigError
from . import options
from .checkpoints import AS_SAVED, model_class, read_config
from .output import note, print_json, print_table, write_json
from .suites import Evaluation, run_lm_eval, run_mteb
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
    asked = Evaluation(
        model, names, baseline, limit, fewshot, batch_size, max_length, tokenizer, device, dtype, revision
    )
    scores = SUITES[suite](asked)
    result: dict[str, Any] = {"model": model, "suite": suite, "tasks": names, "limit": limit, "scores": scores}
    result["versions"] = {name: importlib.metadata.version(name) for name in (suite, "transformers", "torch")}
    if output is not None:
        write_json(output, result)
        note(f"written: {output}")
    if json:
        print_json(result)
    else:
        _show(scores)


def _show(scores: dict[str, dict[str, dict[str, float]]]) -> None:
    """A row for every metric of every task, a column for every attention."""
    first = next(iter(scores.values()))
    rows = [
        (task, metric, *(f"{found[task][metric]:.4f}" for found in scores.values()))
        for task, metrics in first.items()
        for metric in metrics
    ]
    print_table(("task", "metric", *scores), rows)
