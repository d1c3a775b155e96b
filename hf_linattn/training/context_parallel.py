"""Converted models whose sequences are spread over processes, with the words of torch's context parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..distributed.context import attending, cut_buffers, sequence_group
from ..distributed.layers import refusal
from ..errors import UnsupportedError
from ..integrations.attach import family_layers
from ..integrations.families import get_family
from ..integrations.layers import linear_layer
from ..models.mixin import LinAttnMixin
from ..modules.base import LinearAttention
from .shared_forward import SharedForward
from .token_heads import HEADS_OF_PARTS, TOKEN_HEADS, stock_head

_ADVICE = "Convert all layers, or let each process have whole sequences."


@contextmanager
def context_parallel(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    buffers: Sequence[Tensor] | None = None,
    buffer_seq_dims: Sequence[int] | None = None,
    no_restore_buffers: set[Tensor] | None = None,
    gather_output: bool | None = None,
) -> Iterator[None]:
    """Within the block, the processes of a mesh compute the sequences that a converted model is called with together.

    Every process calls the model with the same whole rows. The model takes its own part of them, and its attention
    layers exchange what slots have read. Of what one process would compute with the whole rows, the loss is the mean
    over the processes, and so are the gradients: DistributedDataParallel over all processes, or `reduce_gradients`,
    makes them complete. The forward pass belongs into the block, with activation checkpointing the backward pass too.

    Args:
        model: A converted BERT or GPT-2, with any head, also within what other libraries put round it.
        mesh: Of one dimension: `mesh["cp"]`.
        buffers, buffer_seq_dims, no_restore_buffers: As in `torch.distributed.tensor.experimental.context_parallel`:
            tensors that are cut up in place for the time of the block. A model called with them still knows the whole
            rows, which it needs for padding, positions and labels.
        gather_output: Whether all processes get the states of whole rows after the last layer, in the order of the
            input. `None`: where the head reads more than single tokens. Heads of single tokens then give the logits of
            the process's own part: of rows without padding, of its tokens; otherwise real tokens come first.
    Raises: InputError and UnsupportedError for what would not be computed correctly, here or when the model is called.
    """
    group = sequence_group(mesh)
    if isinstance(model, nn.DataParallel):
        raise UnsupportedError("DataParallel runs one process; sequences are shared by several. Use torchrun and DDP.")
    if any(getattr(m, "_orig_mod", None) or getattr(m, "_compiled_call_impl", None) for m in model.modules()):
        raise UnsupportedError(
            "A compiled model cannot share sequences: its graph would not exchange anything. Run it as it is."
        )
    inner = converted_model(model, training=model.training)
    layers = [layer for layer in inner.modules() if isinstance(layer, LinearAttention)]
    whole = _is_whole(inner, gather_output)
    with cut_buffers(group, buffers, buffer_seq_dims, no_restore_buffers) as wholes:
        if group.size == 1:
            yield
            return
        shared = SharedForward(group, layers, wholes, whole=whole)
        with attending(layers, shared.attend), shared.running(inner, has_token_loss=not whole):
            yield


def converted_model(model: nn.Module, *, training: bool) -> Any:
    """The converted model that is a module, or is within it.

    Raises: UnsupportedError if there is none, or several; for images; where a layer has softmax, and where one cannot
        share a sequence, in training or not.
    """
    found: list[Any] = [module for module in model.modules() if isinstance(module, LinAttnMixin)]
    inside = {id(module.base_model) for module in found if module.base_model is not module}
    found = [module for module in found if id(module) not in inside]
    if len(found) != 1:
        raise UnsupportedError(
            f"{type(model).__name__} holds {len(found)} converted models; processes can share the sequences of one."
            " Convert the model first (hf_linattn.convert): of a stock one, native mode included, the processes would"
            " see their own parts alone."
        )
    inner = found[0]
    if get_family(inner.config).name == "vit":
        raise UnsupportedError(f"{type(inner).__name__} reads images, which are not cut up. Share rows instead (DDP).")
    softmax = [str(i) for i, layer in enumerate(family_layers(inner)) if linear_layer(layer) is None]
    if softmax:
        raise UnsupportedError(
            f"Layers {', '.join(softmax)} of the model have softmax attention, which would see the tokens of its own"
            f" process alone. {_ADVICE}"
        )
    for layer in inner.modules():
        if isinstance(layer, LinearAttention) and (reason := refusal(layer, training=training)):
            raise UnsupportedError(f"Layer {layer.shape.layer_idx} ({layer.kind}) cannot share a sequence: {reason}")
    return inner


def _is_whole(model: Any, gather_output: bool | None) -> bool:
    """Whether what comes after the last layer gets whole rows."""
    head = stock_head(model)
    needs_whole = head not in TOKEN_HEADS and head not in HEADS_OF_PARTS
    if gather_output is False and needs_whole and model.base_model is not model:
        raise UnsupportedError(
            f"The head of {type(model).__name__} reads more than single tokens: it needs gather_output=True or None."
        )
    return needs_whole if gather_output is None else gather_output
