"""Random directions, drawn on the CPU from an explicit seed: the same on every machine, rank and resume."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ...errors import InputError
from ..inputs import check_counts


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any values, e.g. `(seed, layer_idx, "projection")`; nearby inputs give unrelated seeds."""
    digest = hashlib.sha256("/".join(map(repr, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw_projection(
    num_heads: int | None,
    num_features: int,
    head_dim: int,
    *,
    seed: int,
    orthogonal: bool = True,
    regularized: bool = False,
) -> Tensor:
    """Directions omega of random features, one independent set per head or one for all heads.

    Orthogonal directions come in blocks of `head_dim` rows, uniformly distributed (QR of a Gaussian matrix with the
    signs of R's diagonal taken out; without that correction the rows are not uniform and the estimate is biased).
    Their lengths are drawn as norms of Gaussian vectors, so that each row alone is N(0, I).

    Source: Choromanski et al. 2021, arXiv:2009.14794, section 2.4; sign correction: Mezzadri 2007,
        arXiv:math-ph/0609050.

    Args:
        num_heads: `None` draws one set that all heads share: the errors of the heads are then correlated, each alone
            has the same distribution.
        num_features: Rows per set; need not be a multiple of `head_dim`.
        seed: An integer that fits into 64 bits; `derive_seed` makes one of anything, and mixes in the layer.
        orthogonal: False draws independent Gaussian rows.
        regularized: All lengths `head_dim ** 0.5` (slightly biased, a little less variance).
    Returns: `[num_heads, num_features, head_dim]`, shared `[num_features, head_dim]`; float32 on the CPU.
    Random: a function of the arguments alone; the global generator is not touched.
    """
    if num_heads is None:
        return draw_projection(
            1, num_features, head_dim, seed=seed, orthogonal=orthogonal, regularized=regularized
        ).squeeze(0)
    check_counts({"num_heads": num_heads, "num_features": num_features, "head_dim": head_dim})
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise InputError(f"seed must be an integer from -2**63 to 2**64 - 1; got {seed!r}. derive_seed makes one.")
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    if not orthogonal:
        return normal(num_heads, num_features, head_dim).float()
    blocks = -(-num_features // head_dim)
    q, r = torch.linalg.qr(normal(num_heads, blocks, head_dim, head_dim))
    rows = (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).transpose(-1, -2)
    rows = rows.reshape(num_heads, blocks * head_dim, head_dim)[:, :num_features]
    if regularized:
        return (rows * head_dim**0.5).float()
    return (rows * normal(num_heads, num_features, head_dim).norm(dim=-1, keepdim=True)).float()
