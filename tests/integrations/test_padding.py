"""Padding changes nothing: the outputs of real tokens are those of the same rows without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BERT, GPT2, KINDS, TOKENS, VOCAB, ModelCase, converted, largest, logits, native, supported
from torch import Tensor

import hf_linattn

CASES = [
    pytest.param(kind, case, build, id=f"{kind}-{case.name}-{build.__name__}")
    for kind in KINDS
    for case in (BERT, GPT2)
    for build in (native, converted)
    if supported(kind, case, native=build is native)
]
LENGTHS = [40, 23, 8, 1, 33]


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in LENGTHS]


def padded(side: str, rows: list[Tensor], width: int = TOKENS) -> dict[str, Tensor]:
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = row, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


@pytest.mark.compat("padding")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("kind", "case", "build"), CASES)
def test_padded_rows_equal_unpadded_ones(kind: str, case: ModelCase, build: Any, side: str) -> None:
    model = build(case, kind)
    alone = [logits(model, input_ids=row[None])[0] for row in rows()]
    together = logits(model, **padded(side, rows()))
    wider = logits(model, **padded(side, rows()[1:3], width=47))
    for i, row in enumerate(rows()):
        n = len(row)
        assert largest((together[i, :n] if side == "right" else together[i, -n:]) - alone[i]) < 1e-5
    for i, row in enumerate(rows()[1:3]):
        n = len(row)
        assert largest((wider[i, :n] if side == "right" else wider[i, -n:]) - alone[1 + i]) < 1e-5


@pytest.mark.compat("padding")
@pytest.mark.parametrize(("kind", "case", "build"), CASES)
def test_all_padding_row(kind: str, case: ModelCase, build: Any) -> None:
    """Its outputs and gradients are finite, and it does not disturb the rows beside it."""
    model = build(case, kind)
    inputs = padded("right", rows())
    beside = logits(model, **inputs)
    inputs["attention_mask"][1] = 0
    out = model(**inputs)[0]
    assert torch.isfinite(out).all()
    others = [0, 2, 3, 4]
    real = inputs["attention_mask"][others].bool()
    assert largest((out.detach()[others] - beside[others])[real]) < 1e-5
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("case", [BERT, GPT2], ids=lambda case: case.name)
def test_all_padding_row_in_a_softmax_layer(case: ModelCase) -> None:
    model = hf_linattn.convert(case.build(), case.settings("favor_plus"), layers=[1])
    inputs = padded("left", rows())
    inputs["attention_mask"][1] = 0
    out = model(**inputs)[0]
    assert torch.isfinite(out).all()
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@pytest.mark.compat("padding")
@pytest.mark.parametrize("kind", KINDS)
def test_padding_reaches_the_attention_function(kind: str) -> None:
    """Without a registered mask function Transformers drops the mask silently."""
    model = native(BERT, kind)
    inputs = padded("right", rows())
    masked = logits(model, **inputs)
    inputs.pop("attention_mask")
    inputs.pop("position_ids", None)  # those of the padding repeat, which is an error without the mask
    assert largest((logits(model, **inputs) - masked)[1, :23]) > 1e-3
