"""What `transfer_quality.py` measures on: a file a task, each with one class `Task`."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_linattn.modules.config import AttentionConfig

TASKS = ("gpt2", "recall", "vit", "minilm")


@dataclass(frozen=True)
class Files:
    """Where a task finds its model and its data; a task that needs none of one kind ignores it.

    Args:
        train_rows: Only the first rows of each training file; `None`: all.
    """

    model: Path | None = None
    train: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    train_rows: int | None = None


class BaseTask(ABC):
    """A softmax model, inputs to transfer on, and a score.

    Args:
        files: Model and data.
    Attributes:
        model: On softmax attention, float32, in evaluation mode.
        about: What a score is, and of how much (`few` and all), for the results.
    """

    model: Any
    about: str

    @abstractmethod
    def __init__(self, files: Files) -> None: ...

    @abstractmethod
    def settings(self) -> dict[str, AttentionConfig]:
        """By the name of a row. Learned ones are trained, the others are controls. Seeds are the runner's."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Inputs without labels, without end."""

    @abstractmethod
    def score(self, model: Any, few: bool = False) -> dict[str, float]:
        """How good a model is, the main figure first.

        Args:
            few: Of a part of the test data, for controls.
        """

    def labelled_batches(self, seed: int) -> Iterator[Mapping[str, Tensor]]:
        """Inputs with labels, without end, of tasks whose models can be fine-tuned; the others leave this as it is."""
        raise NotImplementedError(f"{type(self).__module__} has no labels: its models are not fine-tuned.")


def load_task(name: str, files: Files) -> BaseTask:
    """The task of a file in this folder."""
    return importlib.import_module(f"{__name__}.{name}").Task(files)
