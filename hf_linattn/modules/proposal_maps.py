"""Learned proposals: what LARA and EVA make of the mean query and key of a landmark or chunk.

| map | what it is | tensors (`query_` and `key_`) |
|---|---|---|
| "residual" | `z + z W_h`, one map per head, zero at first | `adapter [heads, head_dim, head_dim]` |
| "linear" | `z W' + b`, shared by the heads (published EVA, `no-ln`) | `map_weight [head_dim, head_dim]`, `map_bias` |
| "linear_norm" | the same, then layer norm (LARA `light`, EVA `default`, `qk`) | and `norm_weight`, `norm_bias` |
| "dense_norm" | the same over the concatenated heads (published LARA `dense`) | `[heads * head_dim, ...]` |
| "none" | nothing: the parameter-free method | |

Every map starts at the identity (before a layer norm), so that converting a pretrained model changes as little as it
can; the published models start from random maps, because they are trained from scratch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.proposal_map import ProposalMap, ResidualMap
from .base import LinearAttention
from .contract import LayerShape, StateTensor, zeros
from .definition import C

PROPOSAL_MAPS = ("residual", "linear", "linear_norm", "dense_norm", "none")
_EPSILON = 1e-5  # of layer norm, as in torch


def proposal_spec(proposal_map: str | None, side: str, shape: LayerShape) -> dict[str, StateTensor]:
    """The tensors of one map; `side` is "query" or "key"."""
    heads, dim = shape.num_heads, shape.head_dim
    if proposal_map in ("none", None):
        return {}
    if proposal_map == "residual":
        return {f"{side}_adapter": zeros(heads, dim, dim, learned=True)}
    width = heads * dim if proposal_map == "dense_norm" else dim
    spec = {
        f"{side}_map_weight": StateTensor((width, width), learned=True, draw=lambda: torch.eye(width), optional=True),
        f"{side}_map_bias": zeros(width, learned=True),
    }
    if proposal_map != "linear":
        spec[f"{side}_norm_weight"] = StateTensor((width,), learned=True, draw=lambda: torch.ones(width))
        spec[f"{side}_norm_bias"] = zeros(width, learned=True)
    return spec


class ProposalAttention(LinearAttention[C]):
    """What LARA and EVA share: in native mode, which has no parameters, a map must not be more than the identity."""

    @classmethod
    def native_refusal(cls, config: C, shape: LayerShape, *, training: bool) -> str | None:
        if str(config.proposal_map).endswith("_norm"):
            return (
                f"proposal_map={config.proposal_map!r} (the default of conventions='published') has parameters, and"
                " native mode has none. Set proposal_map='none' in config.linear_attention for the parameter-free"
                " method"
            )
        return super().native_refusal(config, shape, training=training)


def proposal_maps(state: Mapping[str, Tensor]) -> tuple[ProposalMap | None, ProposalMap | None]:
    """The maps of queries and of keys, `[batch, heads, groups, head_dim]` to the same shape; `None` for none."""
    maps: list[ProposalMap | None] = []
    for side in ("query", "key"):
        if f"{side}_adapter" in state:
            maps.append(ResidualMap(state[f"{side}_adapter"]))
        elif f"{side}_map_weight" in state:
            names = ("map_weight", "map_bias", "norm_weight", "norm_bias")
            maps.append(functools.partial(_linear, [state.get(f"{side}_{name}") for name in names]))
        else:
            maps.append(None)
    return maps[0], maps[1]


def _linear(tensors: Sequence[Any], z: Tensor) -> Tensor:
    weight, bias, norm_weight, norm_bias = tensors
    heads, dim = z.shape[1], z.shape[-1]
    concatenated = weight.shape[0] != dim
    if concatenated:
        z = z.transpose(1, 2).flatten(-2)
    z = F.linear(z, weight.to(z.dtype), bias.to(z.dtype))
    if norm_weight is not None:
        z = F.layer_norm(z, z.shape[-1:], norm_weight.to(z.dtype), norm_bias.to(z.dtype), _EPSILON)
    return z.unflatten(-1, (heads, dim)).transpose(1, 2) if concatenated else z
