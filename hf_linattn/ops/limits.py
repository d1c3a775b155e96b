"""How large options may be: beyond it nothing is meant, and integers or memory overflow somewhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError

# Of tokens, features, landmarks, samples and chunks.
LARGEST_COUNT = 2**20
# Of factors that float32 multiplies with.
LARGEST_FACTOR = 1e6
# Of the factor of dot products, and its inverse.
LARGEST_SCALING = 1e30


def check_counts(options: Mapping[str, Any], *, minimum: int = 1, or_none: bool = False) -> None:
    """Raise `InputError` for the first of `options` that is no integer from `minimum` to `LARGEST_COUNT`."""
    note = ", or None" if or_none else ""
    for name, value in options.items():
        if or_none and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise InputError(f"{name} must be an integer >= {minimum}{note}; got {value!r}.")
        if value > LARGEST_COUNT:
            raise InputError(f"{name} must be an integer >= {minimum} and <= {LARGEST_COUNT}{note}; got {value!r}.")
