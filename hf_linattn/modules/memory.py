"""`RecurrentMemory`: what one causal layer has seen of a batch of sequences that are still growing.

Tokens are absorbed into the state as soon as their queries have read. They are *pending* instead, one by one, while
something may still need them: under autograd until the next call (so that a training step costs what it costs without
a cache), and while recording until `crop` (assisted decoding takes tokens back).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError
from ..ops.recurrent.pending import PendingTokens
from ..ops.recurrent.protocol import Recurrence, map_state, state_tensors
from .base import LinearAttention
from .contract import AttentionInputs
from .memory_reader import FirstReader, check_piece
from .offload import copying_stream, wait_for_copy
from .seen_tokens import SeenTokens

# Tokens of earlier calls that stay available to `crop`: more than a draft model proposes in one go.
CROPPABLE_TOKENS = 256


class RecurrentMemory:
    """The state of one layer for a batch of sequences, and the tokens that are not yet part of it.

    `layer(query, key, value, memory=memory)` reads it and takes the new tokens in. Nothing in it grows with the number
    of tokens, but for EVA's chunk summaries without `max_chunks`.

    Args:
        static_tokens: Keep all shapes, and the tensors themselves, the same from token to token (for compiled steps),
            with room for so many tokens where room is needed.
    """

    def __init__(self, *, static_tokens: int | None = None) -> None:
        self.static_tokens = static_tokens
        self.is_recording = False
        self.state: Any = None
        self._pending: PendingTokens | None = None
        self._seen = SeenTokens()  # without static shapes
        self._reader: FirstReader | None = None
        self._recurrence: Recurrence[Any] | None = None
        self._made_from: Any = None  # what `_recurrence` is of
        self._stream: torch.cuda.Stream | None = None  # on which `to` has copied last, perhaps not done yet

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles do without what follows from the layer."""
        self._arrive()
        reader = self._reader and self._reader.without_layer()
        return {**self.__dict__, "_recurrence": None, "_made_from": None, "_reader": reader, "_stream": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> RecurrentMemory:
        twin = type(self)(static_tokens=self.static_tokens)
        twin.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        twin._reader = self._reader
        return twin

    # -- reading and taking in --------------------------------------------------------------------------------------
    def attend(self, layer: LinearAttention, inputs: AttentionInputs) -> Tensor:
        """What the new tokens' queries read; the tokens are then part of the past.

        Args:
            inputs: Of the new tokens alone.
        Returns: `[batch, heads, tokens, head_dim]`.
        Raises: InputError for another batch, layer or shape than before; UnsupportedError in training with noise.
        """
        self._check(layer, inputs)
        self._arrive()
        is_first = self._reader is None
        if is_first:
            self._reader = FirstReader.of(layer)
        learns = torch.is_grad_enabled() and _requires_grad(layer, inputs)
        if is_first and learns and not self.is_recording and self.static_tokens is None:
            return self._first_in_training(layer, inputs)
        with torch.autocast(inputs.query.device.type, enabled=False):
            recurrence = self._recurrence_of(layer, inputs, keep=not (learns or layer.training))
            if self.state is None:
                self.state = recurrence.start(inputs.key, inputs.value, static_tokens=self.static_tokens)
                self._make_static()
            self._settle(recurrence)
            self._note(inputs)
            keeps_tokens = learns or self.is_recording
            is_step = inputs.key.shape[2] == 1 and (inputs.key_mask is None or self.static_tokens is not None)
            if is_step and self._pending is None and not keeps_tokens and not layer.training:
                return self._one_token(recurrence, inputs)
            output = self._some_tokens(layer, recurrence, inputs, is_first=is_first)
            if not keeps_tokens:
                self._absorb_pending(recurrence)
        return output

    def _first_in_training(self, layer: LinearAttention, inputs: AttentionInputs) -> Tensor:
        """The first tokens under autograd, as without a memory: a state is made if there is a next call."""
        self._pending = PendingTokens(inputs.query, inputs.key, inputs.value, inputs.key_mask)
        self._note(inputs)
        return layer.compute_or_record(layer.config, layer.tensors(), inputs)

    def _one_token(self, recurrence: Recurrence[Any], inputs: AttentionInputs) -> Tensor:
        """One more token of every row, without gradients: a few operations."""
        valid = None if inputs.key_mask is None else inputs.key_mask[:, 0]
        output, state = recurrence.step(inputs.query, inputs.key, inputs.value, self.state, valid)
        self._store(state)
        return output

    def _some_tokens(
        self, layer: LinearAttention, recurrence: Recurrence[Any], inputs: AttentionInputs, *, is_first: bool
    ) -> Tensor:
        """Any number of tokens; they are pending afterwards."""
        query = inputs.query if recurrence.keeps_queries else None
        new = PendingTokens(query, inputs.key, inputs.value, inputs.key_mask)
        tokens = new if self._pending is None else self._pending.then(new)
        if is_first:
            output = layer.compute_or_record(layer.config, layer.tensors(), inputs)
        elif layer.training and layer.config.sample_noise:
            raise UnsupportedError(
                "Continuing from a cache in training mode with sample_noise=True would mix the noise of several calls."
                " Call model.eval(), or train on whole sequences (use_cache=False)."
            )
        else:
            queries = inputs.query if tokens.query is None else tokens.query
            output = recurrence.attend(queries, tokens.key, tokens.value, tokens.mask, self.state)
            output = output[:, :, output.shape[2] - inputs.query.shape[2] :]
        self._pending = tokens
        return output

    def _settle(self, recurrence: Recurrence[Any]) -> None:
        """Absorb what need not be pending any longer; while recording, all but the last tokens."""
        pending = self._pending
        if pending is None or not self.is_recording:
            self._absorb_pending(recurrence)
        elif pending.tokens > 2 * CROPPABLE_TOKENS:
            self._pending = pending.cut(0, pending.tokens - CROPPABLE_TOKENS)
            self._absorb_pending(recurrence)
            self._pending = pending.cut(pending.tokens - CROPPABLE_TOKENS, pending.tokens)

    def _absorb_pending(self, recurrence: Recurrence[Any]) -> None:
        pending = self._pending
        if pending is not None:
            self._pending = None
            self._store(recurrence.absorb(pending.query, pending.key, pending.value, pending.mask, self.state))

    def _recurrence_of(self, layer: LinearAttention, inputs: AttentionInputs, *, keep: bool) -> Recurrence[Any]:
        """The layer's recurrent form, made again only when something it is made of has changed."""
        query, scaling = inputs.query, inputs.scaling
        if torch.compiler.is_compiling():
            return self._recurrence or layer.recurrent_form(query, scaling=scaling)
        # The tensors are kept: another one may get the id of one that is gone. A learned one changes in place.
        tensors = tuple(layer.tensors().values())
        versions = [(id(t), None if t.is_inference() else t._version) for t in tensors]
        made_from = (versions, scaling, query.dtype, query.device)
        if self._recurrence is None or not keep or self._made_from is None or self._made_from[0] != made_from:
            self._recurrence = layer.recurrent_form(query, scaling=scaling)
            self._made_from = (made_from, tensors) if keep else None
        return self._recurrence

    def _check(self, layer: LinearAttention, inputs: AttentionInputs) -> None:
        check_piece(layer, inputs)
        if self._reader is None:
            return
        self._reader.check(layer)
        if inputs.key.shape[0] != self.batch:
            raise InputError(
                f"This memory holds {self.batch} sequences; got a batch of {inputs.key.shape[0]}. Start with a new"
                " cache, or use its batch_repeat_interleave or batch_select_indices."
            )

    def _note(self, inputs: AttentionInputs) -> None:
        """Remember what was real, for `check_past`. Reads values; not with static shapes, which may compile."""
        if self.static_tokens is None:
            self._seen = self._seen.then(inputs.key_mask, inputs.key.shape[2], self.batch)

    def check_past(self, real: tuple[int, ...] | None) -> None:
        """Raise `InputError` if a mask calls other earlier tokens real than were read; `None` stands for all."""
        if self.static_tokens is None:
            self._seen.check(real, self.batch)

    # -- rows and time ----------------------------------------------------------------------------------------------
    @property
    def batch(self) -> int:
        """Sequences in the batch; -1 before the first token."""
        tensor = next(self._tensors(), None)
        return -1 if tensor is None else int(tensor.shape[0])

    def _tensors(self) -> Iterator[Tensor]:
        yield from state_tensors(self.state)
        yield from state_tensors(self._pending)

    def rows(self, index: Tensor) -> None:
        """Keep the rows `index` `[rows]`, in that order, some perhaps several times."""
        tensor = next(self._tensors(), None)
        if tensor is None:
            return
        self._arrive()
        index = index.to(tensor.device)
        if self.state is not None:
            self._store(self.state.rows(index))
        self._pending = map_state(self._pending, lambda z: z.index_select(0, index))
        self._seen = self._seen.rows(index)

    def crop(self, count: int) -> None:
        """Take the last `count` tokens back. Those before them become final.

        At least the last `CROPPABLE_TOKENS` tokens read in earlier calls, and all of the last call, can be taken back.

        Raises: UnsupportedError for tokens that were not recorded (`is_recording`).
        """
        pending = self._pending
        available = 0 if pending is None else pending.tokens
        if count > available:
            raise UnsupportedError(
                f"Cannot take {count} tokens back, only {available} here: those read while recording"
                " (`cache.activate_past_recording()`, which assisted generation does) and since the last crop, after"
                " which what is left is final. Keep a copy of the cache from before, or read the text again."
            )
        if pending is None:
            return
        self._arrive()
        kept = pending.cut(0, pending.tokens - count)
        if self._recurrence is None:
            raise UnsupportedError(
                "A copied cache, or one filled under autograd without recording, cannot be cropped before it has read"
                " its next tokens. Crop before copying."
            )
        mask = None if pending.mask is None else pending.mask[:, pending.tokens - count :]
        self._seen = self._seen.without_last(mask, count, self.batch)
        self._pending = kept if kept.tokens else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and pending.requires_grad()):
            self._absorb_pending(self._recurrence)

    def reset(self) -> None:
        """Forget everything."""
        if self.static_tokens is None or self.state is None or self._recurrence is None:
            is_recording = self.is_recording
            self.__init__(static_tokens=self.static_tokens)  # type: ignore[misc]
            self.is_recording = is_recording
            return
        self._arrive()
        # The tensors stay where they are: a captured graph may know them.
        window = self.state.window
        self._store(self._recurrence.start(window.key, window.value, static_tokens=self.static_tokens))
        self._pending = None

    # -- storage ----------------------------------------------------------------------------------------------------
    def _make_static(self) -> None:
        if self.static_tokens is not None and not torch.compiler.is_compiling():
            for tensor in state_tensors(self.state):
                torch._dynamo.mark_static_address(tensor)

    def _store(self, state: Any) -> None:
        if self.static_tokens is None:
            self.state = state
            return
        pairs = list(zip(state_tensors(self.state), state_tensors(state), strict=True))
        if any(old.shape != new.shape for old, new in pairs):  # another batch
            self.state = state
            self._make_static()
            return
        for old, new in pairs:
            old.copy_(new)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> RecurrentMemory:
        """Move everything to a device; returns itself, as accelerate's hooks expect of an argument that has `to`.

        A cache that offloads calls this on a stream of its own, and copies to pinned memory are not waited for: a copy
        starts after the one before it, and `_arrive` makes others wait for the last one.
        """
        stream = copying_stream(device, next(self._tensors(), None))
        if self._stream is not None and stream is not None:
            stream.wait_stream(self._stream)  # also for what that stream still does with the tensors given up here
        self.state, self._pending = (
            map_state(kept, lambda z: z.to(device, non_blocking=non_blocking)) for kept in (self.state, self._pending)
        )
        self._stream = stream
        return self

    def _arrive(self) -> None:
        """Wait for the last copy of `to` where its tensors are used next."""
        if self._stream is not None:
            self._stream = wait_for_copy(self._stream, next(self._tensors(), None))

    @property
    def nbytes(self) -> int:
        """Bytes of the state and of pending tokens."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._tensors()}
        return sum(storages.values())


def _requires_grad(layer: LinearAttention, inputs: AttentionInputs) -> bool:
    tensors = (inputs.query, inputs.key, inputs.value, *layer.tensors().values())
    return any([tensor.requires_grad for tensor in tensors])
