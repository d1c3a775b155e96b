"""Settings and buffers of native mode, where nothing is attached to the model."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from ..modules.base import LayerShape
from ..modules.config import AttentionConfig
from ..modules.defaults import resolve
from ..modules.registry import get_kind
from ..ops.tracing import outside_tracing
from .canary import ask_seams
from .families import FAMILIES, MODEL_TYPE_PREFIX
from .settings import parse_settings

# Tokens before the patches, without register tokens. Of other models it is unknown whether they have a distillation
# token beside [CLS].
LEADING_TOKENS = {
    **dict.fromkeys(("vit", "dinov2", "dinov2_with_registers", "dinov3_vit", "clip_vision_model", "beit"), 1),
    "deit": 2,
    "siglip_vision_model": 0,
}


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
    if isinstance(settings, str):
        settings = {"kind": settings}
    elif isinstance(settings, AttentionConfig):
        settings = settings.to_dict()
    elif settings is not None and not isinstance(settings, dict):
        parse_settings(settings, family=family)  # raises
    frozen = None if settings is None else json.dumps(settings, sort_keys=True)
    config, state = _layer(
        kind, family, frozen, LayerShape(num_heads, head_dim, layer_idx, is_causal), num_leading, device
    )
    _check_stateless(config, is_causal, training, convertible=family in FAMILIES)
    return config, tuple(state.items())


def _check_stateless(config: AttentionConfig, is_causal: bool, training: bool, *, convertible: bool) -> None:
    """Raise for settings that need something kept in the layer."""
    proposal_map = getattr(config, "proposal_map", None) or "none"
    if proposal_map.endswith("_norm"):
        raise UnsupportedError(
            f"proposal_map={proposal_map!r} (the default of conventions='published') has parameters, and native mode"
            " has none. Set proposal_map='none' in config.linear_attention for the parameter-free method"
            + (", or convert the model (hf_linattn.convert)." if convertible else ".")
        )
    sources = (getattr(config, "statistics", None), getattr(config, "proposal_source", None))
    if not is_causal and "calibrated" in sources:
        raise UnsupportedError(
            f"config.linear_attention asks for calibrated {config.kind!r}, but native mode keeps no statistics."
            " Leave out the field: bidirectional models take their statistics from each row"
            + (
                "; or convert the model (hf_linattn.convert) and calibrate it (hf_linattn.calibrate)."
                if convertible
                else "."
            )
        )
    interval = getattr(config, "redraw_interval", None)
    if training and interval is not None:
        raise UnsupportedError(
            f"config.linear_attention asks for redraw_interval={interval}, but native mode has no layers that could"
            " keep new directions. Set redraw_interval to None"
            + (", or convert the model (hf_linattn.convert)." if convertible else ".")
        )


@functools.lru_cache(maxsize=512)
def _layer(
    kind: str, family: str, settings: str | None, shape: LayerShape, num_leading: int | None, device: str
) -> tuple[AttentionConfig, dict[str, Tensor]]:
    declared = get_kind(kind)
    if settings is None:
        config = declared.config_cls()
        if num_leading is not None:
            config = config.replace(num_global_tokens=num_leading)
        config = resolve(config, family)
    else:
        values = {"kind": kind, **json.loads(settings)}
        estimates_softmax = values.get("kernel", "softmax") == "softmax"  # otherwise nothing exact can stand beside it
        if num_leading is not None and estimates_softmax and values.get("num_global_tokens") is None:
            values["num_global_tokens"] = num_leading
        parsed = parse_settings(values, family=family)
        config = parsed.config
        if parsed.layers is not None:
            raise ConfigError(
                f"config.linear_attention['layers'] = {list(parsed.layers)} selects layers of a converted model; "
                "native mode uses the kind in every layer. Drop 'layers'"
                + (", or convert the model (`hf_linattn.convert`)." if family in FAMILIES else ".")
            )
        if config.kind != kind:
            raise ConfigError(
                f"config.linear_attention holds settings of {config.kind!r}, but the active attn_implementation is "
                f"{kind!r}. Call set_attn_implementation({config.kind!r}), or replace config.linear_attention."
            )
    declared.module_cls.check(config, shape)
    return config, _state(config, shape, device)


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
    name = str(getattr(config, "model_type", "")).removeprefix(MODEL_TYPE_PREFIX)
    known = LEADING_TOKENS.get(name)
    without_registers = leading - (getattr(config, "num_register_tokens", None) or 0)
    return (grid, leading) if without_registers in ((1, 2) if known is None else (known,)) else None


def as_pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return value[0], value[1]
    return None
