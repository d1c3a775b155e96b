"""Attention patterns that no kind can follow, in words: what a mask function of Transformers hides, and where it comes
from in the model's config."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .families import stock_type
from .seams import softmax_name

# The function of `masking_utils` that makes an overlay -> what it is called; the first that is found counts.
_OVERLAYS = {
    "packed_sequence": "packed sequences",
    "sliding_window": "sliding-window attention",
    "chunked": "chunked attention",
    "blockwise": "attention in both directions within blocks of tokens, such as those of an image",
}
# What makes a mask of packed sequences, and of them alone.
_PACKING = {"packed_sequence_mask_function", "remap_positions_for_packed_sequence"}
# Type of a layer in config.layer_types -> the overlay that it has.
_LAYER_TYPES = {"sliding_attention": "sliding_window", "chunked_attention": "chunked"}
# Fields with the width of an overlay.
_FIELDS = {"sliding_window": ("sliding_window", "local_attention"), "chunked": ("attention_chunk_size",)}


def refusal(mask_function: Callable[..., Any] | None, config: Any, local_size: int | None) -> str:
    """Why a mask function cannot be followed and what to do, for a `UnsupportedError`."""
    names = list(_makers(mask_function))
    overlay = next((key for key in _OVERLAYS for name in names if name.startswith(key)), None)
    plain = "A linear attention kind honours the plain causal and the plain bidirectional attention pattern. "
    softmax = f"attn_implementation={softmax_name(config)!r}"
    if overlay == "packed_sequence":
        return (
            f"{plain}This input asks for packed sequences (several in one row) together with another pattern. Give"
            f" one sequence per row with a 2-D attention_mask, or use {softmax}."
        )
    if overlay is None and local_size is not None:
        overlay = "sliding_window"
    if overlay is None:
        shown = ", ".join(dict.fromkeys(names)) or getattr(mask_function, "__qualname__", str(mask_function))
        return f"{plain}This model or input adds one of its own to it ({shown}). Use {softmax}."
    where = _where(overlay, config, local_size)
    title = "This model" if config is None else f"A model of type {stock_type(config)!r}"
    return f"{plain}{title} uses {_OVERLAYS[overlay]}{where}. {_switch_off(overlay, config)}{softmax}."


def is_packed(mask_function: Callable[..., Any] | None) -> bool:
    """Whether a mask function hides nothing but other sequences: Transformers makes it of positions that restart."""
    names = set(_makers(mask_function))
    return "packed_sequence_mask_function" in names and names <= _PACKING


class Pattern:
    """A mask function of Transformers, looked at in a few places for each token: it is never written out.

    Args:
        mask_function: From numbers of rows, heads, queries and keys, which broadcast, to whether the key is seen.
    """

    def __init__(self, mask_function: Callable[..., Any], batch: int, tokens: int, device: Any) -> None:
        self.mask_function = mask_function
        self.rows = torch.arange(batch, device=device)[:, None]
        self.tokens = torch.arange(tokens, device=device)[None]

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """`[batch, tokens]` bool, for numbers of tokens that broadcast to it."""
        seen: Tensor = self.mask_function(self.rows, self.tokens.new_zeros(()), queries, keys)
        return seen

    def is_whole(self) -> Tensor:
        """Whether every token sees its row's first token and the one before: then it hides nothing else, a scalar."""
        return self.shows(torch.zeros_like(self.tokens))

    def shows(self, start: Tensor) -> Tensor:
        """Whether every token sees the first of its sequence and the one before, and no sequence the one before it.

        Args:
            start: `[batch or 1, tokens]` int64, the first token of the sequence of every token.
        """
        before = (self.tokens - 1).clamp_min(0)
        follows = self.sees(self.tokens, before) == ((start < self.tokens) | (self.tokens == 0))
        return (self.sees(self.tokens, start) & follows).all()

    def starts(self) -> Tensor | None:
        """`[batch, tokens]` bool, where sequences start; `None` where it is not a mask of sequences. Reads values."""
        starts = ~self.sees(self.tokens, (self.tokens - 1).clamp_min(0)) | (self.tokens == 0)
        start = torch.where(starts, self.tokens, 0).cummax(-1).values
        return starts if bool(self.shows(start)) else None

    def is_causal(self, starts: Tensor) -> bool | None:
        """Whether no token sees the next one of its sequence; `None` if none has a next one. Reads values."""
        if bool(starts.all()):
            return None
        return not bool((self.sees((self.tokens - 1).clamp_min(0), self.tokens) & ~starts).any())


def _read(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # Transformers raises for a field that differs between layers
        return None


def _takes_none(config: Any, name: str) -> bool:
    """Whether a field of a config may be None: its class may say that it is a number."""
    try:
        setattr(copy.copy(config), name, None)
    except Exception:  # of huggingface_hub, which validates
        return False
    return True


def _makers(function: Any) -> Iterator[str]:
    """Names of the functions that made a mask function and those it is combined of, without `and` and `or`."""
    if isinstance(function, (tuple, list)):
        for part in function:
            yield from _makers(part)
    elif callable(function):
        maker = getattr(function, "__qualname__", type(function).__name__).partition(".")[0]
        parts = [value for cell in getattr(function, "__closure__", None) or () for value in _contents(cell)]
        if maker not in ("and_masks", "or_masks", "causal_mask_function", "bidirectional_mask_function"):
            yield maker
        for part in parts:
            if callable(part) or isinstance(part, (tuple, list)):
                yield from _makers(part)


def _contents(cell: Any) -> Iterator[Any]:
    try:
        yield cell.cell_contents
    except ValueError:  # not filled yet
        return


def _where(overlay: str, config: Any, local_size: int | None) -> str:
    """In which layers, and the fields of the config that say so."""
    types = getattr(config, "layer_types", None)
    fields = [f"{name}={value}" for name in _FIELDS.get(overlay, ()) if (value := _read(config, name))]
    if isinstance(types, (list, tuple)):
        count = sum(_LAYER_TYPES.get(kind) == overlay for kind in types)
        if count:
            layers = "all" if count == len(types) else f"{count}"
            return f" in {layers} of its {len(types)} layers (config.{', config.'.join(['layer_types', *fields])})"
    if fields:
        return f" (config.{', config.'.join(fields)})"
    return f" (over {local_size} tokens)" if local_size else ""


def _switch_off(overlay: str, config: Any) -> str:
    """How to load the model without a pattern, where that leaves one that a kind can follow; ends in "or use "."""
    types = getattr(config, "layer_types", None)
    # Models that do not know "sdpa" have more that no kind can follow: capped logits, sinks.
    if config is None or softmax_name(config) == "eager" or overlay == "blockwise":
        return "Use "
    if isinstance(types, (list, tuple)) and any(kind in _LAYER_TYPES for kind in types):
        rope = getattr(config, "rope_parameters", None) or {}
        by_type = any(kind in rope for kind in _LAYER_TYPES) and "full_attention" not in rope
        if by_type or getattr(config, "per_layer_config", None) or not set(types) <= {"full_attention", *_LAYER_TYPES}:
            return "Use "
        change = f"layer_types=['full_attention'] * {len(types)}"
    elif types is None and _read(config, "sliding_window") and _takes_none(config, "sliding_window"):
        change = "sliding_window=None"
    else:
        return "Use "
    return (
        f"Set {change} in the {stock_type(config)!r} config before the model is made, after which its layers attend to"
        " the whole sequence (another result for texts longer than the window), or use "
    )


def in_config(config: Any) -> str | None:
    """The pattern that a config asks for, in words; None for a plain one. What an input asks for is not known here."""
    types = getattr(config, "layer_types", None)
    types = types if isinstance(types, (list, tuple)) else None
    for overlay, fields in _FIELDS.items():
        listed = types is not None and any(_LAYER_TYPES.get(kind) == overlay for kind in types)
        switched = types is None and getattr(config, "use_sliding_window", True)
        if listed or (switched and any(_read(config, name) for name in fields)):
            return f"{_OVERLAYS[overlay]}{_where(overlay, config, None)}"
    return None


def is_unused(mask_function: Callable[..., Any] | None, config: Any) -> bool:
    """Whether a model makes a mask for which it has no layer, as some do for every pattern that they know."""
    types = getattr(config, "layer_types", None)
    if not isinstance(types, (list, tuple)) or set(types) != {"full_attention"}:
        return False
    return all(name.startswith(tuple(_FIELDS)) for name in _makers(mask_function))
