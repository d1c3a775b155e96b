"""`set_image_size`: images of another resolution for models that learn a vector per patch."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigError, UnsupportedError
from ..integrations.canary import check_model
from ..integrations.families import stock_type
from ..integrations.native import as_pair
from ..integrations.wrappers import itself

logger = logging.getLogger(__name__)


def set_image_size(model: PreTrainedModel, image_size: int | tuple[int, int]) -> PreTrainedModel:
    """Let a ViT, stock or converted, with any head, read images of another size. In place.

    The table of position embeddings `[1, 1 + patches, hidden]` is interpolated over the grid of patches, bicubic, in
    float32, as Transformers does at every call with `interpolate_pos_encoding=True`; the CLS token's vector stays.
    Here the result is stored: the checkpoint has the new size, loads as usual and needs no argument. The parameter
    keeps its identity, dtype, device and `requires_grad`. Nothing has changed if an error is raised.

    Call it before the optimizer is built and before wrapping (DDP, FSDP, PEFT, torch.compile), before or after
    `convert`, and once, from the pretrained size: a second call interpolates what has been interpolated. What resizes
    the images is the image processor, which is yours: set its `size`.

    Args:
        model: A Transformers model whose own architecture is ViT. Its `config.image_size` gets the new value.
        image_size: Pixels of a side, or (height, width); each a multiple of the patch's.
    Returns: `model`.
    Raises:
        ConfigError: A size that is no positive multiple of the patch size.
        UnsupportedError: Another architecture, a wrapper in place of a model, or a table whose values are not all here
            (sharded, offloaded, meta device).
    """
    model = itself(model, "set_image_size")
    check_model(model)
    embeddings = _embeddings(model)
    patch, old = as_pair(model.config.patch_size), as_pair(model.config.image_size)
    assert patch is not None
    assert old is not None
    new = _checked(image_size, patch)
    table = embeddings.position_embeddings
    old_grid, new_grid = (old[0] // patch[0], old[1] // patch[1]), (new[0] // patch[0], new[1] // patch[1])
    _check_table(table, old_grid)
    if new == old:
        return model
    with torch.inference_mode(False), torch.no_grad():  # in inference mode the new values could not be trained
        table.grad = None
        table.data = _interpolate(table.detach(), old_grid, new_grid)
    patches = embeddings.patch_embeddings
    patches.num_patches = new_grid[0] * new_grid[1]
    embeddings.image_size = patches.image_size = new
    stored = new[0] if new[0] == new[1] else new
    configs = {id(config): config for module in model.modules() if (config := module.__dict__.get("config"))}
    for config in configs.values():
        if hasattr(config, "image_size"):
            config.image_size = stored
    logger.info("%s now takes images of %d x %d pixels instead of %d x %d.", type(model).__name__, *new, *old)
    return model


def _checked(image_size: Any, patch: tuple[int, int]) -> tuple[int, int]:
    pair = as_pair(image_size)
    if pair is None or any(isinstance(side, bool) or side < 1 for side in pair):
        raise ConfigError(
            f"image_size must be a number of pixels, or a pair of them (height, width); got {image_size!r}."
        )
    if pair[0] % patch[0] or pair[1] % patch[1]:
        near = tuple(max(1, round(side / of)) * of for side, of in zip(pair, patch, strict=True))
        raise ConfigError(
            f"image_size must be a multiple of the patch size, {patch[0]} x {patch[1]} pixels; got {image_size!r}. "
            f"Near it: {near[0]} x {near[1]}."
        )
    return pair


def _embeddings(model: Any) -> Any:
    """The module that owns the positions."""
    model_type = getattr(model.config, "model_type", None)
    if stock_type(model.config) != "vit":
        raise UnsupportedError(
            f"set_image_size() is implemented for the architecture 'vit'; got model_type {model_type!r}. For longer "
            "texts see extend_positions()."
        )
    embeddings = getattr(model.base_model, "embeddings", None)
    if not isinstance(getattr(embeddings, "position_embeddings", None), nn.Parameter):
        raise UnsupportedError(
            f"set_image_size() finds no table of position embeddings in {type(model).__name__}, although its config "
            f"says {model_type!r}. Its base model must be laid out as that of the stock class."
        )
    return embeddings


def _check_table(table: Tensor, grid: tuple[int, int]) -> None:
    shape = (1, 1 + grid[0] * grid[1])
    if table.is_meta:
        raise UnsupportedError(
            "set_image_size() needs the values of the position embeddings; got a tensor on the meta device. Load the "
            "weights first and call it before offloading (cpu_offload, a device_map with 'cpu' or 'disk')."
        )
    if type(table.data) is not Tensor or table.ndim != 3 or tuple(table.shape[:2]) != shape:
        raise UnsupportedError(
            f"set_image_size() needs the whole table of positions, {(*shape, 'hidden')} by the config; got a "
            f"{type(table.data).__name__} of shape {tuple(table.shape)}. Call it before the weights are sharded "
            "(FSDP, DeepSpeed, tensor parallelism); if the config is at fault, correct it."
        )


def _interpolate(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table `[1, 1 + patches, hidden]` for another grid of patches."""
    patches = table[:, 1:].unflatten(1, old).permute(0, 3, 1, 2)
    values = patches if table.dtype == torch.float64 else patches.float()
    wide = nn.functional.interpolate(values, size=new, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], wide.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)
