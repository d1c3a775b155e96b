"""Directions that are redrawn while training: what a layer holds is a function of (settings, shape, step).

A redraw depends on nothing else, so every rank and every resumed run has the same directions without exchanging or
storing a counter. The directions themselves are saved with the model: a checkpoint evaluates as it did in training.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .base import LinearAttention

# Stands for directions that came from elsewhere (a checkpoint) after the layer had been told a step.
_UNKNOWN = -1


def check_step(step: Any) -> int:
    """Raises `InputError` unless `step` is a number of training steps."""
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise InputError(f"step must be the number of optimizer steps taken so far, an integer >= 0; got {step!r}.")
    return step


def redraws(layer: nn.Module) -> bool:
    """Whether a module is an attention layer whose directions are to be redrawn."""
    return isinstance(layer, LinearAttention) and layer.config.redraw_interval is not None


@torch.no_grad()
def set_training_step(layer: LinearAttention, step: int) -> bool:
    """Give a layer the directions that belong to a training step.

    The buffers are changed in place, so wrappers and compiled graphs keep seeing them: call it between a backward pass
    and the next forward pass.

    Args:
        step: Optimizer steps taken so far; the directions are those of redraw number `step // redraw_interval`.
    Returns: Whether anything was drawn.
    Raises: InputError if `step` is not a number of steps.
    Random: a function of (seed, layer, redraw number) alone; the global generator is not touched.
    """
    check_step(step)
    if not redraws(layer):
        return False
    count = step // layer.config.redraw_interval  # type: ignore[attr-defined]
    known = getattr(layer, "_redraw_count", None)
    if known == count:
        return False
    buffers = layer.tensors()
    specs = layer.state_spec(layer.config, layer.shape)
    redrawn = {name: spec.redraw for name, spec in specs.items() if spec.redraw is not None}
    if any(buffers[name].is_meta for name in redrawn):
        return False
    for name, redraw in redrawn.items():
        buffers[name].copy_(redraw(count))
    layer.note_new_buffers()
    if known is None:
        layer.register_load_state_dict_post_hook(forget)
    layer._redraw_count = count
    return True


def forget(layer: nn.Module, *_: Any) -> None:
    """The layer's directions came from elsewhere: the next step draws them again, whatever its number."""
    if getattr(layer, "_redraw_count", None) is not None:
        layer._redraw_count = _UNKNOWN  # type: ignore[assignment]


def watch(layer: LinearAttention) -> None:
    """Warn once if a layer is trained for longer than its interval and nobody has told it a step."""
    if torch.compiler.is_compiling() or not redraws(layer):
        return
    if not (layer.training and torch.is_grad_enabled()) or getattr(layer, "_redraw_count", None) is not None:
        return
    forwards = getattr(layer, "_untold_forwards", 0) + 1
    layer._untold_forwards = forwards  # type: ignore[assignment]
    interval = layer.config.redraw_interval
    if forwards == interval + 1:
        warnings.warn(
            f"redraw_interval={interval}, but after {interval} training forward passes no layer has been told a step,"
            " so its directions stay the same. Add hf_linattn.training.LinAttnCallback() to the Trainer's callbacks,"
            " or call hf_linattn.training.redraw_projections(model, step) after every optimizer step.",
            stacklevel=2,
        )
