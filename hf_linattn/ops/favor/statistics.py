r"""What FAVOR# takes from the data: moments of queries and keys, and the constants of the features made from them.

`exp(x . y)` stays the same when a constant is taken off queries and keys (up to a factor per token, see
`ops.favor.features.favor_log_features`) and when `x' = x P`, `y' = y Q` with `P Q' = I`. Such coordinates, and the
diagonal `A` of the features in them, are chosen to make the mean log second moment of the estimate small.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import InputError, did_you_mean
from ..inputs import check_inputs, factor_of
from ..packed import of_sequences
from .fit import dense_constants, diagonal_constants
from .moments import Moments, merge_moments, row_moments, row_spread

FAVOR_VARIANTS = ("gerf", "saderf", "aderf", "sderf", "dense")
DENSE_VARIANTS = ("aderf", "sderf", "dense")


class FavorStatistics(NamedTuple):
    """Data-dependent constants of FAVOR#: features are taken of `x' = (x - query_mean) query_transform`; keys alike.

    In scaled coordinates. Any values with `query_transform @ key_transform^T = I` are exact in
    expectation; good ones reduce the variance.

    query_mean, key_mean: `[batch or 1, heads or 1, 1, head_dim]`, taken off before the features.
    query_transform, key_transform: `[batch or 1, heads or 1, 1, head_dim]` (factors per coordinate, inverse to each
        other) or `[batch or 1, heads or 1, head_dim, head_dim]` (row vectors are multiplied from the left).
    shape: The diagonal of `A`, below 1/8, `[batch or 1, heads or 1, 1, head_dim]`.
    """

    query_mean: Tensor
    key_mean: Tensor
    query_transform: Tensor
    key_transform: Tensor
    shape: Tensor

    @classmethod
    def among(cls, tensors: Mapping[str, Tensor]) -> FavorStatistics:
        """Those that are stored among the tensors of a layer, as `statistics_query_mean` and so on."""
        return cls(*[tensors[f"statistics_{name}"] for name in cls._fields])

    def transform_query(self, query: Tensor) -> Tensor:
        """Scaled queries in the coordinates of the features."""
        return transformed(query - self.query_mean.to(query), self.query_transform.to(query))

    def transform_key(self, key: Tensor) -> Tensor:
        """Scaled keys in the coordinates of the features."""
        return transformed(key - self.key_mean.to(key), self.key_transform.to(key))

    def transform(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled queries and keys in the coordinates of the features."""
        return self.transform_query(x), self.transform_key(y)

    def to(self, *, dtype: torch.dtype, device: torch.device | None = None) -> FavorStatistics:
        """The same in a dtype, on a device."""
        return FavorStatistics(*[s.to(device=device, dtype=dtype) for s in self])


class RowStatistics(FavorStatistics):
    """Statistics that a row has taken from itself: a causal function refuses them, because they know later tokens."""

    __slots__ = ()


def neutral_statistics(num_heads: int, head_dim: int, *, dense: bool = False) -> FavorStatistics:
    """The statistics with which FAVOR# is FAVOR+. `dense` gives the transforms as matrices."""
    zero = torch.zeros(1, num_heads, 1, head_dim)
    same = torch.eye(head_dim).repeat(1, num_heads, 1, 1) if dense else torch.ones_like(zero)
    return FavorStatistics(zero, zero.clone(), same, same.clone(), zero.clone())


# -- moments --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class FavorMoments:
    """Second-order moments of scaled queries and keys, per head, that can be gathered in pieces and in any order.

    Kept about the means (Chan, Golub and LeVeque 1979), so that large means cost no precision. Memory: O(head_dim^2).

    query_count, key_count: `[batch or 1, 1, 1, 1]`, the number of real tokens.
    query_mean, key_mean: `[batch or 1, heads or 1, 1, head_dim]`.
    query_scatter, key_scatter: Sums of outer products of the centred tokens, `[batch or 1, heads, head_dim,
        head_dim]`, or only their diagonals, `[batch or 1, heads or 1, 1, head_dim]`.
    """

    query_count: Tensor
    key_count: Tensor
    query_mean: Tensor
    key_mean: Tensor
    query_scatter: Tensor
    key_scatter: Tensor

    @classmethod
    def empty(cls, num_heads: int, head_dim: int) -> FavorMoments:
        """The moments of no tokens: dense, float64, on the CPU."""
        count = torch.zeros(1, 1, 1, 1, dtype=torch.float64, device="cpu")
        mean = count.new_zeros(1, num_heads, 1, head_dim)
        scatter = count.new_zeros(1, num_heads, head_dim, head_dim)
        return cls(count, count.clone(), mean, mean.clone(), scatter, scatter.clone())

    @torch.no_grad()
    def update(
        self,
        query: Tensor,
        key: Tensor,
        *,
        key_mask: Tensor | None = None,
        scaling: float | None = None,
        is_causal: bool = False,
        is_cross: bool = False,
    ) -> FavorMoments:
        """The moments of these tokens and a batch's real ones.

        Args:
            query, key: `[batch, heads, tokens, head_dim]`, unscaled. Queries may be fewer if causal: the last.
            key_mask: `[batch, keys]` bool, True where a key is real.
            scaling: Factor of the dot product; `head_dim ** -0.5` if `None`.
            is_causal: A shorter `query` holds the last tokens of the sequence of `key`.
            is_cross: Queries and keys are of different sequences, so `key_mask` says nothing about queries. Implied by
                different lengths unless `is_causal`.
        Raises: InputError if heads or head_dim differ from what has been gathered.
        Cost: O(tokens * head_dim^2).
        """
        expected = (self.query_mean.shape[1], self.query_mean.shape[-1])
        if any((z.shape[1], z.shape[-1]) != expected for z in (query, key)):
            raise InputError(
                f"query and key must have {expected[0]} heads of dimension {expected[1]}, like the tokens before; got"
                f" query {tuple(query.shape)} and key {tuple(key.shape)}."
            )
        masks = None if is_cross else _query_mask(query, key, key_mask, is_causal), key_mask
        # All tokens of the batch as one row.
        query_row, key_row = (z.transpose(0, 1).flatten(1, 2).unsqueeze(0) for z in (query, key))
        query_mask, key_mask = (None if mask is None else mask.reshape(1, -1) for mask in masks)
        new = _gather(query_row, key_row, query_mask, key_mask, dense=True).scaled(factor_of(query, scaling))
        return self + FavorMoments(**{name: z.to(self.key_count) for name, z in new.tensors().items()})

    def __add__(self, other: FavorMoments) -> FavorMoments:
        """The moments of all tokens of both."""
        return _of_sides(*(merge_moments(*pair) for pair in zip(self._sides(), other._sides(), strict=True)))

    def _sides(self) -> tuple[Moments, Moments]:
        query = self.query_count, self.query_mean, self.query_scatter
        return query, (self.key_count, self.key_mean, self.key_scatter)

    def scaled(self, scaling: float) -> FavorMoments:
        """The moments of scaled tokens from those of unscaled ones."""
        root = scaling**0.5
        return _of_sides(*((count, mean * root, scatter * root * root) for count, mean, scatter in self._sides()))

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name; `FavorMoments(**tensors)` is the inverse."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def statistics(self, variant: str = "saderf", centring: bool = True) -> FavorStatistics:
        """FAVOR#'s constants for these tokens; see `favor_statistics` for the arguments. Cost: O(head_dim^3)."""
        check_variant(variant)
        with torch.no_grad():
            return _statistics(self, variant, centring)


def check_variant(variant: str) -> None:
    """Raise `InputError` for a name that is not one of `FAVOR_VARIANTS`."""
    if variant not in FAVOR_VARIANTS:
        raise InputError(
            f"variant must be one of {list(FAVOR_VARIANTS)}; got {variant!r}.{did_you_mean(variant, FAVOR_VARIANTS)}"
        )


@of_sequences
@torch.no_grad()
def favor_statistics(
    query: Tensor,
    key: Tensor,
    *,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    variant: str = "saderf",
    centring: bool = True,
    is_cross: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> FavorStatistics:
    """FAVOR#'s constants from the real tokens of every row and head, without gradient. Bidirectional attention only.

    They depend on every token of the row, so a causal function refuses them; for causal attention gather
    `FavorMoments` from other data.

    Source: Likhosherstov et al. 2023, arXiv:2302.00787, section 3; "gerf": Likhosherstov et al. 2022,
        arXiv:2205.15317. Differs from them: `centring`; "dense", which combines ADERF and SDERF; degenerate moments
        (fewer tokens than dimensions, equal tokens) are floored rather than excluded.

    Args:
        query, key: `[batch, heads, tokens, head_dim]` of the same tokens (or of two sequences).
        key_mask: `[batch, tokens]` bool, True where a token is real.
        scaling: Factor of the dot product; `head_dim ** -0.5` if `None`.
        variant: How coordinates and `A` are chosen:
            "gerf": coordinates as they are, `A = a I`;
            "saderf": every coordinate scaled so that queries and keys have equal second moments, `A = a I`;
            "aderf": a symmetric matrix that gives queries and keys equal matrices of second moments, `A = a I`;
            "sderf": a rotation to the principal axes of `x + y`, one `a` per axis;
            "dense": the coordinates of "aderf", then the rotation and `A` of "sderf": the least variance.
        centring: Take the means off first: changes nothing in expectation and reduces the variance.
        is_cross: Queries and keys are of different sequences, so `key_mask` says nothing about queries. Implied by
            different lengths.
        cu_seqlens, max_seqlen: As in `favor_attention`: the statistics are those of every packed sequence.
    Returns: `FavorStatistics` per row, in the dtype of the inputs (float32 for half precisions). Transforms are dense
        for "aderf", "sderf" and "dense". The signs of rotated axes are fixed by convention.
    Raises: InputError for an unknown variant.
    Cost: O(tokens * head_dim); with dense ones O(tokens * head_dim^2 + head_dim^3), in float64 where the device
        has it, so that rounding does not turn the axes. Random: no.
    """
    check_variant(variant)
    check_inputs(query, key, key, key_mask)
    scaling = factor_of(query, scaling)
    with _without_autocast(query.device.type):
        if variant in DENSE_VARIANTS:
            moments = token_moments(query, key, key_mask, is_cross=is_cross, dense=True).scaled(scaling)
            statistics = _statistics(moments, variant, centring)
        else:
            query_mask = None if is_cross else _query_mask(query, key, key_mask, False)
            sides = zip(row_spread(query, query_mask), row_spread(key, key_mask), strict=True)
            mean, second = (torch.stack(side) for side in sides)
            constants = diagonal_constants(mean * scaling**0.5, second * scaling, variant, centring)
            statistics = FavorStatistics(*constants)
    dtype = torch.promote_types(query.dtype, torch.float32)
    return RowStatistics(*(statistics if statistics.shape.dtype == dtype else statistics.to(dtype=dtype)))


# -- helpers --------------------------------------------------------------------------------------------------------


def transformed(z: Tensor, transform: Tensor) -> Tensor:
    """Row vectors in new coordinates; a single row of factors acts per coordinate."""
    return z * transform if transform.ndim < 2 or transform.shape[-2] == 1 else z @ transform


def _query_mask(x: Tensor, y: Tensor, key_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """Which queries are real, if queries and keys are of the same sequence."""
    if key_mask is None or x.shape[2] == y.shape[2]:
        return key_mask
    return key_mask[:, -x.shape[2] :] if is_causal else None


def _statistics(moments: FavorMoments, variant: str, centring: bool) -> FavorStatistics:
    means, seconds = (moments.query_mean, moments.key_mean), (moments.query_scatter, moments.key_scatter)
    is_dense = variant in DENSE_VARIANTS
    if is_dense and seconds[0].shape[-1] != seconds[0].shape[-2]:
        raise InputError(f"variant={variant!r} needs dense moments; got diagonal ones.")
    if not is_dense and seconds[0].shape[-2] != 1:
        seconds = tuple(z.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) for z in seconds)  # type: ignore[assignment]
    counts = moments.query_count.clamp_min(1), moments.key_count.clamp_min(1)
    second = torch.stack([z / count for z, count in zip(seconds, counts, strict=True)])
    fit = dense_constants if is_dense else diagonal_constants
    return FavorStatistics(*fit(torch.stack(means), second, variant, centring))


def token_moments(
    x: Tensor, y: Tensor, key_mask: Tensor | None = None, *, is_cross: bool = False, dense: bool = False
) -> FavorMoments:
    """Moments of every row's real tokens, in whatever coordinates they are.

    Dense ones in float64 where the device has it; otherwise diagonals only, in float32 at least.
    """
    return _gather(x, y, None if is_cross else _query_mask(x, y, key_mask, False), key_mask, dense)


def _gather(x: Tensor, y: Tensor, query_mask: Tensor | None, key_mask: Tensor | None, dense: bool) -> FavorMoments:
    with _without_autocast(x.device.type):
        return _of_sides(row_moments(x, query_mask, dense), row_moments(y, key_mask, dense))


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Switches autocast off where it is on: entering takes longer than the sums of a short row."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _of_sides(query: Moments, key: Moments) -> FavorMoments:
    return FavorMoments(query[0], key[0], query[1], key[1], query[2], key[2])
