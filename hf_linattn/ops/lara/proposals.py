r"""Samples of LARA's proposals, and proposals that are fixed in advance: no landmark of the sequence, also causal.

Let `mu_1 .. mu_C` be fixed vectors and `w_1 .. w_M` samples, M / C of each N(mu_c, I). Importance sampling with the
mixture of the proposals as density gives, for scaled `x`, `y` and `l(x, w) = w . x - |x|^2 / 2`,

    E[ sum_j exp( l(x, w_j) + l(y, w_j) + e_j ) ] = exp(x . y),
    e_j = log C - log M - log sum_c exp( l(mu_c, w_j) )

for any `mu`: an unbiased estimate on the scale of the exact weights. Its variance is small where `x + y` is near some
`mu_c` (for one proposal its second moment is exp(2 x . y + |x + y - mu|^2) / M + (1 - 1 / M) exp(2 x . y)), so the
`mu` are put where the densities of randomized attention have their means on typical data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import InputError
from ..noise import RowNoise, add_noise


def draw_samples(
    mu: Tensor, noise: Tensor | bool, samples_per_landmark: int = 1, *, antithetic: bool = False, factor: float = 1.0
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


def landmark_noise(noise: RowNoise, mu: Tensor, samples_per_landmark: int) -> Tensor:
    """Noise for `draw_samples` with `mu` `[batch, heads, landmarks, dim]`; of a landmark whatever their number."""
    landmarks = mu.shape[2]
    mu = torch.cat([mu] * samples_per_landmark, dim=2)
    return noise.normal(mu, sample_numbers(mu, landmarks)).to(mu)


def sample_numbers(samples: Tensor, landmarks: int) -> Tensor:
    """`[samples]`: a number for every sample of `draw_samples`, of a landmark whatever their number."""
    repeats = samples.shape[2] // landmarks
    number = torch.arange(samples.shape[2], device=samples.device)
    return number % landmarks * repeats + number // landmarks


class CalibratedProposals(NamedTuple):
    """Proposals N(centroid, I) and samples of them, in scaled coordinates.

    centroids: `[heads, proposals, head_dim]`.
    samples: `[heads, samples, head_dim]`, as many of each proposal: `samples` is a multiple of `proposals`
    (`sample_proposals`).
    """

    centroids: Tensor
    samples: Tensor


def sample_proposals(centroids: Tensor, noise: Tensor, *, antithetic: bool = False) -> CalibratedProposals:
    """Proposals at `centroids` with samples `centroid + noise`.

    Args:
        centroids: `[heads, proposals, head_dim]`, scaled: near typical `x + y`.
        noise: `[heads, samples, head_dim]`, rows from N(0, I), which need not be independent; `samples` is a multiple
            of `proposals`, and sample `j` belongs to proposal `j mod proposals`.
        antithetic: Use every row of noise with both signs: twice as many samples.
    """
    count = centroids.shape[-2]
    if not count or noise.shape[-2] % count or not noise.shape[-2]:
        raise InputError(
            f"noise needs as many rows for each of the {count} proposals: a multiple of {count}; got"
            f" {noise.shape[-2]}."
        )
    samples = draw_samples(centroids, noise, samples_per_landmark=noise.shape[-2] // count, antithetic=antithetic)
    return CalibratedProposals(centroids, samples)
