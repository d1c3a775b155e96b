"""The canary: asks the installed Transformers, once per process, whether every seam is as expected.

Nothing here depends on the version number: a newer release is refused for what it does, not for being newer.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from ..errors import UnsupportedTransformersError
from ..ops.tracing import outside_of_modes
from . import cache_probes, family_probes, probes  # noqa: F401  # declare the seams
from .expected import SEAMS, Seam, changed, describe
from .families import FAMILIES, MODEL_TYPE_PREFIX

_lock = threading.RLock()
# Groups of seams, and model types for which all has been asked: every call of an attention function looks here.
passed: set[str] = set()
_asking: set[str] = set()


def check_seams(model_type: str | None = None) -> None:
    """Ask what has not been asked yet in this process. Does nothing while torch traces.

    Args:
        model_type: Of a config; for BERT, GPT-2 and ViT, converted or not, their modules are asked too.
    Raises: `UnsupportedTransformersError` for a seam that has changed.
    """
    if not torch.compiler.is_compiling():
        ask_seams(model_type)


def ask_seams(model_type: str | None = None) -> None:
    """`check_seams` for code that torch calls while it traces, without tracing it."""
    if "always" not in passed:
        _ask("always")
    if model_type is not None:
        family = model_type.removeprefix(MODEL_TYPE_PREFIX)
        if family in FAMILIES and family not in passed:
            _ask(family)
        if not _asking:
            passed.add(model_type)


def check_model(model: Any) -> None:
    """`check_seams` for what a function of this library was given as a model, whatever that is."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    check_seams(model_type if isinstance(model_type, str) else None)


def check_trainer() -> None:
    """The same for what the callback needs of the Trainer."""
    if "trainer" not in passed:
        _ask("trainer")


def _ask(group: str) -> None:
    with _lock:
        # A probe makes caches and masks of ours, which ask in turn: not what is being asked, and no family meanwhile.
        if group in passed or group in _asking or (_asking and group in FAMILIES):
            return
        _asking.add(group)
        try:
            for seam in SEAMS.values():
                if seam.when == group:
                    _probe(seam)
                elif seam.when == "family" and group in FAMILIES:
                    _probe(seam, group)
            passed.add(group)
        finally:
            _asking.discard(group)


def _probe(seam: Seam, *args: str) -> None:
    try:
        # As in a model's first call, whatever the caller's modes are: "meta" as default device, autograd, tracing.
        with outside_of_modes(), torch.no_grad(), torch.device("cpu"):
            found = seam.probe(*args)
    except UnsupportedTransformersError:
        raise
    except Exception as error:
        raise changed(seam.name, describe(error)) from error
    if found:
        raise changed(seam.name, found)
