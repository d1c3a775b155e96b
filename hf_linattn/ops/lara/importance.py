"""Samples of proposals and their importance weights: what turns landmarks into LARA's slots."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ...kernels.half_norm import half_norm
from ..noise import add_noise
from ..slot_weights import LinearSlotWeights
from ..slots import mask_logits

WEIGHTINGS = ("balance", "biased", "optimal")
_SMALLEST_ALPHA = 1e-8  # part of the published definition of the optimal weights


def log_feature(x: Tensor, w: Tensor) -> Tensor:
    """`l(x, w) = w . x - |x|^2 / 2` for all pairs of `[..., tokens, dim]` and `[..., samples, dim]`."""
    return x @ w.transpose(-1, -2) - half_norm(x).unsqueeze(-1)


def draw_samples(
    mu: Tensor, noise: Tensor | bool, *, samples_per_landmark: int = 1, antithetic: bool = False, factor: float = 1.0
) -> Tensor:
    """All samples of the proposals, `[..., samples, dim]`; sample `a` belongs to proposal `a mod landmarks`.

    Args:
        mu: `[..., landmarks, dim]`.
        noise: `[..., samples_per_landmark * landmarks, dim]`, or True to draw it. False gives `mu` itself, one sample
            per proposal whatever the other arguments say.
        antithetic: Every draw also with the opposite sign, after all others.
    """
    if noise is False:
        return mu
    mu = torch.cat([mu] * samples_per_landmark, dim=-2)
    if noise is True:
        noise = torch.randn_like(mu)
    elif noise.shape != mu.shape:
        raise InputError(
            f"noise must be [batch, heads, samples_per_landmark * landmarks, head_dim] = {tuple(mu.shape)}; got"
            f" {tuple(noise.shape)}."
        )
    samples = add_noise(mu, noise, factor)
    return torch.cat([samples, add_noise(mu, noise, -factor)], dim=-2) if antithetic else samples


def mixture_log_ratio(mu: Tensor, samples: Tensor, used: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log density, relative to N(0, I), of each sample under each proposal, and under all of them together.

    Args:
        mu: `[..., landmarks, dim]`. samples: `[..., samples, dim]`. used: `[..., 1, landmarks]`, False takes a
            proposal out.
    Returns: `[..., samples, landmarks]`, and its log-sum-exp `[..., samples]`.
    """
    density = mask_logits(log_feature(mu, samples).transpose(-1, -2), used)
    return density, density.logsumexp(-1)


def importance_weights(
    x: Tensor,
    y: Tensor,
    query_mean: Tensor,
    key_mean: Tensor,
    samples: Tensor,
    used: Tensor,
    *,
    weighting: str,
    alpha_coeff: float,
    visible: Tensor | None,
    beside_exact: bool,
) -> tuple[LinearSlotWeights, LinearSlotWeights, Tensor | None]:
    """Log-weights of queries and keys for every sample, on the scale of `exp(x . y)`.

    Args:
        x, y: `[batch, heads, tokens, dim]`, scaled.
        query_mean, key_mean: `[batch, heads, landmarks, dim]`; their sum is the mean of a proposal.
        samples: `[batch, heads, samples, dim]` from `draw_samples`.
        used: `[batch or 1, 1, 1, landmarks]`, False for a landmark without members.
        weighting: One of `WEIGHTINGS`, with `alpha_coeff` for "optimal".
        visible: `[batch, 1, tokens, 1]`, False at padding.
        beside_exact: The slots stand beside exact keys, so factors that belong to the query alone do not cancel.
    Returns: weights of the queries, weights of the keys, and what to add to the former.
    """
    mu = query_mean + key_mean
    per_landmark = samples.shape[-2] // mu.shape[-2]
    density, mixture = mixture_log_ratio(mu, samples, used)
    # `samples / landmarks` times the mixture's log density, so that adding the samples up is the right average.
    log_count = torch.tensor(float(per_landmark), dtype=x.dtype, device=x.device).log()
    mixture = mixture + log_count

    def repeated(z: Tensor) -> Tensor:
        return torch.cat([z] * per_landmark, dim=-1)

    # An unused landmark (a row shorter than `num_landmarks`) has no density: take its terms out, not only its weight.
    used_slots = repeated(used.squeeze(-2))
    directions, extra, lse = samples, None, mixture
    token_bias = -half_norm(x).unsqueeze(-1)
    if weighting == "biased":
        directions = samples + torch.cat([mu] * per_landmark, dim=-2)
        if beside_exact:
            # exp(mu_c . x) divided by its mean over the proposals: a redistribution of the weight between them.
            count = used.sum(-1, keepdim=True).clamp_min(1).to(x.dtype)
            affinity = (x @ mu.transpose(-1, -2)).masked_fill(~used, torch.finfo(x.dtype).min)
            token_bias = token_bias - affinity.logsumexp(-1, keepdim=True) + count.log()
    elif weighting == "optimal":
        blocks = density.unflatten(-2, (per_landmark, mu.shape[-2]))
        own = blocks.diagonal(dim1=-2, dim2=-1).flatten(-2)  # density of each sample under its own proposal
        affinity = x @ query_mean.transpose(-1, -2)
        if visible is not None:
            # Finite, so that a row without any real token gives no NaN.
            affinity = affinity.masked_fill(~visible, torch.finfo(x.dtype).min)
        query_share = affinity.softmax(2)
        count = used.sum(-1, keepdim=True).clamp_min(1)
        centred = query_share - query_share.masked_fill(~used, 0.0).sum(-1, keepdim=True) / count
        balance = (own.masked_fill(~used_slots, 0.0) - mixture.masked_fill(~used_slots, 0.0)).exp().unsqueeze(-2)
        extra = (balance + alpha_coeff * repeated(centred)).clamp_min(_SMALLEST_ALPHA).log()
        lse = own
    slot_bias = torch.where(used_slots, -lse, float("-inf"))
    key_bias = -half_norm(y).unsqueeze(-1)
    return (
        LinearSlotWeights(x, token_bias, directions, slot_bias),
        LinearSlotWeights(y, key_bias, samples, torch.zeros_like(slot_bias)),
        extra,
    )
