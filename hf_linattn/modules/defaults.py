"""Defaults that depend on the model family.

A field that is `None` in a config takes its value when a model is converted (the saved config is explicit) or, in
native mode, at every call: from here if every kind has the field, else from the kind's `AttentionConfig.own_defaults`.
`docs/decisions.md` says how the values were chosen.
"""

from __future__ import annotations

from typing import Any, TypeVar

from ..errors import ConfigError, did_you_mean
from .config import AttentionConfig

C = TypeVar("C", bound=AttentionConfig)

_SHARED: dict[str, dict[str, Any]] = {
    "encoder": {"window_size": 32, "num_global_tokens": 0},
    "decoder": {"window_size": 32, "num_global_tokens": 0},
    # In 2-D the window is the side of a square of patches: 4 x 4 = 16 of them.
    "vision": {"window_size": 4, "num_global_tokens": 1},
}
# Families beyond the three that can be converted share the defaults of the closest one.
DEFAULT_GROUPS = {"bert": "encoder", "gpt2": "decoder", "vit": "vision", **{group: group for group in _SHARED}}


def resolve(config: C, family: str, *, num_global_tokens: int | None = None) -> C:
    """A copy of `config` with every `None` field filled in for the family.

    Args:
        num_global_tokens: Tokens before the patches, where an image model has other ones than its family.
    Raises: `ConfigError` for an unknown family.
    """
    if family not in DEFAULT_GROUPS:
        raise ConfigError(
            f"Unknown model family {family!r}; families: {sorted(DEFAULT_GROUPS)}."
            f"{did_you_mean(family, DEFAULT_GROUPS)}"
        )
    group = DEFAULT_GROUPS[family]
    shared = _SHARED[group]
    if num_global_tokens is not None:
        shared = {**shared, "num_global_tokens": num_global_tokens}
    return config.filled({**shared, **config.own_defaults(group)})
