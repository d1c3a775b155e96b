"""Where BERT, GPT-2 and ViT keep their attention layers, and what those layers are called in their configs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..modules.base import LayerShape


@dataclass(frozen=True)
class Family:
    """What the library has to know about a model architecture to convert it.

    Args:
        name: Stock `model_type`; also selects the column of default settings.
        dropout_field: Config field with the probability of attention dropout.
        layers: Self-attention modules of a base model, first layer first.
    """

    name: str
    dropout_field: str
    layers: Callable[[Any], list[nn.Module]]


FAMILIES = {
    "bert": Family(
        name="bert",
        dropout_field="attention_probs_dropout_prob",
        layers=lambda base: [layer.attention.self for layer in base.encoder.layer],
    ),
    "gpt2": Family(
        name="gpt2",
        dropout_field="attn_pdrop",
        layers=lambda base: [block.attn for block in base.h],
    ),
    "vit": Family(
        name="vit",
        dropout_field="attention_probs_dropout_prob",
        layers=lambda base: [layer.attention for layer in base.layers],
    ),
}

MODEL_TYPE_PREFIX = "linattn_"


def read(config: Any, name: str) -> Any:
    """`getattr(config, name, None)`, without the Python that Transformers runs for every name: layers ask often."""
    if not (torch.compiler.is_compiling() or config is None or hasattr(type(config), "__getattr__")):
        own = object.__getattribute__(config, "__dict__")
        if name in own:
            return own[name]
        if not hasattr(type(config), name) and name not in getattr(type(config), "attribute_map", ()):
            return None
    return getattr(config, name, None)


def stock_type(config: Any) -> str:
    """The model type of a stock or converted config."""
    return str(read(config, "model_type")).removeprefix(MODEL_TYPE_PREFIX)


def takes_images(model: Any) -> bool:
    """Whether a model of Transformers reads pixels, not token ids."""
    return bool(model.main_input_name == "pixel_values")


def is_converted(config: Any) -> bool:
    """Whether a config belongs to a converted model (`model_type` `linattn_bert`, `linattn_gpt2`, `linattn_vit`)."""
    return str(read(config, "model_type")).startswith(MODEL_TYPE_PREFIX)


def get_family(config: Any) -> Family:
    """The family of a stock or converted config. Raises `UnsupportedError` for any other architecture."""
    name = stock_type(config)
    if name not in FAMILIES:
        model_type = getattr(config, "model_type", None)
        raise UnsupportedError(
            f"Conversion is implemented for the architectures {list(FAMILIES)}; got model_type {model_type!r}. "
            "Without conversion, `model.set_attn_implementation(kind)` works for any architecture that uses "
            "Transformers' AttentionInterface, or raises where it cannot be right."
        )
    return FAMILIES[name]


def is_causal_model(config: Any) -> bool:
    """Whether self-attention is causal in a model that can be converted: GPT-2, a decoding BERT.

    `config.is_causal = False` makes a decoder bidirectional, as for text embeddings.
    """
    if getattr(config, "is_causal", None) is False:
        return False
    return get_family(config).name == "gpt2" or bool(getattr(config, "is_decoder", False))


def defaults_family(config: Any) -> str:
    """Column of the default settings for a model that can be converted. Raises `UnsupportedError` for any other."""
    get_family(config)
    return family_of(config, is_causal=is_causal_model(config))


def family_of(config: Any, *, is_causal: bool) -> str:
    """Column of the default settings for any architecture: of its own, or "vision", "decoder" or "encoder".

    A decoding BERT has those of decoders, a bidirectional GPT-2 those of encoders.
    """
    name = stock_type(config)
    if name == "vit" or name == ("gpt2" if is_causal else "bert"):
        return name
    if hasattr(config, "image_size") and hasattr(config, "patch_size") and not hasattr(config, "vocab_size"):
        return "vision"
    return "decoder" if is_causal else "encoder"


def layer_shape(layer: Any, index: int) -> LayerShape:
    """Heads, head dimension and causality of a stock self-attention module, the last as its config has it."""
    heads = layer.num_heads if hasattr(layer, "num_heads") else layer.num_attention_heads
    head_dim = layer.head_dim if hasattr(layer, "head_dim") else layer.attention_head_size
    is_causal = bool(layer.is_causal) and getattr(layer.config, "is_causal", None) is not False
    return LayerShape(num_heads=heads, head_dim=head_dim, layer_idx=index, is_causal=is_causal)


def set_attention_dropout(layer: Any, probability: float) -> None:
    """Set the probability of attention dropout of a stock self-attention module."""
    if hasattr(layer, "attn_dropout"):  # GPT-2
        layer.attn_dropout.p = probability
    elif hasattr(layer, "attention_dropout"):  # ViT
        layer.attention_dropout = probability
    else:  # BERT
        layer.dropout.p = probability
