"""Directions and statistics that change while an adapter (PEFT) is in place belong to the adapter, in training too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import CLASSIFIER, adapter, inputs_of, outputs, wrap
from cases import BERT, GPT2, TOKENS, VIT, ModelCase, converted
from transformers import Trainer, TrainingArguments

import hf_linattn
from hf_linattn import UncalibratedError, UnsupportedError
from hf_linattn.training import LinAttnCallback, key_noise, redraw_projections

peft = pytest.importorskip("peft")

REDRAWN = [(kind, case) for kind in ("favor_plus", "favor_sharp") for case in (CLASSIFIER, GPT2, VIT)]


@pytest.mark.parametrize(("kind", "case"), REDRAWN, ids=[f"{kind}-{case.name}" for kind, case in REDRAWN])
@pytest.mark.parametrize("method", ["lora", "ia3", "prompt", "lora with layers"])
def test_redrawn_directions_are_in_the_adapter(kind: str, case: ModelCase, method: str, tmp_path: Path) -> None:
    if case is VIT and method == "prompt":
        pytest.skip("PEFT has none for images")
    changes = {"modules_to_save": ["linattn"]} if method == "lora with layers" else {}
    base = converted(case, kind, redraw_interval=10)
    clean = copy.deepcopy(base)
    wrapped = wrap(base, adapter(case, method.split(" ")[0], **changes))
    before = outputs(wrapped, **inputs_of(case))
    assert redraw_projections(wrapped, 25) == 2
    want = outputs(wrapped, **inputs_of(case))
    assert not torch.allclose(want, before, atol=1e-4)
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(clean), tmp_path)
    torch.testing.assert_close(outputs(loaded, **inputs_of(case)), want, rtol=0, atol=0)
    if method.startswith("lora"):  # PEFT merges other methods only where all modules it saves have a weight
        torch.testing.assert_close(outputs(loaded.merge_and_unload(), **inputs_of(case)), want, rtol=0, atol=1e-4)
    if method != "prompt":
        with wrapped.disable_adapter():  # the model under it has its own directions still
            torch.testing.assert_close(outputs(wrapped, **inputs_of(case)), outputs(clean, **inputs_of(case)))


def test_directions_belong_to_one_adapter(tmp_path: Path) -> None:
    wrapped = wrap(converted(BERT, "favor_plus", redraw_interval=10), adapter(BERT, "lora"))
    redraw_projections(wrapped, 25)
    first = outputs(wrapped, **inputs_of(BERT))
    wrapped.add_adapter("second", adapter(BERT, "lora"))
    wrapped.set_adapter("second")
    redraw_projections(wrapped, 10)
    second = outputs(wrapped, **inputs_of(BERT))
    wrapped.set_adapter("default")
    torch.testing.assert_close(outputs(wrapped, **inputs_of(BERT)), first, rtol=0, atol=0)
    wrapped.save_pretrained(tmp_path)
    for folder, want in ((tmp_path, first), (tmp_path / "second", second)):
        loaded = peft.PeftModel.from_pretrained(converted(BERT, "favor_plus", redraw_interval=10), folder)
        torch.testing.assert_close(outputs(loaded, **inputs_of(BERT)), want, rtol=0, atol=0)


def test_without_the_adapter_the_model_under_it_changes(tmp_path: Path) -> None:
    wrapped = wrap(converted(BERT, "favor_plus", redraw_interval=10), adapter(BERT, "lora"))
    plain = converted(BERT, "favor_plus", redraw_interval=10)
    redraw_projections(plain, 25)
    with wrapped.disable_adapter():
        redraw_projections(wrapped, 25)
        torch.testing.assert_close(outputs(wrapped, **inputs_of(BERT)), outputs(plain, **inputs_of(BERT)))
    wrapped.save_pretrained(tmp_path)
    assert "linattn" not in (wrapped.peft_config["default"].modules_to_save or [])


def test_several_active_adapters_cannot_share_directions() -> None:
    wrapped = wrap(converted(BERT, "favor_plus", redraw_interval=10), adapter(BERT, "lora"))
    wrapped.add_adapter("second", adapter(BERT, "lora"))
    wrapped.base_model.set_adapter(["default", "second"])
    with pytest.raises(UnsupportedError, match=r"\['default', 'second'\] are active.*set_adapter"):
        redraw_projections(wrapped, 10)


def test_an_adapter_added_by_transformers_holds_its_directions(tmp_path: Path) -> None:
    model = converted(BERT, "favor_plus", redraw_interval=10)
    try:
        model.add_adapter(adapter(BERT, "lora", task_type=None))
    except ValueError as error:
        pytest.skip(str(error))  # releases of Transformers and PEFT that do not go together
    redraw_projections(model, 25)
    want = outputs(model, **inputs_of(BERT))
    model.save_pretrained(tmp_path)
    again = converted(BERT, "favor_plus", redraw_interval=10)
    again.load_adapter(str(tmp_path))
    torch.testing.assert_close(outputs(again, **inputs_of(BERT)), want, rtol=0, atol=0)


@pytest.mark.parametrize("modules", [None, ["linattn"]])
def test_random_numbers_are_keyed_in_the_layers_of_the_adapter(modules: Any) -> None:
    model = hf_linattn.convert(BERT.build(hidden_dropout_prob=0.0), BERT.settings("eva", sample_noise=True))
    wrapped = wrap(model, adapter(BERT, "lora", lora_dropout=0.0, modules_to_save=modules)).train()

    def logits() -> torch.Tensor:
        found: torch.Tensor = wrapped(**inputs_of(BERT)).logits
        return found

    assert key_noise(wrapped, 3) == 2
    first = logits()
    assert torch.equal(logits(), first)
    key_noise(wrapped, None)
    assert not torch.equal(logits(), first)


STATISTICS = [("favor_sharp", GPT2, {}), ("lara", GPT2, {}), ("favor_sharp", BERT, {"statistics": "calibrated"})]


@pytest.mark.parametrize(("kind", "case", "changes"), STATISTICS)
@pytest.mark.parametrize("through", ["wrapper", "inner model"])
def test_statistics_taken_with_an_adapter_are_in_it(
    kind: str, case: ModelCase, changes: Any, through: str, tmp_path: Path
) -> None:
    base = hf_linattn.convert(case.build(), case.settings(kind, **changes))
    clean = copy.deepcopy(base)
    wrapped = wrap(base, adapter(case, "lora"))
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    data = [{"input_ids": torch.randint(3, 60, (4, TOKENS))} for _ in range(2)]
    hf_linattn.calibrate(wrapped if through == "wrapper" else wrapped.get_base_model(), data)
    assert {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad} == trained
    assert not hf_linattn.needs_calibration(wrapped)
    want = outputs(wrapped, **inputs_of(case))
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(clean, tmp_path)
    torch.testing.assert_close(outputs(loaded, **inputs_of(case)), want, rtol=0, atol=0)


def test_an_adapter_on_a_calibrated_model_needs_the_same_model(tmp_path: Path) -> None:
    """Statistics of before the adapter are the base's: without them the model under the adapter says so."""
    wrapped = wrap(converted(GPT2, "favor_sharp"), adapter(GPT2, "lora"))
    wrapped.save_pretrained(tmp_path)
    uncalibrated = hf_linattn.convert(GPT2.build(), GPT2.settings("favor_sharp"))
    with pytest.raises(UncalibratedError, match="needs statistics of data"):
        outputs(peft.PeftModel.from_pretrained(uncalibrated, tmp_path), **inputs_of(GPT2))


# -- Trainer --------------------------------------------------------------------------------------------------------
def train(model: Any, folder: Path, resume: Any = None, **options: Any) -> Trainer:
    data = [{"input_ids": row, "labels": row} for row in torch.randint(3, 60, (8, TOKENS))]
    arguments = TrainingArguments(
        str(folder),
        **{"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.05, "save_steps": 1, **options},
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="falling",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data[:2],
        compute_metrics=lambda _, seen=[]: (seen.append(0), {"falling": -float(len(seen))})[1],  # noqa: B006
        callbacks=[LinAttnCallback()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("modules", [None, ["linattn"]])
@pytest.mark.parametrize("interval", [1, 3])
def test_the_best_adapter_at_the_end_has_its_own_directions(modules: Any, interval: int, tmp_path: Path) -> None:
    base = converted(GPT2, "favor_plus", redraw_interval=interval)
    clean = copy.deepcopy(base)
    wrapped = wrap(base, adapter(GPT2, "lora", modules_to_save=modules))
    trainer = train(wrapped, tmp_path, load_best_model_at_end=True)
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert best.endswith("checkpoint-1")
    found = outputs(wrapped, **inputs_of(GPT2))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(clean), best)
    torch.testing.assert_close(found, outputs(loaded, **inputs_of(GPT2)), rtol=0, atol=0)
    redraw_projections(loaded, 1)  # those of its step, not of the last one
    torch.testing.assert_close(found, outputs(loaded, **inputs_of(GPT2)), rtol=0, atol=0)
    redraw_projections(loaded, 4)
    assert not torch.allclose(found, outputs(loaded, **inputs_of(GPT2)), atol=1e-4)


def test_a_resumed_adapter_goes_on_as_it_would_have(tmp_path: Path) -> None:
    base = converted(GPT2, "favor_plus", redraw_interval=2)
    clean = copy.deepcopy(base)
    torch.manual_seed(5)
    wrapped = wrap(base, adapter(GPT2, "lora"))
    torch.manual_seed(5)
    train(wrapped, tmp_path)
    again = wrap(clean, adapter(GPT2, "lora"))
    torch.manual_seed(5)
    train(again, tmp_path / "again", resume=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(outputs(again, **inputs_of(GPT2)), outputs(wrapped, **inputs_of(GPT2)))
