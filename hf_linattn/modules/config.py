"""Base class of the per-kind settings: validation, dictionary form, defaults that depend on the model family.

A kind's settings are a frozen, keyword-only dataclass; a name that is not a field raises and names near misses.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, TypeVar, cast

from ..errors import ConfigError, LinAttnError, UnknownFieldError, did_you_mean
from ..ops.inputs import LARGEST_COUNT, LARGEST_FACTOR

C = TypeVar("C", bound="AttentionConfig")

# LARA and EVA: `conventions` bundles the fields in which the published code differs from its own mathematics, or from
# what suits a pretrained model. Each can be set on its own.
CONVENTIONS = ("corrected", "published")


# -- fields: each says what its value must be (`None` too, if that is its default) ------------------------------------
def _setting(
    default: Any,
    must_be: Callable[[Any], str | None],
    choices: tuple[str, ...] = (),
    conventions: tuple[Any, Any] | None = None,
) -> Any:
    """A field; `must_be(value)` is `None` if the value is fine, else what it must be.

    `conventions` are the values that stand for `None` under conventions="corrected" and "published".
    """
    metadata = {"must_be": must_be, "choices": choices, "conventions": conventions}
    return dataclasses.field(default=default, metadata=metadata)


def count(default: Any, *, minimum: int = 1, maximum: int | None = None, words: tuple[Any, ...] = ()) -> Any:
    """A field that holds an integer, at most `LARGEST_COUNT` unless `maximum` says otherwise, or one of `words`."""
    largest = LARGEST_COUNT if maximum is None else maximum

    def must_be(value: Any) -> str | None:
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if value in words or (is_integer and minimum <= value <= largest):
            return None
        is_large = is_integer and value > largest
        bound = f"an integer >= {minimum}" + (f" and <= {largest}" if maximum or is_large else "")
        return bound + (f", or one of {list(words)}" if words else "")

    return _setting(default, must_be)


def choice(default: str | None, allowed: tuple[str, ...], conventions: tuple[str, str] | None = None) -> Any:
    """A field that holds one of several names."""

    def must_be(value: Any) -> str | None:
        return None if value in allowed else f"one of {list(allowed)}"

    return _setting(default, must_be, allowed, conventions)


def flag(default: bool | None, conventions: tuple[bool, bool] | None = None) -> Any:
    """A field that holds True or False."""
    must_be = "True or False"
    return _setting(default, lambda value: None if isinstance(value, bool) else must_be, conventions=conventions)


def number(default: float, must_be: str, largest: float, *, below: bool = False) -> Any:
    """A field that holds a number from 0 to `largest`, with or (`below`) without that."""

    def check(value: Any) -> str | None:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return None if is_number and 0 <= value and (value < largest if below else value <= largest) else must_be

    return _setting(default, check)


def factor(default: float) -> Any:
    """A field that holds a factor."""
    return number(default, f"a finite number >= 0 and <= {LARGEST_FACTOR:g}", LARGEST_FACTOR)


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
        exact_below: Short inputs are softmax attention. In a bidirectional layer a row of at most so many tokens,
            padding not counted; in a causal layer the first `exact_below` tokens of a row read all earlier ones
            exactly, with and without a cache (which keeps them). 0 for never. Not where a kind estimates something
            else (generalised kernels), or adds biases to its window.
        seed: Seed of everything random in the layer; the layer index is mixed in.
    """

    kind: ClassVar[str] = ""
    # `to_dict` as text, of each object: at hand where a graph keeps the settings (`modules/recorded.py`). Not a field.
    as_json: ClassVar[str] = ""

    window_size: int | None = count(None, minimum=0)
    num_global_tokens: int | None = count(None, minimum=0)
    overlap_window: bool = flag(False)
    slot_dropout: float = number(0.0, "a number with 0 <= slot_dropout < 1", 1, below=True)
    seed: int = count(0, minimum=0, maximum=2**63 - 1)
    exact_below: int = count(0, minimum=0)

    # Settings that only some kinds have, as what it means not to have them: not fields.
    num_heavy_keys = 0  # keys of the row that every query sees exactly
    redraw_interval = cast("int | None", None)  # training steps after which directions are drawn anew
    sample_noise = cast("bool | None", False)  # whether training draws new samples in every forward pass
    proposal_map = cast("str | None", "none")  # learned map of what slots are made of
    chunk_size = cast("Any", None)  # tokens within which queries and keys meet directly (in EVA, of a chunk)
    learned = False  # whether maps of queries and keys are trained
    normalizer = "slots"  # of the key weights of learned maps
    value_convolution = False  # whether the values of an image are convolved beside attention
    conventions = CONVENTIONS[0]  # what counts where the published code departs from its own mathematics

    @property
    def is_random(self) -> bool:
        """Whether two forward passes in training give different outputs."""
        return self.slot_dropout > 0 or bool(self.sample_noise)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let `help(FavorSharpConfig)` describe all fields: add those of the base classes to the docstring."""
        super().__init_subclass__(**kwargs)
        docs = [base.__doc__ or "" for base in cls.__mro__ if issubclass(base, AttentionConfig)]
        own, *inherited = [doc.partition("\n\n    Shared settings:\n")[0].rstrip() for doc in docs]
        shared = "\n".join(args for doc in inherited if (args := doc.partition("Args:\n")[2]))
        if own and shared:
            cls.__doc__ = f"{own}\n\n    Shared settings:\n{shared}\n    "

    def __new__(cls, *args: Any, **fields: Any) -> Any:
        allowed = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in allowed:
                raise UnknownFieldError(
                    f"{cls.__name__} has no field {name!r}; fields: {allowed}.{did_you_mean(name, allowed)}"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, must_be = getattr(self, field.name), field.metadata.get("must_be")
            if must_be is None or (value is None and field.default is None):
                continue
            wanted = must_be(value)
            if wanted is not None:
                wanted += " (or None for the default)" if field.default is None else ""
                choices = field.metadata["choices"]
                self.fail(field.name, wanted, did_you_mean(value, choices).strip() if choices else "")
        self.validate()
        object.__setattr__(self, "as_json", json.dumps(self.to_dict(), sort_keys=True))

    def validate(self) -> None:
        """Raise `ConfigError` for fields that cannot work together; each of them is fine by itself."""
        if self.overlap_window and self.window_size == 0:
            self.fail("overlap_window", "False with window_size=0")

    def fail(self, field: str, allowed: str, advice: str = "", error: type[LinAttnError] = ConfigError) -> NoReturn:
        """Raise an error about the value of a field."""
        text = f"{type(self).__name__}.{field} must be {allowed}; got {getattr(self, field)!r}."
        raise error(f"{text} {advice}".rstrip())

    def _check_even_overlap(self) -> None:
        if self.overlap_window and self.window_size is not None and self.window_size % 2:
            self.fail("window_size", "even with overlap_window=True", "Half a window is its reach to each side.")

    # -- dictionary form --------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the kind's name under `"kind"`."""
        values = {"kind": self.kind, **dataclasses.asdict(self)}
        if not self.exact_below:  # as a version without the field wrote and reads it
            del values["exact_below"]
        return values

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
        fields = [field for field in dataclasses.fields(self) if field.metadata.get("conventions")]
        return {field.name: field.metadata["conventions"][self.conventions == "published"] for field in fields}

    def filled(self: C, defaults: Mapping[str, Any]) -> C:
        """A copy in which every field that is `None` takes its value from `defaults`, if it has one there."""
        return self.replace(**{k: v for k, v in defaults.items() if getattr(self, k, 0) is None})


@dataclass(frozen=True, kw_only=True)
class LearnedConfig(AttentionConfig):
    """Settings of the kinds whose maps can be trained; each says what `learned=True` makes of it.

    Args:
        value_convolution: Add to the output a depthwise 3 x 3 convolution of the values over the patches of an image,
            trained with the maps and zero at first. With `learned=True`, in models of images only.
    """

    learned: bool = flag(False)
    value_convolution: bool = flag(False)

    def validate(self) -> None:
        super().validate()
        if self.value_convolution and not self.learned:
            self.fail("value_convolution", "False without learned=True", "It is trained with the learned maps.")

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        for name in ("learned", "value_convolution"):
            if not getattr(self, name):  # as a version without the field wrote and reads it
                del values[name]
        return values
