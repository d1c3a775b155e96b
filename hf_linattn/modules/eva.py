"""EVA: efficient attention via control variates (Zheng et al. 2023, arXiv:2302.04542)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..errors import ConfigError
from ..ops.eva import WEIGHTINGS, eva_attention
from .base import AttentionInputs, LayerShape, LinearAttention, StateTensor
from .config import AttentionConfig
from .proposals import adapter_spec, residual_map
from .registry import AttentionKind, register_kind


@dataclass(frozen=True, kw_only=True)
class EvaConfig(AttentionConfig):
    """Settings of EVA. See `AttentionConfig` for the shared ones; `window_size` must be at least 1.

    Args:
        num_chunks: Upper bound of the number of chunks in a bidirectional layer.
        chunk_size: Tokens per chunk in a causal layer, a divisor of `window_size`.
        query_proposals: Place a chunk's proposal at its mean query + mean key instead of its mean key. `None` takes
            the default of the model family: True for encoders, False for decoders, whose cache keeps keys only.
        weighting: "size" weighs a chunk by its number of keys; "spread" also by their variance along the query.
        learn_proposals: A linear map per head on the mean query and key of each chunk, starting at the identity.
            Converted models only; native mode has no parameters.
        sample_noise: Add standard normal noise to the proposals in training.
    """

    kind = "eva"

    num_chunks: int = 128
    chunk_size: int = 8
    query_proposals: bool | None = None
    weighting: str = "size"
    learn_proposals: bool = True
    sample_noise: bool = False

    def validate(self) -> None:
        super().validate()
        self._check_int("window_size", minimum=1, optional=True)
        self._check_int("num_chunks", minimum=1)
        self._check_int("chunk_size", minimum=1)
        self._check_choice("weighting", WEIGHTINGS)
        if self.query_proposals is not None:
            self._check_bool("query_proposals")
        self._check_bool("learn_proposals")
        self._check_bool("sample_noise")


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
        if not config.learn_proposals:
            return {}
        spec = {"key_adapter": adapter_spec(shape)}
        if cls._query_proposals(config, shape.is_causal):
            spec["query_adapter"] = adapter_spec(shape)
        return spec

    @staticmethod
    def _query_proposals(config: EvaConfig, is_causal: bool) -> bool:
        return not is_causal if config.query_proposals is None else config.query_proposals

    @classmethod
    def attend(cls, config: AttentionConfig, state: Mapping[str, Tensor], inputs: AttentionInputs) -> Tensor:
        assert isinstance(config, EvaConfig)
        return eva_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            num_chunks=config.num_chunks,
            chunk_size=config.chunk_size,
            query_proposals=cls._query_proposals(config, inputs.is_causal),
            weighting=config.weighting,
            query_map=residual_map(state, "query_adapter"),
            key_map=residual_map(state, "key_adapter"),
            noise=inputs.training and config.sample_noise,
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
