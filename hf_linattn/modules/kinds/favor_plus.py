"""FAVOR+: positive orthogonal random features, or those of a generalised kernel (Choromanski et al. 2021).

arXiv:2009.14794.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...ops.favor.attention import favor_attention
from ...ops.favor.generalized import KERNELS, NO_SOFTMAX, generalized_attention
from ...ops.favor.random_features import derive_seed, draw_projection
from ...ops.favor.recurrent import favor_recurrence
from ...ops.learned import NORMALIZERS, learned_recurrence
from ...ops.recurrent.slots import SlotRecurrence
from ..config import LearnedConfig, choice, count, factor, flag
from ..contract import AttentionInputs, LayerShape, StateTensor
from ..learned_maps import learned_feature_map, learned_output, learned_spec, learned_start
from ..redraw import RedrawnAttention
from ..registry import AttentionKind, register_kind

# Slots per head: random features, and learned ones.
RANDOM_FEATURES, LEARNED_FEATURES = 64, 32


@dataclass(frozen=True, kw_only=True)
class FavorConfig(LearnedConfig):
    """Settings shared by FAVOR+ and FAVOR#.

    Args:
        num_features: Features per head (M); `None` is 64, or 32 learned ones. Cost grows with it, the error of random
            features falls like its square root.
        orthogonal: Orthogonal directions; False draws them independently.
        shared_projection: One set of directions for all heads of a layer instead of one per head.
        redraw_interval: New directions every so many training (optimizer) steps, `None` for never. They follow from
            the seed, the layer and the step alone. The training loop has to tell the step:
            `hf_linattn.training.LinAttnCallback` with a Trainer, `hf_linattn.training.redraw_projections` elsewhere.
        num_heavy_keys: Keys of the row that every query sees exactly (bidirectional only); 0 for none.
        chunk_size: Tokens, a power of two, within which queries and keys meet directly rather than through a state of
            the slots (causal or with a window). Changes cost, never the result.
        learned: Maps of queries and keys to the slots that are trained, of their own for each
            (`hf_linattn.training.transfer_attention`), instead of random directions, from which they start.
        normalizer: Of the key weights of learned maps. "slots": each key spreads one unit of weight over the slots.
            "kernel": that of random features, `exp(-|y|^2 / 2)`: training then starts from exactly what random
            features give, but for the offset of the far mass.
    """

    num_features: int = count(None)
    orthogonal: bool = flag(True)
    shared_projection: bool = flag(False)
    redraw_interval: int | None = None
    num_heavy_keys: int = count(0, minimum=0)
    chunk_size: int | None = count(None, maximum=4096)
    normalizer: str = choice("slots", NORMALIZERS)

    def __post_init__(self) -> None:
        if self.num_features is None:
            object.__setattr__(self, "num_features", LEARNED_FEATURES if self.learned else RANDOM_FEATURES)
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if not self.learned:  # as a version without learned maps wrote and reads it
            del values["normalizer"]
        return values

    def validate(self) -> None:
        super().validate()
        self._check_even_overlap()
        if self.learned and self.redraw_interval is not None:
            self.fail("redraw_interval", "None with learned=True", "Learned maps are trained, not drawn.")
        if self.learned and self.shared_projection:
            self.fail("shared_projection", "False with learned=True", "Every head learns maps of its own.")
        if not self.learned and self.normalizer != "slots":
            self.fail(
                "normalizer", "'slots' (the default) without learned=True", "Random features have one normaliser."
            )
        if self.chunk_size is not None and self.chunk_size & (self.chunk_size - 1):
            self.fail("chunk_size", "a power of two, or None")
        interval = self.redraw_interval
        is_integer = isinstance(interval, int) and not isinstance(interval, bool)
        if interval is not None and not (is_integer and 1 <= interval < 2**63):
            self.fail("redraw_interval", "an integer >= 1 (training steps), or None for never")


@dataclass(frozen=True, kw_only=True)
class FavorPlusConfig(FavorConfig):
    """Settings of FAVOR+. See `FavorConfig` and `AttentionConfig` for the shared ones.

    Args:
        regularized: Directions of fixed length `head_dim ** 0.5` instead of chi-distributed ones: a little less
            variance, a slight bias.
        kernel: "softmax" estimates softmax attention. "relu", "exp", "sigmoid", "softplus", "abs" and "square" make it
            generalised kernel attention with features `kernel(W z) + kernel_epsilon` (Performer-ReLU and others): an
            attention of its own that a pretrained model has to be trained for, without window, global tokens, heavy
            keys and exact short inputs, which are 0 by default then.
        kernel_epsilon: Part of a generalised kernel's definition; not used by "softmax", which has no epsilon. With 0
            a query whose features overlap those of no key gives 0.
    """

    kind = "favor_plus"

    regularized: bool = flag(False)
    kernel: str = choice("softmax", ("softmax", *KERNELS))
    kernel_epsilon: float = factor(1e-3)

    def own_defaults(self, group: str) -> dict[str, Any]:
        # Nothing exact can stand beside attention that does not estimate softmax attention.
        return {} if self.kernel == "softmax" else {"window_size": 0, "num_global_tokens": 0}

    def validate(self) -> None:
        super().validate()
        if self.kernel != "softmax":
            for field in ("window_size", "num_global_tokens", "num_heavy_keys", "exact_below"):
                if getattr(self, field):
                    self.fail(field, f"0 with kernel={self.kernel!r}", NO_SOFTMAX)
            for field in ("overlap_window", "learned"):
                if getattr(self, field):
                    self.fail(field, f"False with kernel={self.kernel!r}", NO_SOFTMAX)
        if self.regularized and not self.orthogonal:
            why = "Fixed lengths only make sense for orthogonal directions."
            self.fail("regularized", "False when orthogonal=False", why)


def projection_spec(config: FavorConfig, shape: LayerShape, *, regularized: bool = False) -> StateTensor:
    """The layer's directions: `[num_heads, num_features, head_dim]`, shared ones `[num_features, head_dim]`."""
    num_heads = None if config.shared_projection else shape.num_heads
    size = (config.num_features, shape.head_dim)

    def draw(count: int) -> Tensor:
        # Redraw 0 has the seed of a layer that is never redrawn.
        number = (count,) if count else ()
        return draw_projection(
            num_heads,
            *size,
            seed=derive_seed(config.seed, shape.layer_idx, "projection", *number),
            orthogonal=config.orthogonal,
            regularized=regularized,
        )

    return StateTensor(
        shape=size if num_heads is None else (num_heads, *size), learned=False, draw=lambda: draw(0), redraw=draw
    )


F = TypeVar("F", bound=FavorConfig)


class FavorAttention(RedrawnAttention[F]):
    """What FAVOR+ and FAVOR# share: the layer's own directions, which may be redrawn, and their recurrent form.

    With `learned=True` the layer has maps of its own in their place (`modules/learned_maps.py`).
    """

    projection: Tensor

    @classmethod
    def is_exact_in_window(cls, config: F) -> bool:
        return True

    def learning_start(
        self, inputs: AttentionInputs, mean: Callable[[Tensor, Tensor], Tensor] = torch.div
    ) -> dict[str, Tensor]:
        return learned_start(self.config, self.tensors(), inputs, mean) if self.config.learned else {}

    def recurrence_options(self) -> dict[str, Any]:
        return {**super().recurrence_options(), "chunk_size": self.config.chunk_size}

    def recurrence(self, query: Tensor, *, scaling: float) -> SlotRecurrence:
        if self.config.learned:
            feature_map = learned_feature_map(self.tensors(), self.config.normalizer)
            return learned_recurrence(feature_map, scaling=scaling, **FavorAttention.recurrence_options(self))
        return favor_recurrence(query, self.tensors()["projection"], scaling=scaling, **self.recurrence_options())


class FavorPlusAttention(FavorAttention[FavorPlusConfig]):
    """FAVOR+, or attention with a generalised kernel."""

    kind = "favor_plus"

    @classmethod
    def state_spec(cls, config: FavorPlusConfig, shape: LayerShape) -> dict[str, StateTensor]:
        projection = projection_spec(config, shape, regularized=config.regularized)
        return learned_spec(config, projection) if config.learned else {"projection": projection}

    def recurrence_options(self) -> dict[str, Any]:
        kernel = {"kernel": self.config.kernel, "kernel_epsilon": self.config.kernel_epsilon}
        return {**super().recurrence_options(), **kernel}

    @classmethod
    def compute(cls, config: FavorPlusConfig, state: Mapping[str, Tensor], inputs: AttentionInputs) -> Tensor:
        if config.learned:
            return learned_output(config, state, inputs)
        if config.kernel == "softmax":
            return favor_attention(
                inputs.query,
                inputs.key,
                inputs.value,
                state["projection"],
                num_heavy_keys=config.num_heavy_keys,
                chunk_size=config.chunk_size,
                **cls.call_options(config, inputs),
            )
        return generalized_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            state["projection"],
            kernel=config.kernel,
            kernel_epsilon=config.kernel_epsilon,
            chunk_size=config.chunk_size,
            **cls.call_options(config, inputs),
        )


register_kind(
    AttentionKind(
        name="favor_plus",
        title="FAVOR+",
        paper="arXiv:2009.14794",
        config_cls=FavorPlusConfig,
        module_cls=FavorPlusAttention,
        size_field="num_features",
        causal="yes",
        supports_cross=True,
        checkpoint_fields=("kernel", "learned", "normalizer", "value_convolution"),
        example={"num_features": 32},
    )
)
