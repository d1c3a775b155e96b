r"""FAVOR#'s log-weights with statistics of the row itself, where what is centred for the statistics is what is used.

The same as `favor_statistics` and `favor_feature_map` one after the other, for variants with one `a` and a factor `t`
for every coordinate of the queries (`1 / t` of the keys). With centred tokens `c` and `s = sqrt(1 - 4 a)` the
directions stay those of the layer, and the log-weights of a feature are

    w . (s t c_x) + a |w|^2 + c_x . m_y - |t c_x|^2 / 2           of a query
    w . (s c_y / t) + a |w|^2 + c_y . m_x - |c_y / t|^2 / 2       of a key

What all features have in common, `m_x . m_y + dim log s`, is added to the query's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.functions import call
from ...kernels.row_fit import fit_rows, fits_in_c
from ..linear_weights import LinearSlotWeights
from ..padding import Tokens
from .fit import diagonal_fit
from .statistics import DENSE_VARIANTS, FavorStatistics, check_variant, favor_statistics

# Up to so many tokens queries and keys are put into one tensor: half the operations, and one pass more.
_STACKED = 256


@dataclass(frozen=True)
class RowFit:
    """Statistics that are still to be taken of the row itself; the fields are arguments of `favor_statistics`."""

    variant: str = "saderf"
    centring: bool = True

    def __post_init__(self) -> None:
        check_variant(self.variant)

    def statistics(self, query: Tensor, key: Tensor, **options: Any) -> FavorStatistics:
        """Those of these tokens; other options of `favor_statistics`."""
        return favor_statistics(query, key, variant=self.variant, centring=self.centring, **options)

    @property
    def is_diagonal(self) -> bool:
        return self.variant not in DENSE_VARIANTS


def fitted_weights(tokens: Tokens, projection: Tensor, fit: RowFit) -> tuple[LinearSlotWeights, LinearSlotWeights]:
    """Log-weights of queries and keys in float32 or wider, of the rows' own diagonal statistics.

    Args:
        tokens: Those of the statistics too.
        projection: `[heads, features, head_dim]` or `[features, head_dim]`.
    """
    query, key = tokens.query, tokens.key
    options = None if tokens.valid is None else tokens.lengths, tokens.visible, fit
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        moved_query, moved_key, query_bias, key_bias, shape, *_ = call(_Fitted, query, key, *options)
    else:
        moved_query, moved_key, query_bias, key_bias, shape, *_ = _forward(query, key, *options)
    directions = projection.to(query)
    slot_bias = torch.linalg.vecdot(directions, directions) * shape
    directions = directions.expand(*query.shape[:2], -1, -1)
    query_bias = query_bias - math.log(projection.shape[-2])
    return (
        LinearSlotWeights(moved_query, query_bias, directions, slot_bias),
        LinearSlotWeights(moved_key, key_bias, directions, slot_bias),
    )


def _forward(
    query: Tensor, key: Tensor, lengths: Tensor | None, visible: Tensor | None, fit: RowFit
) -> tuple[Tensor, ...]:
    """Moved queries and keys, their biases, `a` `[batch, heads, 1]`, and what the backward pass needs of both sides:
    `s t`, `t^2` and the mean of the other side."""
    if visible is None and fits_in_c(query, key):
        return fit_rows(query, key, balances=fit.variant == "saderf", centres=fit.centring)
    count = query.shape[2] if lengths is None else lengths.clamp_min(1).to(query)[:, None, None, None]
    # What follows is written for sides that are one tensor, and done for each where they are two.
    is_short = query.shape[2] <= _STACKED
    sides = [torch.stack([query, key])] if is_short else [query, key]
    means, centred, seconds = [], [], []
    for z in sides:
        means.append(z.sum(-2, keepdim=True) / count)
        z = z - means[-1]
        centred.append(z if visible is None else z.mul_(visible))
        seconds.append(torch.linalg.vecdot(z, z, dim=-2).unsqueeze(-2) / count)
    mean, second = (means[0], seconds[0]) if is_short else (torch.stack(means), torch.stack(seconds))
    transform, square, shape = diagonal_fit(mean, second, fit.variant, fit.centring)
    base = 1 - 4 * shape
    factor, other = transform * base.sqrt(), mean.flip(0)
    # In common: m_x . m_y + dim log s.
    common = base.squeeze(-1).log() * (query.shape[-1] / 2)
    if fit.centring:
        common = common + torch.linalg.vecdot(*mean.unbind(0))
    else:
        other, centred = torch.zeros_like(mean), sides
    moved, biases = [], []
    for side, z in enumerate(centred):
        own = (other, square, factor) if is_short else (other[side], square[side], factor[side])
        biases.append(torch.linalg.vecdot(z, torch.addcmul(own[0], z, own[1], value=-0.5)))
        moved.append(z * own[2])
    if is_short:
        moved, biases = list(moved[0].unbind(0)), list(biases[0].unbind(0))
    query_bias, key_bias = (biases[0] + common).unsqueeze(-1), biases[1].unsqueeze(-1)
    return *moved, query_bias, key_bias, shape.squeeze(-1), factor, square, other


class _Fitted(torch.autograd.Function):
    """`_forward`, whose statistics are constants for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, lengths: Tensor | None, visible: Tensor | None, fit: RowFit
    ) -> tuple[Tensor, ...]:
        return _forward(query, key, lengths, visible, fit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output[:2], *output[5:])
        ctx.mark_non_differentiable(*output[4:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *moved, factor, square, other = ctx.saved_tensors
        shrink, found = square / factor, []
        for side, z in enumerate(moved):
            # Of a bias: m - t^2 c.
            pull = torch.addcmul(other[side], z, shrink[side], value=-1)
            found.append((grads[side] * factor[side]).addcmul_(pull, grads[2 + side]))
        return *found, None, None, None
