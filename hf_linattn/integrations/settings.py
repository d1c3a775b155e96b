"""`config.linear_attention`: from what a user may write to its one canonical form, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..modules.config import AttentionConfig
from ..modules.defaults import resolve
from ..modules.registry import config_from_dict, list_kinds

VERSION = 1
OWN_KEYS = ("version", "layers", "attention_dropout")


@dataclass(frozen=True)
class LinearAttentionSettings:
    """Which attention a model uses, in which layers.

    Args:
        config: Settings of the kind, every `None` filled for the model family.
        layers: Converted layers, ascending; `None` means all (only before the number of layers is known).
        attention_dropout: Probability of attention dropout of the stock model; the softmax layers keep it.
    """

    config: AttentionConfig
    layers: tuple[int, ...] | None = None
    attention_dropout: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as they stand in config.json."""
        values: dict[str, Any] = {"version": VERSION, **self.config.to_dict()}
        if self.layers is not None:
            values["layers"] = list(self.layers)
        if self.attention_dropout is not None:
            values["attention_dropout"] = self.attention_dropout
        return values


def settings_dict(value: Any) -> dict[str, Any]:
    """A kind's name, its settings object or a dictionary, as a dictionary. Raises `ConfigError` for anything else."""
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, AttentionConfig):
        return value.to_dict()
    if isinstance(value, Mapping):
        return dict(value)
    raise ConfigError(
        f"linear_attention must be the name of a kind ({list_kinds()}), a kind's settings such as "
        f"FavorPlusConfig(), or a dictionary of them; got {value!r}."
    )


def parse_settings(
    value: Any, *, family: str, num_layers: int | None = None, num_global_tokens: int | None = None
) -> LinearAttentionSettings:
    """Read a kind's name, a kind's settings object, or a dictionary such as config.json holds.

    Args:
        num_global_tokens: Their default, where it is not that of the family.
    Raises:
        ConfigError: Unknown kind, unknown or impossible field, layers that do not exist.
        CheckpointError: The dictionary was written by a newer version of this library.
    """
    value = settings_dict(value)
    version = value.get("version", VERSION)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise CheckpointError(f"linear_attention['version'] must be a positive integer; got {version!r}.")
    if version > VERSION:
        raise CheckpointError(
            f"linear_attention['version'] is {version}, but this hf_linattn reads versions up to {VERSION}: the "
            "checkpoint was written by a newer release. Upgrade it (`pip install -U hf-linattn`)."
        )
    config = config_from_dict({name: field for name, field in value.items() if name not in OWN_KEYS})
    dropout = value.get("attention_dropout")
    if dropout is not None and (
        isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1
    ):
        raise ConfigError(f"linear_attention['attention_dropout'] must be a number from 0 to 1; got {dropout!r}.")
    config = resolve(config, family, num_global_tokens=num_global_tokens)
    return LinearAttentionSettings(config, check_layers(value.get("layers"), num_layers), dropout)


def check_layers(layers: Iterable[int] | None, num_layers: int | None) -> tuple[int, ...] | None:
    """Sorted layer indices; `None` means all layers. Raises `ConfigError` for indices that do not exist or repeat."""
    if layers is None:
        return None if num_layers is None else tuple(range(num_layers))
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable):
        raise ConfigError(f"layers must be a list of layer indices such as [0, 1], or None for all; got {layers!r}.")
    indices = list(layers)
    last = "" if num_layers is None else f" from 0 to {num_layers - 1}"
    for index in indices:
        wrong_type = isinstance(index, bool) or not isinstance(index, int)
        if wrong_type or index < 0 or (num_layers is not None and index >= num_layers):
            raise ConfigError(f"layers must be integers{last}; got {index!r} in {indices}.")
    if len(set(indices)) != len(indices):
        raise ConfigError(f"layers must name each layer once; got {indices}.")
    if not indices:
        raise ConfigError("layers must name at least one layer, or be None for all; got an empty list.")
    return tuple(sorted(indices))
