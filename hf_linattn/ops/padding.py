"""What comes before and after every estimator: padding, global tokens, queries that are only the last ones.

The rule for padding is that a row is treated as if it had been given without it. So `prepare_tokens` moves the real
tokens of each row to its front, and `Tokens.finish` moves the results back; what happens between them needs to know
only how many tokens of a row are real.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError, UnsupportedError
from ..kernels.attend import attend
from ..kernels.attention_state import AttentionState, merge_states


def without_padding(key: Tensor, value: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Masked keys and values set to 0, so that inf or NaN in the padding reaches neither values nor gradients."""
    if key_mask is None:
        return key, value
    padding = ~key_mask[:, None, :, None]
    return key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)


def real_tokens_first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`[batch, tokens]`: the order that moves the real tokens of each row to its front, and which are real then."""
    order = mask.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)
    return order, mask.gather(1, order)


def reorder_tokens(x: Tensor, order: Tensor, real: Tensor) -> Tensor:
    """`x` `[batch, heads, tokens, dim]` with its tokens in another order; 0 where the result is not `real`."""
    moved = x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))
    # Filled, not multiplied: whatever stood in the padding (even inf or NaN) reaches neither values nor gradients.
    return moved.masked_fill(~real[:, None, :, None], 0.0)


class GlobalTokens(NamedTuple):
    """The first `number` tokens see and are seen exactly. Tensors are those of all tokens, `valid` as in `Tokens`."""

    number: int
    query: Tensor
    key: Tensor
    value: Tensor
    valid: Tensor | None

    def join(self, rest: AttentionState | None) -> Tensor:
        """Outputs of all tokens, from what the others have read of each other (`None` if there are none)."""
        query, key, value, number = self.query, self.key, self.value, self.number
        visible = None if self.valid is None else self.valid[:, None, None, :]
        output = attend(query[:, :, :number], key, value, visible=visible).output
        if rest is None:
            return output
        visible = None if visible is None else visible[..., :number]
        seen = attend(query[:, :, number:], key[:, :, :number], value[:, :, :number], visible=visible)
        return torch.cat([output, merge_states([rest, seen]).output], dim=2)


@dataclass(frozen=True)
class Tokens:
    """Scaled inputs without padding and without global tokens: what an estimator works on.

    query, key, value: `[batch, heads, tokens, head_dim]`, real tokens first. Queries and keys are scaled.
    valid: `[batch, tokens]`, True for a real token; `None` if all are. visible: The same as `[batch, 1, tokens, 1]`.
    lengths: Real tokens of a row, `[batch]` (`[1]` without a mask).
    grid: Height and width, if the tokens are the patches of an image.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    valid: Tensor | None
    visible: Tensor | None
    lengths: Tensor
    grid: tuple[int, int] | None
    _num_queries: int
    _global: GlobalTokens | None
    _order: Tensor | None
    _mask: Tensor | None

    def finish(self, estimate: AttentionState | None) -> Tensor:
        """The attention output for all queries that were asked for: global tokens and padding put back."""
        if self._global is not None:
            output = self._global.join(estimate)
        else:
            assert estimate is not None
            output = estimate.output
        if self._order is not None and self._mask is not None:
            output = reorder_tokens(output, self._order.argsort(dim=-1), self._mask)
        return output if output.shape[2] == self._num_queries else output[:, :, -self._num_queries :]


def prepare_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    scaling: float,
    is_causal: bool,
    num_global_tokens: int = 0,
    grid: tuple[int, int] | None = None,
) -> Tokens:
    """Scale queries and keys (`x = sqrt(s) q`, `y = sqrt(s) k`), take out padding and global tokens.

    In a causal layer queries may be fewer than keys (decoding with a kv cache); they are then the last ones.
    Raises: InputError for queries and keys of different sequences, UnsupportedError for global tokens in a
        causal layer.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    if is_causal and num_global_tokens:
        raise UnsupportedError(
            f"Global tokens see every token, which a causal layer forbids; got num_global_tokens={num_global_tokens}."
            " Set it to 0."
        )
    if is_causal and grid is not None:
        raise UnsupportedError(f"A causal layer reads a sequence, not an image; got grid={grid!r}. Pass grid=None.")
    root = scaling**0.5
    query, key = query * root, key * root
    if num_queries != num_keys:
        if not is_causal or num_queries > num_keys:
            raise InputError(
                f"This form needs queries and keys of the same tokens; got {num_queries} queries and {num_keys} keys."
                " Cross-attention works with FAVOR+ and FAVOR# without window and global tokens, or with softmax."
            )
        query = F.pad(query, (0, 0, num_keys - num_queries, 0))
    count = min(num_global_tokens, num_keys)
    if grid is not None:
        check_grid(num_keys - count, grid, key_mask)
    order = valid = visible = global_tokens = None
    if key_mask is not None:
        order, valid = real_tokens_first(key_mask)
        query, key, value = (
            reorder_tokens(query, order, valid),
            reorder_tokens(key, order, valid),
            reorder_tokens(value, order, valid),
        )
    if count:
        global_tokens = GlobalTokens(count, query, key, value, valid)
        query, key, value = query[:, :, count:], key[:, :, count:], value[:, :, count:]
    if valid is None:
        lengths = torch.full((1,), num_keys - count, device=key.device)
    else:
        valid = valid[:, count:]
        visible, lengths = valid[:, None, :, None], valid.sum(-1)
    return Tokens(query, key, value, valid, visible, lengths, grid, num_queries, global_tokens, order, key_mask)


def check_grid(tokens: int, grid: tuple[int, int], mask: Tensor | None) -> None:
    """A 2-D layout needs exactly `height * width` tokens, all of them real."""
    if grid[0] * grid[1] != tokens:
        raise InputError(
            f"A grid of {grid[0]} x {grid[1]} patches needs {grid[0] * grid[1]} tokens after the global ones; got"
            f" {tokens}. Pass the grid of these images, or grid=None to treat the tokens as a sequence."
        )
    if mask is None:
        return
    must = "A mask over a 2-D grid must be all True (a full rectangle of patches)"
    advice = "Pass grid=None to treat the tokens as a sequence."
    if torch.compiler.is_compiling():  # when the graph runs
        torch._assert_async(mask.all(), f"hf_linattn: {must}. {advice}")
    elif not bool(mask.all()):
        raise InputError(f"{must}; got one with {int((~mask).sum())} masked patches. {advice}")
