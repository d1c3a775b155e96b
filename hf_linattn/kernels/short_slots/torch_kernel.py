"""`short_slot_attention` in plain torch on a CPU, tile after tile, and the derivatives of `reading.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention_state import AttentionState
from .inputs import OF_TOKENS, ShortInputs, ShortOptions, tiles
from .reading import Read, read_tile


def options_of(options: Sequence[Any]) -> ShortOptions:
    """From the arguments of an operator, which has lists in place of tuples."""
    places, grid, *others, probes = options
    return ShortOptions._make((places, tuple(grid), *others, tuple(probes)))


def short_forward(inputs: ShortInputs, *options: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as `short_slot_attention` describes them."""
    query, value, of_call = inputs.query, inputs.value, options_of(options)
    output = value.new_empty(*query.shape[:-1], value.shape[-1])
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_full(query.shape[:-1], float("nan"), dtype=wide)
    for tile in tiles(inputs, of_call):
        read = read_tile(tile)
        tile.cut.write_tokens(output, read.output())
        if of_call.with_lse:
            tile.cut.write_tokens(lse, read.lse())
    return output, lse


def short_backward(
    grads: AttentionState, inputs: ShortInputs, results: Sequence[Tensor], needs: Sequence[bool], *options: float
) -> list[Tensor | None]:
    """Gradients of the tensors of `inputs`, where `needs` says so. Weights are computed again, tile by tile."""
    wide, of_call = results[1].dtype, options_of(options)
    found: list[Tensor | None] = []
    for number, (z, needed) in enumerate(zip(inputs, needs, strict=True)):
        new = torch.empty if number < OF_TOKENS else torch.zeros  # those of slots are sums
        found.append(new(z.shape, dtype=wide, device=z.device) if needed and z is not None else None)
    upstream = grads if of_call.with_lse else grads[:1]
    for tile in tiles(inputs, of_call):
        read = read_tile(tile)
        grad_output, *rest = (
            z.to(read.weights.dtype)
            for z in tile.cut.tokens_of(upstream, ("grad_output", "grad_lse"))
            if z is not None
        )
        of_tile = _gradients(read, grad_output, rest[0] if rest else None, needs)
        for number, (total, grad) in enumerate(zip(found, of_tile, strict=True)):
            if total is None or grad is None:
                continue
            if number < OF_TOKENS:
                tile.cut.write_tokens(total, grad)
            else:
                tile.cut.add_slots(total, grad)
    return [None if grad is None or z is None else grad.to(z.dtype) for grad, z in zip(found, inputs, strict=True)]


def _gradients(read: Read, grad_output: Tensor, grad_lse: Tensor | None, needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of the inputs of a tile, of tokens as `[groups, tokens(, dim)]` or in windows."""
    tile, (places, _, root, query_norm, key_norm, *_) = read.tile, read.tile.options
    inputs, (groups, tokens, _) = tile.inputs, tile.inputs.query.shape
    number, _, slots = read.features.shape
    grad_output = grad_output.view(number, places, -1)
    # Of logits: in the window, and of slots.
    pairs = [torch.bmm(grad_output, z.mT) for z in (read.values, read.slot_values)]
    of_weights = torch.cat(pairs, -1, out=read.memory.logits)
    grad_logits = torch._softmax_backward_data(of_weights, read.weights, -1, read.weights.dtype)
    if grad_lse is not None:
        sees = read.weights.any(-1, keepdim=True)
        grad_lse = grad_lse.view(number, places, 1).masked_fill(~sees, 0.0)
        grad_logits.addcmul_(read.weights, grad_lse)
    in_window, of_slots = grad_logits[..., :places], grad_logits[..., places:]
    # Of what the slots hold, back to the keys.
    grad_values = torch.bmm(read.weights[..., :places].mT, grad_output)
    grad_slots = torch.bmm(read.weights[..., places:].mT, grad_output)
    grad_slot_bias = of_slots.sum(1)
    grad_mass = (grad_slot_bias - torch.linalg.vecdot(grad_slots, read.slot_values)).div_(read.mass)
    grad_slots.div_(read.mass.unsqueeze(-1))
    by_row = (groups * tile.rows, tile.windows, -1)
    grad_slots, grad_mass = (read.references.merge_back(z.view(by_row)).view(z.shape) for z in (grad_slots, grad_mass))
    grad_features = torch.baddbmm(grad_mass.unsqueeze(1), read.values, grad_slots.mT)
    grad_values.baddbmm_(read.features, grad_slots)
    of_features = grad_features.mul_(read.features)

    query, key = inputs.query.view(number, places, -1), inputs.key.view(number, places, -1)
    if root != 1:
        in_window = in_window * root**2
    grad_query, grad_key = torch.bmm(in_window, key), torch.bmm(in_window.mT, query)
    of_slots, of_features = of_slots.reshape(groups, tokens, slots), of_features.view(groups, tokens, slots)
    grad_query_bias = of_slots.sum(-1) if query_norm or needs[5] else None
    grad_key_bias = of_features.sum(-1) if key_norm or needs[6] else None
    of_keys = of_features
    if read.spread is not None:
        of_keys = torch._log_softmax_backward_data(of_features, read.spread, -1, of_features.dtype)
    grad_query_tokens, grad_query = _through_slots(
        of_slots, inputs.query_slots, grad_query, inputs.query, inputs.query_tokens, grad_query_bias, query_norm, root
    )
    grad_key_tokens, grad_key = _through_slots(
        of_keys, inputs.key_slots, grad_key, inputs.key, inputs.key_tokens, grad_key_bias, key_norm, root
    )
    query_tokens, key_tokens = (
        own if other is None else other
        for own, other in ((inputs.query, inputs.query_tokens), (inputs.key, inputs.key_tokens))
    )
    slot_bias = grad_slot_bias.view(groups, -1, slots).sum(1) if needs[8] or needs[10] else None
    key_slot_bias = slot_bias
    if read.spread is not None:
        key_slot_bias = of_keys.sum(1) if needs[10] else None
    return [
        grad_query,
        grad_key,
        grad_values,
        grad_query_tokens,
        grad_key_tokens,
        grad_query_bias,
        grad_key_bias,
        torch.bmm(of_slots.mT, query_tokens).mul_(root) if needs[7] else None,
        slot_bias,
        torch.bmm(of_keys.mT, key_tokens).mul_(root) if needs[9] else None,
        key_slot_bias,
    ]


def _through_slots(
    of_logits: Tensor,
    slots: Tensor,
    grad: Tensor,
    own: Tensor,
    tokens: Tensor | None,
    of_bias: Tensor | None,
    norm: float,
    root: float,
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the tokens that the slots' maps are applied to, if they are others, and of those of the window.

    of_bias: Of the bias of tokens, of which `-norm |root tokens|^2 / 2` is a part.
    """
    if tokens is None:
        of_tokens = grad = grad.view(own.shape).baddbmm_(of_logits, slots, alpha=root)
    else:
        of_tokens = torch.bmm(of_logits, slots)
        of_tokens = of_tokens if root == 1 else of_tokens.mul_(root)
    if norm:
        assert of_bias is not None
        of_tokens.addcmul_(of_bias.unsqueeze(-1), own if tokens is None else tokens, value=-norm * root**2)
    return None if tokens is None else of_tokens, grad
