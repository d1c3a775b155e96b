"""Packed input of a converted model: what its layers would not learn by themselves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import InputError
from .checks import PACKED, is_ordered
from .keywords import PACKING


def tell_packing(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a model's forward, with the numbers of packed sequences where its layers are not told them.

    A BERT keeps `position_ids` to itself: of positions that restart it hands on `seq_idx` in their place.

    Raises: InputError where sequences start but positions are missing, which would then count through the whole row.
    """
    positions = kwargs.get("position_ids")
    says_packing = any(kwargs.get(name) is not None for name in PACKING)
    if says_packing and positions is None and hasattr(model.config, "max_position_embeddings"):
        raise InputError(
            "Packed sequences need position_ids that restart, or the positions of the model would count through the"
            f" whole row (DataCollatorWithFlattening makes them by default). {PACKED}"
        )
    hands_on = "position_ids" not in _KEPT.get(model.base_model_prefix, ())
    if says_packing or hands_on or not isinstance(positions, Tensor) or positions.ndim != 2:
        return kwargs
    mask, tokens = kwargs.get("attention_mask"), positions.shape[1]
    key_mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == tokens else None
    if is_ordered(positions, key_mask, tokens) is not False:
        return kwargs
    new = positions != positions.roll(1, -1) + 1
    return {**kwargs, "seq_idx": new.cumsum(-1)}


# What a model of a family, by the name of its base model, does not hand on to its layers.
_KEPT = {"bert": ("position_ids",)}
