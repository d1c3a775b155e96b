r"""Attention through slots whose maps are learned, beside exact keys.

Per head, with trained directions `w^q_j`, `w^k_j`, shifts `m_q`, `m_k`, a slot bias `e_j`, an offset `g_0` and a slope
`g` of the mass that goes through the slots,

    c[j, n] = w^k_j . (y_n - m_k) - logsumexp_i w^k_i . (y_n - m_k)
    a[t, j] = w^q_j . (x_t - m_q) + e_j + g_0 + g . (x_t - m_q)

for scaled queries `x` and keys `y`. Each key spreads one unit of weight over the slots (`normalizer="slots"`), so the
slots hold the mass of all keys that they have read. `normalizer="kernel"` takes `|y|^2 / 2` in place of the
log-sum-exp, and `|x|^2 / 2 + log M` off `a`: with the directions of FAVOR+ and all else zero that is FAVOR+. With
statistics of FAVOR#, `x` and `y` are tokens in its coordinates and its centring terms are added to `a` and `c`: with
the stretched directions of FAVOR# and twice its feature bias as `e_j` that is FAVOR#.

A feature map of this form, tied and of both signs, is Hedgehog's (Zhang et al. 2024, arXiv:2402.04347).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .exact import ONE_WINDOW, in_one_window
from .favor.features import FavorFeatureMap
from .favor.statistics import FavorStatistics
from .inputs import checked_attention, factor_of, prepare_tokens
from .linear_weights import LinearSlotWeights, TokenRule
from .noise import SlotDropout
from .padding import Tokens
from .recurrent.slots import SlotRecurrence
from .short_attention import attention_with_slots, short_blocks
from .slot_attention import SlotOptions, exact_attention
from .softmax import causal_visibility, mask_logits

NORMALIZERS = ("slots", "kernel")


@dataclass(frozen=True)
class LearnedFeatureMap:
    """The maps of a layer.

    Args:
        query_directions, key_directions: `[heads, slots, head_dim]`.
        query_shift, key_shift: `[heads, head_dim]`.
        slot_bias: `[heads, slots]`.
        far_offset: `[heads]`: added to the log-mass of the slots.
        far_slope: `[heads, head_dim]`: what of it is linear in the query.
        normalizer: "slots" or "kernel".
        statistics: With the normaliser "kernel" those of FAVOR#: directions, shifts and slope are then in its
            coordinates. `None` for tokens as they are.
        root: The square root of `scaling` where tokens are not scaled; 1 where they are. Only without statistics.
    """

    query_directions: Tensor
    key_directions: Tensor
    query_shift: Tensor
    key_shift: Tensor
    slot_bias: Tensor
    far_offset: Tensor
    far_slope: Tensor
    normalizer: str = "slots"
    statistics: FavorStatistics | None = None
    root: float = 1.0

    @property
    def num_slots(self) -> int:
        return self.query_directions.shape[-2]

    def query_weights(self, query: Tensor) -> LinearSlotWeights:
        """Log-weights `a[t, j]` of scaled queries `[batch, heads, tokens, head_dim]`."""
        wide = torch.promote_types(query.dtype, torch.float32)
        # The mass of the slots is a part of all of their directions and biases.
        directions = self.query_directions.to(wide) + self.far_slope.to(wide).unsqueeze(-2)
        slot_bias = self.slot_bias.to(wide) + self.far_offset.to(wide).unsqueeze(-1)
        slot_bias = slot_bias - moved_by(directions, self.query_shift.to(wide))
        if self.normalizer == "kernel":
            return self._features(directions, slot_bias).query_weights(query)
        return LinearSlotWeights(query, None, directions.to(query.dtype), slot_bias, rule=TokenRule(root=self.root))

    def key_weights(self, key: Tensor) -> LinearSlotWeights:
        """Log-weights `c[j, n]` of scaled keys `[batch, heads, tokens, head_dim]`."""
        wide = torch.promote_types(key.dtype, torch.float32)
        directions = self.key_directions.to(wide)
        slot_bias = -moved_by(directions, self.key_shift.to(wide))
        if self.normalizer == "kernel":
            return self._features(directions, slot_bias).key_weights(key)
        rule = TokenRule(spreads=True, root=self.root)
        return LinearSlotWeights(key, None, directions.to(key.dtype), slot_bias, rule=rule)

    def in_coordinates(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled tokens as the directions meet them."""
        return (query, key) if self.statistics is None else self.statistics.transform(query, key)

    def _features(self, directions: Tensor, slot_bias: Tensor) -> FavorFeatureMap:
        statistics, log_count = self.statistics, math.log(self.num_slots)
        statistics = None if statistics is None else statistics.to(dtype=slot_bias.dtype, device=slot_bias.device)
        return FavorFeatureMap(directions, slot_bias, statistics, log_count, self.root)


def moved_by(directions: Tensor, shift: Tensor) -> Tensor:
    """What a shift `[heads, head_dim]` of the tokens takes off the log-weights of every slot, `[heads, slots]`."""
    return torch.linalg.vecdot(directions, shift.to(directions).unsqueeze(-2))


@checked_attention(in_half=("cpu", "cuda"))
def learned_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: LearnedFeatureMap,
    *,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool = False,
    window_size: int = 0,
    overlap_window: bool = False,
    num_heavy_keys: int = 0,
    grid: tuple[int, int] | None = None,
    num_global_tokens: int = 0,
    chunk_size: int | None = None,
    slot_dropout: float | SlotDropout = 0.0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    real_first: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Attention through learned slots.

    Args:
        query, key, value: `[batch, heads, tokens, head_dim]`.
        feature_map: Of this number of heads and this head_dim.
        The others as in `ops.favor.attention.favor_attention`.
    Returns: `[batch, heads, tokens, head_dim]`, dtype of `query`; zeros for padded queries.
    Raises: InputError and UnsupportedError as `favor_attention` does.
    """
    options = SlotOptions(is_causal, window_size, overlap_window, num_heavy_keys, chunk_size, slot_dropout)
    options.check(grid)
    scaling = factor_of(query, scaling)
    if in_one_window(query, key, key_mask, **options.window(num_global_tokens, grid)):
        return ONE_WINDOW
    tokens = prepare_tokens(
        *(query, key, value, key_mask, scaling, is_causal, num_global_tokens, grid),
        real_first=real_first,
        scaled=feature_map.statistics is not None,
    )
    if tokens.key.shape[2] == 0:
        return tokens.finish(None)
    if short_blocks(tokens, options, feature_map.num_slots) is None:
        tokens = tokens.scaled().packed()
    if tokens.root != 1:
        feature_map = replace(feature_map, root=tokens.root)
    query_weights, key_weights = feature_map.query_weights(tokens.query), feature_map.key_weights(tokens.key)
    return tokens.finish(attention_with_slots(tokens, options, query_weights, key_weights))


@torch.no_grad()
def learning_start(
    query: Tensor,
    key: Tensor,
    feature_map: LearnedFeatureMap,
    options: SlotOptions,
    *,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    grid: tuple[int, int] | None = None,
    num_global_tokens: int = 0,
    mean: Callable[[Tensor, Tensor], Tensor] = torch.div,
) -> dict[str, Tensor]:
    """Where training starts, in closed form: values of `query_shift`, `key_shift`, `slot_bias` and `far_offset`.

    The shifts are the means of scaled queries and keys. The slot bias makes up for that of queries, so that their
    log-weights stay as they are (and with the normaliser "kernel" for that of keys). With the offset the mean log-mass
    of the slots, over queries, is that of the keys that they stand for.

    Args:
        query, key: `[batch, heads, tokens, head_dim]`. The others as in `learned_attention`.
        mean: From a sum over these tokens and their number to the mean over the tokens of all processes.
    Cost: O(tokens^2) time and memory: for a batch of a few sequences.
    """
    query, key = query.float(), key.float()
    factor = factor_of(query, scaling)
    tokens = prepare_tokens(query, key, key, key_mask, factor, options.is_causal, num_global_tokens, grid)
    real = _real(tokens).to(key.dtype)
    seen = feature_map.in_coordinates(tokens.query, tokens.key)
    query_shift, key_shift = (mean((z * real).sum((0, 2)), real.sum()) for z in seen)
    slot_bias = feature_map.slot_bias + moved_by(feature_map.query_directions, query_shift - feature_map.query_shift)
    if feature_map.normalizer == "kernel":
        slot_bias = slot_bias + moved_by(feature_map.key_directions, key_shift - feature_map.key_shift)
    start = {"query_shift": query_shift, "key_shift": key_shift, "slot_bias": slot_bias}
    start["far_offset"] = torch.zeros_like(query_shift[:, 0])
    exact = exact_attention(tokens, options)
    if exact.windows is None and exact.heavy is None:
        return start  # beside nothing else the mass of the slots has no effect

    started = replace(feature_map, query_shift=query_shift, key_shift=key_shift, slot_bias=slot_bias)

    def mass(offset: float) -> Tensor:
        """Log-mass of exact keys and slots together."""
        maps = replace(started, far_offset=torch.zeros_like(started.far_offset) + offset)
        return exact.with_slots(maps.query_weights(tokens.query), maps.key_weights(tokens.key)).lse

    return start | {"far_offset": matching_offset(tokens, mass, is_causal=options.is_causal, mean=mean)}


def matching_offset(
    tokens: Tokens, mass: Callable[[float], Tensor], *, is_causal: bool, mean: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The offset of the slots' log-mass with which its mean over queries is that of the keys that they stand for.

    Args:
        mass: Log-mass of exact keys and slots together, `[batch, heads, tokens]`, given the offset.
        mean: As in `learning_start`.
    Returns: `[heads]`; 0 where no query reads a slot.
    """
    real = _real(tokens)
    logits = mask_logits(tokens.query @ tokens.key.mT, real.mT)
    if is_causal:
        logits = mask_logits(logits, causal_visibility(logits.shape[-2], logits.shape[-1], logits.device))
    near = mass(float("-inf"))
    far, slots = (total + torch.log1p(-(near - total).exp()) for total in (logits.logsumexp(-1), mass(0.0)))
    seen = far.isfinite() & slots.isfinite() & real.squeeze(-1)
    return mean(torch.where(seen, far - slots, 0.0).sum((0, 2)), seen.sum((0, 2))).nan_to_num(0.0)  # 0 / 0 if none


def _real(tokens: Tokens) -> Tensor:
    """`[batch or 1, 1, tokens, 1]`, True where a token is real."""
    if tokens.visible is not None:
        return tokens.visible
    return torch.ones_like(tokens.key[:, :1, :, :1], dtype=torch.bool)


def learned_recurrence(
    feature_map: LearnedFeatureMap,
    *,
    scaling: float,
    window_size: int = 0,
    overlap_window: bool = False,
    chunk_size: int | None = None,
    slot_dropout: float | SlotDropout = 0.0,
) -> SlotRecurrence:
    """The recurrent form of `learned_attention(..., is_causal=True)` with the same options."""
    options = SlotOptions(True, window_size, overlap_window, chunk_size=chunk_size, dropout=slot_dropout)
    return SlotRecurrence(feature_map, feature_map.num_slots, scaling, options, in_half=("cpu", "cuda"))
