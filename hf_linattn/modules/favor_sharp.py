"""FAVOR#: data-adapted positive random features (Likhosherstov et al. 2023, arXiv:2302.00787)."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.favor import FavorStatistics, favor_attention, favor_statistics, neutral_statistics
from .base import AttentionInputs, LayerShape, LinearAttention, StateTensor
from .config import AttentionConfig
from .favor_plus import FavorConfig, projection_spec
from .registry import AttentionKind, register_kind

VARIANTS = ("saderf", "gerf")


@dataclass(frozen=True, kw_only=True)
class FavorSharpConfig(FavorConfig):
    """Settings of FAVOR#. See `FavorConfig` and `AttentionConfig` for the shared ones.

    The statistics that adapt the features to the data are taken from each row's real tokens in a bidirectional layer.
    A causal layer must not look at later tokens, so it uses stored ones; until they are set they are neutral, which
    makes the layer FAVOR+ (one warning says so).

    Args:
        variant: "saderf" balances the coordinates of queries and keys, then stretches all directions by the optimal
            factor; "gerf" only stretches.
        centring: Take the mean query and key off first: exact, and less variance.
    """

    kind = "favor_sharp"

    variant: str = "saderf"
    centring: bool = True

    def validate(self) -> None:
        super().validate()
        self._check_choice("variant", VARIANTS)
        self._check_bool("centring")


class FavorSharpAttention(LinearAttention):
    """FAVOR# with the layer's own directions and, in a causal layer, stored statistics."""

    kind = "favor_sharp"
    config: FavorSharpConfig

    @classmethod
    def state_spec(cls, config: AttentionConfig, shape: LayerShape) -> dict[str, StateTensor]:
        assert isinstance(config, FavorSharpConfig)
        spec = {"projection": projection_spec(config, shape)}
        if shape.is_causal:
            neutral = neutral_statistics(shape.num_heads, shape.head_dim)
            for name, tensor in neutral._asdict().items():
                spec[f"statistics_{name}"] = StateTensor(tuple(tensor.shape), learned=False, draw=tensor.clone)
        return spec

    @classmethod
    def attend(cls, config: AttentionConfig, state: Mapping[str, Tensor], inputs: AttentionInputs) -> Tensor:
        assert isinstance(config, FavorSharpConfig)
        if inputs.is_causal:
            statistics = FavorStatistics(*(state[f"statistics_{name}"] for name in FavorStatistics._fields))
            _warn_if_neutral(statistics)
        else:
            statistics = favor_statistics(
                inputs.query,
                inputs.key,
                key_mask=inputs.key_mask,
                scaling=inputs.scaling,
                variant=config.variant,
                centring=config.centring,
            )
        return favor_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            state["projection"],
            statistics=statistics,
            chunk_size=config.chunk_size,
            **inputs.options(config),
        )


_checked_statistics: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def _warn_if_neutral(statistics: FavorStatistics) -> None:
    """Say so if a causal layer has no statistics. Reads values: looks at each tensor once, not while compiling."""
    shape = statistics.shape
    if torch.compiler.is_compiling() or shape.is_meta:
        return
    if _checked_statistics.get(id(shape)) is shape:
        return
    _checked_statistics[id(shape)] = shape
    if not bool(shape.any()):
        warnings.warn(
            "FAVOR# in a causal layer has no statistics yet and therefore behaves like FAVOR+: statistics of the"
            " sequence itself would let a token look ahead. Set the layer's statistics_* buffers from other data.",
            stacklevel=2,
        )


register_kind(
    AttentionKind(
        name="favor_sharp",
        title="FAVOR#",
        config_cls=FavorSharpConfig,
        module_cls=FavorSharpAttention,
        supports_causal=True,
        supports_cross=True,
        paper="arXiv:2302.00787",
    )
)
