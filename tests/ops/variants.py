"""The kinds of attention as plain functions with small settings, for tests that hold for all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_linattn.functional import (
    FavorStatistics,
    draw_projection,
    eva_attention,
    favor_attention,
    favor_statistics,
    lara_attention,
)
from hf_linattn.ops.lara.proposals import CalibratedProposals


@functools.cache
def directions(heads: int, dim: int) -> Tensor:
    return draw_projection(heads, 7, dim, seed=3).double()


def fixed_statistics(heads: int, dim: int, dense: bool = False) -> FavorStatistics:
    """Statistics that come from no data: what a causal layer stores."""
    ramp = torch.linspace(-0.3, 0.4, dim, dtype=torch.float64).expand(1, heads, 1, dim)
    scale = 1 + ramp.abs()
    if not dense:
        return FavorStatistics(ramp, -ramp / 2, scale, 1 / scale, torch.full_like(ramp, -0.1))
    shear = torch.diag_embed(scale.squeeze(-2)) + torch.ones(dim, dim, dtype=torch.float64).tril(-1) * 0.3
    return FavorStatistics(ramp, -ramp / 2, shear, torch.linalg.inv(shear).mT, -0.1 - ramp.abs())


@dataclass(frozen=True)
class Variant:
    """One kind with its options. `window` says whether it takes window 0."""

    name: str
    function: Callable[..., Tensor]
    is_causal: bool
    smallest_window: int = 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, window_size: int = 0, **options: Any) -> Tensor:
        window_size = max(window_size, self.smallest_window)
        return self.function(query, key, value, is_causal=self.is_causal, window_size=window_size, **options)


def _favor_plus(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return favor_attention(q, k, v, directions(q.shape[1], q.shape[-1]).to(q), chunk_size=4, **options)


def _favor_sharp(variant: str) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        given = {name: options.get(name) for name in ("key_mask", "cu_seqlens", "max_seqlen")}
        statistics = favor_statistics(q, k, variant=variant, **given)
        w = directions(q.shape[1], q.shape[-1])
        return favor_attention(q, k, v, w, statistics=statistics, chunk_size=4, **options)

    return run


def _favor_sharp_fixed(dense: bool) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        statistics = fixed_statistics(q.shape[1], q.shape[-1], dense)
        w = directions(q.shape[1], q.shape[-1])
        return favor_attention(q, k, v, w, statistics=statistics, chunk_size=4, **options)

    return run


@functools.cache
def proposals(heads: int, dim: int) -> CalibratedProposals:
    """Three proposals with two samples each, whose weights for `x = y = 0` add up to one, as exact ones do."""
    centroids = directions(heads, dim)[:, :3] * 0.5
    samples = torch.cat([centroids, centroids], 1) + directions(heads, dim)[:, 1:]
    ahead = (samples @ centroids.transpose(-1, -2)).amax(-1, keepdim=True) > 0
    samples = torch.where(ahead, samples, -samples)
    low, high = torch.zeros(heads, 1, 1).double(), torch.full((heads, 1, 1), 100.0).double()
    for _ in range(100):  # the sum falls from more than one to nothing as all samples move away from zero
        middle = (low + high) / 2
        ratio = samples * middle @ centroids.transpose(-1, -2) - centroids.square().sum(-1).unsqueeze(-2) / 2
        above = (1 / ratio.exp().mean(-1)).mean(-1)[:, None, None] > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return CalibratedProposals(centroids, samples * low)


def _lara(**settings: Any) -> Callable[..., Tensor]:
    return functools.partial(lara_attention, num_landmarks=3, **settings)


def _lara_fixed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return lara_attention(q, k, v, proposals=proposals(q.shape[1], q.shape[-1]), chunk_size=4, **options)


def _eva(**settings: Any) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, *, window_size: int, is_causal: bool, **options: Any) -> Tensor:
        chunk_size = (2 if window_size % 2 == 0 else 1) if is_causal else None
        layout = {"window_size": window_size, "num_chunks": 3, "chunk_size": chunk_size, "is_causal": is_causal}
        return eva_attention(q, k, v, **layout, **settings, **options)

    return run


VARIANTS = [
    Variant("favor_plus", _favor_plus, False),
    Variant("favor_plus-causal", _favor_plus, True),
    Variant("favor_sharp", _favor_sharp("saderf"), False),
    Variant("favor_sharp-dense", _favor_sharp("dense"), False),
    Variant("favor_sharp-fixed", _favor_sharp_fixed(False), False),
    Variant("favor_sharp-fixed-dense", _favor_sharp_fixed(True), False),
    Variant("favor_sharp-causal", _favor_sharp_fixed(False), True),
    Variant("favor_sharp-causal-dense", _favor_sharp_fixed(True), True),
    Variant("lara-balance", _lara(weighting="balance"), False),
    Variant("lara-optimal", _lara(weighting="optimal", alpha_coeff=0.7), False),
    Variant("lara-biased", _lara(weighting="biased"), False),
    Variant("lara-mixed", _lara(mixing="key_value"), False),
    Variant("lara-calibrated", _lara_fixed, False),
    Variant("lara-causal", _lara_fixed, True),
    Variant("eva", _eva(), False, smallest_window=1),
    Variant("eva-spread", _eva(weighting="spread", proposals="key"), False, smallest_window=1),
    Variant("eva-overlap", _eva(overlap_window=True, proposals="mean"), False, smallest_window=1),
    Variant("eva-causal", _eva(), True, smallest_window=1),
    Variant("eva-causal-spread", _eva(weighting="spread", proposals="key"), True, smallest_window=1),
    Variant("eva-causal-overlap", _eva(overlap_window=True, proposals="none"), True, smallest_window=1),
]
CAUSAL = [variant for variant in VARIANTS if variant.is_causal]
BIDIRECTIONAL = [variant for variant in VARIANTS if not variant.is_causal]


def name_of(variant: Variant) -> str:
    return variant.name
