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
from .defaults import CONVENTIONS
from .proposals import PROPOSAL_MAPS, proposal_map, proposal_spec
from .registry import AttentionKind, register_kind


@dataclass(frozen=True, kw_only=True)
class LaraConfig(AttentionConfig):
    """Settings of LARA. See `AttentionConfig` for the shared ones.

    Args:
        num_landmarks: Proposals per row: segments of the sequence, or (rounded down to a square) bins of the image.
        weighting: How samples are weighed: "balance" (balance heuristic) or "optimal" (plus a per-query correction).
        proposal_map: Learned map of the mean query and key of each landmark (`modules/proposals.py`). Converted models
            only; native mode has no parameters.
        sample_noise: Draw the samples around the proposals in training (at their means in evaluation).
        noise_scale: "corrected", the scale that the densities assume, or "published", smaller by `head_dim ** -0.25`.
        conventions: "corrected" or "published": the defaults of the fields that are `None`
            (`modules/defaults.py`).
    """

    kind = "lara"

    num_landmarks: int = 64
    weighting: str | None = None
    proposal_map: str | None = None
    sample_noise: bool | None = None
    noise_scale: str | None = None
    conventions: str = "corrected"

    def validate(self) -> None:
        super().validate()
        self._check_int("num_landmarks", minimum=1)
        self._check_choice("weighting", WEIGHTINGS, optional=True)
        self._check_choice("proposal_map", PROPOSAL_MAPS, optional=True)
        self._check_bool("sample_noise", optional=True)
        self._check_choice("noise_scale", CONVENTIONS, optional=True)
        self._check_choice("conventions", CONVENTIONS)


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
        assert config.proposal_map is not None
        spec = {**proposal_spec(config.proposal_map, "query", shape), **proposal_spec(config.proposal_map, "key", shape)}
        if spec and (config.window_size or config.num_global_tokens):
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
            weighting=config.weighting or "balance",
            query_map=proposal_map(state, "query"),
            key_map=proposal_map(state, "key"),
            noise=bool(inputs.training and config.sample_noise),
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
