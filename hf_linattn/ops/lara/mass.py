"""Log-sum-exps alone, of keys and of slots: what the correction of LARA's mass compares. Without gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.attend import attend
from ..padding import Tokens
from ..slot_weights import LinearSlotWeights
from ..softmax import mask_logits

# Logits that are formed at a time, few enough for the caches of a CPU core, and keys of a piece.
_AT_A_TIME, _PIECE = 1 << 18, 1024


def masses(probes: Tensor, tokens: Tokens, key_weights: LinearSlotWeights) -> tuple[Tensor, Tensor]:
    """The exact mass of all keys for every probe, and what every slot has read of them.

    Args:
        probes: Queries, `[batch, heads, probes, head_dim]`.
        key_weights: Log-weights of the keys of `tokens` for the slots, which have no bias.
    Returns: `[batch, heads, probes]` and `[batch, heads, slots]`.
    Cost: O(tokens * (probes + slots) * head_dim). On a CPU logits are formed, some heads and keys at a time.
    """
    if probes.device.type != "cpu" or torch.compiler.is_compiling():
        return _streamed(probes, tokens, key_weights)
    batch, heads, count, _ = probes.shape
    readers = torch.cat([probes, key_weights.slots], 2).flatten(0, 1)
    keys, bias = tokens.key.flatten(0, 1).transpose(-1, -2), key_weights.token_bias.flatten(0, 1).transpose(-1, -2)
    visible = None if tokens.visible is None else tokens.visible.expand(-1, heads, -1, -1).flatten(0, 1).mT
    together = max(1, _AT_A_TIME // (readers.shape[1] * min(keys.shape[-1], _PIECE)))
    found = []
    for start in range(0, batch * heads, together):
        some, pieces = slice(start, start + together), []
        for first in range(0, keys.shape[-1], _PIECE):
            part = slice(first, first + _PIECE)
            logits = readers[some] @ keys[some, :, part]
            logits[:, count:] += bias[some, :, part]
            pieces.append(mask_logits(logits, None if visible is None else visible[some, :, part]).logsumexp(-1))
        found.append(pieces[0] if len(pieces) == 1 else torch.stack(pieces).logsumexp(0))
    mass = (found[0] if len(found) == 1 else torch.cat(found)).unflatten(0, (batch, heads))
    return mass[..., :count], mass[..., count:]


def read_mass(probes: LinearSlotWeights, slots: Tensor) -> Tensor:
    """The mass that queries find in slots of mass `slots` `[batch, heads, slots]`: `[batch, heads, probes]`."""
    linear = probes.tokens @ probes.slots.transpose(-1, -2) + (probes.slot_bias + slots).unsqueeze(-2)
    logits = linear if probes.pair_bias is None else linear + probes.pair_bias
    return logits.logsumexp(-1) + probes.token_bias.squeeze(-1)


def _streamed(probes: Tensor, tokens: Tokens, key_weights: LinearSlotWeights) -> tuple[Tensor, Tensor]:
    """The same by a kernel that forms no logits."""
    visible = None if tokens.visible is None else tokens.visible.transpose(-1, -2)
    exact = attend(probes, tokens.key, tokens.value, visible=visible).lse
    return exact, key_weights.masked(tokens.visible).summarise(tokens.value).lse
