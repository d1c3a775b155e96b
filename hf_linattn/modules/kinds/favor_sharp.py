"""FAVOR#: data-adapted positive random features (Likhosherstov et al. 2023, arXiv:2302.00787)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, UnsupportedError
from ...ops.favor.attention import favor_attention
from ...ops.favor.features import favor_feature_map
from ...ops.favor.fitted import RowFit
from ...ops.favor.moments import without_rounding
from ...ops.favor.recurrent import favor_recurrence
from ...ops.favor.statistics import (
    DENSE_VARIANTS,
    FAVOR_VARIANTS,
    FavorMoments,
    FavorStatistics,
    neutral_statistics,
)
from ...ops.recurrent.slots import SlotRecurrence
from ..config import choice, flag
from ..contract import CALIBRATED_TOKENS, AttentionInputs, LayerShape, StateTensor, zeros
from ..learned_maps import learned_output, learned_spec
from ..registry import AttentionKind, register_kind
from .favor_plus import FavorAttention, FavorConfig, projection_spec


@dataclass(frozen=True, kw_only=True)
class FavorSharpConfig(FavorConfig):
    """Settings of FAVOR#. See `FavorConfig` and `AttentionConfig` for the shared ones.

    Args:
        variant: How the features are fitted to the data (see `hf_linattn.functional.favor_statistics`): "gerf"
            stretches all directions by the optimal factor; "saderf" also balances the coordinates of queries and keys;
            "aderf" balances them with a matrix; "sderf" rotates to principal axes and stretches each; "dense" is
            "aderf" and "sderf" together and has the least variance. Matrices and rotations cost O(head_dim ** 3) where
            statistics are taken, and as much as two more projections when they are used.
        centring: Take the mean query and key off first: exact, and less variance.
        statistics: Where the statistics come from: "row", the real tokens of each row (bidirectional only: a causal
            layer must not look at later tokens), or "calibrated", buffers that `hf_linattn.calibrate` sets. `None`
            is "row" in a bidirectional layer and "calibrated" in a causal one, and with learned maps: these start from
            the calibrated coordinates.
    """

    kind = "favor_sharp"

    variant: str = choice("saderf", FAVOR_VARIANTS)
    centring: bool = flag(True)
    statistics: str | None = choice(None, ("row", "calibrated"))

    def own_defaults(self, group: str) -> dict[str, Any]:
        return {"statistics": "calibrated" if group == "decoder" or self.learned else "row"}

    def validate(self) -> None:
        super().validate()
        if self.learned and self.statistics == "row":
            self.fail("statistics", "'calibrated' (or None) with learned=True", "Learned maps start from them.")


class FavorSharpAttention(FavorAttention[FavorSharpConfig]):
    """FAVOR# with the layer's own directions and, if calibrated, stored statistics.

    Buffers of a calibrated layer: `statistics_query_mean`, `statistics_key_mean`, `statistics_shape`
    (`[1, heads, 1, head_dim]`), `statistics_query_transform`, `statistics_key_transform`
    (`[1, heads, head_dim, head_dim]`) and `calibrated_tokens` (scalar; 0 until calibrated).
    """

    kind = "favor_sharp"

    @classmethod
    def check(cls, config: FavorSharpConfig, shape: LayerShape) -> None:
        super().check(config, shape)
        if shape.is_causal and config.statistics == "row":
            raise UnsupportedError(
                "Statistics of the row itself would let a token of a causal layer see later ones; got"
                " statistics='row'. Use 'calibrated' (or None) and hf_linattn.calibrate."
            )

    @classmethod
    def native_refusal(cls, config: FavorSharpConfig, shape: LayerShape, *, training: bool) -> str | None:
        """Warns for a layer that is served with neutral statistics."""
        refusal = super().native_refusal(config, shape, training=training)
        if refusal is None and config.statistics == "calibrated":
            warnings.warn(
                "FAVOR# has no calibrated statistics here and therefore behaves like FAVOR+: statistics of the"
                " sequence itself would let a token of a causal model look ahead. A BERT or GPT-2 can be converted"
                " (hf_linattn.convert) and calibrated (hf_linattn.calibrate); other models have FAVOR+ here.",
                stacklevel=2,
            )
        return refusal

    @classmethod
    def state_spec(cls, config: FavorSharpConfig, shape: LayerShape) -> dict[str, StateTensor]:
        projection = projection_spec(config, shape)
        if config.learned and config.normalizer == "slots":  # its maps hold what it needs of the statistics
            return {**learned_spec(config, projection), CALIBRATED_TOKENS: zeros()}
        spec = learned_spec(config, projection) if config.learned else {"projection": projection}
        if config.statistics == "calibrated":
            neutral = neutral_statistics(shape.num_heads, shape.head_dim, dense=True)
            for name, tensor in neutral._asdict().items():
                spec[f"statistics_{name}"] = StateTensor(tuple(tensor.shape), learned=False, draw=tensor.clone)
            spec[CALIBRATED_TOKENS] = zeros()
        return spec

    @classmethod
    def compute(cls, config: FavorSharpConfig, state: Mapping[str, Tensor], inputs: AttentionInputs) -> Tensor:
        if config.learned:
            return learned_output(config, state, inputs)
        statistics: FavorStatistics | RowFit
        if config.statistics == "calibrated":
            statistics = FavorStatistics.among(state)
        else:
            statistics = RowFit(config.variant, config.centring)
        return favor_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            state["projection"],
            statistics=statistics,
            num_heavy_keys=config.num_heavy_keys,
            chunk_size=config.chunk_size,
            **cls.call_options(config, inputs),
        )

    def recurrence_options(self) -> dict[str, Any]:
        if self.config.learned:
            return super().recurrence_options()
        return {**super().recurrence_options(), "statistics": FavorStatistics.among(self.tensors())}

    def recurrence_of_rows(self, query: Tensor, statistics: FavorStatistics, *, scaling: float) -> SlotRecurrence:
        """What `recurrence` gives, with statistics of the rows in place of calibrated ones."""
        options = {**super().recurrence_options(), "statistics": statistics}
        return favor_recurrence(query, self.tensors()["projection"], scaling=scaling, **options)

    def new_calibration(self, stream: int = 0, first_row: int | None = None) -> FavorCalibration | None:
        return FavorCalibration(self.config, self.shape) if self.config.statistics == "calibrated" else None


class FavorCalibration:
    """Moments of a layer's scaled queries and keys, in float64; implements `modules.contract.Calibration`."""

    def __init__(self, config: FavorSharpConfig, shape: LayerShape) -> None:
        self.config = config
        self.shape = shape
        self.moments = FavorMoments.empty(shape.num_heads, shape.head_dim)

    def update(self, inputs: AttentionInputs) -> None:
        self.moments = self.moments.update(
            inputs.query,
            inputs.key,
            key_mask=inputs.key_mask,
            scaling=inputs.scaling,
            is_causal=inputs.is_causal,
        )

    def state(self) -> dict[str, Tensor]:
        return self.moments.tensors()

    def merge(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        moments = [FavorMoments(**state) for state in states]
        self.moments = sum(moments[1:], moments[0])

    def result(self) -> dict[str, Tensor]:
        check_calibration(self.moments, self.config.variant, self.shape.layer_idx)
        statistics = self.moments.statistics(self.config.variant, self.config.centring)
        values = {f"statistics_{name}": value.float() for name, value in statistics._asdict().items()}
        for name in ("statistics_query_transform", "statistics_key_transform"):
            if values[name].shape[-2] == 1:
                values[name] = torch.diag_embed(values[name].squeeze(-2))
        calibrated = {CALIBRATED_TOKENS: self.moments.key_count.float().reshape(())}
        if not self.config.learned:
            return {**values, **calibrated}
        if self.config.normalizer == "kernel":
            return {**_kernel_start(self.config, self.shape, statistics), **values, **calibrated}
        return {**_slots_start(self.config, self.shape, statistics), **calibrated}


def _kernel_start(config: FavorSharpConfig, shape: LayerShape, statistics: FavorStatistics) -> dict[str, Tensor]:
    """Learned maps that are the features of FAVOR# with these statistics."""
    directions = projection_spec(config, shape).draw().to(statistics.shape)
    features = favor_feature_map(directions.unsqueeze(0), directions, statistics)
    stretched = features.directions.squeeze(0).float()
    # The bias of a feature enters the log-weights of queries and of keys.
    assert features.feature_bias is not None  # with statistics
    slot_bias = 2 * features.feature_bias.squeeze(0).float()
    return {"query_directions": stretched, "key_directions": stretched, "slot_bias": slot_bias}


def _slots_start(config: FavorSharpConfig, shape: LayerShape, statistics: FavorStatistics) -> dict[str, Tensor]:
    """Learned maps that are the directions in the coordinates of statistics, about their means."""
    directions = projection_spec(config, shape).draw().to(statistics.shape)
    stretched = directions * (1 - 4 * statistics.shape[0]).sqrt()

    def in_coordinates(transform: Tensor) -> Tensor:
        is_diagonal = transform.shape[-2] == 1
        return (stretched * transform[0] if is_diagonal else stretched @ transform[0].mT).float()

    size = shape.num_heads, shape.head_dim
    return {
        "query_directions": in_coordinates(statistics.query_transform),
        "key_directions": in_coordinates(statistics.key_transform),
        "query_shift": statistics.query_mean.expand(1, size[0], 1, size[1]).reshape(size).float(),
        "key_shift": statistics.key_mean.expand(1, size[0], 1, size[1]).reshape(size).float(),
    }


def check_calibration(moments: FavorMoments, variant: str, layer: int) -> None:
    """Raise `InputError` for moments that are no statistics: of too few tokens, of equal ones, not finite."""
    seen, dim = int(min(moments.query_count, moments.key_count)), moments.query_mean.shape[-1]
    if not seen:
        raise InputError(
            f"FAVOR# needs real tokens to take statistics of; got {int(moments.query_count)} queries and"
            f" {int(moments.key_count)} keys. Calibrate with batches that are not all padding."
        )
    # The second moments of d dimensions about their mean have full rank from d + 1 tokens on.
    needed = dim + 1 if variant in DENSE_VARIANTS else 2
    if seen < needed:
        why = f"one more than the {dim} dimensions of a head" if variant in DENSE_VARIANTS else "for a variance"
        raise InputError(
            f"Calibrating FAVOR# with variant={variant!r} needs at least {needed} real tokens ({why}); got {seen}."
            " Pass more batches (some tens of thousands of tokens)."
        )
    if not all(bool(tensor.isfinite().all()) for tensor in moments.tensors().values()):
        raise InputError(
            f"The queries or keys of the calibration data are not all finite (inf or NaN) in layer {layer}."
        )
    sides = (moments.query_scatter, moments.query_mean), (moments.key_scatter, moments.key_mean)
    if not any(bool(without_rounding(scatter / seen, mean).any()) for scatter, mean in sides):
        raise InputError(
            f"All {seen} tokens of the calibration data are equal in layer {layer}: there is nothing to take"
            " statistics of. Calibrate with typical inputs."
        )


register_kind(
    AttentionKind(
        name="favor_sharp",
        title="FAVOR#",
        paper="arXiv:2302.00787",
        config_cls=FavorSharpConfig,
        module_cls=FavorSharpAttention,
        size_field="num_features",
        causal="calibrated",
        causal_uncalibrated=True,
        supports_cross=True,
        calibrated_field="statistics",
        checkpoint_fields=("statistics", "variant", "centring", "learned", "normalizer", "value_convolution"),
        example={"num_features": 32},
    )
)
