"""A tiny config and model of any type in Transformers' registries, from the defaults of its config class."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto

WIDTH, HEADS, LAYERS, VOCAB, POSITIONS, IMAGE, PATCH = 64, 4, 2, 99, 128, 32, 8
HEAD_DIM = WIDTH // HEADS

# Pattern of a field's name -> what a larger number becomes. The first that fits counts.
_SMALL: tuple[tuple[str, int], ...] = (
    (r"(^|_)(layer_norm|rms_norm)", 0),
    (r"token_(id|index)$|_id$|_ids$|_index$|_idx$", 0),
    (r"num_(key_value|kv)_heads|num_key_value_groups|multi_query_group_num|n_head_kv|num_kv_heads", 2),
    (r"n_group|topk_group", 1),
    (r"num_experts_per_tok|top_k_experts|moe_topk|moe_k$|moe_top_k|router_topk|^topk$|num_selected_experts", 2),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|n_shared_experts", 4),
    (r"(attention_|_|^)n?_?heads?$|num_attention_heads|_heads$|n_head$|^heads$", HEADS),
    (r"head_dim|head_size|kv_channels|d_kv$|attention_head_size", HEAD_DIM),
    (r"q_lora_rank|kv_lora_rank", 16),
    (r"stacks?_layers|num_blocks|layers?$|^depth$|n_layer|num_layers|_depth$|num_hidden_layers|blocks$", LAYERS),
    (r"vocab|num_tokens$|num_embeddings|n_vocab|audio_vocab", VOCAB),
    (r"position|max_sequence|max_seq|context_length|n_ctx|max_length|max_source|max_target|seq_length", POSITIONS),
    (r"image_size|img_size|input_size|pretrain_img", IMAGE),
    (r"patch_size$", PATCH),
    (r"num_queries|num_query_tokens|num_latents|num_object_queries|max_num_bins", 8),
    (r"mel_bins|num_mel|input_feat|feature_size", 16),
    (r"intermediate|ffn|d_ff|d_inner|mlp_dim|mlp_hidden|inner_dim|feed_?forward|linear_units|n_inner", WIDTH),
    (r"hidden|d_model|n_embd|embed|embd|_dim$|^dim$|width|channels$|_size$|units|dims?$|d_latents", WIDTH),
    (r"num_frames|max_frames|temporal", 4),
)
_LEAVE = re.compile(
    r"num_channels|in_channels|in_chans|out_channels$|window|stride|kernel|chunk|group|rate|factor|ratio|spatial_merge|"
    r"conv|hop|eps|dropout|num_labels|tubelet|mrope|downsampl|pool|bucket|reduc|max_distance|dilation"
)

# What the defaults of a class, made small, do not get right by themselves.
_MLA = {"num_key_value_heads": HEADS}  # keys are made of a latent of their own, one for each head
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_MROPE = ("qwen2_vl_text", "qwen2_5_vl_text", "colqwen2_text", "qwen2_5_omni_text", "qwen2_5_omni_talker")
_SWIN = {"window_size": 2, "patch_size": 4, "image_size": 64, "depths": [1, 1, 1, 1]}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "longcat_flash",
            "glm_moe_dsa",
            "glm4_moe_lite",
        ),
        _MLA,
    ),
    **dict.fromkeys(("swin", "donut-swin", "maskformer-swin", "swinv2", "swin2sr"), _SWIN),
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), {"prediction_length": 4}),
    **dict.fromkeys(_MROPE, {"rope_parameters": _ROPE}),
    "rf_detr_dinov2": {"num_windows": 2},  # more tokens than one patch and one class token
    "segformer": {"sr_ratios": [2, 1, 1, 1]},  # more than one key in every stage
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 2},
    "gemma3n_text": {"intermediate_size": WIDTH},
}


def small_number(name: str, value: int) -> int:
    if _LEAVE.search(name):
        return value
    for pattern, small in _SMALL:
        if re.search(pattern, name):
            if not small:
                return value
            return min(value, small)
    return value


def small_value(name: str, value: Any) -> Any:
    """A smaller value of a config's field, or the same."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return small_number(name, value)
    if isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
        if re.search(r"depth|num_layers|layers_per|blocks", name):
            return type(value)(min(item, 1) for item in value)
        if re.search(r"head", name):
            return type(value)(min(item, 2) for item in value)
        return type(value)(small_number(name, item) for item in value)
    return value


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # a field that differs between layers
        return None


def fit_rope(config: Any) -> None:
    """Sections of multi-dimensional rotary positions that add up to half of a small head, where a model has them."""
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or name not in sys.modules or "rope_theta" not in rope:
        return
    if "mrope_section" in inspect.getsource(sys.modules[name]):
        half = int(HEAD_DIM * (rope.get("partial_rotary_factor") or 1)) // 2
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]


def config_class(model_type: str) -> type[PreTrainedConfig]:
    return configuration_auto.CONFIG_MAPPING[model_type]


def tiny_config(cls: type[PreTrainedConfig], **given: Any) -> PreTrainedConfig:
    """The class's defaults with every size made small, those of its parts too."""
    return shrink(cls(), **given)


def shrink(default: PreTrainedConfig, **given: Any) -> PreTrainedConfig:
    cls = type(default)
    names = [name for name in getattr(cls, "__dataclass_fields__", {}) if not name.startswith("_")]
    common = set(getattr(PreTrainedConfig, "__dataclass_fields__", {}))
    fields: dict[str, Any] = {}
    parts = set(cls.sub_configs)
    for name in [*names, *(part for part in parts if part not in names)]:
        value = _value(default, name)
        if name in parts or isinstance(value, PreTrainedConfig):
            if isinstance(value, PreTrainedConfig):
                fields[name] = shrink(value, **SPECIAL.get(value.model_type, {}))
            continue
        if name in common or value is None:
            continue
        if isinstance(value, dict) and "mrope_section" in value:
            half = HEAD_DIM // 2
            fields[name] = {**value, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
            continue
        initial = cls.__dataclass_fields__[name].default
        if initial is None:  # derived from others
            continue
        small = small_value(name, value)
        if small != value:
            fields[name] = small
    vocabulary = fields.get("vocab_size", getattr(default, "vocab_size", None))
    if isinstance(vocabulary, int):
        number = 0
        for name in names:
            value = _value(default, name)
            if re.search(r"token_(id|index)$|_id$|_token_index$", name) and type(value) is int and value >= vocabulary:
                number += 1
                fields[name] = vocabulary - number
    fields.update(SPECIAL.get(cls.model_type, {}))
    fields.update(given)
    return cls(**fields)


def _listed(mapping: Any, model_type: str) -> list[str]:
    names = mapping.get(model_type, ())
    return [names] if isinstance(names, str) else list(names)


def model_class(model_type: str) -> type[PreTrainedModel]:
    """The base model of a type; that of a head, or of a part, where there is none. Raises LookupError."""
    package = importlib.import_module(f"transformers.models.{folder(model_type)}")
    mappings = [modeling_auto.MODEL_MAPPING_NAMES]
    mappings += [
        getattr(modeling_auto, name)
        for name in sorted(dir(modeling_auto))
        if name.endswith("_MAPPING_NAMES") and name != "MODEL_MAPPING_NAMES" and name.startswith("MODEL")
    ]
    for mapping in mappings:
        for name in _listed(mapping, model_type):
            found = getattr(package, name, None)
            if found is not None and issubclass(found, PreTrainedModel):
                return found
    config = config_class(model_type)
    modeling = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    own = [
        cls
        for _, cls in inspect.getmembers(modeling, inspect.isclass)
        if issubclass(cls, PreTrainedModel)
        and cls.config_class is config
        and not cls.__name__.endswith("PreTrainedModel")
    ]
    if not own:
        raise LookupError(f"no model class has {config.__name__}")
    return min(own, key=lambda cls: (len(cls.__mro__), len(cls.__name__)))


def folder(model_type: str) -> str:
    return configuration_auto.model_type_to_module_name(model_type)


def all_types() -> list[str]:
    """Every model type of Transformers, in alphabetical order."""
    return sorted(name for name in configuration_auto.CONFIG_MAPPING_NAMES if not name.startswith("linattn_"))


__all__ = ["AutoConfig", "all_types", "config_class", "model_class", "shrink", "tiny_config"]
