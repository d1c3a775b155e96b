"""Adapters (PEFT) round converted models: what they compute, and what their files hold."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, BY_NAME, CAUSAL_KINDS, GPT2, KINDS, TOKENS, VIT, ModelCase, converted, ready, supported
from torch import Tensor
from transformers import Trainer, TrainingArguments

import hf_linattn
from hf_linattn import UncalibratedError, UnsupportedError
from hf_linattn.training import LinAttnCallback, redraw_projections

peft = pytest.importorskip("peft")
CLASSIFIER = BY_NAME["bert-classifier"]
TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn"], "vit": ["q_proj", "v_proj"]}
TASKS = {"bert-classifier": "SEQ_CLS", "bert-mlm": "FEATURE_EXTRACTION", "gpt2": "CAUSAL_LM", "vit": None}


def adapter(case: ModelCase, method: str, **changes: Any) -> Any:
    """An adapter's config, of values as if trained where the method has such a choice."""
    task = TASKS[case.name]
    targets = {"target_modules": TARGETS[case.name.split("-")[0]], "task_type": task, **changes}
    tokens = {"num_virtual_tokens": 4, "task_type": task, **changes}
    return {
        "lora": lambda: peft.LoraConfig(r=4, init_lora_weights=False, **targets),
        "ia3": lambda: peft.IA3Config(feedforward_modules=[], init_ia3_weights=False, **targets),
        "loha": lambda: peft.LoHaConfig(r=4, init_weights=False, **targets),
        "oft": lambda: peft.OFTConfig(oft_block_size=4, init_weights=False, **targets),
        "prefix": lambda: peft.PrefixTuningConfig(**tokens),
        "prompt": lambda: peft.PromptTuningConfig(**tokens),
        "p-tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=16, **tokens),
    }[method]()


def wrap(model: Any, config: Any) -> Any:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about Conv1D
        return peft.get_peft_model(model, config).eval()


@torch.no_grad()
def outputs(model: Any, **inputs: Tensor) -> Tensor:
    found = model.eval()(**inputs)
    return found.logits if "logits" in found else found[0]  # type: ignore[no-any-return]


def inputs_of(case: ModelCase) -> dict[str, Tensor]:
    """A batch with a padded row, short enough for virtual tokens beside it."""
    inputs = case.inputs()
    if case is VIT:
        return inputs
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[1, 25:] = 0
    return {"input_ids": inputs["input_ids"][:, :32], "attention_mask": mask}


# -- what an adapted model computes ---------------------------------------------------------------------------------
METHODS = [
    (case, method)
    for case in (CLASSIFIER, GPT2, VIT)
    for method in ("lora", "ia3", "loha", "oft", "prefix", "prompt", "p-tuning")
    if not (case is VIT and method in ("prefix", "prompt", "p-tuning"))  # PEFT has none for images
    and not (case is GPT2 and method in ("loha", "oft"))  # nor these for GPT-2's Conv1D
    and not (case is CLASSIFIER and method == "prefix")  # below
]


@pytest.mark.parametrize(("case", "method"), METHODS, ids=[f"{case.name}-{method}" for case, method in METHODS])
@pytest.mark.parametrize("kind", KINDS)
def test_adapted_model_in_the_softmax_limit(kind: str, case: ModelCase, method: str) -> None:
    """A window over the whole text computes softmax: what is left of a difference is what the adapter does."""
    if not supported(kind, case):
        pytest.skip("no causal form")
    exact = case.settings(kind, window_size=6 if case is VIT else 64)
    ours = wrap(ready(hf_linattn.convert(case.build(), exact)), adapter(case, method))
    stock = wrap(case.build(), adapter(case, method))
    assert not ours.load_state_dict(stock.state_dict(), strict=False).unexpected_keys
    inputs = inputs_of(case)
    want, found = outputs(stock, **inputs), outputs(ours, **inputs)
    if case is GPT2:  # padding is padding
        real = inputs["attention_mask"].bool()
        want, found = want[:, -32:][real], found[:, -32:][real]
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
    plain = outputs(case.build(), **inputs)
    assert plain.shape != want.shape or not torch.allclose(plain, want, atol=1e-2)  # the adapter does something


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["converted", "native"])
def test_prefix_tuning_of_an_encoder_is_refused_in_its_own_words(kind: str, how: str) -> None:
    model = converted(BERT, kind) if how == "converted" else BERT.build()
    model.set_attn_implementation(kind)
    wrapped = wrap(model, adapter(BERT, "prefix"))
    with pytest.raises(UnsupportedError, match=r"36 keys for 32 queries.*prefix tuning.*PromptTuningConfig"):
        outputs(wrapped, **inputs_of(BERT))


@pytest.mark.parametrize("function", [hf_linattn.compare, hf_linattn.calibrate])
def test_virtual_tokens_are_not_left_out_silently(function: Any) -> None:
    wrapped = wrap(converted(GPT2, "favor_sharp"), adapter(GPT2, "prompt"))
    with pytest.raises(UnsupportedError, match=r"virtual tokens\. Pass model\.get_base_model\(\)"):
        function(wrapped, [inputs_of(GPT2)])
    assert function(wrapped.get_base_model(), [inputs_of(GPT2)]) is not None


# -- PEFT's wrappers of our own layers ------------------------------------------------------------------------------
LEARNED = [
    ("eva", BERT, {}, "key_adapter"),
    ("eva", GPT2, {}, "key_adapter"),
    ("eva", VIT, {}, "key_adapter"),
    ("lara", BERT, {}, "query_adapter"),
    ("lara", VIT, {}, "key_adapter"),
]


@pytest.mark.parametrize(("kind", "case", "changes", "name"), LEARNED)
def test_adapted_parameters_of_ours_are_used(kind: str, case: ModelCase, changes: Any, name: str) -> None:
    model = converted(case, kind, **changes)
    before = outputs(model, **inputs_of(case))
    names = [n for n, _ in model.named_parameters() if n.endswith(f"linattn.{name}")]
    assert names
    config = peft.LoraConfig(r=2, target_parameters=[f"linattn.{name}"], target_modules=[], init_lora_weights=False)
    wrapped = wrap(model, config)
    found = outputs(wrapped, **inputs_of(case))
    assert not torch.allclose(found, before, atol=1e-4)
    wrapped.train()
    wrapped(**inputs_of(case))[0].sum().backward()
    grads = [p.grad for n, p in wrapped.named_parameters() if "lora_B" in n]
    assert grads
    assert all(grad is not None for grad in grads)
    assert any(bool(grad.any()) for grad in grads)  # the last layer of a ViT: [CLS] alone, exactly
    torch.testing.assert_close(outputs(wrapped.merge_and_unload(), **inputs_of(case)), found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [BERT, GPT2, VIT], ids=lambda case: case.name)
def test_layers_saved_with_an_adapter(kind: str, case: ModelCase, tmp_path: Path) -> None:
    """`modules_to_save=["linattn"]`: trained parts of ours are in the adapter, and the base keeps its own."""
    if not supported(kind, case):
        pytest.skip("no causal form")
    base = converted(case, kind)
    clean = copy.deepcopy(base)
    wrapped = wrap(base, adapter(case, "lora", modules_to_save=["linattn"]))
    with torch.no_grad():
        for name, tensor in wrapped.named_parameters():
            if ".linattn.modules_to_save." in name:
                tensor.add_(torch.randn_like(tensor))
    want = outputs(wrapped, **inputs_of(case))
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(clean), tmp_path)
    torch.testing.assert_close(outputs(loaded, **inputs_of(case)), want, rtol=0, atol=0)
    torch.testing.assert_close(outputs(loaded.merge_and_unload(), **inputs_of(case)), want, rtol=0, atol=1e-4)
    with wrapped.disable_adapter():
        torch.testing.assert_close(outputs(wrapped, **inputs_of(case)), outputs(clean, **inputs_of(case)))
    if case is GPT2:
        ids = case.inputs()["input_ids"][:, :20]
        options = {"max_new_tokens": 12, "do_sample": False}
        cached = wrapped.generate(input_ids=ids, **options)
        assert torch.equal(cached, wrapped.generate(input_ids=ids, use_cache=False, **options))


def test_generation_with_adapted_parameters() -> None:
    config = {"target_parameters": ["linattn.key_adapter"], "target_modules": [], "init_lora_weights": False}
    wrapped = wrap(converted(GPT2, "eva"), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **config))
    ids = GPT2.inputs()["input_ids"][:, :20]
    options = {"max_new_tokens": 16, "do_sample": False}
    cached = wrapped.generate(input_ids=ids, **options)
    assert torch.equal(cached, wrapped.generate(input_ids=ids, use_cache=False, **options))


def _greedy(model: Any, ids: Tensor, steps: int) -> Tensor:
    """Generation token by token, each from the whole text."""
    for _ in range(steps):
        ids = torch.cat([ids, outputs(model, input_ids=ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.filterwarnings("ignore:Both `past_key_values` and `cache`:FutureWarning")  # what is wrong there
@pytest.mark.parametrize("kind", CAUSAL_KINDS)
@pytest.mark.parametrize("method", ["prefix", "prompt", "p-tuning"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_with_virtual_tokens(kind: str, method: str, use_cache: bool) -> None:
    ids = GPT2.inputs()["input_ids"][:, :16]
    options = {"max_new_tokens": 10, "do_sample": False, "use_cache": use_cache}
    stock = wrap(GPT2.build(n_positions=256), adapter(GPT2, method))
    if not torch.equal(stock.generate(input_ids=ids, **options), _greedy(stock, ids, 10)):
        pytest.skip("these releases of PEFT and Transformers are wrong together, with the stock model too")
    model = ready(hf_linattn.convert(GPT2.build(n_positions=256), GPT2.settings(kind)))
    wrapped = wrap(model, adapter(GPT2, method))
    assert torch.equal(wrapped.generate(input_ids=ids, **options), _greedy(wrapped, ids, 10))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_an_adapter_compile(kind: str) -> None:
    wrapped = wrap(converted(BERT, kind), adapter(BERT, "lora", modules_to_save=["linattn"]))
    want = outputs(wrapped, **BERT.inputs())
    torch.compiler.reset()
    compiled = torch.compile(wrapped, backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(compiled, **BERT.inputs()), want, rtol=0, atol=1e-6)


# -- directions and statistics that change while an adapter is in place ---------------------------------------------
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
