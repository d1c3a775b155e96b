"""Windows and slots under one softmax for short inputs on a CPU: a few large products in place of many small ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention_state import AttentionState
from ..backends import current_backend
from ..operators import register_pair
from . import native_kernel, torch_kernel
from .inputs import ShortInputs, ShortOptions
from .native_kernel import is_compiled


def suits_short(like: Tensor, windows: int, places: int, slots: int) -> bool:
    """Whether tensors like this one, cut into so many windows of so many places, take the short road.

    It does where that is faster than states of windows and a scan (measured on a CPU core: two to four times). In
    torch, sums over other windows cost as much as `windows / places` more slots; in C they are a scan. Both keep sums
    for every window, of a few heads at a time.
    """
    if like.device.type != "cpu" or current_backend() == "triton" or slots > 64 * places:
        return False
    if current_backend() == "auto" and like.dtype != torch.float64 and is_compiled():
        return windows * slots <= 1 << 17
    return windows <= min(256, 32 * places)


def short_slot_attention(inputs: ShortInputs, options: ShortOptions) -> AttentionState:
    """What every query reads from the keys of its window, one by one, and from all others through slots.

    Tokens are cut into windows; the last may be shorter.

    Returns: output `[batch, tokens, heads, head_dim]`, log-sum-exp `[batch, tokens, heads]`. A query that sees nothing
        has output 0 and log-sum-exp `-inf`.
    Cost: O(tokens * (places + slots) * head_dim + windows^2 * slots * head_dim) time.
    """
    return AttentionState(*_short(*inputs, *options, current_backend()))


_short = register_pair(
    "short(Tensor query, Tensor key, Tensor value, Tensor? query_tokens, Tensor? key_tokens, Tensor? query_bias,"
    " Tensor? key_bias, Tensor query_slots, Tensor? query_slot_bias, Tensor key_slots, Tensor? key_slot_bias,"
    " int places, int[] grid, float root, float query_norm, float key_norm, float shift, bool spreads,"
    " bool has_hidden, bool with_lse, int[] probes) -> (Tensor output, Tensor lse)",
    torch_kernel,
    compiled=native_kernel,
    record=ShortInputs,
)
