"""LARA: linear randomized attention (Zheng et al. 2022, arXiv:2204.04667)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..ops.lara import WEIGHTINGS, lara_attention
from .base import AttentionInputs, LayerShape, LinearAttention, StateTensor
from .config import AttentionConfig
from .proposals import adapter_spec, residual_map
from .registry import AttentionKind, register_kind


@dataclass(frozen=True, kw_only=True)
class LaraConfig(AttentionConfig):
    """Settings of LARA. See `AttentionConfig` for the shared ones.

    Args:
        num_landmarks: Proposals per row: segments of the sequence, or (rounded down to a square) bins of the image.
        weighting: How samples are weighed: "balance" (balance heuristic) or "optimal" (plus a per-query correction).
        learn_proposals: A linear map per head on the mean query and key of each landmark, starting at the identity.
            Converted models only; native mode has no parameters.
        sample_noise: Draw the samples around the proposals in training (at their means in evaluation).
    """

    kind = "lara"

    num_landmarks: int = 64
    weighting: str = "balance"
    learn_proposals: bool = True
    sample_noise: bool = False

    def validate(self) -> None:
        super().validate()
        self._check_int("num_landmarks", minimum=1)
        self._check_choice("weighting", WEIGHTINGS)
        self._check_bool("learn_proposals")
        self._check_bool("sample_noise")


class LaraAttention(LinearAttention):
    """LARA with learned maps of the landmarks and, beside exact keys, a learned offset of the slots' log mass."""

    kind = "lara"
    config: LaraConfig

    @classmethod
    def check(cls, config: AttentionConfig, shape: LayerShape) -> None:
        if shape.is_causal:
            raise UnsupportedError(
                "LARA has no causal form here: its proposals are landmarks of the whole sequence, so every query would"
                " see later keys. Use 'favor_plus', 'favor_sharp' or 'eva' in a causal model."
            )

    @classmethod
    def state_spec(cls, config: AttentionConfig, shape: LayerShape) -> dict[str, StateTensor]:
        assert isinstance(config, LaraConfig)
        if not config.learn_proposals:
            return {}
        spec = {"query_adapter": adapter_spec(shape), "key_adapter": adapter_spec(shape)}
        if config.window_size or config.num_global_tokens:
            size = (shape.num_heads,)
            spec["mass_offset"] = StateTensor(size, learned=True, draw=lambda: torch.zeros(size))
        return spec

    @classmethod
    def attend(cls, config: AttentionConfig, state: Mapping[str, Tensor], inputs: AttentionInputs) -> Tensor:
        assert isinstance(config, LaraConfig)
        return lara_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            num_landmarks=config.num_landmarks,
            weighting=config.weighting,
            query_map=residual_map(state, "query_adapter"),
            key_map=residual_map(state, "key_adapter"),
            noise=inputs.training and config.sample_noise,
            offset=state.get("mass_offset"),
            **inputs.options(config),
        )


register_kind(
    AttentionKind(
        name="lara",
        title="LARA",
        config_cls=LaraConfig,
        module_cls=LaraAttention,
        supports_causal=False,
        supports_cross=False,
        paper="arXiv:2204.04667",
    )
)
