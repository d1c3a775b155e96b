"""Looking into the attention layers of a model: what each is called with, while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..modules.base import LinearAttention
from .call import Call
from .families import is_converted
from .interface import resolve_call
from .masks import linattn_mask
from .seams import PreTrainedModel, attention_of, parts_of_config, register_attention, select_attention

# The attention implementation of a model that is looked into.
OBSERVER = "linattn_observer"

# From an attention module and its call to the output with which the model goes on.
OnCall = Callable[[nn.Module, Call], Tensor]

# Attention module -> the kind to resolve its calls for, and the callback.
_observed: dict[nn.Module, tuple[str, OnCall]] = {}


@contextmanager
def observed_attention(model: PreTrainedModel, on_call: OnCall) -> Iterator[None]:
    """Within the `with` block, the attention layers of a model call `on_call` in place of their attention.

    Everything is as before afterwards: the attention implementation and the train mode of every part of the model.

    Args:
        model: Converted, or a stock model with a kind as its attention implementation.
        on_call: Called as `on_call(module, call)`, layer by layer. Returns the output with which the model goes on,
            `[batch, queries, heads, head_dim]`: as a rule `softmax_output(module, call)` or
            `linear_output(module, call)` of `interface.py`.
    Raises: UnsupportedError for a model whose heads are split over processes.
    """
    register_attention(OBSERVER, _observe, linattn_mask)
    modules = list(model.modules())
    if any(isinstance(module, LinearAttention) and module.local_heads is not None for module in modules):
        raise UnsupportedError(
            "Calibration, attention transfer and comparisons look at all heads of a layer, which are split over"
            " processes (split_heads). Call them before."
        )
    outer = {module: _observed[module] for module in modules if module in _observed}
    # A compiled model would be compiled with what `on_call` does, some of it at compile time.
    with restored(model), torch.compiler.set_stance("force_eager"):
        _observed.update(dict.fromkeys(modules, (kind_of(model), on_call)))
        try:
            model.set_attn_implementation(OBSERVER)
            yield
        finally:
            for module in modules:
                del _observed[module]
            _observed.update(outer)


def _observe(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function behind `OBSERVER`."""
    kind, on_call = _observed[module]
    call = resolve_call(kind, module, query, key, value, attention_mask, scaling, dropout, kwargs)
    if call.sequences is None or not call.sequences.is_packed:
        return on_call(module, call), None
    # Who looks on sees a padded batch.
    rows = call.sequences.as_padded(query.device)
    q, k, v = (rows.split(z)[0] for z in (call.query, call.key, call.value))
    own = replace(call, query=q, key=k, value=v, key_mask=rows.groups[0].real, sequences=None)
    return rows.join([on_call(module, own).transpose(1, 2)]).transpose(1, 2), None


@contextmanager
def restored(model: PreTrainedModel) -> Iterator[None]:
    """Put the attention implementation and train mode of every part of a model back after the block."""
    training = [(module, module.training) for module in model.modules()]
    configs = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    attention = [(config, attention_of(config)) for whole in configs for config in parts_of_config(whole)]
    try:
        yield
    finally:
        for config, implementation in attention:
            select_attention(config, implementation, parts=False)
        for module, is_training in training:
            module.training = is_training


def kind_of(model: PreTrainedModel) -> str:
    """The kind that a model was converted to; of another one, the name of its attention implementation."""
    config: Any = model.config
    return str(config.linear_attention["kind"] if is_converted(config) else attention_of(config))
