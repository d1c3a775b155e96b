"""A layer's whole attention as one operator of torch, for graphs that outlive the call that made them.

`torch.jit.trace` and `torch.export` record what happens to be done for the sizes and values of one call: branches on
lengths, numbers of windows and of padded tokens become constants, or are taken apart symbol by symbol. In such a graph
the attention is `hf_linattn::attention`, which calls `LinearAttention.compute` when the graph runs: any batch size,
length and mask, and no more of Python's code in the graph than that. `torch.compile`, which guards what it assumes,
sees the attention itself.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..kernels.operators import backward_of
from .config import AttentionConfig
from .contract import AttentionInputs, LayerClass
from .registry import config_from_dict, get_kind

_LIBRARY = torch.library.Library("hf_linattn", "FRAGMENT")
_LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor[] state, str settings, str names,"
    " float scaling, bool is_causal, int[] grid) -> Tensor"
)
_NAME = "hf_linattn::attention"


def is_traced() -> bool:
    """Whether this call is being written down to be run later, for other inputs."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def record(config: AttentionConfig, state: Mapping[str, Tensor], inputs: AttentionInputs) -> Tensor:
    """`LinearAttention.compute` as one operator, for a call that is recorded (`is_traced`)."""
    if _to_onnx():
        raise UnsupportedError(
            f"torch.onnx.export of a model with linear attention ({config.kind!r}) is not supported: ONNX has no"
            " operator for it. Use torch.export or torch.jit.trace, or export the model with softmax attention"
            " (model.set_attn_implementation('eager'))."
        )
    if inputs.training and config.is_random:
        raise UnsupportedError(
            f"{config.kind!r} draws random numbers in training (slot_dropout, sample_noise), which a recorded graph"
            " (torch.jit.trace, torch.export) cannot draw again for its gradients. Call model.eval() first, or set"
            " slot_dropout=0 and sample_noise=False."
        )
    return torch.ops.hf_linattn.attention(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.key_mask,
        list(state.values()),
        config.as_json,
        ",".join(state),
        float(inputs.scaling),
        bool(inputs.is_causal),
        [] if inputs.grid is None else list(inputs.grid),
    )


@torch.compiler.assume_constant_result
def _to_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


@functools.lru_cache(maxsize=512)
def _parsed(settings: str) -> tuple[LayerClass, AttentionConfig]:
    config = config_from_dict(json.loads(settings))
    return get_kind(config.kind).module_cls, config


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    state: list[Tensor],
    settings: str,
    names: str,
    scaling: float,
    is_causal: bool,
    grid: list[int],
) -> Tensor:
    module_cls, config = _parsed(settings)
    size = (grid[0], grid[1]) if grid else None
    inputs = AttentionInputs(query, key, value, key_mask, scaling=scaling, is_causal=is_causal, grid=size)
    named = dict(zip(names.split(",") if names else (), state, strict=True))
    return module_cls.compute(config, named, inputs).contiguous()


def _like_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _gradients(options: Sequence[Any], grad: Tensor, mask: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """Of query, key, value and the state's tensors, from a forward pass that is done again."""
    with torch.enable_grad():
        leaves = [z.detach().requires_grad_() for z in tensors]
        query, key, value, *state = leaves
        output = _attention(query, key, value, mask, state, *options)
        found = torch.autograd.grad(output, leaves, grad, allow_unused=True)
    return [torch.zeros_like(z) if g is None else g for z, g in zip(tensors, found, strict=True)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, key_mask, state, *options = inputs
    ctx.options = options
    ctx.save_for_backward(query, key, value, key_mask, *state)


def _backward(ctx: Any, grad: Tensor) -> Any:
    query, key, value, key_mask, *state = ctx.saved_tensors
    found = backward_of(_gradients, ctx.options, grad, key_mask, query, key, value, *state)
    grid = ctx.options[-1]
    return *found[:3], None, found[3:], None, None, None, None, [None] * len(grid)


_LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
_LIBRARY.impl("attention", _like_attention, "Meta")  # register_fake looks for its caller in all modules
torch.library.register_autograd(_NAME, _backward, setup_context=_keep, lib=_LIBRARY)
