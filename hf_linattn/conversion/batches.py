"""Running a model over a user's batches and leaving it as it was."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InputError
from ..integrations.seams import attention_of, softmax_attention
from ..integrations.token_mask import causal_key_mask


@contextmanager
def restored(model: PreTrainedModel) -> Iterator[None]:
    """Put attention implementation and train mode back, module by module, whatever happens."""
    training = {module: module.training for module in model.modules()}
    implementation = attention_of(model.config)
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        for module, flag in training.items():
            module.training = flag


def read_batches(batches: Any, max_batches: int | None, progress: bool, doing: str) -> Iterator[Mapping[str, Any]]:
    if isinstance(batches, (Mapping, str, Tensor)) or not isinstance(batches, Iterable):
        raise InputError(
            f"`batches` must be a series of dictionaries of model inputs; got {type(batches).__name__}. Put a single "
            "batch into a list."
        )
    if progress:
        from tqdm.auto import tqdm

        batches = tqdm(batches, desc=doing, total=max_batches)
    for number, batch in enumerate(batches):
        if max_batches is not None and number >= max_batches:
            return
        if not isinstance(batch, Mapping):
            raise InputError(f"Every batch must be a dictionary of model inputs; got {type(batch).__name__}.")
        yield batch


def prepare_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """Inputs on the model's device, without labels, and the mask of real tokens."""
    inputs = {name: value for name, value in batch.items() if "label" not in name}
    for name, value in inputs.items():
        if isinstance(value, (list, tuple)):
            raise InputError(
                f"{name!r} of a batch must be a tensor; got {type(value).__name__}. Collate the rows first."
            )
    inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    mask = inputs.get("attention_mask")
    return inputs, None if mask is None else mask.reshape(-1, mask.shape[-1]).bool()


def exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    *,
    scaling: float | None,
    is_causal: bool,
) -> Tensor:
    """What the layer computes under softmax attention, `[batch, queries, heads, head_dim]`."""
    queries, keys = query.shape[2], key.shape[2]
    mask = None
    if key_mask is not None and is_causal:
        mask = causal_key_mask(queries, keys, key_mask, query.device)
    elif key_mask is not None:
        mask = key_mask[:, None, None, :].expand(-1, -1, queries, -1)
    return softmax_attention(module, query, key, value, mask, scaling=scaling, is_causal=is_causal)
