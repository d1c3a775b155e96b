"""Directions that are redrawn while training: what a layer holds is a function of (settings, shape, step).

A redraw depends on nothing else, so every rank and every resumed run has the same directions without exchanging or
storing a counter. The directions themselves are saved with the model: a checkpoint evaluates as it did in training.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..errors import InputError
from .base import LinearAttention
from .definition import C


def check_step(step: Any) -> int:
    """Raises `InputError` unless `step` is a number of training steps."""
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise InputError(f"step must be the number of optimizer steps taken so far, an integer >= 0; got {step!r}.")
    return step


def redraws(layer: nn.Module) -> TypeGuard[RedrawnAttention[Any]]:
    """Whether a module is an attention layer whose directions are to be redrawn."""
    return isinstance(layer, RedrawnAttention) and layer.config.redraw_interval is not None


class RedrawnAttention(LinearAttention[C]):
    """A layer with buffers that get new values every `redraw_interval` training steps (`StateTensor.redraw`)."""

    # Number of the last redraw and the layer's revision after it: at another revision the buffers come from elsewhere
    # (a checkpoint), and the next step draws them again whatever its number. `None` before the first.
    _drawn: tuple[int, int] | None = None
    _untold_passes = 0

    @torch.no_grad()
    def set_training_step(self, step: int) -> bool:
        """Give the layer the directions that belong to a training step.

        The buffers are changed in place, so wrappers and compiled graphs keep seeing them: call it between a backward
        pass and the next forward pass.

        Args:
            step: Optimizer steps taken so far; the directions are those of redraw number `step // redraw_interval`.
        Returns: Whether anything was drawn.
        Raises: InputError if `step` is not a number of steps.
        Random: a function of (seed, layer, redraw number) alone; the global generator is not touched.
        """
        check_step(step)
        interval = self.config.redraw_interval
        if interval is None or self._drawn == (step // interval, self.revision):
            return False
        buffers = self.tensors(all_heads=True)
        specs = self.state_spec(self.config, self.shape)
        redrawn = {name: spec.redraw for name, spec in specs.items() if spec.redraw is not None}
        if any(buffers[name].is_meta for name in redrawn):
            return False
        for name, redraw in redrawn.items():
            buffers[name].copy_(redraw(step // interval))
        self.invalidate()
        self._drawn = (step // interval, self.revision)
        return True

    def in_training(self, output: Tensor) -> Tensor:
        """Warns once if the layer is trained for longer than its interval and nobody has told it a step."""
        interval = self.config.redraw_interval
        if interval is not None and self._drawn is None and not torch.compiler.is_compiling():
            self._untold_passes += 1
            if self._untold_passes == interval + 1:
                warnings.warn(
                    f"redraw_interval={interval}, but after {interval} training forward passes no layer has been told"
                    " a step, so its directions stay the same. Add hf_linattn.training.LinAttnCallback() to the"
                    " Trainer's callbacks, or call hf_linattn.training.redraw_projections(model, step) after every"
                    " optimizer step.",
                    stacklevel=2,
                )
        return super().in_training(output)
