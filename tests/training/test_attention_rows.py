"""The rows of attention, of softmax and of any kind, and what they add to the loss."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import BERT, GPT2, VIT, ModelCase
from torch import Tensor
from transfer_runs import EVA, LARA, SETTINGS, batches, converted, every_case, every_kind, seen_calls, short

from hf_linattn.errors import ConfigError, InputError
from hf_linattn.integrations.interface import linear_output, softmax_output
from hf_linattn.training import objective, transfer_attention
from hf_linattn.training.objective import linear_rows, row_divergence, softmax_rows


def last_call(model: Any, batch: dict[str, Tensor]) -> Any:
    with torch.no_grad(), seen_calls(model.eval()) as calls:
        model(**batch)
    return calls[-1]


def real_queries(call: Any) -> Tensor:
    """`[batch, tokens]`, True where a query is real."""
    return torch.ones(call.query.shape[0], call.query.shape[2]).bool() if call.key_mask is None else call.key_mask


@every_kind
@every_case
@torch.no_grad()
def test_rows_are_the_weights_of_the_values(case: ModelCase, settings: Any) -> None:
    module, call = last_call(converted(case, settings), batches(case)[0])
    real = real_queries(call)
    for rows, output in (
        (linear_rows(module, call), linear_output(module, call)),
        (softmax_rows(call), softmax_output(module, call)),
    ):
        assert rows.shape == (*call.query.shape[:3], call.key.shape[2])
        torch.testing.assert_close((rows @ call.value).transpose(1, 2)[real], output[real], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rows.sum(-1).transpose(1, 2)[real], torch.ones(int(real.sum()), rows.shape[1]))


@torch.no_grad()
@pytest.mark.parametrize(("case", "settings"), [(BERT, SETTINGS), (GPT2, EVA), (VIT, LARA)])
def test_divergence_is_that_of_distributions(case: ModelCase, settings: Any) -> None:
    module, call = last_call(converted(case, settings), batches(case)[0])
    softmax, linear = (
        rows.transpose(1, 2)[real_queries(call)] for rows in (softmax_rows(call), linear_rows(module, call))
    )
    expected = (softmax * (softmax.clamp_min(1e-30).log() - linear.clamp_min(1e-30).log())).sum(-1).mean()
    assert expected > 0.05
    torch.testing.assert_close(row_divergence(module, call), expected, rtol=1e-4, atol=0)


@torch.no_grad()
def test_equal_rows_do_not_diverge() -> None:
    module, call = last_call(converted(BERT), short(BERT))
    assert abs(float(row_divergence(module, call))) < 1e-5


def test_a_weight_of_rows_brings_them_closer() -> None:
    found = {}
    for weight in (0.0, 10.0):
        model = converted(BERT)
        transfer_attention(model, batches(BERT), steps=40, row_weight=weight)
        with torch.no_grad():
            found[weight] = float(row_divergence(*last_call(model, batches(BERT)[0])))
    assert found[10.0] < 0.97 * found[0.0]


def test_long_inputs_have_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "MAX_ROW_TOKENS", 20)
    model = converted(BERT)
    with pytest.raises(InputError, match="at most 20 tokens; got 24"):
        transfer_attention(model, batches(BERT), steps=1, row_weight=0.1)
    transfer_attention(model, batches(BERT, tokens=20), steps=1, row_weight=0.1)


def test_a_convolution_of_the_values_has_no_rows() -> None:
    module, call = last_call(converted(VIT), batches(VIT)[0])
    layer = SimpleNamespace(config=SimpleNamespace(value_convolution=True))
    with pytest.raises(ConfigError, match="row_weight must be 0 with value_convolution=True"):
        row_divergence(module, dataclasses.replace(call, layer=layer))
