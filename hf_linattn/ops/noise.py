r"""Random numbers that belong to the rows of a batch: noise of proposals, and dropout of slots.

A number is a function of a key of its row and of its place in the row (head, token, slot, ...), and of nothing else.
So rows are independent, whatever shares a batch with them; a row has the same numbers in any batch, in any place of
it, with any padding, on any process; and a pass that is done again (activation checkpointing) draws them again. There
is no generator whose state would count the draws: numbers are hashes of their place (counter-based generators, Salmon
et al. 2011). Hashes are 32 bits wide, in int64, where their products do not overflow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError

_ALL_BITS = 2**32 - 1
_STRIDE = 0x9E3779B9  # 2**32 over the golden ratio: neighbours lie far apart
_MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)  # of the hash "lowbias32", both below 2**31

_AT_ONCE = 2**22  # hashes of decisions

# Of the noise of proposals: the scale that the densities assume, or that of the published code.
NOISE_SCALES = ("corrected", "published")

# What numbers are for: each use has its own.
_ANGLE, _APART, _DROPOUT = 1, 2, 3


def _hashed(state: Tensor) -> Tensor:
    """A permutation of the numbers below 2**32 in which every bit depends on all others. Changes `state` in place."""
    for shift, multiplier in zip((16, 15), _MULTIPLIERS, strict=True):
        state ^= state >> shift
        state *= multiplier
        state &= _ALL_BITS
    state ^= state >> 15
    return state


def _next(state: Tensor, index: Tensor | int) -> Tensor:
    """Hashes of `state` and an index from 0 to 2**31 - 1, broadcast against each other."""
    return _hashed((state + index * _STRIDE) & _ALL_BITS)


@dataclass(frozen=True, eq=False)
class RowNoise:
    """Where the random numbers of a batch come from, instead of torch's generator.

    Args:
        keys: `[batch]` int64, at least 0 and below 2**32: of every row. Equal keys have equal numbers.
        common: `[1]`, the same for all rows: for what they share.
        first_head: The number of the first head of what they are for, where heads are split over processes.
    """

    keys: Tensor
    common: Tensor
    first_head: int = 0

    @classmethod
    def keyed(cls, key: Tensor | int, rows: Tensor, part: Tensor | int = 0, *, first_head: int = 0) -> RowNoise:
        """The numbers of some rows.

        Args:
            key: `[1]` int64 or a number, at least 0 and below 2**32: the same for all rows, another one for every
                layer and step.
            rows: `[batch]` int64, at least 0 and below 2**31: the number of every row.
            part: The same, of a part of a row that is one by itself.
            first_head: As in the class.
        """
        common = torch.zeros_like(rows[:1]) + key
        return cls(_next(_next(common, rows), part), common, first_head)

    @classmethod
    def drawn(cls, like: Tensor) -> RowNoise:
        """Numbers that torch's generator decides on, for the rows of `like` `[batch, ...]`: others at every call."""
        key = torch.randint(0, _ALL_BITS + 1, (1,), device=like.device)
        return cls.keyed(key, torch.arange(like.shape[0], device=like.device))

    def of_rows(self, rows: Tensor) -> RowNoise:
        """The numbers of some of the rows, `[n]` int64."""
        return replace(self, keys=self.keys[rows])

    def for_all_rows(self) -> RowNoise:
        """For a batch of one that stands for all rows."""
        return replace(self, keys=self.common)

    def apart(self) -> RowNoise:
        """Other numbers of the same rows."""
        return replace(self, keys=_next(self.keys, _APART), common=_next(self.common, _APART))

    def bits(self, like: Tensor, use: int, *index: Tensor) -> Tensor:
        """Numbers from 0 to 2**32 - 1, `[batch, heads, ...]`, a function of the row, the head and the index.

        Args:
            like: `[batch, heads, ...]`, with as many dimensions. use: What they are for.
            index: Places, each of which broadcasts to `[batch, heads, ...]`, from 0 to 2**31 - 1.
        Raises: InputError for another number of rows than that of the keys.
        """
        return _next(self._places(like, use, *index[:-1]), index[-1])

    def below(self, share: float, like: Tensor, use: int, *index: Tensor) -> Tensor:
        """Whether a number is among the lowest `share` of all, `[batch, heads, ...]`; the others as in `bits`.

        Hashes take eight times the memory of the result: there is only a part of them at a time.
        """
        places, last = self._places(like, use, *index[:-1]), index[-1]
        parts = (places,)
        size = torch.broadcast_shapes(places.shape, last.shape)
        if not torch.compiler.is_compiling() and math.prod(size) > _AT_ONCE:
            parts = places.split(max(1, _AT_ONCE * size[1] // math.prod(size)), dim=1)
        return torch.cat([_next(part, last) < round(share * 2**32) for part in parts], dim=1)

    def _places(self, like: Tensor, use: int, *index: Tensor) -> Tensor:
        if self.keys.shape[0] != like.shape[0]:
            raise InputError(
                f"These random numbers are those of {self.keys.shape[0]} rows; got a batch of {like.shape[0]}. Make"
                " them with as many keys as the batch has rows."
            )
        state = _next(self.keys.to(like.device), use).view(-1, *[1] * (like.ndim - 1))
        heads = torch.arange(self.first_head, self.first_head + like.shape[1], device=like.device)
        for place in (heads.view(1, -1, *[1] * (state.ndim - 2)), *index):
            state = _next(state, place)
        return state

    def normal(self, like: Tensor, member: Tensor | None = None) -> Tensor:
        """Standard normal numbers for `like` `[batch, heads, members, dim]`, float32 (Box and Muller's transform).

        Args:
            member: `[members]` int64, the number of every member; `None` for 0, 1, 2, ...
        """
        if member is None:
            member = torch.arange(like.shape[2], device=like.device)
        dim = like.shape[3]
        index = member[None, None, :, None], torch.arange(-(-dim // 2), device=like.device)[None, None, None]
        radius, angle = (self.bits(like, use, *index).to(torch.float32) for use in (0, _ANGLE))
        radius.add_(1).mul_(2.0**-32).log_().mul_(-2).sqrt_()  # of a number above 0
        angle.mul_(2 * math.pi * 2.0**-32)
        return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)[..., :dim]


@dataclass(frozen=True, eq=False)
class SlotDropout:
    """Dropout of slots: a probability, and where the decisions come from. As an option, instead of a probability."""

    probability: float
    noise: RowNoise


class Dropped(NamedTuple):
    """Which slots queries do without.

    mask: `[batch, heads, ..., tokens, slots]`, True for a slot that is dropped from a query's weights.
    kept: The probability of keeping one: what is left is divided by it.
    """

    mask: Tensor
    kept: float


def with_noise(dropout: float | SlotDropout, like: Tensor) -> SlotDropout | None:
    """The option with somewhere to take decisions from: torch's generator if it has none. `None` for no dropout.

    Args:
        like: `[batch, ...]`.
    """
    if isinstance(dropout, SlotDropout):
        return dropout
    return SlotDropout(dropout, RowNoise.drawn(like)) if dropout else None


def dropped_slots(
    dropout: SlotDropout | None, like: Tensor, token: Tensor, slot: Tensor, use: int = 0
) -> Dropped | None:
    """Decide for every query and slot; once for all keys that the query reads through the slot, however they are cut.

    Args:
        like: `[batch, heads, ...]`, with as many dimensions as the result.
        token: The query's place in its row, and slot: the slot's number; both broadcast to the shape of the result.
        use: Slots of different sorts have different numbers.
    """
    if dropout is None:
        return None
    mask = dropout.noise.below(dropout.probability, like, _DROPOUT + use, token, slot)
    return Dropped(mask, 1 - dropout.probability)


def noise_factor(noise_scale: str, scaling: float) -> float:
    """What standard normal noise is multiplied by: the densities assume 1 in scaled coordinates."""
    if noise_scale not in NOISE_SCALES:
        raise InputError(f"noise_scale must be one of {list(NOISE_SCALES)}; got {noise_scale!r}.")
    return 1.0 if noise_scale == "corrected" else scaling**0.5


def add_noise(mu: Tensor, noise: Tensor | RowNoise | bool, factor: float = 1.0) -> Tensor:
    """Samples of the proposals N(mu, I) (`factor` 1); `mu` itself without noise."""
    if noise is False:
        return mu
    if isinstance(noise, RowNoise):
        noise = noise.normal(mu)
    return mu + factor * (torch.randn_like(mu) if noise is True else noise.to(mu))
