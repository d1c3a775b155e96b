"""A user's batches, and the inputs of a model that are made of them."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InputError

# What a model cannot do without.
_MAIN = ("input_ids", "inputs_embeds", "pixel_values")


def is_label(name: str) -> bool:
    """Whether an input of a model is what it is to predict, by its name: labels, or the ends of an answer."""
    return "label" in name or name in ("start_positions", "end_positions")


def read_batches(batches: Any, max_batches: int | None, progress: bool, doing: str) -> Iterator[Mapping[str, Any]]:
    if isinstance(batches, (Mapping, str, Tensor)) or not isinstance(batches, Iterable):
        raise InputError(
            f"`batches` must be a series of dictionaries of model inputs; got {type(batches).__name__}. Put a single "
            "batch into a list."
        )
    if progress:
        from tqdm.auto import tqdm

        batches = tqdm(batches, desc=doing, total=max_batches)
    for batch in itertools.islice(batches, max_batches):  # leaves the next one in an iterator
        if not isinstance(batch, Mapping):
            raise InputError(f"Every batch must be a dictionary of model inputs; got {type(batch).__name__}.")
        yield batch


def prepare_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """Inputs on the model's device, without labels, and the mask of real tokens."""
    inputs = {name: value for name, value in batch.items() if not is_label(name)}
    for name, value in inputs.items():
        if isinstance(value, (list, tuple)):
            raise InputError(
                f"{name!r} of a batch must be a tensor; got {type(value).__name__}. Collate the rows first."
            )
        if hasattr(value, "__array__") and not isinstance(value, Tensor):
            raise InputError(
                f"{name!r} of a batch must be a tensor; got {type(value).__name__}. Use torch.as_tensor, or"
                " return_tensors='pt'."
            )
        if name in _MAIN and value is not None and not value.numel():
            raise InputError(f"{name!r} of a batch is empty; got shape {tuple(value.shape)}. Leave such batches out.")
    inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    mask = inputs.get("attention_mask")
    return inputs, None if mask is None else mask.reshape(-1, mask.shape[-1]).bool()
