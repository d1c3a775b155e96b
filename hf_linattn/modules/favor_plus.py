"""FAVOR+: positive orthogonal random features (Choromanski et al. 2021, arXiv:2009.14794)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..ops.favor import favor_attention
from ..ops.random_features import derive_seed, draw_projection
from .base import AttentionInputs, LayerShape, LinearAttention, StateTensor
from .config import AttentionConfig
from .registry import AttentionKind, register_kind


@dataclass(frozen=True, kw_only=True)
class FavorConfig(AttentionConfig):
    """Settings shared by FAVOR+ and FAVOR#.

    Args:
        num_features: Random features per head (M). Cost grows with it, error falls like its square root.
        orthogonal: Orthogonal directions; False draws them independently.
        chunk_size: Tokens, a power of two, within which queries and keys meet directly rather than through a state of
            the slots (causal or with a window). Changes cost, never the result.
    """

    num_features: int = 256
    orthogonal: bool = True
    chunk_size: int = 32

    def validate(self) -> None:
        super().validate()
        self._check_int("num_features", minimum=1)
        self._check_int("chunk_size", minimum=1, maximum=4096)
        if self.chunk_size & (self.chunk_size - 1):
            self._fail("chunk_size", "a power of two")
        self._check_bool("orthogonal")


@dataclass(frozen=True, kw_only=True)
class FavorPlusConfig(FavorConfig):
    """Settings of FAVOR+. See `FavorConfig` and `AttentionConfig` for the shared ones.

    Args:
        regularized: Directions of fixed length `head_dim ** 0.5` instead of chi-distributed ones: a little less
            variance, a slight bias.
    """

    kind = "favor_plus"

    regularized: bool = False

    def validate(self) -> None:
        super().validate()
        self._check_bool("regularized")
        if self.regularized and not self.orthogonal:
            self._fail(
                "regularized",
                "False when orthogonal=False",
                "Fixed lengths only make sense for orthogonal directions.",
            )


def projection_spec(config: FavorConfig, shape: LayerShape, *, regularized: bool = False) -> StateTensor:
    """The layer's directions, `[num_heads, num_features, head_dim]`."""
    return StateTensor(
        shape=(shape.num_heads, config.num_features, shape.head_dim),
        learned=False,
        draw=lambda: draw_projection(
            shape.num_heads,
            config.num_features,
            shape.head_dim,
            seed=derive_seed(config.seed, shape.layer_idx, "projection"),
            orthogonal=config.orthogonal,
            regularized=regularized,
        ),
    )


class FavorPlusAttention(LinearAttention):
    """FAVOR+ with the layer's own directions."""

    kind = "favor_plus"
    config: FavorPlusConfig

    @classmethod
    def state_spec(cls, config: AttentionConfig, shape: LayerShape) -> dict[str, StateTensor]:
        assert isinstance(config, FavorPlusConfig)
        return {"projection": projection_spec(config, shape, regularized=config.regularized)}

    @classmethod
    def attend(cls, config: AttentionConfig, state: Mapping[str, Tensor], inputs: AttentionInputs) -> Tensor:
        assert isinstance(config, FavorPlusConfig)
        return favor_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            state["projection"],
            chunk_size=config.chunk_size,
            **inputs.options(config),
        )


register_kind(
    AttentionKind(
        name="favor_plus",
        title="FAVOR+",
        config_cls=FavorPlusConfig,
        module_cls=FavorPlusAttention,
        supports_causal=True,
        supports_cross=True,
        paper="arXiv:2009.14794",
    )
)
