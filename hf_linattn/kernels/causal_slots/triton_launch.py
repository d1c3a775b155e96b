"""Causal attention through slots without a window, in Triton: inter-chunk by states and their scan, and intra-chunk.

Keys of earlier chunks are read as blocks (`block_slots`), through merged states of slots, those of the query's own
chunk pair by pair. Both are one softmax, so the gradients of either part follow from the joint output and log-sum-exp.

Inside a chunk a query reads a key with weight `exp(l[t, n])`, `l[t, n] = logsumexp_j(a[t, j] + c[n, j])`: one softmax
over pairs of a key and a slot. A program owns one chunk and walks over tiles of slots; features are never stored.
`triton_tiles` says how their range is kept in bounds without a query depending on a key that it cannot see.

Nothing of size tokens x slots is stored, there are no atomic additions, and two runs agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError
from ..attention_state import AttentionState, merge_states
from ..block_slots import BlockReach
from ..block_slots.triton_launch import blocks_backward, blocks_forward
from ..slot_inputs import SlotInputs
from ..triton_common import TL_TYPES, CompileCases, check, launch, padded, rows, splits
from . import triton_kernel as kernels
from .torch_kernel import kept_states

CHUNKS = (16, 32, 64, 128)
# Tokens of a chunk of the kernels, whatever the caller's chunk is: the result is the same.
_CHUNK = 64
# Tokens among which keys are compared with one first key of their own, or one by one.
_SEGMENT = 16
# Fewest chunks of a part when the gradients of slots are summed over chunks.
_LEAST_CHUNKS = 8
_EARLIER_CHUNKS = BlockReach(is_causal=True)


def causal_forward(inputs: SlotInputs, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and log-sum-exp of every query, as `causal_slot_attention` with one dimension of groups.

    The last two results stand for the states that `torch_kernel` keeps: of the same shape, all 0.
    """
    groups, tokens, _ = inputs.query.shape
    kept = groups, kept_states(tokens, chunk), inputs.key_slots.shape[1]
    inputs = _whole_chunks(inputs)
    output, lse = blocks_forward(_by_chunk(inputs), _EARLIER_CHUNKS)
    inter = AttentionState(output.flatten(1, 2), lse.flatten(1, 2))
    both = merge_states([inter, AttentionState(*intra_chunk_forward(inputs, _CHUNK))])
    output, lse = (z[:, :tokens].contiguous() for z in both)
    return output, lse, lse.new_zeros(*kept, output.shape[-1]), lse.new_zeros(*kept, 2)


def causal_backward(
    grads: AttentionState, inputs: SlotInputs, results: Sequence[Tensor], needs: Sequence[bool], chunk: int
) -> list[Tensor | None]:
    """Gradients of the eight tensors of `inputs`, where `needs` says so. `chunk` is not used."""
    extra, whole = -inputs.query.shape[1] % _CHUNK, _whole_chunks(inputs)
    grads = AttentionState(F.pad(grads.output, (0, 0, 0, extra)), F.pad(grads.lse, (0, extra)))
    result = AttentionState(F.pad(results[0], (0, 0, 0, extra)), F.pad(results[1], (0, extra), value=float("-inf")))
    intra = intra_chunk_backward(grads, whole, result, needs, _CHUNK)
    grads, result = (AttentionState(_cut(state.output), _cut(state.lse)) for state in (grads, result))
    inter = blocks_backward(grads, _by_chunk(whole), result, needs, _EARLIER_CHUNKS)
    return [
        None if one is None or other is None else (one + other.view_as(one))[:, : given.shape[1]].contiguous()
        for given, one, other in zip(inputs, intra, inter, strict=True)
    ]


def _whole_chunks(inputs: SlotInputs) -> SlotInputs:
    """Padded to a multiple of `_CHUNK` tokens."""
    extra = -inputs.query.shape[1] % _CHUNK
    if not extra:
        return inputs
    query, key, value = (F.pad(z, (0, 0, 0, extra)) for z in (inputs.query, inputs.key, inputs.value))
    key_bias = F.pad(inputs.key_bias, (0, extra), value=float("-inf"))
    return inputs._replace(query=query, key=key, value=value, key_bias=key_bias)


def _cut(x: Tensor) -> Tensor:
    """`[groups, tokens, ...]` -> `[groups, chunks, tokens of a chunk, ...]`."""
    return x.unflatten(1, (-1, _CHUNK))


def _by_chunk(inputs: SlotInputs) -> SlotInputs:
    """Every chunk of queries as a block, every chunk of keys as a unit."""
    query, key, key_bias, value = (_cut(z) for z in (inputs.query, inputs.key, inputs.key_bias, inputs.value))
    return inputs._replace(query=query, key=key, key_bias=key_bias, value=value)


# -- intra-chunk -----------------------------------------------------------------------------------------------------


def intra_chunk_forward(inputs: SlotInputs, chunk: int) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of every query over the keys of its chunk, up to itself.

    Args:
        inputs: With one dimension of groups; tokens a multiple of `chunk`. Strides of slots may be 0.
        chunk: Tokens of a chunk: 16, 32, 64 or 128.
    Returns: `[groups, tokens, head_dim]` in the dtype of `value`, and float32 `[groups, tokens]` (`-inf`, with output
        0, where a query sees nothing).
    Raises: InputError for another chunk or number of tokens; UnsupportedError for tensors that Triton cannot take.
    """
    query, value = inputs.query, inputs.value
    groups, tokens, _ = query.shape
    inputs = _ready(inputs, chunk)
    output = value.new_empty(groups, tokens, value.shape[-1])
    lse = value.new_empty(groups, tokens, dtype=torch.float32)
    constants = _constants(inputs, chunk, backward=False)
    launch(kernels.forward, groups * (tokens // chunk), *inputs, output, lse, *_sizes(inputs), **constants)
    return output, lse


def intra_chunk_backward(
    grads: AttentionState, inputs: SlotInputs, result: AttentionState, needs: Sequence[bool], chunk: int
) -> list[Tensor | None]:
    """Gradients of the eight tensors of `inputs`, where `needs` says so, by computing the weights again.

    Gradients of slots are those of every group on its own, also where groups share their memory. Where a query sees
    nothing, the gradient of its log-sum-exp is not looked at.
    Raises: as `intra_chunk_forward`.
    """
    inputs = _ready(inputs, chunk)
    upstream = (grads.output.to(inputs.value.dtype).contiguous(), grads.lse.float().contiguous())
    given = (*inputs, *upstream, result.output.contiguous(), result.lse)
    found: list[Tensor | None] = [None] * 8
    constants = _constants(inputs, chunk, backward=True)
    groups, tokens, dim = inputs.query.shape
    parts = triton.cdiv(dim, constants["BLOCK_D"])
    if needs[0] or needs[3] or needs[4] or needs[7]:
        of_tokens = [inputs[i].new_empty(inputs[i].shape) for i in (0, 3, 4, 7)]
        programs = groups * (tokens // chunk) * parts
        launch(kernels.backward_tokens, programs, *given, *of_tokens, *_sizes(inputs), **constants)
        for index, grad in zip((0, 3, 4, 7), of_tokens, strict=True):
            found[index] = grad if needs[index] else None
    if needs[1] or needs[2] or needs[5] or needs[6]:
        slots, chunks = inputs.query_slots.shape[1], tokens // chunk
        programs = groups * triton.cdiv(slots, constants["TILE"]) * parts
        pieces = splits(programs, chunks, _LEAST_CHUNKS)
        of_slots = [inputs.query.new_empty(pieces, *inputs[i].shape, dtype=torch.float32) for i in (1, 2, 5, 6)]
        sizes = (*_sizes(inputs), pieces, triton.cdiv(chunks, pieces))
        launch(kernels.backward_slots, programs * pieces, *given, *of_slots, *sizes, **constants)
        for index, grad in zip((1, 2, 5, 6), of_slots, strict=True):
            found[index] = grad.sum(0).to(inputs[index].dtype) if needs[index] else None
    return found


def _ready(inputs: SlotInputs, chunk: int) -> SlotInputs:
    """The last dimensions contiguous. Raises as `intra_chunk_forward` says."""
    if chunk not in CHUNKS:
        raise InputError(f"chunk must be one of {list(CHUNKS)} for the Triton kernels; got {chunk!r}.")
    if inputs.query.shape[1] % chunk:
        raise InputError(f"tokens must be a multiple of chunk={chunk}; got {inputs.query.shape[1]}. Pad the input.")
    check(*inputs, head_dims=(inputs.query.shape[-1], inputs.value.shape[-1]))
    return SlotInputs(*(rows(z) for z in inputs._replace(key_bias=inputs.key_bias.float().contiguous())))


def _sizes(inputs: SlotInputs) -> tuple[int, ...]:
    """Tokens, slots, and strides in the order in which the kernels take them; the key bias is contiguous."""
    strides = [x.stride()[:-1] for x in inputs._replace(key_bias=inputs.key_bias[0])]
    return (inputs.query.shape[1], inputs.query_slots.shape[1], *(stride for x in strides for stride in x))


def _constants(inputs: SlotInputs, chunk: int, *, backward: bool) -> dict[str, Any]:
    """Block sizes: those of chunks of 64 in dimension 64 were the fastest on an H100 (`scripts/tune_kernels.py`).

    Four warps are twice as fast there as eight. Chunks of 128 tokens spill registers; 64 is the better choice.
    """
    dtype = torch.promote_types(torch.promote_types(inputs.query.dtype, inputs.key.dtype), inputs.value.dtype)
    half = dtype != torch.float32
    widest = 64 if half else 32
    dim, width = inputs.query.shape[-1], inputs.value.shape[-1]
    return {
        "DIM": dim,
        "BLOCK_D": min(widest, padded(dim)),
        "WIDTH": width,
        "BLOCK_E": min(widest, padded(width)),
        "CHUNK": chunk,
        "TILE": 16 if backward else 32,
        "SEGMENT": _SEGMENT,
        "DTYPE": TL_TYPES[dtype],
        "num_warps": 8 if chunk == 128 or (backward and not half) else 4,
        "num_stages": 2 if half else 1,
    }


def _case(dim: int, chunk: int, dtype: torch.dtype) -> None:
    tokens, bias = torch.zeros(1, chunk, dim, dtype=dtype), torch.zeros(1, chunk)
    slots, slot_bias = torch.zeros(1, 256, dim, dtype=dtype), torch.zeros(1, 256)
    inputs = SlotInputs(tokens, slots, slot_bias, tokens, bias, slots, slot_bias, tokens)
    result = AttentionState(*intra_chunk_forward(inputs, chunk))
    intra_chunk_backward(result, inputs, result, [True] * 8, chunk)


COMPILE_CASES: CompileCases = {
    "intra-chunk, bfloat16, chunk 64": lambda: _case(64, 64, torch.bfloat16),
    "intra-chunk, float16, chunk 32, head_dim 80": lambda: _case(80, 32, torch.float16),
    "intra-chunk, float32, chunk 32": lambda: _case(64, 32, torch.float32),
}
