r"""LARA with proposals that are fixed in advance: no landmark of the sequence, hence also causal.

Let `mu_1 .. mu_C` be fixed vectors and `w_1 .. w_M` samples, M / C of each N(mu_c, I). Importance sampling with the
mixture of the proposals as density gives, for scaled `x`, `y` and `l(x, w) = w . x - |x|^2 / 2`,

    E[ sum_j exp( l(x, w_j) + l(y, w_j) + e_j ) ] = exp(x . y),
    e_j = log C - log M - log sum_c exp( l(mu_c, w_j) )

for any `mu`: an unbiased estimate on the scale of the exact weights. Its variance is small where `x + y` is near some
`mu_c` (for one proposal its second moment is exp(2 x . y + |x + y - mu|^2) / M + (1 - 1 / M) exp(2 x . y)), so the
`mu` are put where the densities of randomized attention have their means on typical data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import InputError
from ...kernels.half_norm import half_norm
from ..slot_weights import LinearSlotWeights
from .importance import draw_samples, mixture_log_ratio


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


@dataclass(frozen=True)
class ProposalFeatureMap:
    """Samples of calibrated proposals, ready for any number of queries and keys (`proposal_feature_map`).

    Args:
        samples: `[heads, samples, head_dim]`.
        log_weight: `[heads, samples]`, the importance weight of each sample.
        offset: Added to the log mass of all slots, broadcastable to `[batch, heads, 1, 1]`; `None` for none.
    """

    samples: Tensor
    log_weight: Tensor
    offset: Tensor | None = None

    def query(self, x: Tensor) -> LinearSlotWeights:
        """Log-weights of scaled queries `[batch, heads, tokens, head_dim]`."""
        bias = -half_norm(x).unsqueeze(-1)
        return LinearSlotWeights(
            x, bias if self.offset is None else bias + self.offset.to(x), self.samples, self.log_weight
        )

    def key(self, y: Tensor) -> LinearSlotWeights:
        """Log-weights of scaled keys `[batch, heads, tokens, head_dim]`."""
        return LinearSlotWeights(y, -half_norm(y).unsqueeze(-1), self.samples, torch.zeros_like(self.log_weight))


def proposal_feature_map(
    x: Tensor, proposals: CalibratedProposals, offset: Tensor | None = None
) -> ProposalFeatureMap:
    """The basis for scaled queries and keys like `x` `[batch, heads, tokens, head_dim]`.

    Raises: InputError if the shapes do not fit.
    """
    centroids, samples = (z.to(x) for z in proposals)
    expected = (x.shape[1], x.shape[-1])
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
    per_proposal = torch.tensor(float(samples.shape[1] // count), dtype=x.dtype, device=x.device)
    return ProposalFeatureMap(samples, -mixture - per_proposal.log(), offset)


def proposal_log_weights(
    x: Tensor, y: Tensor, proposals: CalibratedProposals
) -> tuple[LinearSlotWeights, LinearSlotWeights]:
    """Log-weights of queries and keys, on the scale of `exp(x . y)`.

    Args:
        x, y: Scaled queries and keys `[batch, heads, tokens, head_dim]`.
    Raises: InputError if the shapes do not fit.
    """
    basis = proposal_feature_map(x, proposals)
    return basis.query(x), basis.key(y)
