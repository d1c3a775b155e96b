"""Models whose position tables are extended, and what their tables should become."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BY_NAME, VOCAB, converted
from torch import Tensor, nn

import hf_linattn

OLD, NEW = 64, 150  # two seams when tiled, the last copy incomplete
CASES = [pytest.param(BY_NAME[name], id=name) for name in ("bert-classifier", "bert-mlm", "gpt2")]


def reverted(case: Any, kind: str = "favor_plus") -> Any:
    return hf_linattn.revert(converted(case, kind))


FORMS: dict[str, Callable[[Any], Any]] = {
    "stock": lambda case: case.build(),
    "favor_plus": lambda case: converted(case, "favor_plus"),
    "favor_sharp": lambda case: converted(case, "favor_sharp"),
    "lara": lambda case: converted(case, "lara"),
    "eva": lambda case: converted(case, "eva"),
    "mixed": lambda case: converted(case, "favor_plus", layers=[1]),
    "reverted": reverted,
}


def table_of(model: Any) -> nn.Embedding:
    base = model.base_model
    return base.wpe if hasattr(base, "wpe") else base.embeddings.position_embeddings


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))


def snapshot(model: Any) -> tuple[Any, ...]:
    state = {name: (id(tensor), tensor.clone() if not tensor.is_meta else None) for name, tensor in state_of(model)}
    return state, model.config.to_dict()


def state_of(model: Any) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
