"""Which attention kinds exist and what each can do.

A kind's own module calls `register_kind` when it is imported; the built-in ones are imported on first use of the
registry.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import ConfigError, did_you_mean
from .config import AttentionConfig
from .contract import LayerClass

# Each in the file of its name in `modules/kinds`.
BUILTIN_KINDS = ("favor_plus", "favor_sharp", "lara", "eva")


@dataclass(frozen=True)
class AttentionKind:
    """What the library declares about a kind: everything that others may want to know of it.

    What depends on the settings is asked of the settings (`AttentionConfig`) or of the module class
    (`LinearAttention.check`, `check_grid`, `native_refusal`, `supports_recurrence`, `state_spec`).

    Args:
        name: The name used with `attn_implementation` and in config files.
        title: The name used in prose ("FAVOR+").
        paper: Where the method comes from.
        config_cls: Settings dataclass.
        module_cls: `LinearAttention` subclass.
        size_field: The setting that counts the slots and trades cost for error, such as "num_features".
        causal: Whether there is a form in which no query sees a later key: "yes", "no", or "calibrated" if it takes
            statistics that `hf_linattn.calibrate` gathers.
        causal_uncalibrated: Whether a form with "calibrated" statistics is defined without them too: native mode,
            which keeps none, has it then.
        native: Whether the kind works without conversion, with tensors drawn from the seed alone.
        supports_cross: Has a form for queries and keys of different sequences (without a window).
        overlap_on_grids: Whether `overlap_window` works on the patches of an image.
        needs_window: Whether `window_size` must be at least 1.
        calibrated_field: The setting whose value "calibrated" asks for statistics of data; `None` if none does.
        checkpoint_fields: Settings that say what a checkpoint's tensors mean, beyond kind, layers, seed and shapes.
        bound_field: The setting that keeps the state of a causal layer from growing with the text; `None` if it never
            grows.
        cost: How the cost grows, in prose.
        example: Small settings, for tiny models in tests and demonstrations.
    """

    name: str
    title: str
    paper: str
    config_cls: type[AttentionConfig]
    module_cls: LayerClass
    size_field: str
    causal: Literal["yes", "calibrated", "no"]
    causal_uncalibrated: bool = False
    native: bool = True
    supports_cross: bool = False
    overlap_on_grids: bool = False
    needs_window: bool = False
    calibrated_field: str | None = None
    checkpoint_fields: tuple[str, ...] = ()
    bound_field: str | None = None
    cost: str = "linearly with the number of tokens"
    example: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size_word(self) -> str:
        """What the slots are called in prose: "features", "landmarks", "chunks"."""
        return self.size_field.removeprefix("num_")

    @property
    def supports_causal(self) -> bool:
        """Whether there is a causal form, perhaps after calibration."""
        return self.causal != "no"

    @property
    def native_causal(self) -> bool:
        """Whether there is a causal form in native mode, which keeps no statistics."""
        return self.native and (self.causal == "yes" or self.causal_uncalibrated)


_KINDS: dict[str, AttentionKind] = {}
_LISTENERS: list[Callable[[str], None]] = []


def register_kind(kind: AttentionKind) -> None:
    """Add a kind. Raises `ConfigError` if the name is taken by another class."""
    present = _KINDS.get(kind.name)
    if present is not None and present.module_cls is not kind.module_cls:
        raise ConfigError(f"Attention kind {kind.name!r} is already registered by {present.module_cls!r}.")
    is_new = kind.name not in list_kinds()
    _KINDS[kind.name] = kind
    if is_new:
        for listener in _LISTENERS:
            listener(kind.name)


def for_each_kind(listener: Callable[[str], None]) -> None:
    """Call `listener` with the name of every kind: of those registered now, and later of each new one."""
    if listener not in _LISTENERS:
        _LISTENERS.append(listener)
    for name in list_kinds():
        listener(name)


def list_kinds() -> list[str]:
    """Names of all registered kinds, sorted."""
    return sorted({*BUILTIN_KINDS, *_KINDS})


def get_kind(name: str) -> AttentionKind:
    """The declaration of one kind. Raises `ConfigError` for an unknown name, naming near misses."""
    if not isinstance(name, str):
        raise ConfigError(
            f"The name of an attention kind must be a string; got {name!r}; registered kinds: {list_kinds()}."
        )
    if name not in _KINDS and name in BUILTIN_KINDS:
        importlib.import_module(f"{__package__}.kinds.{name}")
    if name not in _KINDS:
        kinds = list_kinds()
        raise ConfigError(f"Unknown attention kind {name!r}; registered kinds: {kinds}.{did_you_mean(name, kinds)}")
    return _KINDS[name]


def config_from_dict(values: Mapping[str, Any]) -> AttentionConfig:
    """Build the settings of any kind from its dictionary form (which names the kind under `"kind"`)."""
    if "kind" not in values:
        raise ConfigError(
            f"The settings of an attention kind need the key 'kind' (one of {list_kinds()}); got {dict(values)!r}."
        )
    return get_kind(values["kind"]).config_cls.from_dict(values)
