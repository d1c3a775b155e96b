"""lm-evaluation-harness and MTEB on a checkpoint: tasks by name, or in a file of one's own."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..conversion import revert
from ..errors import ConfigError, InputError, did_you_mean
from ..hub.header import is_hub_name
from .checkpoints import check_calibrated, find_device, load_model, load_processor

# Attention -> task -> metric -> value.
Scores = dict[str, dict[str, dict[str, float]]]
Metrics = dict[str, dict[str, float]]

_TASK_NAME = re.compile(r"^(?:task|group):\s*[\"']?([\w.-]+)", re.MULTILINE)


@dataclass(frozen=True)
class Evaluation:
    """What a command was told to evaluate, and how.

    Args:
        model: Hub name or folder of the checkpoint.
        tasks: Names of the suite, or files.
        baseline: Also with the softmax attention of the same weights.
        limit: Examples of every task (lm-eval); `None` for all.
        fewshot: Examples in every prompt (lm-eval); `None` is as the task says.
        batch_size: Rows at a time.
        max_length: Tokens of an input; `None` is that of the model.
        tokenizer: Where it is, if not with the model.
        device, dtype, revision: As in `load_model`.
    """

    model: str
    tasks: Sequence[str]
    baseline: bool
    limit: int | None
    fewshot: int | None
    batch_size: int
    max_length: int | None
    tokenizer: str | None
    device: str | None
    dtype: str
    revision: str


@dataclass(frozen=True)
class Source:
    """Where a task has its data, if that is the Hub: a data set with its configuration, split and revision.

    Args:
        task: What sort of task it is, in the words of the Hub.
    """

    task: str
    dataset: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Found:
    """What a suite found.

    Args:
        scores: The checkpoint's first, then those of its baseline.
        sources: Task -> where its data are, for tasks with data on the Hub.
    """

    scores: Scores
    sources: Mapping[str, Source]


def check_installed(module: str, package: str) -> None:
    """Raise `ConfigError` for a suite that is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"This evaluation needs {package}, which is not installed: pip install {package}")


# -- lm-evaluation-harness --------------------------------------------------------------------------------------------
def run_lm_eval(asked: Evaluation) -> Found:
    """The scores of a language model. A file is a task in the harness's own YAML format."""
    check_installed("lm_eval", "lm-eval")
    for name in (name for name in asked.tasks if _is_file(name)):
        if not name.endswith((".yaml", ".yml")) or not Path(name).is_file():
            raise InputError(f"--tasks {name!r} must be a task file (.yaml) of lm-eval that exists, or a name.")
    with _stdout_kept():
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        folders = sorted({str(Path(name).absolute().parent) for name in asked.tasks if _is_file(name)})
        manager = TaskManager(include_path=folders or None)
        tasks = [_task_of(name) if _is_file(name) else name for name in asked.tasks]
        for name in tasks:
            if not manager.match_tasks([name]):
                raise InputError(f"lm-eval has no task {name!r}.{did_you_mean(name, manager.all_tasks)}")
        model = load_model(asked.model, asked.revision, asked.dtype, asked.device)
        check_calibrated(model, asked.model)
        tokenizer = load_processor(model, asked.tokenizer or asked.model, asked.revision)
        if tokenizer.eos_token is None and tokenizer.bos_token is None:
            raise InputError(
                f"lm-eval begins a text with the end-of-text token, and the tokenizer of {asked.model!r} has none. "
                "Set its eos_token, or name another one: --tokenizer NAME."
            )

        sources: dict[str, Source] = {}

        def scores(model: Any) -> Metrics:
            options = {"batch_size": asked.batch_size, "max_length": asked.max_length, "device": str(model.device)}
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", **options)
            found = simple_evaluate(
                wrapped,
                tasks=tasks,
                num_fewshot=asked.fewshot,
                limit=asked.limit,
                task_manager=manager,
                log_samples=False,
            )
            configs = found["configs"].items()
            sources.update({task: source for task, config in configs if (source := _source_of(config))})
            return {task: _numbers(values) for task, values in found["results"].items()}

        return Found(_with_baseline(asked, model, scores), sources)


def _task_of(path: str) -> str:
    """The name of the task in a file."""
    named = _TASK_NAME.search(Path(path).read_text(encoding="utf-8"))
    if named is None:
        raise InputError(f"--tasks {path!r} is no task of lm-eval: it has no line 'task: NAME'.")
    return named[1]


def _source_of(config: Mapping[str, Any]) -> Source | None:
    """The data set of a task, from its settings; `None` for files."""
    path = config.get("dataset_path")
    if not isinstance(path, str) or not is_hub_name(path) or Path(path).exists():
        return None
    if "data_files" in (config.get("dataset_kwargs") or {}):
        return None
    split = config.get("test_split") or config.get("validation_split") or config.get("training_split")
    return Source("text-generation", path, config.get("dataset_name"), split)


# -- MTEB -------------------------------------------------------------------------------------------------------------
def run_mteb(asked: Evaluation) -> Found:
    """The scores of embeddings. A file holds pairs of texts with a score: `sentence1`, `sentence2`, `score`."""
    check_installed("mteb", "mteb")
    check_installed("sentence_transformers", "sentence-transformers")
    for name, value in {"--limit": asked.limit, "--fewshot": asked.fewshot}.items():
        if value is not None:
            raise ConfigError(f"{name} is for lm-eval; MTEB runs whole tasks.")
    with _stdout_kept():
        import mteb
        from sentence_transformers import SentenceTransformer

        tasks = [_pairs(name) if _is_file(name) else _named(name) for name in asked.tasks]
        loaded = load_model(asked.model, asked.revision, asked.dtype, "cpu")  # told here if it cannot be
        check_calibrated(loaded, asked.model)
        load_processor(loaded, asked.tokenizer or asked.model, asked.revision)
        encoder = SentenceTransformer(
            asked.model,
            device=str(find_device(asked.device)),
            revision=asked.revision,
            model_kwargs={"dtype": loaded.dtype},
        )
        if asked.max_length is not None:
            encoder.max_seq_length = asked.max_length

        def scores(_: Any) -> Metrics:
            options = {"batch_size": asked.batch_size}
            found = mteb.evaluate(encoder, tasks, cache=None, encode_kwargs=options)
            return {task.task_name: _flat(task.scores) for task in found.task_results}

        on_hub = [task for name, task in zip(asked.tasks, tasks, strict=True) if not _is_file(name)]
        sources = {
            task.metadata.name: Source(
                task.metadata.type,
                task.metadata.dataset["path"],
                config=task.metadata.dataset.get("name"),
                split=", ".join(task.metadata.eval_splits),
                revision=task.metadata.dataset["revision"],
            )
            for task in on_hub
        }
        return Found(_with_baseline(asked, encoder[0].auto_model, scores), sources)


def _named(name: str) -> Any:
    import mteb

    try:
        return mteb.get_task(name)
    except KeyError as error:
        raise InputError(f"MTEB has no task {name!r}: {error.args[0]}") from None


def _pairs(path: str) -> Any:
    """A task of MTEB out of a file."""
    import datasets
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    from ..data.files import TEXT_FORMATS, find_column, load_files

    rows = list(load_files([path], "--tasks", TEXT_FORMATS, streaming=True))
    columns = ("sentence1", "sentence2", "score")
    for column in columns:
        find_column(list(rows[0]) if rows else [], column, (), "tasks")
    kept = datasets.Dataset.from_list([{column: row[column] for column in columns} for row in rows])

    class Pairs(AbsTaskSTS):
        metadata = TaskMetadata(
            name=Path(path).stem,
            description="Pairs of texts with a score",
            type="STS",
            dataset={"path": Path(path).name, "revision": "local"},
            eval_langs=["eng-Latn"],
            main_score="cosine_spearman",
        )

        def load_data(self, **_: Any) -> None:
            self.dataset, self.data_loaded = {"test": kept}, True

    return Pairs()


def _flat(scores: Any) -> dict[str, float]:
    """The numbers of all splits and subsets, by metric; where there are several, with their names."""
    parts = {(split, part["hf_subset"]): _numbers(part) for split, parts in scores.items() for part in parts}
    if len(parts) == 1:
        return next(iter(parts.values()))
    return {f"{name} ({', '.join(where)})": value for where, found in parts.items() for name, value in found.items()}


# -- both -------------------------------------------------------------------------------------------------------------
def _with_baseline(asked: Evaluation, model: Any, scores: Callable[[Any], Metrics]) -> Scores:
    """The scores of a model as it is, and after it with softmax if that is asked for."""
    settings = getattr(model.config, "linear_attention", None)
    if asked.baseline and not settings:
        raise ConfigError(f"--baseline needs a converted checkpoint; {asked.model!r} has softmax attention itself.")
    found = {settings["kind"] if settings else "softmax": scores(model)}
    if asked.baseline:
        found["softmax"] = scores(revert(model))
    return found


def _numbers(values: Any) -> dict[str, float]:
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items() if name != "sample_len"}


def _is_file(name: str) -> bool:
    """Whether a task is meant as a file: it is one, or looks like the path of one."""
    return Path(name).is_file() or "/" in name or bool(re.search(r"\.(ya?ml|jsonl?|parquet|[ct]sv|txt)$", name))


@contextlib.contextmanager
def _stdout_kept() -> Iterator[None]:
    """What suites print goes to stderr: stdout is for the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
