"""The tokens of one process's part, as estimators take them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..modules.contract import AttentionInputs
from ..ops.inputs import prepare_tokens
from ..ops.padding import Tokens


def part_tokens(inputs: AttentionInputs, dtype: torch.dtype) -> Tokens:
    """The tokens of this part, scaled. Real ones come first in a row, so nothing is put in another order."""
    query, key, value, mask = inputs.query.to(dtype), inputs.key.to(dtype), inputs.value.to(dtype), inputs.key_mask
    if mask is not None:
        query, key, value = (z.masked_fill(~mask[:, None, :, None], 0.0) for z in (query, key, value))
    tokens = prepare_tokens(query, key, value, None, inputs.scaling, is_causal=False).packed()
    return tokens if mask is None else with_mask(tokens, mask)


def with_mask(tokens: Tokens, mask: Tensor) -> Tokens:
    """These tokens, of which those are real where `mask` `[batch, tokens]` is True."""
    return replace(tokens, valid=mask, visible=mask[:, None, :, None])
