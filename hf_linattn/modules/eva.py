"""EVA: efficient attention via control variates (Zheng et al. 2023, arXiv:2302.04542)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import ConfigError
from ..ops.eva import eva_attention
from ..ops.eva_chunks import PROPOSALS, WEIGHTINGS
from .base import AttentionInputs, LayerShape, LinearAttention, StateTensor
from .config import AttentionConfig
from .defaults import CONVENTIONS
from .proposals import PROPOSAL_MAPS, proposal_map, proposal_spec
from .registry import AttentionKind, register_kind


@dataclass(frozen=True, kw_only=True)
class EvaConfig(AttentionConfig):
    """Settings of EVA. See `AttentionConfig` for the shared ones; `window_size` must be at least 1.

    Args:
        num_chunks: Upper bound of the number of chunks in a bidirectional layer.
        chunk_size: Tokens per chunk in a causal layer, a divisor of `window_size`.
        proposals: Where a chunk's proposal stands: "sum" (mean query + mean key), "mean" (half of that), "key" (mean
            key) or "none" (0). `None` takes the default of the model family: "sum" for encoders, "key" for decoders,
            whose cache keeps keys only.
        weighting: "size" weighs a chunk by its number of keys; "spread" also by their variance along the query.
        proposal_map: Learned map of the mean query and key of each chunk (`modules/proposals.py`). Converted models
            only; native mode has no parameters.
        sample_noise: Add standard normal noise to the proposals in training.
        noise_scale: "corrected", the scale that the densities assume, or "published", smaller by `head_dim ** -0.25`.
        conventions: "corrected" or "published": the defaults of the fields that are `None`
            (`modules/defaults.py`).
    """

    kind = "eva"

    num_chunks: int = 128
    chunk_size: int = 8
    proposals: str | None = None
    weighting: str | None = None
    chunking: str | None = None
    proposal_map: str | None = None
    sample_noise: bool | None = None
    noise_scale: str | None = None
    conventions: str = "corrected"

    def validate(self) -> None:
        super().validate()
        self._check_int("window_size", minimum=1, optional=True)
        self._check_int("num_chunks", minimum=1)
        self._check_int("chunk_size", minimum=1)
        self._check_choice("proposals", PROPOSALS, optional=True)
        self._check_choice("weighting", WEIGHTINGS, optional=True)
        self._check_choice("chunking", ("exclusive", "published"), optional=True)
        self._check_choice("proposal_map", PROPOSAL_MAPS, optional=True)
        self._check_bool("sample_noise", optional=True)
        self._check_choice("noise_scale", CONVENTIONS, optional=True)
        self._check_choice("conventions", CONVENTIONS)


class EvaAttention(LinearAttention):
    """EVA with learned maps of the chunk means."""

    kind = "eva"
    config: EvaConfig

    @classmethod
    def check(cls, config: AttentionConfig, shape: LayerShape) -> None:
        assert isinstance(config, EvaConfig)
        window = config.window_size
        if not window:
            raise ConfigError(
                f"EvaConfig.window_size must be an integer >= 1; got {window!r}. EVA is a window plus chunks."
            )
        if shape.is_causal and window % config.chunk_size:
            raise ConfigError(
                f"EvaConfig.chunk_size must divide window_size in a causal layer; got"
                f" chunk_size={config.chunk_size!r} and window_size={window!r}."
            )

    @classmethod
    def state_spec(cls, config: AttentionConfig, shape: LayerShape) -> dict[str, StateTensor]:
        assert isinstance(config, EvaConfig)
        assert config.proposal_map is not None
        spec = proposal_spec(config.proposal_map, "key", shape)
        if config.proposals in ("sum", "mean"):
            spec |= proposal_spec(config.proposal_map, "query", shape)
        return spec

    @classmethod
    def attend(cls, config: AttentionConfig, state: Mapping[str, Tensor], inputs: AttentionInputs) -> Tensor:
        assert isinstance(config, EvaConfig)
        return eva_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            num_chunks=config.num_chunks,
            chunk_size=config.chunk_size if inputs.is_causal else None,
            chunking=config.chunking or "exclusive",
            proposals=config.proposals or "sum",
            weighting=config.weighting or "size",
            noise_scale=config.noise_scale or "corrected",
            query_map=proposal_map(state, "query"),
            key_map=proposal_map(state, "key"),
            noise=bool(inputs.training and config.sample_noise),
            **inputs.options(config),
        )


register_kind(
    AttentionKind(
        name="eva",
        title="EVA",
        config_cls=EvaConfig,
        module_cls=EvaAttention,
        supports_causal=True,
        supports_cross=False,
        paper="arXiv:2302.04542",
    )
)
