"""Exceptions of the library.

Every one derives from `LinAttnError` and, because callers of Transformers expect it, from a built-in type as well
(but `UnsupportedTransformersError`).
A message says what must be which, shows the value that was wrong, and says what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LinAttnError(Exception):
    """Base class of everything this library raises on purpose."""


class ConfigError(LinAttnError, ValueError):
    """A setting has a value that cannot work."""


class UnknownFieldError(ConfigError, TypeError):
    """A setting was given that does not exist (usually a typing error)."""


class UnsupportedError(LinAttnError, NotImplementedError, ValueError):
    """The combination of model, attention kind and request has no correct answer here.

    Also the two built-in types that torch and Transformers raise for that, which callers catch.
    """


class InputError(LinAttnError, ValueError):
    """An input cannot be treated correctly (a 4-D mask, packed sequences, ...)."""


class UncalibratedError(LinAttnError, RuntimeError):
    """A layer needs statistics of data (`hf_linattn.calibrate`) and has none yet."""


class CheckpointError(LinAttnError, ValueError):
    """A saved checkpoint is incomplete, contradicts itself, or was written by a newer version."""


class UnsupportedTransformersError(LinAttnError):
    """The installed Transformers does something else than this library was written for: no result would be right.

    Of no built-in type: Transformers itself goes on after ImportError, AttributeError, OSError, ValueError, TypeError
    and RuntimeError in places, and would do so after this one.
    """


def did_you_mean(value: object, allowed: Iterable[str]) -> str:
    """A sentence naming the closest allowed value, or an empty string when nothing is close."""
    close = difflib.get_close_matches(
        str(value).lower().replace("-", "_").replace("favour", "favor"), list(allowed), n=1
    )
    return f" Did you mean {close[0]!r}?" if close else ""
