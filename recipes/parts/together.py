"""What one process finds out, or fails at, and all of them have to know."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import TrainingArguments

from .common import RecipeError
from .processes import agree

T = TypeVar("T")


class SaveError(RecipeError):
    """Something could not be written, on this process or on another one."""

    is_known = True  # to all processes


def gather(value: T, training: TrainingArguments) -> list[T]:
    """The value of every process, by rank. Every process has to ask."""
    if training.world_size == 1:
        return [value]
    found: list[Any] = [None] * training.world_size
    torch.distributed.all_gather_object(found, value)
    return found


def decided(decide: Callable[[], T], training: TrainingArguments) -> list[T]:
    """What the processes that write checkpoints find out: one process, or one a node with `--save_on_each_node`.

    Raises: RecipeError on every process, if one of them raises it.
    """
    answer: Any = None
    refusal: str | None = None
    if training.should_save:
        try:
            answer = decide()
        except RecipeError as error:
            refusal = str(error)
        except OSError as error:
            refusal = f"{error.filename or training.output_dir} cannot be used: {error.strerror or error}."
    every = gather((training.should_save, answer, refusal), training)
    for _, _, message in every:
        if message is not None:
            raise RecipeError(message)
    return [answer for decides, answer, _ in every if decides]


@contextmanager
def together(
    what: str, folder: str | os.PathLike[str], training: TrainingArguments, needed: Callable[[], int] | None = None
) -> Iterator[None]:
    """Leave the block after all processes have; if one of them fails in it, all stop, and nobody waits for it.

    Args:
        what: Is written, for the message.
        folder: Where to.
        needed: How many bytes that takes, if it is known.
    Raises: SaveError; on the process that failed the error itself, if it is no failure of writing.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if getattr(error, "is_known", False):  # of a block in this one: all processes are here
            raise
        failure = error
    if not agree(failure is not None, training):
        return
    if failure is None:
        raise SaveError(f"{what} is not saved: another process could not write its part.")
    if not is_write_failure(failure):
        failure.is_known = True  # type: ignore[attr-defined]
        raise failure
    raise SaveError(describe_failure(what, folder, failure, needed() if needed else 0)) from failure


def is_write_failure(error: BaseException) -> bool:
    """Whether an error comes from the disk. torch and safetensors have classes of their own for it."""
    if isinstance(error, SafetensorError):
        return "I/O error" in str(error)
    if isinstance(error, RuntimeError):
        return any(part in str(error) for part in ("inline_container", "iostream", "Parent directory"))
    return isinstance(error, OSError) and error.errno is not None


def describe_failure(what: str, folder: str | os.PathLike[str], error: BaseException, needed: int = 0) -> str:
    """What could not be written, where, why, how much is free, and what to do: one line."""
    place = existing(Path(folder))
    reason, number = " ".join(str(error).split()), getattr(error, "errno", None)
    if isinstance(error, OSError) and number is not None:
        reason = os.strerror(number)
    is_read_only = number in (errno.EROFS, errno.EACCES, errno.EPERM) or not os.access(place, os.W_OK)
    free = shutil.disk_usage(place).free
    room = f"; {size(free)} are free there" + (f", about {size(needed)} are needed" if needed else "")
    advice = "Make the folder writable, or give" if is_read_only else "Make room, or give"
    return (
        f"{what} could not be written to {os.fspath(folder)}: {reason}{'' if is_read_only else room}. Earlier "
        f"checkpoints are untouched. {advice} another --output_dir; the same command line goes on from the last "
        "complete checkpoint."
    )


def existing(place: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(each for each in (place, *place.absolute().parents) if each.exists())


def size(number: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
