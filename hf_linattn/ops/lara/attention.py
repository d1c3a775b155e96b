r"""LARA: linear randomized attention (Zheng et al. 2022, arXiv:2204.04667), and a causal form of it.

Softmax attention is an expectation over random directions whose density depends on the query. LARA replaces the
density per query by a few proposals N(mu_c, I), placed at landmarks of the sequence, and weighs their samples `w_j` by
multiple importance sampling. In scaled coordinates and with `l(x, w) = w . x - |x|^2 / 2`, sample j is a slot with

    c[j, n] = l(y_n, w_j)        a[t, j] = l(x_t, w_j) + e[t, j]

where `e` holds the importance weight (`features.py`). With proposals that are fixed in advance
(`proposals.py`) the same works without looking at the sequence, and so for a causal model.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...errors import InputError, UnsupportedError
from ..exact import ONE_WINDOW, in_one_window
from ..inputs import LARGEST_FACTOR, check_counts, checked_attention, factor_of, prepare_tokens
from ..linear_weights import LinearSlotWeights
from ..noise import RowNoise, SlotDropout, noise_factor
from ..padding import Tokens
from ..proposal_map import ProposalMap
from ..short_attention import attention_with_slots, corrects_mass
from ..slot_attention import SlotOptions
from .features import IMPORTANCE_WEIGHTINGS, importance_weights, proposal_feature_map
from .landmarks import Landmarks, find_landmarks
from .mass import masses, read_mass
from .parts import OwnTokens
from .proposals import CalibratedProposals, draw_samples, landmark_noise, sample_numbers


@checked_attention
def lara_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_landmarks: int = 64,
    proposals: CalibratedProposals | None = None,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool = False,
    weighting: str = "balance",
    alpha_coeff: float = 1.0,
    query_map: ProposalMap | None = None,
    key_map: ProposalMap | None = None,
    map_stage: str = "mean",
    mixing: str = "none",
    noise: Tensor | RowNoise | bool = False,
    noise_scale: str = "corrected",
    samples_per_landmark: int = 1,
    antithetic: bool = False,
    offset: Tensor | None = None,
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
    r"""LARA attention, with proposals at landmarks of the sequence (bidirectional) or fixed in advance (any).

    Source: Zheng et al. 2022, arXiv:2204.04667, section 4, and the published code (`HKUNLP/efficient-attention`), all
    of whose options are here. Differs from it: landmarks are those of the real tokens of each row; no epsilon but the
    two that the published "optimal" and "key_value" are defined with; an optional exact window and global tokens in
    the same softmax; a causal form. Without noise (`w = mu`) a slot's mass is too small by about half the spread of
    `x + y` around the landmark, which matters only beside exact keys; there the mass of all slots is corrected per row
    and head by what it is on probe queries (one real query per landmark) against their exact mass, without gradient.
    With noise, or calibrated proposals, no correction is needed: the slots estimate `exp(x . y)` without bias.

    Args:
        query, key, value: `[batch, heads, tokens, head_dim]` of the same tokens. In the causal form queries may be
            fewer than keys: the last ones.
        num_landmarks: Proposals; with a `grid` rounded down to a square number. In a sequence at most one per token.
        proposals: Calibrated proposals instead of landmarks; the options about landmarks, weights and noise then keep
            their defaults.
        key_mask: `[batch, tokens]` bool, True where a token is real.
        scaling: Factor of the dot product; `head_dim ** -0.5` if `None`.
        is_causal: No query sees a later key. Needs `proposals`.
        weighting: "balance" (balance heuristic: the mixture of all proposals is the sampling density), "biased"
            (favours the query's own proposals by `exp(mu . x)`) or "optimal" (adds, per query, `alpha_coeff` times the
            approximately optimal correction; it is normalised over the row's queries, clamped at 1e-8 as published).
        query_map, key_map: Applied to queries and keys in the coordinates of the arguments, `[batch, heads, landmarks
            or tokens, head_dim]`.
        map_stage: Apply the maps to the "mean" of each landmark (published 2-D) or to all "tokens" before averaging
            (published 1-D).
        mixing: "key" replaces every key landmark by its softmax average over all key landmarks (published `mixed`),
            "key_value" counts landmarks with large values more (published `vmixed`).
        noise: Standard normal, `[batch, heads, samples_per_landmark * landmarks, head_dim]`, row `a` for landmark
            `a mod landmarks`; or True to draw it, or a `RowNoise` to take it from. False evaluates at the means.
        noise_scale: "corrected", the scale that the densities assume, or "published", smaller by `scaling ** 0.5`.
        samples_per_landmark: Draws per proposal. Changes nothing without noise.
        antithetic: Every draw with both signs (twice the samples). Changes nothing without noise. (In the published
            code several samples switch it off; here both work together.)
        offset: `[heads]` or broadcastable to `[batch, heads, 1, 1]`, added to the log-sum-exp of slots beside exact
            keys.
        window_size, overlap_window, num_heavy_keys, grid, num_global_tokens, chunk_size, slot_dropout: As in
            `favor_attention`.
        cu_seqlens, max_seqlen, real_first, backend: As in `favor_attention`.
    Returns: `[batch, heads, tokens, head_dim]`, dtype of `query`; zeros for padded queries.
    Raises: UnsupportedError if `is_causal` without `proposals`; InputError if shapes or options do not fit.
    Cost: O(tokens * samples * head_dim). Random: only through `noise` and `slot_dropout`.
    """
    options = SlotOptions(is_causal, window_size, overlap_window, num_heavy_keys, chunk_size, slot_dropout)
    options.check(grid)
    if weighting not in IMPORTANCE_WEIGHTINGS:
        raise InputError(f"weighting must be one of {list(IMPORTANCE_WEIGHTINGS)}; got {weighting!r}.")
    if not 0 <= alpha_coeff <= LARGEST_FACTOR:
        raise InputError(f"alpha_coeff must be a finite number >= 0 and <= {LARGEST_FACTOR:g}; got {alpha_coeff!r}.")
    if proposals is not None:
        _check_calibrated(
            proposals,
            weighting=(weighting, "balance"),
            query_map=(query_map, None),
            key_map=(key_map, None),
            map_stage=(map_stage, "mean"),
            mixing=(mixing, "none"),
            noise=(noise, False),
            samples_per_landmark=(samples_per_landmark, 1),
            antithetic=(antithetic, False),
        )
    elif is_causal:
        raise UnsupportedError(
            "LARA has no causal form with landmarks: they are means over the whole sequence, so every query would see"
            " later keys. Calibrate it: hf_linattn.convert(model, 'lara') and hf_linattn.calibrate(model, batches), or"
            " pass proposals=CalibratedProposals(...) to the function. 'favor_plus' and 'eva' are causal without that."
        )
    scaling = factor_of(query, scaling)
    factor = noise_factor(noise_scale, scaling)
    if in_one_window(query, key, key_mask, **options.window(num_global_tokens, grid)):
        return ONE_WINDOW
    tokens = prepare_tokens(
        *(query, key, value, key_mask, scaling, is_causal, num_global_tokens, grid),
        real_first=real_first,
        scaled=weighting != "balance" or proposals is not None,  # or factors of the few landmarks do
    )
    if tokens.key.shape[2] == 0:
        return tokens.finish(None)
    beside_exact = bool(window_size or num_global_tokens or num_heavy_keys)
    shift = numbers = None
    probes: tuple[int, ...] = ()
    if proposals is not None:
        feature_map = proposal_feature_map(tokens.query, proposals)
        query_weights, key_weights = feature_map.query_weights(tokens.query), feature_map.key_weights(tokens.key)
    else:
        landmarks = find_landmarks(tokens, num_landmarks, scaling, query_map, key_map, map_stage, mixing)
        mu = landmarks.mean
        check_counts({"samples_per_landmark * landmarks": samples_per_landmark * mu.shape[2]})
        if isinstance(noise, RowNoise):
            noise = landmark_noise(noise, mu, samples_per_landmark)
        samples = mu
        if noise is not False:
            samples = draw_samples(mu, noise, samples_per_landmark, antithetic=antithetic, factor=factor)
        numbers = sample_numbers(samples, mu.shape[2]) if slot_dropout else None
        query_weights, key_weights = importance_weights(
            tokens, landmarks, samples, weighting=weighting, alpha_coeff=alpha_coeff, beside_exact=beside_exact
        )
        if beside_exact and noise is False:
            if corrects_mass(tokens, options, query_weights, key_weights):
                probes = landmarks.parts.middles()
            if not probes:
                shift = _mass_correction(tokens, landmarks, query_weights, key_weights)
    if beside_exact:
        if offset is not None:
            offset = offset[None, :, None, None] if offset.ndim == 1 else offset
            if probes:  # the correction is made where the slots are read, and must not take this back
                of_slots = offset.to(tokens.query)[..., 0].expand(*query.shape[:2], query_weights.num_slots)
                key_weights = replace(key_weights, given_slot_bias=of_slots)
            else:
                shift = offset if shift is None else shift + offset
        if shift is not None:
            query_weights = query_weights.plus(shift.to(tokens.query))
    return tokens.finish(attention_with_slots(tokens, options, query_weights, key_weights, numbers, probes))


def _check_calibrated(proposals: CalibratedProposals, **options: tuple[object, object]) -> None:
    """Calibrated proposals, and options (value, only value possible) that these leave no choice in."""
    if not isinstance(proposals, CalibratedProposals):
        raise InputError(f"proposals must be CalibratedProposals; got {type(proposals).__name__}.")
    for name, (value, only) in options.items():
        if isinstance(value, Tensor) or value != only:
            value = "a tensor" if isinstance(value, Tensor) else value
            raise InputError(
                f"Calibrated proposals fix the samples and their weights; {name} must be {only!r} with them, got"
                f" {value!r}."
            )


@torch.no_grad()
def _mass_correction(
    tokens: Tokens, landmarks: Landmarks, query_weights: LinearSlotWeights, key_weights: LinearSlotWeights
) -> Tensor:
    """Mean over probe queries of (exact log-sum-exp - that through the slots), `[batch, heads, 1, 1]`.

    A probe is the middle token of a landmark.
    """
    parts, used = landmarks.parts, landmarks.used
    probes = query_weights if isinstance(parts, OwnTokens) else query_weights.map_tokens(parts.middle)
    exact, slots = masses(probes.tokens, tokens, key_weights)
    difference = exact - read_mass(probes, slots, has_hidden=used is not None)
    if used is None:
        correction = difference.mean(-1)
    else:
        used = used.squeeze(-2)
        correction = torch.where(used, difference, 0.0).sum(-1) / used.sum(-1).clamp_min(1)
    return correction[..., None, None].detach()  # an exported program forgets about `no_grad`
