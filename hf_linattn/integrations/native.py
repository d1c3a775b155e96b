"""Native mode, where nothing is attached to the model: its attention, settings and buffers."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.fully_sharded import has_parts
from ..errors import ConfigError, UnsupportedError
from ..modules.config import AttentionConfig
from ..modules.contract import CALIBRATED_TOKENS, AttentionInputs, LayerShape
from ..modules.registry import AttentionKind, get_kind
from ..ops.tracing import known, outside_tracing
from .advice import convert_first, converting, cross_settings, instead
from .call import Call
from .canary import ask_seams
from .checks import PACKED
from .families import FAMILIES, family_of, read, stock_type
from .packing import grouped_rows
from .settings import parse_settings, settings_dict
from .token_mask import pad_one_key

# Tokens before the patches, without register tokens. Of other models it is unknown whether they have a distillation
# token beside [CLS].
LEADING_TOKENS = {
    **dict.fromkeys(("vit", "dinov2", "dinov2_with_registers", "dinov3_vit", "clip_vision_model", "beit"), 1),
    "deit": 2,
    "siglip_vision_model": 0,
}


def native_attention(module: nn.Module, call: Call, key: Tensor, value: Tensor) -> Tensor:
    """Attention of a layer of a stock model, which has no tensors of its own.

    Args:
        key, value: `[batch, heads, tokens, head_dim]`, those of the call with a copy for every head.
    Raises: `UnsupportedError` for what the kind, its settings or native mode cannot do; `ConfigError` for settings
        that are those of another kind or impossible.
    """
    kind, query, mask, is_causal = call.kind, call.query, call.key_mask, call.is_causal
    config: Any = getattr(module, "config", None)
    declared = get_kind(kind)
    _check_supported(declared, config, is_causal=is_causal, cross=call.is_cross)
    family = family_of(config, is_causal=is_causal)
    image = image_grid(config, key.shape[2], call.grid) if family in ("vit", "vision") and not call.is_cross else None
    given = read(config, "linear_attention")
    if isinstance(given, AttentionConfig) and not torch.compiler.is_compiling():
        config.linear_attention = given = given.to_dict()  # a settings object could not be saved as JSON
    settings, state = native_layer(
        kind,
        family,
        given,
        known(query.shape[1]),
        known(query.shape[3]),
        getattr(module, "layer_idx", None) or 0,
        is_causal,
        None if image is None else known(image[1]),
        str(query.device),
        module.training,
    )
    if state and has_parts(module):
        raise UnsupportedError(
            "Tensor parallelism gives this process some of the heads, and native mode would draw the same directions"
            " for those of every process. Convert the model and call split_heads (docs/tensor_parallelism.md)."
            f" {convert_first(config)}"
        )
    if call.is_cross:
        _check_cross(settings, config)
        if query.shape[2] == key.shape[2]:
            key, value, mask = pad_one_key(key, value, mask)  # or the queries would count as the keys' own tokens
    grid = image[0] if image is not None and image[1] == settings.num_global_tokens else None
    rows = None
    if call.sequences is not None and grid is not None and call.sequences.is_packed:
        raise UnsupportedError(f"Packed sequences cannot be read as images, a grid {grid} of patches. {PACKED}")
    if call.sequences is not None and grid is None:
        rows = grouped_rows(call.sequences, settings, key, is_causal=is_causal)
    inputs = AttentionInputs(
        query,
        key,
        value,
        mask,
        scaling=call.scaling,
        is_causal=is_causal,
        grid=grid,
        training=module.training,
        rows=rows,
    )
    return declared.module_cls.compute_or_record(settings, dict(state), inputs)


def _check_supported(kind: AttentionKind, config: Any, *, is_causal: bool, cross: bool) -> None:
    """Raise for a sort of layer that the kind cannot serve, whatever its settings."""
    title = f"{kind.title} ({kind.name!r})"
    if is_causal and not kind.supports_causal:
        others = instead(config, is_causal=True)
        raise UnsupportedError(f"{title} has no causal form: a token would see later ones. {others}")
    if not kind.native:
        raise UnsupportedError(
            f"{title} has parameters, which only a converted model can keep. {convert_first(config)}"
            f" {instead(config, is_causal=is_causal, cross=cross)}"
        )
    if is_causal and not kind.native_causal:
        raise UnsupportedError(
            f"{title} in a causal model works with statistics of other data, which only a"
            f" converted model can keep. {converting(config, kind.name)}{instead(config, is_causal=True)}"
        )
    if cross and not kind.supports_cross:
        raise UnsupportedError(
            f"{title} needs queries and keys of the same sequence and cannot do cross-attention. "
            f"{instead(config, is_causal=False, cross=True)}"
        )


def _check_cross(settings: AttentionConfig, config: Any) -> None:
    """Raise for settings that have no meaning between two sequences."""
    exact = {name: getattr(settings, name) for name in ("window_size", "num_global_tokens", "num_heavy_keys")}
    if any(exact.values()):
        window, tokens, heavy = (f"{name}={value}" for name, value in exact.items())
        raise UnsupportedError(
            f"Cross-attention under {settings.kind!r} needs window_size=0, num_global_tokens=0 and num_heavy_keys=0"
            f" (queries and keys are different sequences); got {window}, {tokens} and {heavy}. "
            f"{cross_settings(config, settings.kind)}"
        )


@torch.compiler.assume_constant_result
def native_layer(
    kind: str,
    family: str,
    settings: Any,
    num_heads: int,
    head_dim: int,
    layer_idx: int,
    is_causal: bool,
    num_leading: int | None,
    device: str,
    training: bool = False,
) -> tuple[AttentionConfig, tuple[tuple[str, Tensor], ...]]:
    """Settings and named tensors of one layer: a function of plain values, so `torch.compile` takes it as a constant.

    Args:
        settings: `config.linear_attention` if the model's config has it: a dictionary, a kind's name or its settings.
        num_leading: Tokens before the patches of an image; replaces `num_global_tokens` unless that is set.
    Raises: `ConfigError` for settings of another kind; `UnsupportedError` for what only a converted model can do; what
        the kind's `check` raises.
    """
    ask_seams(family)  # here also while torch compiles: this function is called, not traced
    frozen = "{}" if settings is None else _frozen(settings)
    return _layer(kind, family, frozen, num_heads, head_dim, layer_idx, is_causal, num_leading, device, training)


@functools.lru_cache(maxsize=512)
def _layer(
    kind: str,
    family: str,
    settings: str,
    num_heads: int,
    head_dim: int,
    layer_idx: int,
    is_causal: bool,
    num_leading: int | None,
    device: str,
    training: bool,
) -> tuple[AttentionConfig, tuple[tuple[str, Tensor], ...]]:
    shape = LayerShape(num_heads, head_dim, layer_idx, is_causal)
    config = _settings(kind, family, settings, shape, num_leading, training)
    return config, tuple(_state(config, shape, device).items())


# The JSON of settings, by their `repr`, which is quicker to make: every layer asks in every call.
_FROZEN: dict[str, str] = {}


def _frozen(settings: Any) -> str:
    written = repr(settings)
    found = _FROZEN.get(written)
    if found is None:
        found = json.dumps(settings_dict(settings), sort_keys=True)
        if len(_FROZEN) < 512:
            _FROZEN[written] = found
    return found


@functools.lru_cache(maxsize=512)
def _settings(
    kind: str, family: str, settings: str, shape: LayerShape, num_leading: int | None, training: bool
) -> AttentionConfig:
    """Settings of one layer, filled in and checked."""
    convert = ", or convert the model (hf_linattn.convert)." if family in FAMILIES else "."
    parsed = parse_settings({"kind": kind, **json.loads(settings)}, family=family, num_global_tokens=num_leading)
    config = parsed.config
    if parsed.layers is not None:
        raise ConfigError(
            f"config.linear_attention['layers'] = {list(parsed.layers)} selects layers of a converted model; "
            f"native mode uses the kind in every layer. Drop 'layers'{convert}"
        )
    if config.kind != kind:
        raise ConfigError(
            f"config.linear_attention holds settings of {config.kind!r}, but the active attn_implementation is "
            f"{kind!r}. Call set_attn_implementation({config.kind!r}), or replace config.linear_attention."
        )
    module_cls = get_kind(kind).module_cls
    module_cls.check(config, shape)
    refusal = module_cls.native_refusal(config, shape, training=training)
    if refusal is not None:
        if family in FAMILIES and CALIBRATED_TOKENS in module_cls.state_spec(config, shape):
            convert = "; or convert the model (hf_linattn.convert) and calibrate it (hf_linattn.calibrate)."
        raise UnsupportedError(refusal + convert)
    return config


@functools.lru_cache(maxsize=512)
def _state(config: AttentionConfig, shape: LayerShape, device: str) -> dict[str, Tensor]:
    """Non-learned tensors of a layer, float32. Usable in training even if first drawn under inference_mode."""
    module_cls = get_kind(config.kind).module_cls
    with outside_tracing():
        return {
            name: spec.draw().to(device)
            for name, spec in module_cls.state_spec(config, shape).items()
            if not spec.learned
        }


def image_grid(
    config: Any, num_tokens: int, size: tuple[int, int] | None = None
) -> tuple[tuple[int, int], int] | None:
    """`((rows, columns), tokens before the patches)` of an image model, or `None` if the tokens do not fit.

    An image of another size than the config's is recognised by the tokens left over: they would have to be exactly
    those that the model puts before the patches.

    Args:
        config: Config with `image_size` and `patch_size`, each an integer or a pair.
        size: Rows and columns of patches, when known from the input.
    """
    grid = size
    if grid is None:
        image, patch = as_pair(getattr(config, "image_size", None)), as_pair(getattr(config, "patch_size", None))
        if image is None or patch is None:
            return None
        grid = (image[0] // patch[0], image[1] // patch[1])
    leading = num_tokens - grid[0] * grid[1]
    known = LEADING_TOKENS.get(stock_type(config))
    without_registers = leading - (getattr(config, "num_register_tokens", None) or 0)
    return (grid, leading) if without_registers in ((1, 2) if known is None else (known,)) else None


def as_pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return value[0], value[1]
    return None
