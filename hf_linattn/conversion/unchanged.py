"""All or nothing: a model that could not be changed as a whole is as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Put back classes, attributes, submodules and hooks of all modules if the block raises; no tensors are copied."""
    kept = [
        (module, type(module), {k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(module).items()})
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, cls, attributes in kept:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
        raise
