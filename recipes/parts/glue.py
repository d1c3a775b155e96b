"""The tasks of GLUE: columns, splits and metrics (Wang et al. 2019, arXiv:1804.07461, table 1)."""

from __future__ import annotations

from dataclasses import dataclass

DATASET = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """One of them.

    Args:
        text, pair: Columns; None where a row has one text.
        metrics: Names, as in `metrics.METRICS`; the first is the one that counts.
        validation, test: Splits on the Hub: the first is that of `--do_eval` or `--do_predict`, others follow it.
    """

    text: str
    pair: str | None
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)
    test: tuple[str, ...] = ("test",)


TASKS = {
    "cola": GlueTask("sentence", None, ("matthews_correlation",)),
    "mnli": GlueTask(
        "premise",
        "hypothesis",
        validation=("validation_matched", "validation_mismatched"),
        test=("test_matched", "test_mismatched"),
    ),
    "mrpc": GlueTask("sentence1", "sentence2", ("f1", "accuracy")),
    "qnli": GlueTask("question", "sentence"),
    "qqp": GlueTask("question1", "question2", ("f1", "accuracy")),
    "rte": GlueTask("sentence1", "sentence2"),
    "sst2": GlueTask("sentence", None),
    "stsb": GlueTask("sentence1", "sentence2", ("pearson", "spearmanr")),
    "wnli": GlueTask("sentence1", "sentence2"),
}
