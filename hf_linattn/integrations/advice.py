"""What to do instead, by what is possible for the model at hand: no advice that ends in the next refusal."""

from __future__ import annotations

from typing import Any

from ..modules.registry import get_kind, list_kinds
from .families import FAMILIES, stock_type
from .seams import softmax_name


def can_convert(config: Any) -> bool:
    """Whether models with such a config can be converted."""
    return stock_type(config) in FAMILIES


def converting(config: Any, kind: str) -> str:
    """How to convert and calibrate a model, as a part of an error; or that it cannot be done."""
    if can_convert(config):
        return (
            f"Convert it: hf_linattn.convert(model, {kind!r}), then hf_linattn.calibrate(model, batches). Without"
            " conversion: "
        )
    return f"Models of type {stock_type(config)!r} cannot be converted. "


def convert_first(config: Any) -> str:
    """What to do where only a converted model will do."""
    if can_convert(config):
        return "Convert it first: hf_linattn.convert(model, kind)."
    return f"Models of type {stock_type(config)!r} cannot be converted."


def kinds_for(*, is_causal: bool = False, cross: bool = False) -> list[str]:
    """Kinds that work natively, without conversion, in a model with layers of these sorts."""
    return [
        kind.name
        for kind in map(get_kind, list_kinds())
        if (kind.native_causal if is_causal else kind.native) and (not cross or kind.supports_cross)
    ]


def has_cross_attention(config: Any) -> bool:
    """Whether a model has cross-attention, and so a causal decoder."""
    return bool(getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False))


def instead(config: Any, *, is_causal: bool, cross: bool = False) -> str:
    """A sentence with the kinds that work without conversion in all layers of a model, and softmax."""
    cross = cross or has_cross_attention(config)
    able = kinds_for(is_causal=is_causal or has_cross_attention(config), cross=cross)
    settings = f" with linear_attention = {CROSS} in the {stock_type(config)!r} config" if cross else ""
    return f"Use one of {able}{settings}, or attn_implementation={softmax_name(config)!r}."


# Queries and keys of different sequences have no window in common.
CROSS = "{'window_size': 0, 'num_global_tokens': 0}"


def cross_settings(config: Any, kind: str) -> str:
    """What to do about settings that cross-attention cannot follow."""
    settings = CROSS.replace("{", f"{{'kind': {kind!r}, ")
    converted = ", or convert the model: conversion leaves cross-attention on softmax" if can_convert(config) else ""
    return (
        f"Set linear_attention = {settings} in the {stock_type(config)!r} config, and in that of every other part with"
        f" cross-attention{converted}."
    )
