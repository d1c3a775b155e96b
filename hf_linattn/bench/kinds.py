"""The attention kinds as a model calls them: the functions registered with Transformers' AttentionInterface."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import BertConfig, GPT2Config

from ..integrations.seams import attention_named
from ..modules.base import LinearAttention
from ..modules.config import AttentionConfig
from ..modules.contract import AttentionInputs, LayerShape
from ..modules.defaults import resolve
from ..modules.registry import config_from_dict, get_kind
from .workload import AttentionCall, Contender, Unavailable, Workload, make_inputs

CALIBRATION_TOKENS = 2048
# Of random features; peers have as many. Learned maps have the number of their kind's preset.
SIZES = {"num_features": 256, "num_landmarks": 64, "num_chunks": 64}
MODEL_SIZES = dict.fromkeys(SIZES, 64)  # in whole models


@dataclass(frozen=True)
class KindOptions:
    """Settings that a run gives to every kind that has them.

    Args:
        num_features, num_landmarks, num_chunks: `None` for those of `SIZES`, or of the kinds' presets if `learned`.
        window_size: Tokens of the exact window, `None` for the default of the model family. A kind that cannot be
            without a window (EVA) takes `eva_window` instead of 0.
        eva_chunk_size: Tokens per chunk in a causal layer that keeps a summary per chunk; a divisor of the window.
        learned: Learned maps, not trained: what they cost does not depend on their values.
        exact_below: Tokens below which an input is exact softmax; 0 for none.
    """

    num_features: int | None = None
    num_landmarks: int | None = None
    num_chunks: int | None = None
    window_size: int | None = 0
    eva_window: int = 64
    eva_chunk_size: int = 16
    learned: bool = False
    exact_below: int = 0

    def __post_init__(self) -> None:
        for name, size in SIZES.items():
            if getattr(self, name) is None and not self.learned:
                object.__setattr__(self, name, size)

    def config(self, kind: str) -> AttentionConfig:
        """The settings object of a kind. Raises `ConfigError` for an unknown kind or an impossible value."""
        declared = get_kind(kind)
        values: dict[str, Any] = {"kind": kind, "window_size": self.window_size}
        if self.learned:
            values["learned"] = True
        if self.exact_below:
            values["exact_below"] = self.exact_below
        if getattr(self, declared.size_field, None) is not None:
            values[declared.size_field] = getattr(self, declared.size_field)
        if declared.bound_field is not None:
            values["chunk_size"] = self.eva_chunk_size
        if declared.needs_window and self.window_size == 0:
            values["window_size"] = self.eva_window
        return config_from_dict(values)


def kind_contender(kind: str, options: KindOptions) -> Contender:
    """A kind under the settings of a run."""
    config = options.config(kind)
    learned = ", learned" if options.learned else ""
    window = f", window {config.window_size}" if config.window_size else ""
    exact = f", exact below {options.exact_below}" if options.exact_below else ""
    return Contender(f"{kind}{learned}{window}{exact}", "linear", partial(_build, config, options.learned), config)


def registered(name: str, module: nn.Module) -> AttentionCall:
    """The function that models call under `attn_implementation=name`, bound to a module."""
    function, is_causal = attention_named(name), bool(module.is_causal)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        given = {"scaling": query.shape[-1] ** -0.5, "dropout": 0.0, "is_causal": is_causal}
        output: Tensor = function(module, query, key, value, None, **given)[0]
        return output

    return attention


def layer_for(work: Workload, settings: dict[str, Any] | None = None) -> Any:
    """What an attention function needs of an attention module of a stock BERT or GPT-2, and nothing else."""
    sizes = {"hidden_size": work.heads * work.head_dim, "num_attention_heads": work.heads}
    config = GPT2Config(**sizes) if work.is_causal else BertConfig(**sizes)
    config.linear_attention = settings
    layer: Any = nn.Module().train(work.is_training)
    layer.config, layer.is_causal, layer.layer_idx, layer.num_key_value_groups = config, work.is_causal, 0, 1
    return layer


def _build(config: AttentionConfig, learned: bool, work: Workload) -> AttentionCall:
    if work.is_causal and not get_kind(config.kind).supports_causal:
        raise Unavailable("no causal form")
    module = layer_for(work, config.to_dict())
    if learned or work.is_causal:
        layer = converted_layer(config, work)
        if learned or layer.new_calibration() is not None:
            # As in a converted model: native mode has nowhere to keep parameters, or statistics of other data.
            module.config.model_type = f"linattn_{module.config.model_type}"
            module.linattn = layer
    return registered(config.kind, module)


def converted_layer(config: AttentionConfig, work: Workload) -> LinearAttention[Any]:
    """A layer as in a converted model, calibrated on other random tokens if it has to be."""
    shape = LayerShape(work.heads, work.head_dim, is_causal=work.is_causal)
    layer = get_kind(config.kind).module_cls(resolve(config, "gpt2" if work.is_causal else "bert"), shape)
    calibration = layer.new_calibration()
    if calibration is not None:
        query, key, value, _ = make_inputs(Workload(CALIBRATION_TOKENS, 1, work.heads, work.head_dim), seed=1)
        scaling = work.head_dim**-0.5
        inputs = AttentionInputs(query, key, value, key_mask=None, scaling=scaling, is_causal=work.is_causal)
        calibration.update(inputs)
        layer.set_tensors(calibration.result())
    return layer.to(work.device).train(work.is_training)
