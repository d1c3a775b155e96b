"""`KindDefinition`: what a kind of attention defines, beside its settings. `base.py` has what all kinds share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..ops.inputs import check_causal
from ..ops.recurrent.exact_start import ExactStart
from ..ops.recurrent.protocol import Recurrence
from .config import AttentionConfig
from .contract import CALIBRATED_TOKENS, AttentionInputs, Calibration, LayerShape, StateTensor

C = TypeVar("C", bound=AttentionConfig)


class KindDefinition(nn.Module, Generic[C]):
    """What the subclass of `LinearAttention` for a kind may define; it must define `state_spec` and `compute`."""

    kind: ClassVar[str]
    config: C

    @classmethod
    def check(cls, config: C, shape: LayerShape) -> None:
        """Raise `UnsupportedError` or `ConfigError` if the settings cannot work in such a layer. Extends this one."""
        if shape.is_causal:
            check_causal(config.num_global_tokens or 0, config.num_heavy_keys)
            if config.value_convolution:
                where = "False in a causal layer, which reads a sequence"
                config.fail("value_convolution", where, "A convolution of the values is for images.")

    @classmethod
    def check_grid(cls, config: C, *, is_image: bool) -> None:
        """Raise `ConfigError` for settings that contradict what the model's tokens are: patches, or a sequence.

        Extends this one.
        """
        if config.value_convolution and not is_image:
            config.fail("value_convolution", "False in a model of sequences", "Its filters are those of patches.")

    @classmethod
    def is_exact_in_window(cls, config: C) -> bool:
        """Whether a row that fits into one window is softmax attention: a kind that is sure of it says so."""
        return False

    @classmethod
    def native_refusal(cls, config: C, shape: LayerShape, *, training: bool) -> str | None:
        """Why native mode, which keeps no tensors, cannot serve such a layer, and what to do; `None` if it can."""
        spec = cls.state_spec(config, shape)
        needed = [name for name, tensor in spec.items() if tensor.learned and not tensor.optional]
        if needed:
            return f"{cls.kind!r} learns {', '.join(needed)}, and native mode has no parameters. Take another kind"
        if CALIBRATED_TOKENS in spec and not shape.is_causal:  # of causal ones the kind's record says it
            return (
                f"config.linear_attention asks for calibrated {cls.kind!r}, but native mode keeps no statistics."
                " Leave out the field: bidirectional models take their statistics from each row"
            )
        if training and config.redraw_interval is not None:
            return (
                f"config.linear_attention asks for redraw_interval={config.redraw_interval}, but native mode has no"
                " layers that could keep new directions. Set redraw_interval to None"
            )
        return None

    @classmethod
    def state_spec(cls, config: C, shape: LayerShape) -> dict[str, StateTensor]:
        """Names and shapes of the layer's tensors, and how each gets its first value."""
        raise NotImplementedError  # abstract: every registered kind has its own

    @classmethod
    def compute(cls, config: C, state: Mapping[str, Tensor], inputs: AttentionInputs) -> Tensor:
        """The attention itself: a pure function of its arguments. Native mode calls it with buffers alone."""
        raise NotImplementedError  # abstract: every registered kind has its own

    @classmethod
    def supports_recurrence(cls, config: C, *, is_causal: bool) -> bool:
        """Whether such a layer can read a sequence piece by piece with a state (`recurrence`)."""
        return is_causal and cls.recurrence is not KindDefinition.recurrence

    def recurrence(self, query: Tensor, *, scaling: float) -> Recurrence[Any]:
        """The layer's recurrent form, for queries like `query` `[batch, heads, tokens, head_dim]`.

        Raises: `UnsupportedError` if there is none (`supports_recurrence`).
        """
        raise UnsupportedError(f"{type(self).__name__} has no recurrent form: it reads whole sequences only.")

    def recurrent_form(self, query: Tensor, *, scaling: float) -> Recurrence[Any]:
        """`recurrence`, with softmax attention for the first tokens of a row if the settings say so."""
        recurrence, exact_below = self.recurrence(query, scaling=scaling), self.config.exact_below
        return ExactStart(recurrence, exact_below, scaling) if exact_below else recurrence

    def recurrence_options(self) -> dict[str, Any]:
        """Arguments of a recurrent form that the shared settings say."""
        return {
            "window_size": self.config.window_size or 0,
            "overlap_window": self.config.overlap_window,
            "slot_dropout": self.config.slot_dropout if self.training else 0.0,
        }

    def new_calibration(self, stream: int = 0, first_row: int | None = None) -> Calibration | None:
        """An empty `Calibration`, or `None` if the layer has nothing to learn from data in closed form.

        `stream` is the process's rank: what is drawn at random differs between streams, unless `first_row` says which
        rows the process has among those of all. A layer that has one keeps a scalar buffer `calibrated_tokens`, the
        number of tokens it has been calibrated on.
        """
        return None

    def learning_start(
        self, inputs: AttentionInputs, mean: Callable[[Tensor, Tensor], Tensor] = torch.div
    ) -> dict[str, Tensor]:
        """Values in closed form of learned tensors, by name, from one call: where attention transfer starts.

        `mean` makes of a sum over these tokens and of their number the mean over the tokens of all processes.
        """
        return {}
