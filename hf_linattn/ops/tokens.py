"""What comes before and after every estimator: padding, global tokens, queries that are only the last ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError
from ..kernels.attention_state import AttentionState, merge_states
from .exact import exact_partial
from .layout import Compaction, check_grid, compact, pad_tokens


@dataclass(frozen=True)
class Tokens:
    """Scaled inputs without padding and without global tokens: what an estimator works on.

    `x`, `y`, `value` are `[batch, heads, tokens, head_dim]`, real tokens first; `valid` is `[batch, tokens]` or `None`
    if all are real; `lengths` is `[batch]` (or `[1]` without a mask).
    """

    x: Tensor
    y: Tensor
    value: Tensor
    valid: Tensor | None
    lengths: Tensor
    grid: tuple[int, int] | None
    _all: tuple[Tensor, Tensor, Tensor, Tensor | None]
    _num_global: int
    _compaction: Compaction
    _num_queries: int

    @property
    def key_visible(self) -> Tensor | None:
        """`valid` with room for heads and a feature dimension: `[batch, 1, tokens, 1]`."""
        return None if self.valid is None else self.valid[:, None, :, None]

    def finish(self, estimate: AttentionState | None) -> Tensor:
        """Put global tokens and padding back: the attention output for all queries that were asked for."""
        x, y, value, valid = self._all
        count = self._num_global
        visible = None if valid is None else valid[:, None, None, :]
        if count:
            ours = exact_partial(x[:, :, :count], y, value, visible).output
            if estimate is not None:
                near = None if visible is None else visible[..., :count]
                seen = exact_partial(x[:, :, count:], y[:, :, :count], value[:, :, :count], near)
                ours = torch.cat([ours, merge_states([estimate, seen]).output], dim=2)
            output = ours
        else:
            assert estimate is not None
            output = estimate.output
        output = self._compaction.restore(output)
        return output if output.shape[2] == self._num_queries else output[:, :, -self._num_queries :]


def prepare(
    x: Tensor,
    y: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    *,
    is_causal: bool,
    num_global_tokens: int = 0,
    grid: tuple[int, int] | None = None,
) -> Tokens:
    """Take out padding and global tokens.

    In a causal layer queries may be fewer than keys (decoding with a cache of keys); they are then the last ones.
    Raises: InputError for queries and keys of different sequences, UnsupportedError for global tokens in a
        causal layer.
    """
    num_queries, num_keys = x.shape[2], y.shape[2]
    if is_causal and num_global_tokens:
        raise UnsupportedError(
            f"Global tokens see every token, which a causal layer forbids; got num_global_tokens={num_global_tokens}."
            " Set it to 0."
        )
    if is_causal and grid is not None:
        raise UnsupportedError(f"A causal layer reads a sequence, not an image; got grid={grid!r}. Pass grid=None.")
    if num_queries != num_keys:
        if not is_causal or num_queries > num_keys:
            raise InputError(
                f"This form needs queries and keys of the same tokens; got {num_queries} queries and {num_keys} keys."
                " Cross-attention works with FAVOR+ and FAVOR# without window and global tokens, or with softmax."
            )
        x = pad_tokens(x, num_keys - num_queries, 0)
    count = min(num_global_tokens, num_keys)
    if grid is not None:
        check_grid(num_keys - count, grid, key_mask)
    compaction = compact(key_mask)
    x, y, value = compaction.apply(x), compaction.apply(y), compaction.apply(value)
    valid = compaction.valid
    rest = None if valid is None else valid[:, count:]
    lengths = torch.full((1,), num_keys - count, device=y.device) if rest is None else rest.sum(-1)
    return Tokens(
        x=x[:, :, count:] if count else x,
        y=y[:, :, count:] if count else y,
        value=value[:, :, count:] if count else value,
        valid=rest,
        lengths=lengths,
        grid=grid,
        _all=(x, y, value, valid),
        _num_global=count,
        _compaction=compaction,
        _num_queries=num_queries,
    )
