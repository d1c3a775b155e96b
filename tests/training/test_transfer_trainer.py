"""`AttentionTransferTrainer`: runs resume and divide, logs say what the layers do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, GPT2, ModelCase
from forked import in_processes
from torch import Tensor
from transfer_runs import (
    LARA,
    SETTINGS,
    EqualRows,
    close,
    every_target,
    logged,
    own,
    short,
    tensors,
    train,
    trainer_of,
)

from hf_linattn.errors import ConfigError, InputError


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": [1]},
        {"target": "hidden_states"},
        {"target": "hidden_states", "layers": [1]},
        {"row_weight": 0.5},
    ],
    ids=str,
)
def test_the_trainer_learns_and_resumes_as_if_nothing_had_happened(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = train(tmp_path / "whole", dropout=0.1, options=options)
    losses = logged(whole)
    assert whole.evaluate()["eval_loss"] < sum(losses) / len(losses)
    (tmp_path / "again").mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "again" / "checkpoint-3")
    again = train(tmp_path / "again", resume=True, dropout=0.1, options=options)
    assert logged(again) == losses
    expected, found = tensors(whole.model), tensors(again.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@every_target
@pytest.mark.parametrize("case", [BERT, GPT2], ids=lambda case: case.name)  # GPT-2 scales a loss of labels by itself
def test_accumulated_batches_are_one_batch(case: ModelCase, target: str, tmp_path: Path) -> None:
    fields = {"case": case, "rows": EqualRows(), "max_steps": 3, "options": {"target": target}}
    one = train(tmp_path / "one", **fields)
    two = train(tmp_path / "two", per_device_train_batch_size=2, gradient_accumulation_steps=2, **fields)
    for name, tolerance in (("loss", 1e-5), ("error_layer_1", 1e-5), ("grad_norm", 1e-4)):
        assert logged(one, name)[0] == pytest.approx(logged(two, name)[0], rel=tolerance)
    assert close(one.model, two.model)


@every_target
def test_in_bfloat16(tmp_path: Path, target: str) -> None:
    trained = train(tmp_path, bf16=True, max_steps=12, rows=EqualRows(), options={"target": target})
    losses = logged(trained)
    assert losses[-1] < losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in trained.model.parameters())


@every_target
def test_passes_are_without_dropout_and_noise(tmp_path: Path, target: str) -> None:
    options = {"options": {"target": target}, "max_steps": 2}
    plain = train(tmp_path / "plain", **options)
    noisy = train(tmp_path / "noisy", dropout=0.5, settings=SETTINGS.replace(slot_dropout=0.5), **options)
    assert logged(plain) == logged(noisy)


@pytest.mark.parametrize("layers", [None, [1]])
def test_logs_have_the_error_of_every_layer(tmp_path: Path, layers: Any) -> None:
    trained = train(tmp_path, logging_steps=1, max_steps=2, options={"layers": layers})
    names = [f"error_layer_{layer}" for layer in layers or (0, 1)]
    for entry in trained.state.log_history[:2]:
        errors = [entry[name] for name in names]
        assert entry["error"] == pytest.approx(sum(errors) / len(errors))
        assert entry["loss"] == pytest.approx(sum(error**2 for error in errors) / len(errors), rel=1e-3)
    assert not any(name.startswith("error_layer_0") for name in trained.state.log_history[0]) or layers is None


def train_on_two(folder: Path) -> dict[str, Tensor]:
    found = {}
    for target in ("attention", "hidden_states"):
        options = {"target": target}
        trainer = train(folder / target, per_device_train_batch_size=2, save_strategy="no", options=options)
        weights = own(trainer.accelerator.unwrap_model(trainer.model))
        found |= {f"{target} {name}": tensor for name, tensor in weights.items()}
    return found


def test_two_processes_are_one_with_the_same_batches(tmp_path: Path) -> None:
    found = in_processes(tmp_path / "two", 2, train_on_two, tmp_path / "two", launched=True)[0]
    for target in ("attention", "hidden_states"):
        two = {name.split(" ")[1]: tensor for name, tensor in found.items() if name.startswith(target)}
        one = own(train(tmp_path / "one" / target, save_strategy="no", options={"target": target}).model)
        assert one.keys() == two.keys()
        for name, expected in one.items():
            torch.testing.assert_close(two[name], expected, rtol=1e-5, atol=1e-5)


# -- mistakes -------------------------------------------------------------------------------------------------------
def test_residual_maps_take_a_smaller_learning_rate(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, settings=LARA, learning_rate=0.02)
    optimizer = trainer.create_optimizer()
    rates = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
    found = {name: rates[id(each)] for name, each in trainer.model.named_parameters() if ".linattn." in name}
    assert found == {name: pytest.approx(0.006 if name.endswith("adapter") else 0.02) for name in found}
    assert len(rates) == len(found) > 10
    given = torch.optim.SGD(trainer.model.parameters(), lr=1.0)
    trainer.optimizer = given
    assert trainer.create_optimizer().param_groups[0]["lr"] == 1.0


def test_the_learning_rate_of_fine_tuning_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_of(tmp_path).create_optimizer()
    assert "learning_rate" not in caplog.text
    trainer_of(tmp_path, learning_rate=5e-5).create_optimizer()
    assert "learning_rate is 5e-05" in caplog.text


def test_batches_that_teach_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first raises; a later one, also the first after resuming, is told."""
    trainer = trainer_of(tmp_path)
    with pytest.raises(InputError, match="fit into the window"):
        trainer.compute_loss(trainer.model.train(), short(BERT))
    trainer.state.global_step = 3
    loss = trainer.compute_loss(trainer.model.train(), short(BERT))
    loss.backward()  # what is learned is in the graph all the same
    trainer.log({"loss": loss.item()})
    assert "teaches nothing" in caplog.text


def test_arguments_that_hide_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="torch_compile must be False"):
        trainer_of(tmp_path, torch_compile=True)
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", property(lambda self: 2))
    with pytest.raises(ConfigError, match="a process for each GPU"):
        trainer_of(tmp_path)


@pytest.mark.parametrize("options", [{"target": "logits"}, {"layers": [7]}, {"row_weight": -1}], ids=str)
def test_settings_are_checked(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} must be"):
        trainer_of(tmp_path, options=options)
