"""Every seam to Transformers: what this library expects of it, and the names through which the rest reaches it.

Transformers promises little of what a plugin needs: keyword arguments are renamed, private tables move, a signature
grows. So private names, names that differ between releases and functions whose arguments matter are used here and
nowhere else (in `model_seams.py` those of making, saving and loading models, in `families.py` those inside the three
architectures; a test reads the source). Probes (`probes.py` and others) say in words what each has to do and try it
out, once, when `canary.py` asks.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from torch import Tensor, nn

from .expected import changed, describe

logger = logging.getLogger(__name__)

# Names of ours in Transformers' tables: a cache layer's type, and the argument that carries it to the attention.
LAYER_TYPE = "linattn"
ARGUMENT = "linattn_cache"


try:  # what is not used here is for the other files
    from transformers import (  # noqa: F401
        AttentionInterface,
        AttentionMaskInterface,
        PreTrainedConfig,
        PreTrainedModel,
        cache_utils,
    )
    from transformers.cache_utils import (  # noqa: F401
        Cache,
        CacheLayerMixin,
        DynamicCache,
        DynamicLayer,
        EncoderDecoderCache,
        StaticCache,
        StaticLayer,
    )
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import (  # noqa: F401
        bidirectional_mask_function,
        causal_mask_function,
        create_causal_mask,
    )
    from transformers.utils import generic
    from transformers.utils.import_utils import is_tracing  # noqa: F401
except ImportError as error:
    raise changed("names", describe(error)) from error


def attempt(register: Callable[..., None], *args: Any) -> None:
    """Make an entry in a table of Transformers at import. What goes wrong is found and told by the canary."""
    try:
        register(*args)
    except Exception as error:
        logger.debug("%s: %s", register.__name__, describe(error))


# -- attention and masks --------------------------------------------------------------------------------------------
# What Transformers tells a mask function beside its named arguments, and what does not change a mask over tokens.
MASK_OPTIONS = frozenset({"allow_is_bidirectional_skip", "allow_is_causal_skip", "allow_torch_fix", "config", "dtype"})


def register_attention(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Register an attention function and the mask function that goes with it. Repeatable."""
    AttentionInterface.register(name, attention)
    # Without this one Transformers hands None to the attention function, and padding is attended to.
    AttentionMaskInterface.register(name, mask)


def attention_named(name: str) -> Callable[..., Any]:
    """The attention function registered under a name."""
    return AttentionInterface()[name]


@functools.cache
def attention_keywords() -> frozenset[str]:
    """Names that Transformers knows to reach an attention function: of its own functions and its typed arguments."""
    names = set(getattr(generic.TransformersKwargs, "__annotations__", ()))
    for name in AttentionInterface().valid_keys():
        function = attention_named(name)
        if str(getattr(function, "__module__", "")).startswith("transformers."):
            names.update(inspect.signature(function).parameters)
    return frozenset(names - {"module", "kwargs"})


def attention_of(config: Any) -> str | None:
    """Name of the attention implementation that a model's config selects."""
    return config._attn_implementation


def select_attention(config: Any, name: str | None, *, parts: bool = True) -> None:
    """Select an attention implementation in a config that no model has checked; `parts`: in its sub-configs too."""
    if parts:
        config._attn_implementation = name
    else:
        config.__dict__[STORED_ATTENTION] = name


def parts_of_config(config: Any) -> Iterator[Any]:
    """A config and the sub-configs in it, at any depth."""
    if isinstance(config, PreTrainedConfig):
        yield config
        for name in type(config).sub_configs:
            yield from parts_of_config(getattr(config, name, None))


# By one of these names a class asks for the attention function that its config names.
INTERFACE_NAMES = frozenset({"ALL_ATTENTION_FUNCTIONS", "AttentionInterface"})


def softmax_name(config: Any) -> str:
    """The name of softmax attention for models with a config, or a class of configs: not all of them know "sdpa"."""
    cls = config if isinstance(config, type) else type(config)
    name = cls.__module__.replace(".configuration_", ".modeling_")
    found: list[Any] = [value for value in vars(sys.modules.get(name, cls)).values() if isinstance(value, type)]
    models = [value for value in found if issubclass(value, PreTrainedModel) and value.__module__ == name]
    models = [model for model in models if model.config_class is cls] or models
    return "sdpa" if not models or any(model._supports_sdpa for model in models) else "eager"


def softmax_name_of(*modules: Any) -> str:
    """The name of softmax attention for all models among modules and classes of them."""
    return "sdpa" if all(getattr(module, "_supports_sdpa", True) for module in modules) else "eager"


# Where a config keeps it; a composite config writes there without the property.
STORED_ATTENTION = "_attn_implementation_internal"


def causal_mask(
    config: Any, inputs_embeds: Tensor, attention_mask: Any, cache: Any = None, position_ids: Tensor | None = None
) -> Any:
    """The mask that a causal model makes, through the mask function of its attention implementation."""
    # By place: the name of the fourth differs.
    return create_causal_mask(config, inputs_embeds, attention_mask, cache, position_ids)


def softmax_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> Tensor:
    """What `attn_implementation="sdpa"` computes, `[batch, queries, heads, head_dim]`.

    Options are `dropout`, `scaling` and `is_causal`.
    """
    output: Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    return output


def default_scaling(module: nn.Module, head_dim: int) -> float:
    """Factor of the dot product of a layer that passes none on. Raises where it has another one of its own."""
    default = head_dim**-0.5
    own = getattr(module, "scaling", None)
    if isinstance(own, (int, float)) and own != default:
        raise changed("scaling", f"no scaling from {type(module).__name__}, whose own is {own:.4g}")
    return default


# -- caches ---------------------------------------------------------------------------------------------------------
def find_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The `Cache` among the arguments of a call, whatever its place or name; `None` if there is none."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def cache_argument(model: Any) -> str:
    """Name of the argument with which a model's forward takes a `Cache`: it differs between releases."""
    parameters = inspect.signature(model.forward).parameters
    annotated = [name for name, parameter in parameters.items() if "Cache" in str(parameter.annotation)]
    for name in (*annotated, "cache", "past_key_values"):
        if name in parameters:
            return name
    raise changed("cache argument", f"{type(model).__name__}.forward({', '.join(parameters)})")


def register_cache_layers(dynamic: type, static: type) -> None:
    """Name our cache layers for `LAYER_TYPE`. Up to 5.13 static caches keep keys and values for every type."""
    tables = {"DYNAMIC_LAYER_TYPE_MAPPING": dynamic, "LAYER_TYPE_CACHE_MAPPING": dynamic}
    for name, layer in {**tables, "STATIC_LAYER_TYPE_MAPPING": static}.items():
        if hasattr(cache_utils, name):
            getattr(cache_utils, name)[LAYER_TYPE] = layer


def has_static_layer_types() -> bool:
    """Whether static caches follow `config.layer_types` at all."""
    return hasattr(cache_utils, "STATIC_LAYER_TYPE_MAPPING") or not hasattr(cache_utils, "LAYER_TYPE_CACHE_MAPPING")


def callers() -> Iterator[FrameType]:
    """The calls around the caller, innermost first: for errors, and for what nothing else tells."""
    frame = sys._getframe(2)  # not its own, which would then hold itself
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


def calling_layer(attribute: str) -> nn.Module | None:
    """The module in whose forward we are if it has an attribute, else `None`."""
    for frame in callers():
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner if getattr(owner, attribute, None) is not None else None
    return None


def calling_cache() -> Any:
    """The `Cache` that the attention module in whose forward we are was given; `None` if there is none."""
    for frame in callers():
        cache = find_cache((), frame.f_locals)
        if cache is not None or isinstance(frame.f_locals.get("self"), PreTrainedModel):
            return cache
    return None


def shorten(layer: Any, tokens: int) -> bool:
    """Drop the last tokens of a cache layer of keys and values; False, with nothing done, for any other sort."""
    if type(layer) is DynamicLayer:
        if layer.is_initialized:
            kept = max(0, layer.keys.shape[-2] - tokens)
            layer.keys, layer.values = layer.keys[..., :kept, :], layer.values[..., :kept, :]
    elif type(layer) is StaticLayer:  # what lies beyond its length is overwritten
        layer.cumulative_length.sub_(tokens)
    else:
        return False
    return True
