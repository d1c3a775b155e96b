"""Log-sum-exps alone, of keys and of slots: what the correction of LARA's mass compares. Without gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.attend import attend
from ...kernels.attention_state import consumed_logsumexp
from ..linear_weights import LinearSlotWeights
from ..padding import Tokens

# Logits that are formed at a time, few enough for the caches of a CPU core, and keys of a piece.
_AT_A_TIME, _PIECE = 1 << 18, 1024


def masses(probes: Tensor, tokens: Tokens, key_weights: LinearSlotWeights) -> tuple[Tensor, Tensor]:
    """The exact mass of all keys for every probe, and what every slot has read of them.

    Args:
        probes: Queries as those of `tokens`, `[batch, heads, probes, head_dim]`.
        key_weights: Log-weights of the keys of `tokens` for the slots, which have no bias.
    Returns: `[batch, heads, probes]` and `[batch, heads, slots]`.
    Cost: O(tokens * (probes + slots) * head_dim). On a CPU logits are formed, some heads and keys at a time.
    """
    if probes.device.type != "cpu" or torch.compiler.is_compiling():
        return streamed_masses(probes, tokens, key_weights)
    batch, heads, count, _ = probes.shape
    probes = probes if tokens.root == 1 else probes * tokens.root**2
    slots, keys = key_weights.for_tokens_as_they_are().slots, tokens.key.transpose(-1, -2)
    readers = torch.cat([probes, slots], 2)
    bias = key_weights.token_bias.transpose(-1, -2)
    hidden = None
    if tokens.visible is not None:  # added: masks that are the same for many rows are slow to fill with
        hidden = torch.where(tokens.visible, 0.0, float("-inf")).to(bias).transpose(-1, -2)
    if batch * heads * readers.shape[2] * keys.shape[-1] <= _AT_A_TIME:
        mass = _dense(readers, keys, bias, hidden, count)
    else:
        mass = _in_pieces(readers, keys, bias, hidden, count)
    return mass[..., :count], mass[..., count:]


def _dense(readers: Tensor, keys: Tensor, bias: Tensor, hidden: Tensor | None, count: int) -> Tensor:
    """Mass of the keys for `readers` `[..., count + slots, dim]`; `bias` `[..., 1, keys]` is for the slots alone,
    `hidden` for all: `-inf` for a key that counts nowhere."""
    logits = readers @ keys
    logits[..., count:, :].add_(bias)
    if hidden is not None:
        logits.add_(hidden)
    return consumed_logsumexp(logits, has_hidden=hidden is not None)


def _in_pieces(readers: Tensor, keys: Tensor, bias: Tensor, hidden: Tensor | None, count: int) -> Tensor:
    """The same, some heads and keys at a time."""
    batch, heads, rows, _ = readers.shape
    if hidden is not None:
        hidden = hidden.expand(-1, heads, -1, -1).flatten(0, 1)
    readers, keys, bias = readers.flatten(0, 1), keys.flatten(0, 1), bias.flatten(0, 1)
    together = max(1, _AT_A_TIME // (rows * min(keys.shape[-1], _PIECE)))
    found = []
    for start in range(0, batch * heads, together):
        some, pieces = slice(start, start + together), []
        for first in range(0, keys.shape[-1], _PIECE):
            part = slice(first, first + _PIECE)
            own = None if hidden is None else hidden[some, :, part]
            pieces.append(_dense(readers[some], keys[some, :, part], bias[some, :, part], own, count))
        found.append(pieces[0] if len(pieces) == 1 else torch.stack(pieces).logsumexp(0))
    return torch.cat(found).unflatten(0, (batch, heads))


def read_mass(probes: LinearSlotWeights, slots: Tensor, *, has_hidden: bool) -> Tensor:
    """The mass that queries find in slots of mass `slots` `[batch, heads, slots]`: `[batch, heads, probes]`.

    has_hidden: Whether a slot's may be `-inf`.
    """
    logits = probes.tokens @ probes.for_tokens_as_they_are().slots.transpose(-1, -2)
    logits.add_((probes.slot_bias + slots).unsqueeze(-2))
    if probes.pair_bias is not None:
        logits.add_(probes.pair_bias)
    return consumed_logsumexp(logits, has_hidden=has_hidden).add_(probes.token_bias.squeeze(-1))


def streamed_masses(probes: Tensor, tokens: Tokens, key_weights: LinearSlotWeights) -> tuple[Tensor, Tensor]:
    """The same by a kernel that forms no logits."""
    visible = None if tokens.visible is None else tokens.visible.transpose(-1, -2)
    probes = probes if tokens.root == 1 else probes * tokens.root**2
    exact = attend(probes, tokens.key, tokens.value, visible=visible).lse
    return exact, key_weights.masked(tokens.visible).summarise(tokens.value).lse
