"""The attention kinds as a model calls them: the functions registered with Transformers' AttentionInterface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import BertConfig, GPT2Config

from ..integrations.seams import attention_named
from ..modules.base import AttentionInputs, LayerShape
from ..modules.config import AttentionConfig
from ..modules.registry import AttentionKind, config_from_dict, get_kind
from .cases import AttentionCall, Implementation, Unavailable, Workload, make_inputs

CALIBRATION_TOKENS = 2048


@dataclass(frozen=True)
class KindOptions:
    """Settings that a run gives to every kind that has them.

    Args:
        window_size: Tokens of the exact window, `None` for the default of the model family. EVA, which is a window
            plus chunks, takes `eva_window` instead of 0.
        eva_chunk_size: Tokens per chunk in a causal layer, a divisor of the window.
    """

    num_features: int = 256
    num_landmarks: int = 64
    num_chunks: int = 64
    window_size: int | None = 0
    eva_window: int = 64
    eva_chunk_size: int = 16

    def config(self, kind: str) -> AttentionConfig:
        """The settings object of a kind. Raises `ConfigError` for an unknown kind or an impossible value."""
        fields: dict[str, Any] = {"kind": kind, "window_size": self.window_size}
        if kind in ("favor_plus", "favor_sharp"):
            fields["num_features"] = self.num_features
        elif kind == "lara":
            fields["num_landmarks"] = self.num_landmarks
        elif kind == "eva":
            fields |= {"num_chunks": self.num_chunks, "chunk_size": self.eva_chunk_size}
            if self.window_size == 0:
                fields["window_size"] = self.eva_window
        return config_from_dict(fields)


class AttentionLayer(nn.Module):
    """What an attention function needs of a model's attention module, and nothing else."""

    def __init__(self, config: Any, is_causal: bool, training: bool) -> None:
        super().__init__()
        self.config, self.is_causal, self.layer_idx = config, is_causal, 0
        self.num_key_value_groups = 1
        self.train(training)


def kind_implementation(kind: str, options: KindOptions) -> Implementation:
    """A kind of ours under the settings of a run."""
    declared, config = get_kind(kind), options.config(kind)
    window = f", window {config.window_size}" if config.window_size else ""
    return Implementation(f"{kind}{window}", "linear", lambda work: _build(declared, config, work))


def registered(name: str, module: nn.Module) -> AttentionCall:
    """The function that models call under `attn_implementation=name`, bound to a module."""
    function = attention_named(name)
    is_causal = bool(module.is_causal)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scaling = query.shape[-1] ** -0.5
        output: Tensor = function(module, query, key, value, None, scaling=scaling, dropout=0.0, is_causal=is_causal)[
            0
        ]
        return output

    return attention


def layer_for(work: Workload, settings: dict[str, Any] | None = None) -> AttentionLayer:
    """A layer of a stock BERT or GPT-2 of the workload's size."""
    sizes = {"hidden_size": work.heads * work.head_dim, "num_attention_heads": work.heads}
    config = GPT2Config(n_embd=sizes["hidden_size"], n_head=work.heads) if work.is_causal else BertConfig(**sizes)
    if settings is not None:
        config.linear_attention = settings
    return AttentionLayer(config, work.is_causal, work.is_training)


def _build(declared: AttentionKind, config: AttentionConfig, work: Workload) -> AttentionCall:
    if work.is_causal and not declared.supports_causal:
        raise Unavailable("no causal form")
    module = layer_for(work, config.to_dict())
    if work.is_causal and needs_statistics(declared):
        # As in a converted model: native mode has nowhere to keep statistics of other data.
        module.config.model_type = "linattn_gpt2"
        module.linattn = calibrated_layer(declared, config, work)
    return registered(declared.name, module)


def needs_statistics(declared: AttentionKind) -> bool:
    """Whether a causal layer of this kind takes statistics from a calibration."""
    return declared.causal == "calibrated"


def calibrated_layer(declared: AttentionKind, config: AttentionConfig, work: Workload) -> nn.Module:
    """A converted causal layer, calibrated on other random tokens."""
    shape = LayerShape(work.heads, work.head_dim, is_causal=True)
    layer = declared.module_cls(config, shape)
    calibration = layer.new_calibration()
    if calibration is not None:
        data = make_inputs(Workload(CALIBRATION_TOKENS, 1, work.heads, work.head_dim), seed=1)
        scaling = work.head_dim**-0.5
        calibration.update(AttentionInputs(*data[:3], key_mask=None, scaling=scaling, is_causal=True))
        layer.set_buffers(calibration.result())
    return layer.to(work.device).train(work.is_training)
