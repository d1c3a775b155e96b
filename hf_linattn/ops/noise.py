"""Noise of random proposals (LARA, EVA, RA), on the scale that their densities assume or on the published one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError

NOISE_SCALES = ("corrected", "published")


def noise_factor(noise_scale: str, scaling: float) -> float:
    """What standard normal noise is multiplied by: the densities assume 1 in scaled coordinates."""
    if noise_scale not in NOISE_SCALES:
        raise InputError(f"noise_scale must be one of {list(NOISE_SCALES)}; got {noise_scale!r}.")
    return 1.0 if noise_scale == "corrected" else scaling**0.5


def add_noise(mu: Tensor, noise: Tensor | bool, factor: float = 1.0) -> Tensor:
    """Samples of the proposals N(mu, I) (`factor` 1); `mu` itself without noise."""
    if noise is False:
        return mu
    return mu + factor * (torch.randn_like(mu) if noise is True else noise.to(mu))
