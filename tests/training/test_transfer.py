"""Attention transfer: the error falls, nothing else changes, layers by themselves or all together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, GPT2, ModelCase
from transfer_runs import (
    CASES,
    EVA,
    LARA,
    SETTINGS,
    batches,
    converted,
    every_case,
    every_kind,
    every_target,
    own,
    short,
    tensors,
)

from hf_linattn.integrations.attach import family_layers
from hf_linattn.training import teacher, transfer_attention
from hf_linattn.training.trained_layers import start, trained_layers


def str_of(value: Any) -> str:
    return getattr(value, "name", None) or getattr(value, "kind", value)


# Every kind with every family once, and both targets.
RUNS = [(case, kind, "attention") for case in CASES for kind in (SETTINGS, LARA, EVA)]
RUNS += [(case, kind, "hidden_states") for case, kind in zip(CASES, (LARA, EVA, SETTINGS), strict=True)]


@pytest.mark.parametrize(
    ("case", "settings", "target"),
    RUNS,
    ids=lambda value: getattr(value, "name", None) or getattr(value, "kind", value),
)
def test_the_error_falls_and_nothing_else_changes(case: ModelCase, settings: Any, target: str) -> None:
    model = converted(case, settings).train()
    before, required = tensors(model), [parameter.requires_grad for parameter in model.parameters()]
    steps = transfer_attention(model, batches(case), steps=31, target=target)  # the last on the first batch again
    assert [(step.step, step.layers) for step in steps] == [(step, (0, 1)) for step in range(31)]
    assert all(last < 0.95 * first for first, last in zip(steps[0].errors, steps[-1].errors, strict=True))
    after = tensors(model)
    learned = {name for name, _ in model.named_parameters() if ".linattn." in name}
    assert {name for name in before if not torch.equal(before[name], after[name])} == learned
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


@every_target
def test_gradients_only_where_something_is_learned(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    with_gradient: set[str] = set()
    model = converted(BERT)

    def step(self: Any, *arguments: Any) -> None:
        with_gradient.update(name for name, each in model.named_parameters() if each.grad is not None)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    transfer_attention(model, batches(BERT), steps=1, target=target, layers=[1])
    assert with_gradient == set(own(model, 1))


def test_gradients_from_before_and_of_a_step_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stale = converted(BERT), converted(BERT)
    for parameter in stale.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert transfer_attention(model, batches(BERT), steps=2) == transfer_attention(stale, batches(BERT), steps=2)

    def interrupt(*arguments: Any) -> None:  # called when a layer has its gradients
        raise KeyboardInterrupt

    monkeypatch.setattr(teacher, "is_exact", interrupt)
    with pytest.raises(KeyboardInterrupt):
        transfer_attention(model, batches(BERT), steps=1)
    assert all(parameter.grad is None for parameter in model.parameters())


@every_kind
def test_what_was_learned_is_saved_and_loaded(tmp_path: Path, settings: Any) -> None:
    model = converted(BERT, settings)
    transfer_attention(model, batches(BERT), steps=2)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    batch = batches(BERT)[0]
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, loaded(**batch).logits)
    assert loaded.config.linear_attention["learned"] is True


@every_target
@every_kind
def test_padding_does_not_count(settings: Any, target: str) -> None:
    """Rows with padding give the errors of the rows without."""
    rows = [{"input_ids": batch["input_ids"][:, :19]} for batch in batches(BERT)]
    padded = []
    for batch in rows:
        ids = torch.cat([batch["input_ids"], torch.full((3, 6), 7)], 1)
        padded.append({"input_ids": ids, "attention_mask": torch.tensor([[1] * 19 + [0] * 6] * 3)})
    runs = [transfer_attention(converted(BERT, settings), given, steps=4, target=target) for given in (rows, padded)]
    assert runs[0][-1].errors == pytest.approx(runs[1][-1].errors, rel=1e-4)


# -- where it starts ------------------------------------------------------------------------------------------------
def test_the_first_batch_sets_what_has_a_closed_form() -> None:
    model, batch = converted(BERT), batches(BERT)[0]
    start(model, batch, trained_layers(model, None))
    first = own(model)
    for name, value in first.items():
        assert bool(value.abs().sum() > 0) == name.endswith(("directions", "shift", "slot_bias", "far_offset")), name
    start(model, batch, trained_layers(model, None))  # from where it has been put, nothing is left to do
    torch.testing.assert_close(own(model), first)


@every_kind
def test_trained_layers_do_not_start_again(settings: Any) -> None:
    model = converted(BERT, settings)
    transfer_attention(model, batches(BERT), steps=2, layers=[0])
    trained, other = own(model, 0), own(model, 1)
    start(model, batches(BERT, number=3)[2], trained_layers(model, None))
    assert all(torch.equal(trained[name], value) for name, value in own(model, 0).items())
    assert any(not torch.equal(other[name], value) for name, value in own(model, 1).items())


# -- some layers ----------------------------------------------------------------------------------------------------
@every_case
def test_layers_one_by_one_are_layers_together(case: ModelCase) -> None:
    together, blocks = converted(case), converted(case)
    expected = transfer_attention(together, batches(case), steps=3)
    found = [transfer_attention(blocks, batches(case), steps=3, layers=[layer]) for layer in (0, 1)]
    assert [step.layers for run in found for step in run] == [(0,)] * 3 + [(1,)] * 3
    errors = [(first.errors[0], second.errors[0]) for first, second in zip(*found, strict=True)]
    assert errors == [step.errors for step in expected]
    assert all(torch.equal(value, own(together)[name]) for name, value in own(blocks).items())


@every_target
def test_other_layers_stay_as_they_are(target: str) -> None:
    model = converted(GPT2)
    before = own(model)
    transfer_attention(model, batches(GPT2), steps=2, target=target, layers=[1])
    changed = {name for name, value in own(model).items() if not torch.equal(before[name], value)}
    assert changed == set(own(model, 1))


@pytest.mark.parametrize(("layers", "target"), [([0], "attention"), (None, "attention"), (None, "hidden_states")])
def test_the_network_runs_no_further_than_it_has_to(layers: Any, target: str) -> None:
    """Up to the attention of the last layer that is trained; towards hidden states, up to the head."""
    model = converted(BERT)
    first, second = family_layers(model)
    block = model.bert.encoder.layer[1]
    parts = {"0": first, "1": second, "output": block.output, "head": model.cls}
    called = dict.fromkeys(parts, False)
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda module, args, name=name: called.update({name: True}))
    transfer_attention(model, batches(BERT), steps=1, layers=layers, target=target)
    assert called == {"0": True, "1": layers is None, "output": target == "hidden_states", "head": False}


# -- both stages ----------------------------------------------------------------------------------------------------
@every_case
def test_errors_are_those_of_the_hidden_states(case: ModelCase) -> None:
    model, batch = converted(case), batches(case)[0]
    step = transfer_attention(model, [batch], steps=1, learning_rate=0.0, target="hidden_states")[0]
    with torch.no_grad():
        softmax, linear = (
            each.eval()(**batch, output_hidden_states=True).hidden_states[1:]
            for each in (case.build(attention_probs_dropout_prob=0.0), model)
        )
    real = batch.get("attention_mask", torch.ones(softmax[0].shape[:2])).bool()
    for found, one, other in zip(step.errors, linear, softmax, strict=True):
        one, other = one[real], other[real]
        expected = (one - other).square().sum() / (other - other.mean(0)).square().sum()
        assert found == pytest.approx(math.sqrt(expected), rel=1e-4)


def test_the_second_stage_goes_on_from_the_first() -> None:
    model = converted(GPT2)
    transfer_attention(model, batches(GPT2), steps=40)
    before = transfer_attention(model, batches(GPT2), steps=1, learning_rate=0.0, target="hidden_states")[0]
    steps = transfer_attention(model, batches(GPT2), steps=31, learning_rate=3e-3, target="hidden_states")
    assert steps[0].errors == before.errors
    assert steps[-1].errors[-1] < 0.97 * before.errors[-1]


def test_runs_are_deterministic_without_dropout_and_noise() -> None:
    settings = SETTINGS.replace(slot_dropout=0.5)
    for target in ("attention", "hidden_states"):
        runs = [transfer_attention(converted(BERT, settings).train(), batches(BERT), steps=2, target=target)]
        runs += [transfer_attention(converted(BERT), batches(BERT), steps=2, target=target)]
        assert runs[0] == runs[1]


# -- reports --------------------------------------------------------------------------------------------------------
def test_the_progress_bar_has_the_error_of_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    steps = transfer_attention(converted(BERT), batches(BERT), steps=2, progress=True)
    shown = capsys.readouterr().err
    errors = " ".join(f"{error:.2f}".removeprefix("0") for error in steps[-1].errors)
    assert "2/2" in shown
    assert f"by layer {errors}" in shown


def test_a_later_batch_that_teaches_nothing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    given = [batches(BERT)[0], short(BERT)]
    steps = transfer_attention(converted(BERT), given, steps=4)
    assert max(steps[1].errors) < 1e-5
    assert [record.message for record in caplog.records if "teaches nothing" in record.message][1:] == []
    assert any("teaches nothing" in record.message for record in caplog.records)


@pytest.mark.parametrize(("target", "first"), [("attention", 3e-2), ("hidden_states", 1e-2)])
def test_the_learning_rate_decays_from_that_of_the_target(
    monkeypatch: pytest.MonkeyPatch, target: str, first: float
) -> None:
    rates: list[float] = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *_: rates.append(self.param_groups[0]["lr"]))
    transfer_attention(converted(BERT), batches(BERT), steps=4, target=target)
    assert rates == pytest.approx([first * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)])
