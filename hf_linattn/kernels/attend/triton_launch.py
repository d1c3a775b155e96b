r"""Softmax attention with a bias per key and a differentiable log-sum-exp, as Triton kernels.

    s[t, n] = query_t . key_n + bias_n                         (-inf where not visible)
    output_t = sum_n softmax_n(s[t, n]) value_n                lse_t = logsumexp_n s[t, n]

Both softmaxes of attention through slots are this: few queries (slots) over very many keys, and very many queries
over few keys. Nothing of size `[queries, keys]` is stored. Source of the tiling: Dao 2023, arXiv:2307.08691; new are
the gradient of the log-sum-exp (it joins the row sums of the output's) and that of the bias.

Where one side is short there would be too few programs, so the long side is cut into parts whose results are merged
(forward) or summed (backward) in a fixed order: there are no atomic additions, and two runs agree bit for bit.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...errors import InputError
from ..triton_common import TL_TYPES, CompileCases, check, launch, padded, rows, splits
from . import triton_kernel as kernels

_NONE, _KEYS, _PAIRS = 0, 1, 2  # what `visible` depends on: nothing (absent), the key, or query and key


class _Blocks(NamedTuple):
    queries: int
    keys: int
    num_warps: int
    num_stages: int


# Blocks by (bytes per element, padded head_dim). Those of 64 are within 15 % of the fastest on an H100 (of 24 for two
# bytes and 8 for four, `scripts/tune_kernels.py`) and spill few registers on sm_80. The others were chosen by
# compiling for sm_80 and sm_90, so that the tiles of all stages fit into shared memory and accumulators into
# registers. Not tuned at run time: the same everywhere.
_FORWARD = {
    (2, 64): _Blocks(64, 128, 4, 3),
    (2, 128): _Blocks(128, 64, 8, 2),
    (2, 256): _Blocks(64, 32, 8, 3),
    (4, 64): _Blocks(64, 32, 4, 2),
    (4, 128): _Blocks(32, 32, 4, 2),
    (4, 256): _Blocks(32, 16, 8, 1),
}
_OF_QUERIES = {
    (2, 64): _Blocks(64, 64, 4, 2),
    (2, 128): _Blocks(128, 64, 8, 2),
    (2, 256): _Blocks(64, 32, 8, 2),
    (4, 64): _Blocks(32, 64, 4, 2),
    (4, 128): _Blocks(32, 32, 8, 2),
    (4, 256): _Blocks(32, 16, 8, 1),
}
_OF_KEYS = {
    (2, 64): _Blocks(64, 64, 4, 2),
    (2, 128): _Blocks(64, 64, 8, 2),
    (2, 256): _Blocks(16, 64, 8, 2),
    (4, 64): _Blocks(32, 32, 4, 2),
    (4, 128): _Blocks(16, 32, 8, 2),
    (4, 256): _Blocks(16, 32, 8, 1),
}
# The least work of a part, when the long side is cut: below it the parts' results cost more than they save.
_LEAST_PART = 512


class _Operands:
    """The inputs as the kernels want them: checked, last dimension contiguous, and their strides."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, visible: Tensor | None) -> None:
        batch, heads, self.queries, self.head_dim = query.shape
        self.keys, self.value_dim = value.shape[-2:]
        shapes = {"key": key, "value": value, "bias": bias, "visible": visible}
        wanted = {
            "key": (batch, heads, self.keys, self.head_dim),
            "value": (batch, heads, self.keys, self.value_dim),
            "bias": (batch, heads, self.keys),
            "visible": (batch, heads, self.queries, self.keys),
        }
        for name, tensor in shapes.items():
            if tensor is not None and tuple(tensor.shape) != wanted[name]:
                raise InputError(
                    f"{name} must have shape {wanted[name]} for a query of {tuple(query.shape)}; got "
                    f"{tuple(tensor.shape)}. Use expand() for dimensions that do not differ."
                )
        if visible is not None and visible.dtype != torch.bool:
            raise InputError(f"visible must be a bool tensor, True = visible; got {visible.dtype}.")
        check(query, key, value, bias, visible, head_dims=(self.head_dim, self.value_dim))
        self.batch, self.heads, self.groups = batch, heads, batch * heads
        self.query, self.key, self.value = rows(query), rows(key), rows(value)
        self.mask = _NONE
        if visible is not None:
            self.mask = _KEYS if visible.stride(2) == 0 or self.queries == 1 else _PAIRS
        self.tensors = (self.query, self.key, self.value, bias, None if visible is None else visible.view(torch.uint8))
        self.strides = (
            *self.query.stride()[:3],
            *self.key.stride()[:3],
            *self.value.stride()[:3],
            *((0, 0, 0) if bias is None else bias.stride()),
            *((0, 0, 0, 0) if visible is None else visible.stride()),
        )
        self.constants = {
            "D": self.head_dim,
            "E": self.value_dim,
            "D_PADDED": padded(self.head_dim),
            "E_PADDED": padded(self.value_dim),
            "MASK": self.mask,
            "LOGIT_TYPE": TL_TYPES[torch.promote_types(query.dtype, key.dtype)],
        }

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.batch, self.heads, *shape, dtype=dtype, device=self.query.device)

    def blocks(self, table: dict[tuple[int, int], _Blocks]) -> _Blocks:
        """The row of the table for the widest operand; smaller where there are fewer queries or keys."""
        size = 2 if all(t.element_size() == 2 for t in (self.query, self.key, self.value)) else 4
        row = table[size, max(64, padded(self.head_dim), padded(self.value_dim))]
        if self.mask == _PAIRS:  # its tile needs registers
            row = row._replace(queries=max(16, row.queries // 2))
        return row._replace(queries=min(row.queries, padded(self.queries)), keys=min(row.keys, padded(self.keys)))

    def parts(self, outer: int, outer_block: int, inner: int, inner_block: int) -> tuple[int, int]:
        """(number of parts, their size) for programs that own blocks of `outer` and go through all of `inner`."""
        count = splits(self.groups * triton.cdiv(outer, outer_block), inner, _LEAST_PART)
        size = max(1, triton.cdiv(triton.cdiv(inner, count), inner_block)) * inner_block
        return max(1, triton.cdiv(inner, size)), size


def attend_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax over keys of `query . key + bias`, applied to `value`, and its log-sum-exp. No autograd.

    Args:
        query: `[batch, heads, queries, D]`, already scaled. key: `[batch, heads, keys, D]`. value: `[..., keys, E]`.
            float32, bfloat16 or float16, any strides (0 too), D and E from 1 to 256.
        bias: `[batch, heads, keys]` or None; `-inf` hides a key. visible: bool `[batch, heads, queries, keys]` or
            None, as an expanded view where it does not depend on a dimension.
    Returns: output `[batch, heads, queries, E]` in the dtype of `value`; lse `[batch, heads, queries]`, float32.
        A query that sees nothing gets 0 and `-inf`.
    Raises: UnsupportedError, InputError for inputs outside of the above.

    Logits and sums are float32. Products of float32 inputs are not rounded to TF32: an error in a logit is a relative
    error of a weight, and TF32's would be 1 % for a logit of 20.
    """
    x = _Operands(query, key, value, bias, visible)
    blocks = x.blocks(_FORWARD)
    count, size = x.parts(x.queries, blocks.queries, x.keys, blocks.keys)
    output, lse = x.empty(x.queries, x.value_dim, dtype=value.dtype), x.empty(x.queries, dtype=torch.float32)
    part_output, part_lse = output, lse
    if count > 1:
        part_output = x.empty(count, x.queries, x.value_dim, dtype=torch.float32)
        part_lse = x.empty(count, x.queries, dtype=torch.float32)
    launch(
        kernels.forward,
        x.groups * count * triton.cdiv(x.queries, blocks.queries),
        *(*x.tensors, part_output, part_lse, *x.strides),
        *(x.heads, x.queries, x.keys, count, size),
        **x.constants,
        BLOCK_Q=blocks.queries,
        BLOCK_K=blocks.keys,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    if count > 1:
        width = padded(x.value_dim)
        rows_per_program = max(1, 2048 // width)
        launch(
            kernels.merge,
            x.groups * triton.cdiv(x.queries, rows_per_program),
            *(part_output, part_lse, output, lse, x.queries, count),
            E=x.value_dim,
            E_PADDED=width,
            BLOCK=rows_per_program,
        )
    return output, lse


def attend_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    visible: Tensor | None,
    output: Tensor,
    lse: Tensor,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key, value and bias, from those of both results of `attend_forward`.

    Args:
        grad_lse: `[batch, heads, queries]`, or None for 0. needs: which of the four gradients to compute.
    Returns: contiguous gradients in the dtypes of what they belong to; None where not needed.
    """
    x = _Operands(query, key, value, bias, visible)
    need_query, need_key, need_value, need_bias = needs
    need_bias = need_bias and bias is not None
    grad_output, output = rows(grad_output.to(value.dtype)), rows(output)
    delta, lift = x.empty(x.queries, dtype=torch.float32), x.empty(x.queries, dtype=torch.float32)
    width = padded(x.value_dim)
    rows_per_program = max(1, 2048 // width)
    launch(
        kernels.row_sums,
        x.groups * triton.cdiv(x.queries, rows_per_program),
        *(grad_output, output, grad_lse, lse.contiguous(), delta, lift),
        *(*grad_output.stride()[:3], *output.stride()[:3], *((0, 0, 0) if grad_lse is None else grad_lse.stride())),
        *(x.heads, x.queries),
        E=x.value_dim,
        E_PADDED=width,
        BLOCK=rows_per_program,
    )
    shared = (*x.tensors, grad_output, delta, lift)
    strides = (*x.strides, *grad_output.stride()[:3], x.heads, x.queries, x.keys)

    grad_query = grad_key = grad_value = grad_bias = None
    if need_query:
        blocks = x.blocks(_OF_QUERIES)
        count, size = x.parts(x.queries, blocks.queries, x.keys, blocks.keys)
        part = _part_dtype(count, query.dtype)
        grad_query = x.empty(count, x.queries, x.head_dim, dtype=part)
        launch(
            kernels.of_queries,
            x.groups * count * triton.cdiv(x.queries, blocks.queries),
            *(*shared, grad_query, *strides, count, size),
            **x.constants,
            BLOCK_Q=blocks.queries,
            BLOCK_K=blocks.keys,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
        grad_query = _sum_of_parts(grad_query, query.dtype)
    if need_key or need_value or need_bias:
        blocks = x.blocks(_OF_KEYS)
        count, size = x.parts(x.keys, blocks.keys, x.queries, blocks.queries)
        if need_key:
            grad_key = x.empty(count, x.keys, x.head_dim, dtype=_part_dtype(count, key.dtype))
        if need_value:
            grad_value = x.empty(count, x.keys, x.value_dim, dtype=_part_dtype(count, value.dtype))
        if need_bias:
            grad_bias = x.empty(count, x.keys, dtype=torch.float32)
        launch(
            kernels.of_keys,
            x.groups * count * triton.cdiv(x.keys, blocks.keys),
            *(*shared, grad_key, grad_value, grad_bias, *strides, count, size),
            **x.constants,
            BLOCK_Q=blocks.queries,
            BLOCK_K=blocks.keys,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
        grad_key = None if grad_key is None else _sum_of_parts(grad_key, key.dtype)
        grad_value = None if grad_value is None else _sum_of_parts(grad_value, value.dtype)
        grad_bias = None if grad_bias is None or bias is None else _sum_of_parts(grad_bias, bias.dtype)
    return grad_query, grad_key, grad_value, grad_bias


def _part_dtype(count: int, dtype: torch.dtype) -> torch.dtype:
    return dtype if count == 1 else torch.float32


def _sum_of_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Dimension 2 counts the parts. Summed in a fixed order: deterministic."""
    return parts.squeeze(2).to(dtype) if parts.shape[2] == 1 else parts.sum(2).to(dtype)


def _compile_case(dtype: torch.dtype, head_dim: int, masked: str | None, queries: int, keys: int) -> None:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(2, 4, *shape, dtype=dtype, device="meta")

    query = empty(queries, head_dim, dtype=torch.float32 if queries < 16 else dtype)  # mixed with few queries
    key, value = empty(keys, head_dim), empty(keys, head_dim)
    bias = None if masked is None else empty(keys, dtype=torch.float32)
    visible = None
    if masked is not None:
        visible = empty(queries if masked == "pairs" else 1, keys, dtype=torch.bool).expand(2, 4, queries, keys)
    output, lse = attend_forward(query, key, value, bias, visible)
    needs = (True, True, True, bias is not None)
    attend_backward(output, lse, query, key, value, bias, visible, output, lse, needs)


COMPILE_CASES: CompileCases = {
    f"{str(dtype)[6:]}-{head_dim}-{masked}": partial(_compile_case, dtype, head_dim, masked, queries, keys)
    for dtype in (torch.bfloat16, torch.float32)
    for head_dim in (64, 80, 128, 256)
    for masked, queries, keys in ((None, 4096, 256), ("keys", 256, 4096), ("pairs", 256, 4096))
} | {
    f"{str(dtype)[6:]}-few": partial(_compile_case, dtype, 33, "pairs", 3, 5)
    for dtype in (torch.float16, torch.float32)
}
