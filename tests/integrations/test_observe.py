"""`observed_attention`: every layer shows what it is called with, and the model is as before afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BERT, GPT2, ModelCase, converted, largest, native
from torch import nn

from hf_linattn.integrations.attach import family_layers
from hf_linattn.integrations.call import Call
from hf_linattn.integrations.interface import linear_output, softmax_output
from hf_linattn.integrations.observe import observed_attention
from hf_linattn.integrations.seams import attention_of

CASES = [
    pytest.param(case, make, id=f"{case.name}-{make.__name__}")
    for case in (BERT, GPT2)
    for make in (converted, native)
]


def hidden(model: Any, case: ModelCase) -> torch.Tensor:
    with torch.no_grad():
        return model(**case.inputs(), output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize(("case", "make"), CASES)
def test_a_model_goes_on_with_what_is_returned(case: ModelCase, make: Any) -> None:
    model = make(case, "favor_plus")
    before, calls = hidden(model, case), {}

    def linear(module: nn.Module, call: Call) -> torch.Tensor:
        calls[module] = call
        return linear_output(module, call)

    with observed_attention(model, linear):
        assert largest(hidden(model, case) - before) == 0
    assert list(calls) == family_layers(model)
    assert {call.is_causal for call in calls.values()} == {case is GPT2}
    assert not any(call.is_cross or call.on_softmax for call in calls.values())
    with observed_attention(model, softmax_output):
        exact = hidden(model, case)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(hidden(model, case), exact)


def test_everything_is_restored_after_an_error() -> None:
    model = native(GPT2, "favor_plus").train()
    before = hidden(model.eval(), GPT2)
    model.transformer.h[0].train()

    def fail(module: nn.Module, call: Call) -> torch.Tensor:
        raise KeyError("told")

    def look() -> None:
        with observed_attention(model, fail):
            model.train()
            model(**GPT2.inputs())

    with pytest.raises(KeyError, match="told"):
        look()
    assert attention_of(model.config) == "favor_plus"
    assert [model.training, model.transformer.h[0].training, model.transformer.h[1].training] == [False, True, False]
    assert largest(hidden(model.eval(), GPT2) - before) == 0


def test_one_within_another() -> None:
    model, told = converted(BERT, "eva"), []

    def note(name: str) -> Any:
        return lambda module, call: told.append(name) or softmax_output(module, call)

    with observed_attention(model, note("outer")):
        with observed_attention(model, note("inner")):
            hidden(model, BERT)
        hidden(model, BERT)
    layers = len(family_layers(model))
    assert told == ["inner"] * layers + ["outer"] * layers
