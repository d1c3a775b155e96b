"""`convert`, `revert`, `calibrate` and `compare` leave a model as it was if they raise, wherever they raise."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BERT, GPT2, VIT, ModelCase, converted, logits, matrix

import hf_linattn
import hf_linattn.conversion.convert
from hf_linattn.errors import UnsupportedError
from hf_linattn.integrations import attach as attaching
from hf_linattn.integrations.seams import attention_of

conversion = sys.modules["hf_linattn.conversion.convert"]  # the package has the function under its name


class BrokenError(Exception):
    pass


def state(model: Any) -> Any:
    """All that a model is but the values of its tensors, and those by identity."""
    return [
        (
            name,
            type(module),
            sorted(key for key in vars(module) if not key.startswith("__")),
            {key: value for key, value in vars(module).items() if isinstance(value, (int, float, str, bool))},
            {key: id(value) for key, value in (*module._parameters.items(), *module._buffers.items())},
            list(module._modules),
            list(module._forward_pre_hooks.values()),
            id(module.__dict__.get("config")),
            str(module.__dict__.get("config")),
        )
        for name, module in model.named_modules()
    ]


def steps(monkeypatch: pytest.MonkeyPatch, names: dict[str, Any], at: int) -> None:
    """Let the call number `at` of the functions fail, before or after they have done their work."""
    count = [0]

    def breaking(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            for is_after in (False, True):
                if is_after:
                    result = function(*args, **kwargs)
                count[0] += 1
                if count[0] == at:
                    raise BrokenError
            return result

        return call

    for name, owner in names.items():
        monkeypatch.setattr(owner, name, breaking(getattr(owner, name)))


STEPS = {
    "_set_config": conversion,
    "_set_classes": conversion,
    "attach": conversion,
    "detach": conversion,
    "select_attention": conversion,
    "set_model_class": conversion,
    "name_as_unsaved": conversion,
    "name_as_stock": conversion,
    "set_attention_dropout": attaching,
}


@pytest.mark.parametrize("function", ["convert", "revert"])
@pytest.mark.parametrize(("kind", "case"), matrix(BERT, GPT2, VIT))
def test_an_error_at_any_step(function: str, kind: str, case: ModelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    model = case.build() if function == "convert" else converted(case, kind)
    before, want, attention = state(model), logits(model, **case.inputs()), attention_of(model.config)
    for at in range(1, 100):
        with monkeypatch.context() as broken:
            steps(broken, STEPS, at)
            try:
                if function == "convert":
                    hf_linattn.convert(model, case.settings(kind))
                else:
                    hf_linattn.revert(model)
                break
            except BrokenError:
                assert state(model) == before, at
    else:
        raise AssertionError("more steps than expected")
    assert at > 12
    # Once it has gone through, the way back leads to the same model.
    if function == "convert":
        hf_linattn.revert(model)
        assert attention_of(model.config) == attention
        assert torch.equal(logits(model, **case.inputs()), want)


def test_a_base_model_of_the_users_own() -> None:
    model = BERT.build()
    model.bert.__class__ = type("MyBert", (type(model.bert),), {})
    before = state(model)
    with pytest.raises(UnsupportedError, match="stock class; got MyBert"):
        hf_linattn.convert(model, "eva")
    assert state(model) == before


@pytest.mark.parametrize("edit", [None, "favor_plus"])
def test_a_model_with_edited_settings_can_be_reverted(edit: Any) -> None:
    """The error about edited settings advises it."""
    stock = BERT.build()
    model = hf_linattn.convert(BERT.build(), "eva")
    model.config.linear_attention = edit
    assert torch.equal(logits(hf_linattn.revert(model), **BERT.inputs()), logits(stock, **BERT.inputs()))


@pytest.mark.parametrize("kind", ["favor_sharp", "lara"])
def test_calibrate_and_compare(kind: str) -> None:
    """A batch that raises in the middle: attention, mode and buffers are as before."""
    model = converted(GPT2, kind).train()
    model.transformer.h[0].eval()
    before, buffers = state(model), {name: b.clone() for name, b in model.named_buffers()}
    good, bad = GPT2.inputs(), {"input_ids": torch.full((2, 40), 1000)}
    for function in (hf_linattn.calibrate, hf_linattn.compare):
        with pytest.raises(IndexError):
            function(model, [good, bad])
        assert state(model) == before
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, buffers[name])
