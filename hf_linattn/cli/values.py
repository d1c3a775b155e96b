"""What is written on a command line, as values."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError


def name_list(text: str) -> tuple[str, ...]:
    """Names separated by commas, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def layer_list(layers: str | None, flag: str) -> list[int] | None:
    """Layers as the user wrote them, such as "0,1,4-5", as a list of indices; None for all.

    Raises: `ConfigError`, which names the flag, for anything else.
    """
    if layers is None:
        return None
    chosen: set[int] = set()
    try:
        for part in layers.split(","):
            first, _, last = part.partition("-")
            chosen.update(range(int(first), int(last or first) + 1))
    except ValueError:
        raise ConfigError(f"--{flag} must look like '0,1,4-5'; got {layers!r}.") from None
    return sorted(chosen)


def settings_of(pairs: Iterable[str], flag: str) -> dict[str, Any]:
    """Settings as the user wrote them, such as "window_size=64", by name.

    A value is what it is in JSON or in Python (64, 0.1, true, True, null, None), else text.

    Raises: `ConfigError`, which names the flag, for what is no pair, and for a name that is given twice.
    """
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise ConfigError(f"--{flag} must look like 'window_size=64'; got {pair!r}.")
        if name in settings:
            raise ConfigError(f"--{flag} names {name!r} twice; got {settings[name]!r} and {value!r}.")
        settings[name] = _value(value)
    return settings


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text
