"""When a layer's attention is softmax attention, because its input is short (`ops/exact.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..ops.ablation import ABLATED, exact_value
from ..ops.exact import exact_softmax, in_one_window, with_exact_rows
from ..ops.inputs import check_grid, check_inputs, factor_of
from .config import AttentionConfig
from .contract import AttentionInputs, LayerClass
from .value_convolution import with_value_convolution


def is_exact(layer_cls: LayerClass, config: AttentionConfig, inputs: AttentionInputs) -> bool:
    """Whether the shapes of a call say that all of it is softmax attention.

    Args:
        layer_cls: Says whether a row that fits into one window is.
    """
    query, key = inputs.query, inputs.key
    if key.shape[2] <= config.exact_below:
        return query.shape[2] == key.shape[2] or (inputs.is_causal and query.shape[2] < key.shape[2])
    window, num_global_tokens = config.window_size or 0, config.num_global_tokens or 0
    if inputs.grid is None and key.shape[2] > 2 * window + num_global_tokens:
        return False  # without further calls
    fits = in_one_window(
        query,
        key,
        inputs.key_mask,
        window_size=window,
        overlap_window=config.overlap_window,
        is_causal=inputs.is_causal,
        num_global_tokens=num_global_tokens,
        grid=inputs.grid,
    )
    return fits and layer_cls.is_exact_in_window(config)


def exact_output(config: AttentionConfig, state: Mapping[str, Tensor], inputs: AttentionInputs) -> Tensor:
    """Softmax attention, and what the layer adds to its output.

    Raises: InputError for shapes that do not fit, or a factor that is out of range.
    """
    query, key, value, key_mask = inputs.query, inputs.key, inputs.value, inputs.key_mask
    check_inputs(query, key, value, key_mask)
    if inputs.grid is not None:
        check_grid(key.shape[2] - (config.num_global_tokens or 0), inputs.grid, key_mask)
    if ABLATED:
        value = exact_value(value)
    scaling = factor_of(query, inputs.scaling)
    options: dict[str, Any] = {"is_causal": inputs.is_causal, "real_first": inputs.real_first}
    output = exact_softmax(query, key, value, key_mask, scaling=scaling, **options)
    return with_value_convolution(output, config, state, inputs) if config.value_convolution else output


def with_exact_part(
    output: Tensor, config: AttentionConfig, state: Mapping[str, Tensor], inputs: AttentionInputs
) -> Tensor:
    """What a kind gives, with softmax attention in short rows (in a causal layer: for the first queries)."""
    if inputs.grid is not None or (inputs.shortest > config.exact_below and not inputs.is_causal):
        return output  # all rows are long; no token of an image is padding
    return with_exact_rows(
        output,
        inputs.query,
        inputs.key,
        exact_value(inputs.value) if ABLATED else inputs.value,
        inputs.key_mask,
        scaling=inputs.scaling,
        exact_below=config.exact_below,
        is_causal=inputs.is_causal,
        real_first=inputs.real_first,
    )
