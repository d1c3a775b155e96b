"""Attention of one layer over a sequence whose tokens are spread over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError
from ..modules.base import LinearAttention
from ..modules.contract import AttentionInputs
from ..modules.kinds.eva import EvaAttention
from ..ops.inputs import check_inputs, factor_of
from .bidirectional import attend_bidirectional
from .causal import attend_causal
from .collectives import SequenceGroup
from .eva import eva_refusal


def attend_across(layer: LinearAttention[Any], inputs: AttentionInputs, group: SequenceGroup) -> Tensor:
    """What the queries of this process's part read of the whole sequence: `LinearAttention.sequence_parallel`.

    All processes call it together. Every part has equally many tokens, a multiple of the window; in the whole sequence
    the real tokens of a row come first, so that a part of a row is real, padding, or real and then padding.

    Args:
        inputs: Of this part, `[batch, heads, tokens, head_dim]`. `key_mask` is `None` on all processes or on none.
    Returns: `[batch, heads, tokens, head_dim]`, dtype of the query; zeros for padding.
    Raises: UnsupportedError for settings that are not exact here (`refusal`), and for an image; InputError for
        parts that do not consist of whole windows.
    """
    reason = refusal(layer, training=inputs.training)
    if reason is not None:
        raise UnsupportedError(f"Layer {layer.shape.layer_idx} ({layer.kind}) cannot share a sequence: {reason}")
    _check_inputs(layer, inputs)
    with torch.autocast(inputs.query.device.type, enabled=False):
        if inputs.is_causal:
            return attend_causal(layer, inputs, group)
        return attend_bidirectional(layer, inputs, group)


def refusal(layer: LinearAttention[Any], *, training: bool) -> str | None:
    """Why a layer cannot share a sequence between processes, and what to set; `None` if it can."""
    config = layer.config
    if config.num_heavy_keys:
        return f"num_heavy_keys={config.num_heavy_keys}, and these are chosen among all tokens of a row. Set it to 0."
    if config.value_convolution:
        return "value_convolution=True, which is for images, and an image is not cut up. Set it to False."
    if config.exact_below:
        return f"exact_below={config.exact_below}, and no process sees how long a row is. Set it to 0."
    # Of bidirectional EVA all processes draw the same numbers.
    draws_alone = training and (layer.shape.is_causal or not isinstance(layer, EvaAttention))
    if draws_alone and config.slot_dropout:
        return (
            f"slot_dropout={config.slot_dropout} in training, which every process would draw on its own. Set it to 0."
        )
    if draws_alone and config.sample_noise:
        return "sample_noise=True in training, which every process would draw on its own. Set it to False."
    if getattr(config, "proposal_source", None) == "landmarks":
        return (
            "its landmarks are means over the whole row. Set proposal_source='calibrated' and call"
            " hf_linattn.calibrate."
        )
    if layer.shape.is_causal and not layer.supports_recurrence(config, is_causal=True):
        return "its chunks depend on the number of tokens. Set chunk_size."
    if isinstance(layer, EvaAttention) and not layer.shape.is_causal:
        return eva_refusal(layer)
    return None


def _check_inputs(layer: LinearAttention[Any], inputs: AttentionInputs) -> None:
    if torch.compiler.is_compiling():
        raise UnsupportedError("A layer that shares a sequence between processes cannot be compiled. Run it as it is.")
    if inputs.grid is not None:
        raise UnsupportedError(
            f"Processes share sequences, not images; got grid={inputs.grid!r}. Let each process have whole images."
        )
    check_inputs(inputs.query, inputs.key, inputs.value, inputs.key_mask)
    factor_of(inputs.query, inputs.scaling)
    tokens, keys, window = inputs.query.shape[2], inputs.key.shape[2], layer.config.window_size or 0
    if tokens != keys:
        raise InputError(
            f"A process needs the queries and keys of the same tokens of a sequence that is shared; got {tokens}"
            f" queries and {keys} keys."
        )
    if tokens < (layer.config.num_global_tokens or 0):
        raise InputError(
            f"The first process's part of a sequence must hold all num_global_tokens={layer.config.num_global_tokens};"
            f" got parts of {tokens} tokens. Use fewer processes, or fewer global tokens."
        )
    if window and tokens % window:
        raise InputError(
            f"A process's part of a sequence must be a multiple of window_size={window} tokens; got {tokens}. Pad the"
            " sequences to a multiple of processes * window_size."
        )
