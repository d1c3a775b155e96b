"""Metrics of classification and regression, computed on this machine: no script is asked of the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy import stats
from sklearn import metrics

# What is computed if nothing is said.
CLASSIFICATION = ("accuracy", "f1")
REGRESSION = ("pearson", "spearmanr", "mse")


class LocalMetrics(evaluate.Metric):
    """Several metrics at once.

    Args:
        names: Of `METRICS`.
        num_labels: F1 is that of label 1 if there are two labels, else the mean over all.
    """

    def __init__(self, names: Sequence[str], num_labels: int = 2, **kwargs: Any) -> None:
        self.names = names
        self.average = "binary" if num_labels == 2 else "macro"
        # In memory: every process of a distributed run has all predictions, and files would collide.
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Metrics of classification and regression.",
            citation="",
            inputs_description="predictions, references: lists of label indices, or of numbers",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        values = np.asarray(references), np.asarray(predictions)
        return {name: float(METRICS[name](*values, self.average)) for name in self.names}


METRICS: dict[str, Any] = {
    "accuracy": lambda true, found, average: metrics.accuracy_score(true, found),
    "f1": lambda true, found, average: metrics.f1_score(true, found, average=average, zero_division=0.0),
    "matthews_correlation": lambda true, found, average: metrics.matthews_corrcoef(true, found),
    "mse": lambda true, found, average: metrics.mean_squared_error(true, found),
    "pearson": lambda true, found, average: stats.pearsonr(true, found).statistic,
    "spearmanr": lambda true, found, average: stats.spearmanr(true, found).statistic,
}
