"""The forward of a converted model that computes a part of its rows, and gives what one process would give."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed.collectives import SequenceGroup
from ..distributed.layers import attend_across
from ..distributed.parts import SequenceParts
from ..errors import InputError, UnsupportedError
from ..integrations.checks import check_positions
from ..integrations.keywords import PACKING
from ..integrations.seams import attention_of, find_cache
from ..modules.base import LinearAttention
from ..modules.contract import AttentionInputs
from ..modules.registry import list_kinds
from .token_heads import TOKEN_HEADS, part_loss, stock_head, token_targets

Forward = Callable[..., Any]

# Arguments that would not mean the same for a part, and what to do.
_REFUSED = {
    "encoder_hidden_states": "The model attends to another sequence, which is not shared.",
    "head_mask": "Drop the argument.",
    "output_hidden_states": "They would be those of a part: pass gather_output=True to have the last ones of all.",
    "use_cache": "Generate outside of context_parallel; a cache would hold a part of the tokens.",
    **dict.fromkeys(PACKING, "Give one sequence a row with a 2-D attention_mask; packed rows are for DDP."),
}


class SharedForward:
    """What a model and its layers call in place of their own forward and attention within `context_parallel`.

    Args:
        layers: Of the model.
        wholes: Tensors that were cut up, each with a copy of it as it was.
        whole: Whether what comes after the last layer gets whole rows.
    """

    def __init__(
        self,
        group: SequenceGroup,
        layers: Sequence[LinearAttention[Any]],
        wholes: Sequence[tuple[Tensor, Tensor]],
        *,
        whole: bool,
    ) -> None:
        self.group, self.layers, self.wholes, self.whole = group, layers, wholes, whole
        self.parts: SequenceParts | None = None
        self.is_padded = False  # of any call: a layer that is computed again for backward belongs to an earlier one
        self.is_open = False

    @contextmanager
    def running(self, model: Any, *, has_token_loss: bool) -> Iterator[None]:
        """Within the block `model` and the base model in it go through here."""
        base, stack = model.base_model, ExitStack()
        try:
            base.sequence_parallel = self._base_forward
            if has_token_loss and stock_head(model) in TOKEN_HEADS:
                model.sequence_parallel = self._head_forward
            elif model is not base and self.wholes:
                model.sequence_parallel = self._forward_of_whole_rows
            encoder, pooler = getattr(base, "encoder", None), getattr(base, "pooler", None)
            if self.whole and encoder is not None:  # before the pooler
                stack.callback(encoder.register_forward_hook(self._join_output).remove)
            elif pooler is not None:
                stack.callback(pooler.register_forward_pre_hook(self._give_first_token).remove)
            self.is_open = True
            yield
        finally:
            self.is_open = False
            stack.close()
            for part in (model, base):
                part.__dict__.pop("sequence_parallel", None)

    # -- layers -----------------------------------------------------------------------------------------------------
    def attend(self, layer: LinearAttention[Any], inputs: AttentionInputs) -> Tensor:
        """What a layer's queries read of the whole rows."""
        parts, tokens = self.parts, inputs.query.shape[2]
        if parts is None or tokens != parts.length:
            raise InputError(
                f"A layer was called with {tokens} tokens, which are not the part of this process"
                f" ({parts.length if parts else 'no'} tokens). Within context_parallel call the model, not its layers"
                " or the stock forward."
            )
        mask = inputs.key_mask
        if not self.is_padded:
            mask = None
        elif mask is None:  # all tokens of this part are real, but there is padding in another one
            query = inputs.query
            mask = torch.ones(query.shape[0], tokens, dtype=torch.bool, device=query.device)
        return attend_across(layer, replace(inputs, key_mask=mask), self.group)

    # -- the base model -----------------------------------------------------------------------------------------------
    @torch.compiler.disable
    def _base_forward(self, model: Any, forward: Forward, args: Any, kwargs: Any) -> Any:
        given = self._named(model, args, kwargs)
        self._check_call(model, given)
        tokens = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
        if not isinstance(tokens, Tensor) or tokens.ndim != (3 if given.get("input_ids") is None else 2):
            raise InputError(
                f"input_ids must be [batch, tokens], or inputs_embeds [batch, tokens, width]; got "
                f"{tuple(tokens.shape) if isinstance(tokens, Tensor) else tokens!r}. Processes share plain rows only."
            )
        batch, length = tokens.shape[:2]
        mask = given.get("attention_mask")
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
        elif not isinstance(mask, Tensor) or mask.shape not in ((batch, length), (1, length)):
            raise InputError(
                f"attention_mask must be [batch, tokens] = [{batch}, {length}] with 1 where a token is real; got "
                f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}."
            )
        mask = mask.bool().expand(batch, -1)
        self._check_same_rows(tokens, mask)
        positions = given.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=tokens.device)[None]
        check_positions(positions, mask, length)  # the parts of packed rows could each be in order

        # Parts are whole windows of all layers, and the first one has all global tokens.
        windows = lcm(*(layer.config.window_size or 1 for layer in self.layers))
        global_tokens = max(layer.config.num_global_tokens or 1 for layer in self.layers)
        self.parts = parts = SequenceParts.of(self.group, mask, windows, global_tokens)
        self.is_padded |= parts.is_padded
        padding = getattr(model.config, "pad_token_id", None) or 0
        whole = {**given, "attention_mask": mask, "position_ids": positions}
        fills: dict[str, Any] = {"input_ids": padding, "inputs_embeds": 0, "attention_mask": False, "position_ids": 0}
        for name, fill in {**fills, "token_type_ids": 0}.items():
            if isinstance(whole.get(name), Tensor):
                whole[name] = parts.cut(whole[name], fill)
        output = forward(**whole)
        if self.whole and getattr(model, "encoder", None) is None:
            output = self._join_output(model, None, output)
        if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            self._require_open(_first(output))
        return output

    def _named(self, model: Any, args: Any, kwargs: Any) -> dict[str, Any]:
        """Arguments of a forward by name, buffers that were cut up as they were before."""
        bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        named = {**bound, **bound.pop("kwargs", {})}
        named.pop("kwargs", None)
        del named["self"]
        found = {name: next((w for b, w in self.wholes if b is value), value) for name, value in named.items()}
        if any(found[name] is not named[name] for name in named):
            model.check_call((), dict(found))  # which has seen parts
        return found

    def _check_call(self, model: Any, given: dict[str, Any]) -> None:
        """Raise for what a part cannot answer. Switches the cache off."""
        if torch.jit.is_tracing():
            raise UnsupportedError("A model that shares its sequences cannot be traced. Run it as it is.")
        active = attention_of(model.config)
        if active not in list_kinds():
            raise UnsupportedError(
                f"The model runs with {active!r}, which would see the tokens of this process alone. Calibrate,"
                " compare, transfer and set_attn_implementation belong outside of context_parallel."
            )
        ablated = next((layer.ablation for layer in self.layers if layer.ablation is not None), None)
        if ablated is not None:
            raise UnsupportedError(f"ablated(model, {ablated!r}) needs whole rows: leave context_parallel first.")
        if find_cache((), given) is not None:
            raise UnsupportedError(f"A cache was passed. {_REFUSED['use_cache']}")
        for name, advice in _REFUSED.items():
            value = given.get(name)
            if name == "output_hidden_states" and value is None:
                value = model.config.output_hidden_states
            if value is not None and value is not False:
                shown = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise UnsupportedError(f"{name} has no answer where processes share sequences; got {shown}. {advice}")
        if "use_cache" in inspect.signature(type(model).forward).parameters:
            given["use_cache"] = False

    def _check_same_rows(self, tokens: Tensor, mask: Tensor) -> None:
        """Raise InputError, on all processes, if they were called with different rows."""
        values = mask if tokens.is_floating_point() else tokens * 2 + mask
        weights = torch.arange(1, 2 * values.numel(), 2, device=values.device).view_as(values)
        mine = torch.stack(
            [(values * weights).sum(), weights.new_tensor(mask.shape[0]), weights.new_tensor(mask.shape[1])]
        )
        found = [torch.empty_like(mine) for _ in range(self.group.size)]
        dist.all_gather(found, mine, group=self.group.group)
        if any(not torch.equal(other, mine) for other in found):
            shapes = [tuple(other[1:].tolist()) for other in found]
            raise InputError(
                f"All processes that share sequences must call the model with the same rows; got other ones, of shapes"
                f" {shapes}. Give the sampler the number of the group (mesh['dp']) in place of the process's rank; a"
                " buffer that was cut up must be passed itself, not a copy of it."
            )

    def _require_open(self, output: Tensor) -> None:
        """With activation checkpointing, layers run again in the backward pass: then the context has to be open."""

        def check(gradient: Tensor) -> None:
            if not self.is_open:
                raise InputError(
                    "With activation checkpointing backward() computes the layers again: call it within the"
                    " context_parallel block."
                )

        if output.requires_grad:
            output.register_hook(check)

    # -- after the last layer -----------------------------------------------------------------------------------------
    def _join_output(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """The output of an encoder or base model, with the states of whole rows."""
        assert self.parts is not None
        states = self.parts.join(_first(output))
        if isinstance(output, tuple):
            return (states, *output[1:])
        output.last_hidden_state = states
        return output

    def _give_first_token(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """To a pooler, which takes the first of the states that it gets."""
        assert self.parts is not None
        return (self.parts.column(inputs[0], 0), *inputs[1:])

    def _forward_of_whole_rows(self, model: Any, forward: Forward, args: Any, kwargs: Any) -> Any:
        """A head that reads its inputs, too: GPT-2's of rows looks for padding."""
        return forward(**self._named(model, args, kwargs))

    @torch.compiler.disable
    def _head_forward(self, model: Any, forward: Forward, args: Any, kwargs: Any) -> Any:
        """A head of single tokens, on the tokens of this part."""
        given = self._named(model, args, kwargs)
        self._check_call(model, given)
        kept, as_tuple = given.get("logits_to_keep"), given.get("return_dict", model.config.return_dict) is False
        if as_tuple or isinstance(kept, Tensor) or kept:
            what = "return_dict=False" if as_tuple else "logits_to_keep"
            raise UnsupportedError(f"{what} is not supported where processes share sequences. Drop it.")
        labels, shift_labels = given.pop("labels", None), given.pop("shift_labels", None)
        output = forward(**given)
        if labels is None:
            return output
        assert self.parts is not None
        head = stock_head(model)
        assert head is not None
        targets = token_targets(head, labels, shift_labels)
        if targets.shape[1] != self.parts.tokens:
            raise InputError(
                f"labels must be [batch, tokens] of the whole rows, {self.parts.tokens} tokens; got "
                f"{tuple(labels.shape)}."
            )
        loss = part_loss(head, output.logits, targets, self.parts, given.get("num_items_in_batch"))
        return type(output)(loss=loss, **{name: value for name, value in output.items() if name != "loss"})


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.last_hidden_state
