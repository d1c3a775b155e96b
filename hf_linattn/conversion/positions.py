"""`extend_positions`: longer inputs for models that learn a vector per position."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigError, UnsupportedError, did_you_mean
from ..integrations.canary import check_model
from ..integrations.expected import changed
from ..integrations.families import stock_type
from ..integrations.wrappers import itself

logger = logging.getLogger(__name__)


def extend_positions(model: PreTrainedModel, num_positions: int, *, method: str = "tile") -> PreTrainedModel:
    """Let a BERT or GPT-2, stock or converted, with any head, read inputs of up to `num_positions` tokens. In place.

    The table of position embeddings `[positions, hidden]` gets more rows; the config's maximum follows, with
    everything that is derived from it, so that saved checkpoints load as usual. Parameters keep their identity, dtype,
    device and `requires_grad`. Nothing has changed if an error is raised.

    Methods:

    * "tile" repeats the table: position `p` gets row `p % old`. Inputs of up to `old` tokens are computed exactly as
      before, and the order of near tokens means what it meant, except across a seam (every `old` tokens). Tokens
      `old` apart look alike. Use it without further training, beside a window, where short inputs must stay what they
      are, and whenever the target is many times the old maximum. Source: Beltagy et al. 2020, arXiv:2004.05150,
      section 5.
    * "interpolate" stretches the table: position `p` gets the linear interpolation at `p * (old - 1) / (new - 1)`, in
      float32; the first and the last row stay the ends. Positions keep their order from one end to the other, but
      distances shrink by the factor of extension, for short inputs too. Use it before fine-tuning, when the order
      of far-apart tokens matters.

    Order of things: before the optimizer is built (its state has the old shape), before wrapping (DDP, FSDP, PEFT,
    torch.compile), before or after `convert`. Statistics of layers that are calibrated (`hf_linattn.calibrate`) are
    those of shorter inputs: calibrate again. Extend once, from the pretrained size: a second call works on the longer
    table. What truncates text is the tokenizer, which is yours: set `tokenizer.model_max_length = num_positions`.

    Args:
        model: A Transformers model whose own architecture is BERT or GPT-2; of a composite model pass the part.
            Its config is changed in place, as `resize_token_embeddings` does.
        num_positions: New maximum of tokens, at least the old one (then nothing changes).
            `config.max_position_embeddings` (GPT-2: `n_positions`) gets this value, and so does
            `generation_config.max_length` if it was the old maximum.
        method: "tile" or "interpolate".
    Returns: `model`.
    Raises:
        ConfigError: `num_positions` is no integer or smaller than the old maximum; unknown method.
        UnsupportedError: Another architecture, a wrapper in place of a model, or a table that is not a plain one whose
            values are all here (adapters, sharded, offloaded, meta device).
    """
    if method not in list(METHODS):
        raise ConfigError(f"method must be one of {list(METHODS)}; got {method!r}.{did_you_mean(method, METHODS)}")
    model = itself(model, "extend_positions")
    check_model(model)
    new = _integer(num_positions)
    table, owner = _find_table(model)
    old = _check_table(table, model.config)
    if new < old:
        raise ConfigError(
            f"num_positions must be at least the {old} positions that the model has; got {new}. Shorter inputs need "
            "no change."
        )
    if new == old:
        return model
    with torch.inference_mode(False), torch.no_grad():  # in inference mode the new values could not be trained
        weight = METHODS[method](table.weight.detach(), new)
        buffers = _derived_buffers(owner, old, new)
        # The module stays (hooks of accelerate) and so does the parameter (an optimizer without state, ties).
        table.weight.grad = None
        table.weight.data = weight
    table.num_embeddings = new
    for name, buffer in buffers.items():
        setattr(owner, name, buffer)
    _update_configs(model, old, new)
    logger.info("%s now has %d positions instead of %d (%s).", type(model).__name__, new, old, method)
    return model


# -- methods --------------------------------------------------------------------------------------------------------
def _tile(table: Tensor, new: int) -> Tensor:
    return table[torch.arange(new, device=table.device) % table.shape[0]]


def _interpolate(table: Tensor, new: int) -> Tensor:
    old = table.shape[0]
    # In integers: positions of long inputs are exact, and the first and last row come out bit-equal.
    place = torch.arange(new, device=table.device) * (old - 1)
    lower = torch.div(place, new - 1, rounding_mode="floor")
    upper = (lower + 1).clamp(max=old - 1)
    values = table if table.dtype == torch.float64 else table.float()
    share = ((place % (new - 1)).to(values.dtype) / (new - 1))[:, None]
    return torch.lerp(values[lower], values[upper], share).to(table.dtype)


METHODS: dict[str, Callable[[Tensor, int], Tensor]] = {"tile": _tile, "interpolate": _interpolate}


# -- what a model has -----------------------------------------------------------------------------------------------
def _integer(number: Any) -> int:
    try:
        if isinstance(number, bool) or not isinstance(number, SupportsIndex):
            raise TypeError
        return operator.index(number)
    except TypeError:
        raise ConfigError(
            f"num_positions must be an integer, a number of tokens; got {number!r} ({type(number).__name__})."
        ) from None


def _find_table(model: Any) -> tuple[Any, Any]:
    """The table of positions, usually an `nn.Embedding`, and the module that owns it."""
    family, model_type = stock_type(model.config), getattr(model.config, "model_type", None)
    if family == "vit":
        raise UnsupportedError(
            "extend_positions() is for texts: the positions of a ViT are places in an image, in two dimensions. Use "
            "set_image_size() for images of another size."
        )
    if family not in ("bert", "gpt2"):
        raise UnsupportedError(
            "extend_positions() is implemented for the architectures ['bert', 'gpt2']; got model_type "
            f"{model_type!r}. Of a composite model (encoder and decoder) pass the part that is one: model.encoder, "
            "model.decoder."
        )
    relative = getattr(model.config, "position_embedding_type", "absolute")
    if relative not in ("absolute", None):
        raise UnsupportedError(
            f"extend_positions() needs absolute positions; got config.position_embedding_type {relative!r}. The "
            "distances of such a checkpoint have a table of their own, which it cannot extend."
        )
    owner = model.base_model if family == "gpt2" else getattr(model.base_model, "embeddings", None)
    table = getattr(owner, "wpe" if family == "gpt2" else "position_embeddings", None)
    if owner is None or table is None:
        raise UnsupportedError(
            f"extend_positions() finds no table of position embeddings in {type(model).__name__}, although its config "
            f"says {model_type!r}. Its base model must be laid out as that of the stock class."
        )
    return table, owner


def _check_table(table: Any, config: Any) -> int:
    """Rows of a table that can be extended; an error for any other."""
    if type(table) is not nn.Embedding:
        raise UnsupportedError(
            f"extend_positions() needs a plain torch.nn.Embedding of positions; got {type(table).__name__}. Merge or "
            "remove what is around it (an adapter, a parametrization, quantization), extend, and put it back."
        )
    weight, old = table.weight, config.max_position_embeddings
    if weight.is_meta:
        raise UnsupportedError(
            "extend_positions() needs the values of the position embeddings; got a tensor on the meta device. Load "
            "the weights first and extend before offloading (cpu_offload, a device_map with 'cpu' or 'disk')."
        )
    if type(weight.data) is not Tensor or tuple(weight.shape) != (old, table.embedding_dim):
        raise UnsupportedError(
            f"extend_positions() needs the whole table of positions, {(old, table.embedding_dim)} by the config; got "
            f"a {type(weight.data).__name__} of shape {tuple(weight.shape)}. Extend before the weights are sharded "
            "(FSDP, DeepSpeed, tensor parallelism); if the config is at fault, correct it."
        )
    return int(old)


def _derived_buffers(owner: nn.Module, old: int, new: int) -> dict[str, Tensor]:
    """Buffers as long as the longest input: BERT's default positions and segments. Not part of checkpoints."""
    found = {name: owner._buffers.get(name) for name in ("position_ids", "token_type_ids")}
    for name, buffer in owner._buffers.items():
        if name not in found and buffer is not None and old in buffer.shape:
            raise changed("position buffers", f"{name} of shape {tuple(buffer.shape)}")
    values: dict[str, Tensor] = {}
    for name, buffer in found.items():
        if buffer is not None:
            row = torch.arange(new) if name == "position_ids" else torch.zeros(new)
            values[name] = row.to(device=buffer.device, dtype=buffer.dtype).expand(1, -1).contiguous()
    return values


def _update_configs(model: PreTrainedModel, old: int, new: int) -> None:
    configs = {id(config): config for module in model.modules() if (config := module.__dict__.get("config"))}
    for config in configs.values():
        if getattr(config, "max_position_embeddings", None) == old:
            config.max_position_embeddings = new  # GPT-2's attribute map turns it into n_positions
        if config.__dict__.get("n_ctx") == old:  # the same number in checkpoints of older versions
            config.n_ctx = new
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation.max_length == old:
        generation.max_length = new
