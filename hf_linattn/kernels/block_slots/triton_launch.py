"""The scan over states of units, launched in Triton; `triton_kernel` has the mathematics."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..attend.triton_launch import attend_backward, attend_forward
from ..triton_common import CompileCases, check, launch, padded
from . import triton_kernel as kernels
from .inter_block import BlockReach, InterBlock

# Entries of a tile of slots: few enough that prefetching the next unit hides its latency.
_TILE_ENTRIES = 1024


def scan_forward(output: Tensor, lse: Tensor, blocks: int, reach: BlockReach) -> tuple[Tensor, Tensor]:
    """For every block of queries the merged state of the units that it reads.

    Args:
        output: `[groups, units, slots, dim]`.
        lse: `[groups, units, slots]`, float32, `-inf` for an empty state.
        blocks: Number of blocks. reach: Which units a block reads.
    Returns: `[groups, blocks, slots, dim]` and `[groups, blocks, slots]`; empty (output 0, lse `-inf`) where a block
        reads nothing.
    Raises: UnsupportedError for tensors that Triton cannot take.
    """
    output, lse = output.contiguous(), lse.contiguous()
    check(output, lse, head_dims=(output.shape[-1],))
    groups, num_units, slots, dim = output.shape
    # The first of two walks leaves its result to the second, which should not read it rounded.
    merged = output.new_empty(groups, blocks, slots, dim, dtype=output.dtype if reach.is_causal else torch.float32)
    merged_lse = torch.empty_like(merged[..., 0], dtype=torch.float32, memory_format=torch.contiguous_format)
    first = min(blocks, triton.cdiv(reach.margin, reach.units))  # blocks with nothing before them but their margin
    merged[:, :first], merged_lse[:, :first] = 0.0, float("-inf")
    programs, constants = _plan(output)
    sizes = (num_units, blocks, slots, dim, reach.units, reach.margin)
    arguments = (output, lse, merged, merged_lse, *sizes)
    last = max(0, (blocks - 1) * reach.units - reach.margin)  # units that the last block reads
    launch(kernels.scan_forward, programs, *arguments, last + 1, AFTER=False, **constants)
    if not reach.is_causal:
        launch(kernels.scan_forward, programs, *arguments, num_units, AFTER=True, **constants)
    return merged.to(output.dtype), merged_lse


def scan_backward(
    grad_output: Tensor,
    grad_lse: Tensor,
    output: Tensor,
    lse: Tensor,
    merged: Tensor,
    merged_lse: Tensor,
    reach: BlockReach,
) -> tuple[Tensor, Tensor]:
    """Gradients of `scan_forward` for its `output` and `lse`, given those of its results.

    Args:
        grad_output, grad_lse: Shaped as the results; where the merged lse is `-inf` they are not looked at.
        output, lse, reach: As given to `scan_forward`. merged, merged_lse: Its results.
    Raises: as `scan_forward`.
    """
    tensors = [z.contiguous() for z in (grad_output, grad_lse, merged, merged_lse, output, lse)]
    check(*tensors, head_dims=(output.shape[-1],))
    _, num_units, slots, dim = output.shape
    blocks = merged.shape[1]
    grads = (
        output.new_empty(output.shape, dtype=torch.float32),
        output.new_empty(output.shape[:-1], dtype=torch.float32),
    )
    programs, constants = _plan(output)
    arguments = (*tensors, *grads, num_units, blocks, slots, dim, reach.units, reach.margin)
    # Blocks may begin beyond the last unit.
    steps = max(num_units, (blocks - 1) * reach.units - reach.margin)
    launch(kernels.scan_backward, programs, *arguments, steps, AFTER=False, **constants)
    if not reach.is_causal:
        launch(kernels.scan_backward, programs, *arguments, num_units, AFTER=True, **constants)
    return grads[0].to(output.dtype), grads[1]


def _plan(output: Tensor) -> tuple[int, dict[str, int]]:
    """Programs and block sizes of a launch."""
    groups, _, slots, dim = output.shape
    width = padded(dim)
    tile = max(4, min(_TILE_ENTRIES // width, triton.next_power_of_2(slots)))
    return groups * triton.cdiv(slots, tile), {"TILE": tile, "DIM": width}


_inter_block = InterBlock(attend_forward, attend_backward, scan_forward, scan_backward)
blocks_forward, blocks_backward = _inter_block.forward, _inter_block.backward


def _case(is_causal: bool, dim: int, dtype: torch.dtype) -> None:
    output, lse = torch.zeros(1, 4, 256, dim, dtype=dtype), torch.zeros(1, 4, 256)
    reach = BlockReach(is_causal=is_causal)
    merged = scan_forward(output, lse, 4, reach)
    scan_backward(*merged, output, lse, *merged, reach)


COMPILE_CASES: CompileCases = {
    "scan, bfloat16": lambda: _case(True, 64, torch.bfloat16),
    "scan, float32, both sides": lambda: _case(False, 64, torch.float32),
    "scan, float16, both sides, head_dim 80": lambda: _case(False, 80, torch.float16),
    "scan, float32, both sides, head_dim 256": lambda: _case(False, 256, torch.float32),
}
