"""What was measured on data sets of the Hub, in the two formats that the Hub shows beside a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from .header import BrokenCardError, join_card, read_card, split_card

CARD = "README.md"
RESULTS = ".eval_results"
INDEX = "model-index"


@dataclass(frozen=True)
class Measurement:
    """A metric of a model on a data set of the Hub.

    Args:
        metric, value: Name and number.
        task: Such as "text-classification" or "STS".
        dataset: Name on the Hub.
        config, split, revision: Of the data set.
        notes: How it was measured, such as the attention and the number of rows.
    """

    metric: str
    value: float
    task: str
    dataset: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    notes: str = ""


def check_card(folder: Path) -> None:
    """Raise `BrokenCardError` for a model card to whose header nothing can be added."""
    _with_index(folder, "", [])


def write_results(folder: Path, name: str, measured: Sequence[Measurement]) -> list[Path]:
    """Write the results of a task beside a checkpoint: a file in `.eval_results`, and `model-index` of its model card.

    Those of an earlier call with this name, and equal ones of the `model-index`, are replaced. Without a README.md
    there is no `model-index`.

    Returns: The files written.
    Raises: `BrokenCardError`, before anything is written.
    """
    card = _with_index(folder, name, measured)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    entries = [
        EvalResultEntry(
            dataset_id=one.dataset,
            task_id=one.config or "default",
            value=one.value,
            dataset_revision=one.revision,
            date=date,
            notes="; ".join(filter(None, (one.metric, one.notes))),
        )
        for one in measured
    ]
    path = folder / RESULTS / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
    if card is None:
        return [path]
    (folder / CARD).write_text(card, encoding="utf-8")
    return [path, folder / CARD]


def _with_index(folder: Path, name: str, measured: Sequence[Measurement]) -> str | None:
    """The model card with more results in its header; `None` if there is no card of this folder's own."""
    path = folder / CARD
    if not path.is_file() or path.is_symlink():
        return None
    header, body = split_card(read_card(path))
    model_name = folder.absolute().name
    present: list[EvalResult] = []
    if header.get(INDEX):
        try:
            model_name, present = model_index_to_eval_results(header[INDEX])
        except (KeyError, TypeError, AttributeError) as error:
            raise BrokenCardError(
                f"`{INDEX}` in the header of {str(path)!r} is none of the Hub's: {error!r}"
            ) from None
    new = [_of_index(name, one) for one in measured]
    kept = [one for one in present if not any(one.is_equal_except_value(other) for other in new)]
    return join_card({**header, INDEX: eval_results_to_model_index(model_name, [*kept, *new])}, body)


def _of_index(name: str, one: Measurement) -> EvalResult:
    return EvalResult(
        task_type=one.task,
        dataset_type=one.dataset,
        dataset_name=one.dataset,
        metric_type=one.metric,
        metric_name=f"{one.metric} ({name})",
        metric_value=one.value,
        dataset_config=one.config,
        dataset_split=one.split,
        dataset_revision=one.revision,
    )
