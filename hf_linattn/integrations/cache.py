"""Transformers' cache with a state of constant size: the cache layers of converted causal attention layers.

`DynamicCache(config=...)` and `StaticCache(config=...)`, which `generate` and every forward with `use_cache=True`
make, read `config.layer_types`; the config of a converted model names `LAYER_TYPE` there for its linear layers, so
they get a `RecurrentLayer`. How a cache layer gets to the attention function is in `hand_over.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError, UnsupportedTransformersError
from ..modules.base import LinearAttention
from ..modules.memory import RecurrentMemory
from .canary import check_seams
from .expected import changed
from .layers import linear_layer
from .seams import CacheLayerMixin, attempt, attention_of, calling_layer, register_cache_layers


class _NoKeysError(UnsupportedTransformersError, AttributeError):
    """So that `hasattr(layer, "keys")` is False."""


class RecurrentLayer(CacheLayerMixin):
    """The cache of one layer: a state instead of all keys and values. `memory` holds it.

    `update` returns the new keys and values alone, for the layer's attention function, which reads the state and adds
    them to it. Nothing else can use such a cache: unless a layer that can is expected (`is_expected`), it raises.
    """

    is_compileable = False
    supports_early_init = False
    # Transformers sizes the mask of a model by its first layer that is not sliding: with this it asks a layer left on
    # softmax, if there is one, which needs a mask over all tokens; ours need that of the new ones.
    is_sliding = True

    def __init__(self, *args: Any, memory: RecurrentMemory | None = None, **kwargs: Any) -> None:
        check_seams()
        super().__init__()
        self.memory = memory or RecurrentMemory()
        self.seen = 0
        self.is_expected = False  # whether the next `update` comes from a layer that will call `attend`
        self.is_pending = False  # whether there was an `update` whose tokens have not been read
        self._is_offloaded = False

    @property
    def keys(self) -> Any:
        """A state has none: a method of Transformers that reads them would take ours for an empty cache."""
        raise _NoKeysError(
            str(changed("cache layers", "a method that reads the keys of a layer, which keeps a state"))
        )

    @keys.setter
    def keys(self, value: Any) -> None:
        pass  # what a layer of keys and values starts with

    values = keys

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take notice of new keys and values, `[batch, heads, tokens, head_dim]`, and return them."""
        if not self.is_expected:
            _check_hand_over()
            raise UnsupportedError(
                "A cache made for linear attention was given to a layer without it (a model that is not converted, or"
                " another attn_implementation): it holds no keys and values, so the tokens before would be lost. Start"
                " with a new cache, made from this model's config."
            )
        if self.is_pending:
            raise UnsupportedError(
                "A forward pass with this cache was interrupted, so that it no longer fits the sequence. Start with a"
                " new cache."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.is_expected, self.is_pending = False, True
        return key_states, value_states

    def attend(
        self,
        layer: LinearAttention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """What the new tokens read; they are part of the state afterwards. Arguments as in `LinearAttention`."""
        if not self.is_pending:
            raise changed("cache in use", "an attention function called without an update of the cache before")
        self.is_pending = False
        if self._is_offloaded:
            self.memory.to(query.device)
        output = layer(query, key, value, key_mask, scaling=scaling, memory=self.memory)
        if self._is_offloaded:
            self.memory.to("cpu")
        self._count(key.shape[2])
        return output

    def _count(self, tokens: int) -> None:
        self.seen += tokens

    def get_seq_length(self) -> Any:
        """Tokens seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """`(tokens, offset)` of the keys that `update` returns: the new ones, after all that were seen."""
        return query_length, self.get_seq_length()

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name in older releases of Transformers

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return self.memory.nbytes

    @property
    def batch_size(self) -> int:
        """Sequences in the batch, -1 before the first use."""
        return self.memory.batch

    # -- what generation does with a cache --------------------------------------------------------------------------
    def reset(self) -> None:
        self.memory.reset()
        self.seen = 0
        self.is_expected = self.is_pending = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.memory.rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.memory.batch > 0:
            self.memory.rows(torch.arange(self.memory.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.memory.batch > 0:
            self.memory.rows(torch.arange(self.memory.batch, device=indices.device)[indices])

    @property
    def record_past(self) -> bool:
        """Whether tokens can be taken back by `crop`: all since recording began, or since the last `crop`."""
        return self.memory.is_recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.memory.is_recording = value

    is_croppable = record_past  # Transformers asks after it has had recording begin

    def activate_past_recording(self) -> None:
        self.memory.is_recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens; a positive number is that of tokens to keep.

        Raises: UnsupportedError for tokens that were not recorded.
        """
        if tokens_to_remove > 0:  # as older releases of Transformers call it
            tokens_to_remove = min(0, tokens_to_remove - int(self.get_seq_length()))
        self.memory.crop(-tokens_to_remove)
        self._count(tokens_to_remove)

    def offload(self) -> None:
        # Called between `update` and the attention function: what it moves is moved back at once.
        self._is_offloaded = True

    def prefetch(self) -> None:
        if self._is_offloaded and self.is_initialized:
            self.memory.to(self.device)


class StaticRecurrentLayer(RecurrentLayer):
    """The same with tensors that stay where they are, for `StaticCache` and a compiled decoding step."""

    is_compileable = True

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        self.max_cache_len = max_cache_len
        super().__init__(memory=RecurrentMemory(static_tokens=max_cache_len))
        # A number in Python would be a constant of the compiled step.
        self.cumulative_length = torch.tensor(0, dtype=torch.long)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.cumulative_length)

    def _count(self, tokens: int) -> None:
        self.cumulative_length.add_(tokens)

    def get_seq_length(self) -> Any:
        """Tokens seen, padding included, a tensor."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """Tokens that there is room for (in EVA's summaries; other states need none)."""
        return self.max_cache_len

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        super().reset()
        self.cumulative_length.zero_()


def _check_hand_over() -> None:
    """Raise if the layer that is updating its cache is one of ours: then it was `hand_over` that did not find it."""
    layer = None if torch.compiler.is_compiling() else calling_layer("linattn")
    if layer is not None and attention_of(layer.config) == linear_layer(layer).kind:  # type: ignore[union-attr]
        raise changed("cache in use", f"an update by {type(layer).__name__}, whose forward was given no Cache")


attempt(register_cache_layers, RecurrentLayer, StaticRecurrentLayer)
