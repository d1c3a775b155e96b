"""A fifth kind, all of it: what somebody writes who adds one. `modules/test_fifth_kind.py` runs the matrix over it.

FAVOR+ with directions that are learned, or drawn and fixed: features that suit the data, at the price of parameters.
As a plugin of pytest (`-p fifth_kind`) it is registered before the tests are collected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hf_linattn.functional import favor_attention
from hf_linattn.modules.base import AttentionInputs, LinearAttention
from hf_linattn.modules.config import AttentionConfig, count, flag
from hf_linattn.modules.contract import LayerShape, StateTensor
from hf_linattn.modules.registry import AttentionKind, register_kind
from hf_linattn.ops.favor.random_features import derive_seed, draw_projection
from hf_linattn.ops.favor.recurrent import favor_recurrence
from hf_linattn.ops.recurrent.slots import SlotRecurrence

NAME = "own_directions"


@dataclass(frozen=True, kw_only=True)
class FifthConfig(AttentionConfig):
    """Settings of the fifth kind.

    Args:
        num_directions: Features per head.
        learned: Whether the directions are parameters. Converted models only.
    """

    kind = NAME

    num_directions: int = count(64)
    learned: bool = flag(False)

    def validate(self) -> None:
        super().validate()
        self._check_even_overlap()


class FifthAttention(LinearAttention[FifthConfig]):
    """Features of directions of the layer's own."""

    kind = NAME

    @classmethod
    def state_spec(cls, config: FifthConfig, shape: LayerShape) -> dict[str, StateTensor]:
        size = (shape.num_heads, config.num_directions, shape.head_dim)
        seed = derive_seed(config.seed, shape.layer_idx, NAME)
        draw = lambda: draw_projection(*size, seed=seed)  # noqa: E731
        return {"directions": StateTensor(size, learned=config.learned, draw=draw)}

    @classmethod
    def compute(cls, config: FifthConfig, state: Mapping[str, Tensor], inputs: AttentionInputs) -> Tensor:
        return favor_attention(
            inputs.query, inputs.key, inputs.value, state["directions"], **cls.call_options(config, inputs)
        )

    def recurrence(self, query: Tensor, *, scaling: float) -> SlotRecurrence:
        directions = self.tensors()["directions"]
        return favor_recurrence(query, directions, scaling=scaling, **self.recurrence_options())


register_kind(
    AttentionKind(
        name=NAME,
        title="the fifth kind",
        paper="arXiv:2009.14794",
        config_cls=FifthConfig,
        module_cls=FifthAttention,
        size_field="num_directions",
        causal="yes",
        supports_cross=True,
        checkpoint_fields=("learned",),
        example={"num_directions": 32},
    )
)
