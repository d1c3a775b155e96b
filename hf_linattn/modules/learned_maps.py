"""The parameters of a layer with `learned=True`: maps of queries and keys to slots, or summaries of chunks (EVA)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.eva.learned import LearnedSummariser
from ..ops.favor.statistics import FavorStatistics
from ..ops.learned import LearnedFeatureMap, learned_attention, learning_start
from ..ops.slot_attention import SlotOptions
from ..ops.value_convolution import SIZE
from .base import LinearAttention
from .config import AttentionConfig
from .contract import AttentionInputs, LayerShape, StateTensor
from .value_convolution import VALUE_CONVOLUTION, with_value_convolution

# Residual maps of whole tokens learn best with a smaller rate than everything else (docs/decisions.md).
_RATES = {"query_adapter": 0.3, "key_adapter": 0.3}


def parameter_groups(layers: Iterable[LinearAttention[Any]], learning_rate: float) -> list[dict[str, Any]]:
    """What layers learn by themselves, as groups of an optimizer with the learning rate of each."""
    groups: dict[float, list[nn.Parameter]] = {}
    for layer in layers:
        for name, parameter in layer.named_parameters():
            groups.setdefault(_RATES.get(name.rpartition(".")[2], 1.0), []).append(parameter)
    return [{"params": group, "lr": rate * learning_rate} for rate, group in groups.items()]


def learned_spec(config: AttentionConfig, directions: StateTensor) -> dict[str, StateTensor]:
    """The tensors of the maps, which start from `directions` `[heads, slots, head_dim]` for queries and for keys."""
    heads, slots, dim = directions.shape
    first = StateTensor((heads, slots, dim), learned=True, draw=directions.draw)
    return {
        "query_directions": first,
        "key_directions": first,
        "query_shift": _required(heads, dim),
        "key_shift": _required(heads, dim),
        "slot_bias": _required(heads, slots),
        "far_offset": _required(heads),
        "far_slope": _required(heads, dim),
        **_convolution_spec(config, heads, dim),
    }


def _convolution_spec(config: AttentionConfig, heads: int, dim: int) -> dict[str, StateTensor]:
    return {VALUE_CONVOLUTION: _required(heads, dim, SIZE, SIZE)} if config.value_convolution else {}


def _required(*shape: int) -> StateTensor:
    return StateTensor(shape, learned=True, draw=lambda: torch.zeros(shape))


def learned_feature_map(state: Mapping[str, Tensor], normalizer: str) -> LearnedFeatureMap:
    """The feature map that a layer's tensors are, among them perhaps residual maps (`modules/proposal_maps.py`) and,
    with the normaliser "kernel", statistics of FAVOR#."""
    return LearnedFeatureMap(
        query_directions=_directions(state, "query"),
        key_directions=_directions(state, "key"),
        query_shift=state["query_shift"],
        key_shift=state["key_shift"],
        slot_bias=state["slot_bias"],
        far_offset=state["far_offset"],
        far_slope=state["far_slope"],
        normalizer=normalizer,
        statistics=FavorStatistics.among(state) if "statistics_shape" in state else None,
    )


def summariser_spec(config: AttentionConfig, shape: LayerShape) -> dict[str, StateTensor]:
    """The tensors of learned summaries, which start as the mean key and value of a chunk."""
    heads, dim = shape.num_heads, shape.head_dim
    return {
        "key_pooling": _required(heads, dim),
        "value_pooling": _required(heads, dim),
        "key_adapter": _required(heads, dim, dim),
        "query_adapter": _required(heads, dim, dim),
        "far_offset": _required(heads),
        "far_slope": _required(heads, dim),
        "key_slope": _required(heads, dim),
        **_convolution_spec(config, heads, dim),
    }


def learned_summariser(state: Mapping[str, Tensor]) -> LearnedSummariser:
    """How a layer's tensors summarise chunks."""
    return LearnedSummariser(
        key_pooling=state["key_pooling"],
        value_pooling=state["value_pooling"],
        key_adapter=state["key_adapter"],
        query_adapter=state["query_adapter"],
        far_offset=state["far_offset"],
        far_slope=state["far_slope"],
        key_slope=state["key_slope"],
    )


def _directions(state: Mapping[str, Tensor], side: str) -> Tensor:
    """A residual map `z + z A` of the tokens is one of the directions: `w . (z + z A) = (w + w A^T) . z`."""
    directions, adapter = state[f"{side}_directions"], state.get(f"{side}_adapter")
    if adapter is None:
        return directions
    # Copies, because the rounding of a product depends on where its factors lie in memory, which loading changes.
    return directions + directions.clone() @ adapter.clone().mT


def learned_output(config: AttentionConfig, state: Mapping[str, Tensor], inputs: AttentionInputs) -> Tensor:
    """The attention of a layer with learned maps."""
    output = learned_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        learned_feature_map(state, config.normalizer),
        num_heavy_keys=config.num_heavy_keys,
        chunk_size=config.chunk_size,
        **LinearAttention.call_options(config, inputs),
    )
    return with_value_convolution(output, config, state, inputs)


def learned_start(
    config: AttentionConfig,
    state: Mapping[str, Tensor],
    inputs: AttentionInputs,
    mean: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Shifts, slot bias and offset in closed form from one call."""
    return learning_start(
        inputs.query,
        inputs.key,
        learned_feature_map(state, config.normalizer),
        SlotOptions(inputs.is_causal, config.window_size or 0, config.overlap_window, config.num_heavy_keys),
        key_mask=inputs.key_mask,
        scaling=inputs.scaling,
        grid=inputs.grid,
        num_global_tokens=config.num_global_tokens or 0,
        mean=mean,
    )
