r"""LARA: linear randomized attention (Zheng et al. 2022, arXiv:2204.04667), bidirectional.

Softmax attention is an expectation over random directions whose density depends on the query. LARA replaces the
density per query by a few proposals N(mu_c, I), placed at landmarks of the sequence, and weighs their samples `w_j` by
multiple importance sampling. In scaled coordinates and with `l(x, w) = w . x - |x|^2 / 2`, sample j is a slot with

    c[j, n] = l(y_n, w_j)        a[t, j] = l(x_t, w_j) + e[t, j]

where `e` holds the importance weight (`weighting` below).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError
from .exact import attention_function, exact_partial, scale_inputs
from .factored import LogWeights
from .layout import gather_tokens, grid_bins, masked_mean, segment_index
from .slots import mask_logits
from .tokens import Tokens, prepare
from .windowed import slot_attention

WEIGHTINGS = ("balance", "optimal")
LandmarkMap = Callable[[Tensor], Tensor]


def landmark_index(tokens: Tokens, num_landmarks: int) -> Tensor:
    """Members of each landmark, `[batch or 1, landmarks, members]`: segments of a sequence, bins of a grid."""
    if tokens.grid is not None:
        return grid_bins(tokens.grid, max(1, int(num_landmarks**0.5)), tokens.y.device)
    longest = tokens.y.shape[2]
    return segment_index(tokens.lengths, min(num_landmarks, longest), longest)


def add_noise(mu: Tensor, noise: Tensor | bool) -> Tensor:
    """Samples of the proposals N(mu, I); `mu` itself without noise."""
    if noise is False:
        return mu
    return mu + (torch.randn_like(mu) if noise is True else noise.to(mu))


def log_feature(x: Tensor, w: Tensor) -> Tensor:
    """`l(x, w) = w . x - |x|^2 / 2` for all pairs of `[..., tokens, dim]` and `[..., samples, dim]`."""
    return x @ w.transpose(-1, -2) - x.square().sum(-1, keepdim=True) / 2


@attention_function
def lara_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_landmarks: int = 64,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool = False,
    weighting: str = "balance",
    query_map: LandmarkMap | None = None,
    key_map: LandmarkMap | None = None,
    noise: Tensor | bool = False,
    offset: Tensor | None = None,
    window_size: int = 0,
    overlap_window: bool = False,
    num_heavy_keys: int = 0,
    grid: tuple[int, int] | None = None,
    num_global_tokens: int = 0,
    slot_dropout: float = 0.0,
) -> Tensor:
    r"""LARA attention, bidirectional.

    Source: Zheng et al. 2022, arXiv:2204.04667, section 4. Differs from it: landmarks are those of the real tokens of
    each row; `noise` is on the scale that the densities assume; no epsilon; an optional exact window and global
    tokens in the same softmax. Without noise (`w = mu`) a slot's mass is too small by about half the spread of
    `x + y` around the landmark, which matters only beside exact keys; there the mass of all slots is corrected per row
    and head by what it is on probe queries (one real query per landmark) against their exact mass, without gradient.

    Args:
        query, key, value: `[batch, heads, tokens, head_dim]` of the same tokens.
        num_landmarks: Proposals; with a `grid` rounded down to a square number. At most one per token is used.
        key_mask: `[batch, tokens]` bool, True where a token is real.
        scaling: Factor of the dot product; `head_dim ** -0.5` if `None`.
        is_causal: Must be False.
        weighting: "balance" (balance heuristic: the mixture of all proposals is the sampling density) or "optimal"
            (adds, per query, the approximately optimal correction; it is normalised over the row's queries).
        query_map, key_map: Applied to the mean query and key of a landmark, `[batch, heads, landmarks, head_dim]`.
        noise: Standard normal, `[batch, heads, landmarks, head_dim]`, or True to draw it; False evaluates at the
            means.
        offset: `[heads]` or broadcastable to `[batch, heads, 1, 1]`, added to the log mass of the slots beside exact
            keys.
        window_size, grid, num_global_tokens, slot_dropout: As in `favor_attention`.
    Returns: `[batch, heads, tokens, head_dim]`, dtype of `query`; zeros for padded queries.
    Raises: UnsupportedError if `is_causal`; InputError if shapes or options do not fit.
    Cost: O(tokens * landmarks * head_dim). Random: only through `noise` and `slot_dropout`.
    """
    if is_causal:
        raise UnsupportedError(
            "LARA has no causal form here: its proposals are landmarks of the whole sequence, so every query would see"
            " later keys. Use 'favor_plus', 'favor_sharp' or 'eva' in a causal model."
        )
    if weighting not in WEIGHTINGS:
        raise InputError(f"weighting must be one of {list(WEIGHTINGS)}; got {weighting!r}.")
    if num_landmarks < 1:
        raise InputError(f"num_landmarks must be >= 1; got {num_landmarks!r}.")
    x, y = scale_inputs(query, key, scaling)
    tokens = prepare(x, y, value, key_mask, is_causal=False, num_global_tokens=num_global_tokens, grid=grid)
    if tokens.y.shape[2] == 0:
        return tokens.finish(None)
    x, y = tokens.x, tokens.y

    index = landmark_index(tokens, num_landmarks)
    member = (index >= 0) if tokens.valid is None else (index >= 0) & (index < tokens.lengths[:, None, None])
    used = member.any(-1)[:, None, None, :]  # [batch or 1, 1, 1, landmarks]
    query_mean = masked_mean(gather_tokens(x, index), member)
    key_mean = masked_mean(gather_tokens(y, index), member)
    query_mean = query_map(query_mean) if query_map else query_mean
    key_mean = key_map(key_mean) if key_map else key_mean
    mu = query_mean + key_mean
    samples = add_noise(mu, noise)

    # log q_c(w_a) relative to N(0, I), [samples, proposals]
    density = mask_logits(log_feature(mu, samples).transpose(-1, -2), used)
    mixture = density.logsumexp(-1)
    # An unused landmark (a row shorter than `num_landmarks`) has no density: take its terms out, not only its weight.
    used_slots = used.squeeze(-2)
    slot_bias = torch.where(used_slots, -mixture, float("-inf"))
    extra = None
    if weighting == "optimal":
        own = density.diagonal(dim1=-2, dim2=-1)
        affinity = x @ query_mean.transpose(-1, -2)
        if tokens.key_visible is not None:
            # Finite, so that a row without any real token gives no NaN.
            affinity = affinity.masked_fill(~tokens.key_visible, torch.finfo(x.dtype).min)
        query_share = affinity.softmax(2)
        count = used.sum(-1, keepdim=True).clamp_min(1)
        centred = query_share - query_share.masked_fill(~used, 0.0).sum(-1, keepdim=True) / count
        used_ratio = own.masked_fill(~used_slots, 0.0) - mixture.masked_fill(~used_slots, 0.0)
        balance = used_ratio.exp().unsqueeze(-2)
        extra = (balance + centred).clamp_min(1e-8).log()
        slot_bias = torch.where(used_slots, -own, float("-inf"))
    query_weights = LogWeights(x, -x.square().sum(-1, keepdim=True) / 2, samples, slot_bias)
    key_weights = LogWeights(y, -y.square().sum(-1, keepdim=True) / 2, samples, torch.zeros_like(slot_bias))

    if window_size or num_global_tokens:
        shift = torch.zeros(())
        if noise is False:
            shift = _mass_correction(tokens, index, query_weights, key_weights, extra)
        if offset is not None:
            shift = shift + (offset[None, :, None, None] if offset.ndim == 1 else offset)
        query_weights = replace(query_weights, token_bias=query_weights.token_bias + shift.to(x))
    return tokens.finish(
        slot_attention(
            tokens,
            query_weights,
            key_weights,
            is_causal=False,
            window_size=window_size,
            overlap_window=overlap_window,
            num_heavy_keys=num_heavy_keys,
            chunk_size=32,
            dropout=slot_dropout,
            extra=extra,
        )
    )


@torch.no_grad()
def _mass_correction(
    tokens: Tokens, index: Tensor, query: LogWeights, key: LogWeights, extra: Tensor | None
) -> Tensor:
    """Mean over probe queries of (exact log mass - log mass through the slots), `[batch, heads, 1, 1]`."""
    # The middle member, counted per row so that padding in other rows has no influence.
    real = (index >= 0) if tokens.valid is None else (index >= 0) & (index < tokens.lengths[:, None, None])
    probe = index.gather(-1, real.sum(-1, keepdim=True) // 2 % index.shape[-1])
    real = real.any(-1, keepdim=True)
    key_visible = tokens.key_visible

    def at_probes(z: Tensor) -> Tensor:
        return gather_tokens(z, probe).squeeze(-2)

    visible = None if key_visible is None else key_visible.transpose(-1, -2)
    exact = exact_partial(at_probes(tokens.x), tokens.y, tokens.value, visible).log_mass
    readers = replace(query, tokens=at_probes(query.tokens), token_bias=at_probes(query.token_bias))
    slots = key.masked(key_visible).summarise(tokens.value)
    ours = readers.read(slots, extra=None if extra is None else at_probes(extra)).log_mass
    real = real.squeeze(-1)[:, None]
    difference = torch.where(real, exact - ours, 0.0).sum(-1) / real.sum(-1).clamp_min(1)
    return difference[..., None, None]
