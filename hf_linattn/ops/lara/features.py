"""LARA's feature map: every sample of a proposal is a slot, weighed by multiple importance sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...kernels.half_norm import half_norm
from ..linear_weights import LinearSlotWeights, TokenRule
from ..padding import Tokens
from .landmarks import Landmarks
from .mixture import log_densities, log_mixture_at_means
from .proposals import CalibratedProposals

IMPORTANCE_WEIGHTINGS = ("balance", "biased", "optimal")
_SMALLEST_ALPHA = 1e-8  # part of the published definition of the optimal weights
_HALF_NORM = TokenRule(norm=1.0)


def log_feature(x: Tensor, w: Tensor) -> Tensor:
    """`l(x, w) = w . x - |x|^2 / 2` for all pairs of `[..., tokens, dim]` and `[..., samples, dim]`."""
    return x @ w.transpose(-1, -2) - half_norm(x).unsqueeze(-1)


def mixture_log_ratio(mu: Tensor, samples: Tensor, used: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log density, relative to N(0, I), of each sample under each proposal, and under all of them together.

    Args:
        mu: `[..., landmarks, dim]`. samples: `[..., samples, dim]`. used: `[..., 1, landmarks]`, False takes a
            proposal out.
    Returns: `[..., samples, landmarks]`, and its log-sum-exp `[..., samples]`.
    """
    density = log_densities(mu, samples, used)
    return density, density.logsumexp(-1)


# -- at landmarks ---------------------------------------------------------------------------------------------------


def importance_weights(
    tokens: Tokens, landmarks: Landmarks, samples: Tensor, *, weighting: str, alpha_coeff: float, beside_exact: bool
) -> tuple[LinearSlotWeights, LinearSlotWeights]:
    """Log-weights of queries and keys for every sample, on the scale of `exp(x . y)`.

    Args:
        tokens: Scaled ones, unless `weighting` is "balance".
        landmarks: The sum of their mean query and mean key is the mean of a proposal.
        samples: `[batch, heads, samples, dim]` from `draw_samples`.
        weighting: One of `IMPORTANCE_WEIGHTINGS`, with `alpha_coeff` for "optimal".
        beside_exact: The slots stand beside exact keys, so factors that belong to the query alone do not cancel.
    Returns: weights of the queries and weights of the keys.
    """
    query, key, used = tokens.query, tokens.key, landmarks.used
    mu = landmarks.mean
    repeats = samples.shape[-2] // mu.shape[-2]
    density = None
    if samples is mu and weighting != "optimal":
        mixture = log_mixture_at_means(mu, used)
    else:
        density, mixture = mixture_log_ratio(mu, samples, used)
    if repeats > 1:
        # The log of `samples / landmarks` times the sum of densities: then the sum over samples is the right average.
        mixture = mixture + math.log(repeats)
    directions, pair_bias, log_density, rule = samples, None, mixture, _HALF_NORM._replace(root=tokens.root)
    token_bias = None
    if weighting == "biased":
        directions = samples + torch.cat([mu] * repeats, dim=-2)
        if beside_exact:
            # exp(mu_c . x) divided by its mean over the proposals: a redistribution of the weight between them.
            affinity = _finite(query @ mu.transpose(-1, -2), used)
            token_bias = _number_used(mu, used).log() - affinity.logsumexp(-1, keepdim=True)
    elif weighting == "optimal":
        # Of each sample under its own proposal.
        assert density is not None
        assert landmarks.query_mean is not None
        log_density = density.unflatten(-2, (repeats, mu.shape[-2])).diagonal(dim1=-2, dim2=-1).flatten(-2)
        # Finite, so that a row without any real token gives no NaN.
        affinity = _finite(query @ landmarks.query_mean.transpose(-1, -2), tokens.visible)
        query_share = affinity.softmax(2)
        total = (query_share if used is None else query_share.masked_fill(~used, 0.0)).sum(-1, keepdim=True)
        centred = query_share - total / _number_used(mu, used)
        balance = log_density - mixture
        if used is not None:
            balance = balance.masked_fill(~_of_samples(used, repeats), 0.0)
        alpha = balance.exp().unsqueeze(-2) + alpha_coeff * torch.cat([centred] * repeats, dim=-1)
        pair_bias = alpha.clamp_min(_SMALLEST_ALPHA).log()
    slot_bias = -log_density
    if used is not None:
        # An unused landmark (a row shorter than `num_landmarks`) has no density: its terms go, not only its weight.
        slot_bias = torch.where(_of_samples(used, repeats), slot_bias, float("-inf"))
    return (
        LinearSlotWeights(query, token_bias, directions, slot_bias, pair_bias, rule),
        LinearSlotWeights(key, None, samples, None, rule=rule),
    )


def _finite(logits: Tensor, visible: Tensor | None) -> Tensor:
    """The lowest number where `visible` is False."""
    return logits if visible is None else logits.masked_fill(~visible, torch.finfo(logits.dtype).min)


def _number_used(mu: Tensor, used: Tensor | None) -> Tensor:
    """The number of landmarks that are used, at least 1, `[batch or 1, 1, 1, 1]`."""
    if used is None:
        return mu.new_full((1, 1, 1, 1), mu.shape[-2])
    return used.sum(-1, keepdim=True).clamp_min(1).to(mu.dtype)


def _of_samples(used: Tensor, repeats: int) -> Tensor:
    """`[batch or 1, 1, samples]`: which samples belong to a landmark that is used."""
    return torch.cat([used.squeeze(-2)] * repeats, dim=-1)


# -- calibrated -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProposalFeatureMap:
    """Samples of calibrated proposals, ready for any number of queries and keys (`proposal_feature_map`).

    Args:
        samples: `[heads, samples, head_dim]`.
        log_weight: `[heads, samples]`, the importance weight of each sample.
        offset: Added to the log-sum-exp of all slots, broadcastable to `[batch, heads, 1, 1]`; `None` for none.
    """

    samples: Tensor
    log_weight: Tensor
    offset: Tensor | None = None

    def query_weights(self, query: Tensor) -> LinearSlotWeights:
        """Log-weights of scaled queries `[batch, heads, tokens, head_dim]`."""
        weights = LinearSlotWeights(query, None, self.samples, self.log_weight, rule=_HALF_NORM)
        return weights if self.offset is None else weights.plus(self.offset.to(query))

    def key_weights(self, key: Tensor) -> LinearSlotWeights:
        """Log-weights of scaled keys `[batch, heads, tokens, head_dim]`."""
        return LinearSlotWeights(key, None, self.samples, None, rule=_HALF_NORM)


def proposal_feature_map(
    query: Tensor, proposals: CalibratedProposals, offset: Tensor | None = None
) -> ProposalFeatureMap:
    """The feature map for scaled queries and keys like `query` `[batch, heads, tokens, head_dim]`.

    Raises: InputError if the shapes do not fit.
    """
    centroids, samples = (z.to(query) for z in proposals)
    expected = (query.shape[1], query.shape[-1])
    for name, z in (("centroids", centroids), ("samples", samples)):
        if z.ndim != 3 or (z.shape[0], z.shape[2]) != expected:
            raise InputError(
                f"proposals.{name} must be [heads, {'proposals' if name == 'centroids' else 'samples'}, head_dim] ="
                f" [{expected[0]}, ..., {expected[1]}]; got {tuple(z.shape)}."
            )
    count = centroids.shape[1]
    if not count or not samples.shape[1] or samples.shape[1] % count:
        raise InputError(
            f"Every proposal needs the same number of samples; got {samples.shape[1]} samples of {count} proposals."
        )
    _, mixture = mixture_log_ratio(centroids, samples)
    return ProposalFeatureMap(samples, -mixture - math.log(samples.shape[1] // count), offset)
