"""Base class of the per-kind settings: validation, dictionary form, defaults that depend on the model family.

A kind's settings are a frozen, keyword-only dataclass; a name that is not a field raises and names near misses.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ..errors import ConfigError, UnknownFieldError, did_you_mean
from ..ops.limits import LARGEST_COUNT, LARGEST_FACTOR

C = TypeVar("C", bound="AttentionConfig")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Settings that every kind has.

    Args:
        window_size: Tokens in the exact local window: the queries of one block of `window_size` tokens see the keys of
            their own block exactly. On a 2-D grid of patches it is the side of the square block. 0 means no window
            (not for EVA). `None` takes the default of the kind and model family (`modules/defaults.py`).
        num_global_tokens: Leading tokens that every query sees exactly and that see every key exactly (ViT's [CLS]).
            `None` takes the default of the model family.
        overlap_window: The window reaches half a window beyond each side of its block (in a causal layer a whole
            window to the left). Needs an even `window_size` in FAVOR+, FAVOR# and LARA.
        slot_dropout: Probability of dropping a slot from a query's second softmax, in training only.
        seed: Seed of everything random in the layer; the layer index is mixed in.
    """

    kind: ClassVar[str] = ""
    _own_doc: ClassVar[str] = ""
    # `to_dict` as text, of each object: at hand where a graph keeps the settings (`modules/whole.py`). Not a field.
    as_json: ClassVar[str] = ""

    window_size: int | None = None
    num_global_tokens: int | None = None
    overlap_window: bool = False
    slot_dropout: float = 0.0
    seed: int = 0

    # -- settings that only some kinds have: what it means not to have them -------------------------------------------
    @property
    def num_heavy_keys(self) -> int:
        """Keys of the row that every query sees exactly."""
        return 0

    @property
    def redraw_interval(self) -> int | None:
        """Training steps after which random directions are drawn anew; `None` for never."""
        return None

    @property
    def sample_noise(self) -> bool | None:
        """Whether training draws new samples in every forward pass."""
        return False

    @property
    def is_random(self) -> bool:
        """Whether two forward passes in training give different outputs."""
        return self.slot_dropout > 0 or bool(self.sample_noise)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let `help(FavorSharpConfig)` describe all fields: add those of the base classes to the docstring."""
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("__doc__") or ""
        bases = [base for base in cls.__mro__[1:] if issubclass(base, AttentionConfig)]
        inherited = [base._own_doc.partition("Args:\n")[2].rstrip() for base in bases]
        cls._own_doc = own
        shared = "\n".join(text for text in inherited if text)
        if own and shared:
            cls.__doc__ = f"{own.rstrip()}\n\n    Shared settings:\n{shared}\n    "

    def __new__(cls, *args: Any, **fields: Any) -> Any:
        allowed = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in allowed:
                raise UnknownFieldError(
                    f"{cls.__name__} has no field {name!r}; fields: {allowed}.{did_you_mean(name, allowed)}"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.validate()
        object.__setattr__(self, "as_json", json.dumps(self.to_dict(), sort_keys=True))

    # -- validation -------------------------------------------------------------------------------------------------
    def validate(self) -> None:
        """Raise `ConfigError` for the first field whose value cannot work."""
        self._check_int("window_size", minimum=0, optional=True)
        self._check_int("num_global_tokens", minimum=0, optional=True)
        self._check_bool("overlap_window")
        if self.overlap_window and self.window_size == 0:
            self._fail("overlap_window", "False with window_size=0")
        self._check_int("seed", minimum=0, maximum=2**63 - 1)
        dropout = self.slot_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            self._fail("slot_dropout", "a number with 0 <= slot_dropout < 1")

    def _fail(self, field: str, allowed: str, advice: str = "") -> None:
        raise ConfigError(
            f"{type(self).__name__}.{field} must be {allowed}; got {getattr(self, field)!r}."
            + (f" {advice}" if advice else "")
        )

    def _check_int(self, field: str, *, minimum: int, maximum: int | None = None, optional: bool = False) -> None:
        value = getattr(self, field)
        if optional and value is None:
            return
        largest = LARGEST_COUNT if maximum is None else maximum
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or not minimum <= value <= largest:
            is_large = is_integer and value > largest
            bound = f"an integer >= {minimum}" + (f" and <= {largest}" if maximum or is_large else "")
            self._fail(field, bound + (" (or None for the default)" if optional else ""))

    def _check_factor(self, field: str) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= LARGEST_FACTOR:
            self._fail(field, f"a finite number >= 0 and <= {LARGEST_FACTOR:g}")

    def _check_even_overlap(self) -> None:
        if self.overlap_window and self.window_size is not None and self.window_size % 2:
            self._fail("window_size", "even with overlap_window=True", "Half a window is its reach to each side.")

    def _check_choice(self, field: str, allowed: tuple[str, ...], *, optional: bool = False) -> None:
        value = getattr(self, field)
        if value not in allowed and not (optional and value is None):
            note = " (or None for the default)" if optional else ""
            self._fail(field, f"one of {list(allowed)}{note}", did_you_mean(value, allowed).strip())

    def _check_bool(self, field: str, *, optional: bool = False) -> None:
        value = getattr(self, field)
        if not isinstance(value, bool) and not (optional and value is None):
            self._fail(field, "True or False" + (" (or None for the default)" if optional else ""))

    # -- dictionary form --------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the kind's name under `"kind"`."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """Inverse of `to_dict`. Raises `UnknownFieldError` for an unknown field, `ConfigError` for another kind."""
        if values.get("kind", cls.kind) != cls.kind:
            raise ConfigError(f"{cls.__name__} takes settings of kind {cls.kind!r}; got kind={values['kind']!r}.")
        return cls(**{name: value for name, value in values.items() if name != "kind"})

    def replace(self: C, **changes: Any) -> C:
        """A copy with some fields changed (and validated again)."""
        return dataclasses.replace(self, **changes)

    def own_defaults(self, group: str) -> dict[str, Any]:
        """The kind's own values of fields that are `None`, in models of a group: "encoder", "decoder" or "vision".

        `modules/defaults.py` has those of the fields that every kind has.
        """
        return {}

    def filled(self: C, defaults: Mapping[str, Any]) -> C:
        """A copy in which every field that is `None` takes its value from `defaults`, if it has one there."""
        return self.replace(**{k: v for k, v in defaults.items() if getattr(self, k, 0) is None})


AttentionConfig._own_doc = AttentionConfig.__doc__ or ""
