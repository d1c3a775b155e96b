"""`short_slot_attention` in plain torch on a CPU, tile after tile, and the derivatives of `reading.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..attention_state import AttentionState
from .inputs import OF_TOKENS, ShortInputs, tiles
from .reading import Read, read_tile


def short_forward(inputs: ShortInputs, places: int, has_hidden: bool, with_lse: bool) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, as `short_slot_attention` describes them."""
    query, value = inputs.query, inputs.value
    output = value.new_empty(*query.shape[:-1], value.shape[-1])
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_full(query.shape[:-1], float("nan"), dtype=wide)
    for tile in tiles(inputs, places):
        read = read_tile(tile, has_hidden)
        tile.cut.write_tokens(output, read.output())
        if with_lse:
            tile.cut.write_tokens(lse, read.lse())
    return output, lse


def short_backward(
    grads: AttentionState,
    inputs: ShortInputs,
    results: Sequence[Tensor],
    needs: Sequence[bool],
    places: int,
    has_hidden: bool,
    with_lse: bool,
) -> list[Tensor | None]:
    """Gradients of the tensors of `inputs`, where `needs` says so. Weights are computed again, tile by tile."""
    wide = results[1].dtype
    found = [
        z.new_zeros(z.shape, dtype=wide) if needed and z is not None else None
        for z, needed in zip(inputs, needs, strict=True)
    ]
    for tile in tiles(inputs, places):
        read = read_tile(tile, has_hidden)
        dtype = read.weights.dtype
        upstream = tile.cut.tokens_of(grads if with_lse else grads[:1], ("grad_output", "grad_lse"))
        grad_output, *rest = (z.to(dtype) for z in upstream if z is not None)
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
    """Gradients of the inputs of a tile, of tokens as `[groups, rows, tokens(, dim)]`."""
    tile = read.tile
    inputs, places, shape = tile.inputs, tile.places, tile.inputs.query.shape
    number, _, slots = read.features.shape
    groups, count = shape[0], shape[1] * shape[2]
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
    grad_mass = (grad_slot_bias.unsqueeze(-1) - (grad_slots * read.slot_values).sum(-1, keepdim=True)) / read.mass
    grad_slots.div_(read.mass)
    by_row = (shape[0] * shape[1], tile.windows, slots, -1)
    grad_slots, grad_mass = (
        read.references.merge_back(z.view(by_row)).reshape(number, slots, -1) for z in (grad_slots, grad_mass)
    )
    grad_features = torch.baddbmm(grad_mass.mT, read.values, grad_slots.mT)
    grad_values.baddbmm_(read.features, grad_slots)
    of_features = grad_features.mul_(read.features)

    query, key = inputs.query.view(number, places, -1), inputs.key.view(number, places, -1)
    grad_query, grad_key = torch.bmm(in_window, key), torch.bmm(in_window.mT, query)
    of_slots, of_features = of_slots.reshape(groups, count, slots), of_features.view(groups, count, slots)
    grad_query_tokens, grad_query = _through_slots(of_slots, inputs.query_slots, grad_query, inputs.query_tokens)
    grad_key_tokens, grad_key = _through_slots(of_features, inputs.key_slots, grad_key, inputs.key_tokens)
    query_tokens = (inputs.query if inputs.query_tokens is None else inputs.query_tokens).view(groups, count, -1)
    key_tokens = (inputs.key if inputs.key_tokens is None else inputs.key_tokens).view(groups, count, -1)
    slot_bias = grad_slot_bias.view(groups, -1, slots).sum(1) if needs[8] or needs[10] else None
    return [
        grad_query.view(shape),
        grad_key.view(shape),
        grad_values.view(*shape[:3], -1),
        grad_query_tokens,
        grad_key_tokens,
        of_slots.sum(-1).view(shape[:3]) if needs[5] else None,
        of_features.sum(-1).view(shape[:3]) if needs[6] else None,
        torch.bmm(of_slots.mT, query_tokens) if needs[7] else None,
        slot_bias,
        torch.bmm(of_features.mT, key_tokens) if needs[9] else None,
        slot_bias,
    ]


def _through_slots(
    of_logits: Tensor, slots: Tensor, grad: Tensor, tokens: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the tokens that the slots' maps are applied to, if they are others, and of those of the window."""
    if tokens is not None:
        return torch.bmm(of_logits, slots).view(tokens.shape), grad
    grad = grad.view(*of_logits.shape[:2], -1)
    return None, grad.baddbmm_(of_logits, slots)
