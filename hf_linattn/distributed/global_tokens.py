"""Global tokens of a sequence whose tokens are spread over processes: they see and are seen exactly.

Windows and chunks are those of the tokens behind them. So each part hands its first tokens, as many as there are
global ones, to the part before; then all parts are whole windows of the tokens that are not global. What these have
read goes back to where their queries came from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.attend import attend
from ..kernels.attention_state import AttentionState, merge_states
from ..ops.padding import Tokens
from .collectives import SequenceGroup
from .states import merge_over, only_if
from .tokens import with_mask


def beside_global_tokens(
    part: Tokens, count: int, group: SequenceGroup, read: Callable[[Tokens], AttentionState]
) -> Tensor:
    """Outputs of all queries of this part.

    Args:
        count: Global tokens, at most those of a part: the first of the first part.
        read: What the others read of each other, given a part of them.
    """
    is_first = group.rank == 0
    sizes = part.query.shape[-1], part.key.shape[-1], part.value.shape[-1]
    everything = torch.cat([part.query, part.key, part.value], -1)
    real = part.valid if part.valid is not None else torch.ones_like(part.key[:, 0, :, 0], dtype=torch.bool)
    query, key, value = _of_first(everything[:, :, :count], group).split(sizes, -1)
    visible = (_of_first(real[:, :count].to(torch.uint8), group) > 0)[:, None, None]

    rest = _handed_on(part, everything, sizes, real, count, group)
    beside = attend(rest.query, key, value, visible=visible)
    output = merge_states([read(rest), beside]).output

    assert rest.visible is not None
    own = attend(query, rest.key, rest.value, visible=rest.visible.mT)
    among = only_if(is_first, attend(query, key, value, visible=visible))
    seen = merge_over(merge_states([own, among]), group).output.to(output.dtype)
    stop = output.shape[2] - count
    before = group.from_left(output[:, :, stop:])
    first = torch.where(torch.full((), is_first, device=output.device), seen, before)
    return torch.cat([first, output[:, :, :stop]], 2)


def _of_first(x: Tensor, group: SequenceGroup) -> Tensor:
    """What the first process has, for all."""
    return group.reduce(x.masked_fill(torch.full((), group.rank > 0, device=x.device), 0))


def _handed_on(
    part: Tokens, everything: Tensor, sizes: tuple[int, int, int], real: Tensor, count: int, group: SequenceGroup
) -> Tokens:
    """The part without its first `count` tokens, and with those of the next part; the last one gets padding."""
    after = group.from_right(everything[:, :, :count])
    query, key, value = torch.cat([everything[:, :, count:], after], 2).split(sizes, -1)
    real_after = group.from_right(real[:, :count].to(torch.uint8)) > 0
    tokens = replace(part, query=query, key=key, value=value).packed()
    return with_mask(tokens, torch.cat([real[:, count:], real_after], 1))
