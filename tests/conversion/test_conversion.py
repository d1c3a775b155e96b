"""convert, revert, the converted classes, and their round trip through a checkpoint."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from cases import (
    BERT,
    BY_NAME,
    GPT2,
    KINDS,
    MATRIX,
    VIT,
    ModelCase,
    checkpoint_activations,
    converted,
    largest,
    logits,
    ready,
)
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.auto import modeling_auto

import hf_linattn
from hf_linattn.integrations.attach import family_layers
from hf_linattn.models import AUTO_CLASSES, CONFIGS, COUNTERPARTS


@pytest.mark.compat("convert", "save and load")
@pytest.mark.parametrize(("kind", "case"), MATRIX)
def test_convert_and_revert_round_trip(kind: str, case: ModelCase, tmp_path: Any) -> None:
    model, inputs = case.build(), case.inputs()
    stock_class, stock_config = type(model), model.config.to_dict()
    before = logits(model, **inputs)
    assert hf_linattn.convert(model, case.settings(kind)) is model
    assert type(model).__name__ == "LinAttn" + stock_class.__name__
    assert isinstance(model, stock_class)
    after = logits(ready(model), **inputs)
    assert largest(after - before) > 1e-3
    assert largest(after - before) < 10

    model.save_pretrained(tmp_path)
    loaded = case.auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config._attn_implementation == kind
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    # Not bit by bit: loaded tensors are not aligned in memory, and small matrix products then round differently.
    assert largest(logits(loaded, **inputs) - after) < 1e-5

    for one in (model, loaded):
        linear = logits(one, **inputs)
        one.set_attn_implementation("sdpa")
        assert torch.equal(logits(one, **inputs), before)
        one.set_attn_implementation(kind)
        assert torch.equal(logits(one, **inputs), linear)
        assert hf_linattn.revert(one) is one
        assert type(one) is stock_class
        assert type(one.base_model).__module__.startswith("transformers.")
        assert one.config._attn_implementation == "sdpa"
        assert torch.equal(logits(one, **inputs), before)
        assert not any("linattn" in name for name in one.state_dict())
    assert {**model.config.to_dict(), "dtype": None, "architectures": None} == {
        **stock_config,
        "dtype": None,
        "architectures": None,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "case"), MATRIX)
def test_conversion_in_half_precision(kind: str, case: ModelCase, dtype: torch.dtype, tmp_path: Any) -> None:
    model, inputs = converted(case, kind), case.inputs()
    exact = logits(model, **inputs)
    model.save_pretrained(tmp_path)
    loaded = case.auto.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    for source, target in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        if "linattn" in source[0]:
            assert target[1].dtype == torch.float32, source[0]
            assert torch.equal(source[1], target[1]), source[0]
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    low = logits(loaded, **inputs)
    assert torch.isfinite(low).all()
    assert largest(low - exact) < 0.25 * largest(exact)


@pytest.mark.compat("convert", "save and load")
@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_every_class(kind: str, tmp_path: Any) -> None:
    """Every stock head converts, runs, saves, loads and reverts."""
    for stock, counterpart in COUNTERPARTS.items():
        case = {"bert": BERT, "gpt2": GPT2, "vit": VIT}[stock.config_class.model_type]
        torch.manual_seed(0)
        model = stock(case.config()).eval()
        inputs = head_inputs(stock, case)
        before = logits(model, **inputs)
        hf_linattn.convert(model, case.settings(kind))
        assert type(model) is counterpart
        after = logits(ready(model), **inputs)
        assert largest(after - before) > 1e-4, stock
        model.save_pretrained(tmp_path / stock.__name__)
        loaded = counterpart.from_pretrained(tmp_path / stock.__name__)
        assert largest(logits(loaded, **inputs) - after) < 1e-5, stock
        assert torch.equal(logits(hf_linattn.revert(loaded), **inputs), before), stock


def head_inputs(stock: type[PreTrainedModel], case: ModelCase) -> dict[str, Any]:
    inputs = case.inputs()
    if stock.__name__ in ("BertForMultipleChoice", "GPT2DoubleHeadsModel"):
        inputs = {"input_ids": case.inputs(batch=4)["input_ids"].view(2, 2, -1)}
    return inputs


def test_every_stock_head_has_a_counterpart() -> None:
    for module in ("bert.modeling_bert", "gpt2.modeling_gpt2", "vit.modeling_vit"):
        library = __import__(f"transformers.models.{module}", fromlist=["__all__"])
        for name in library.__all__:
            cls = getattr(library, name)
            is_model = isinstance(cls, type) and issubclass(cls, PreTrainedModel)
            if is_model and not name.endswith("PreTrainedModel"):
                assert cls in COUNTERPARTS, f"no converted class for {name}"
                assert COUNTERPARTS[cls].__name__ == "LinAttn" + name
                assert getattr(hf_linattn, "LinAttn" + name) is COUNTERPARTS[cls]


@pytest.mark.compat("convert")
def test_auto_classes_match_those_of_transformers() -> None:
    """Whatever Auto class has a stock head for a model has the converted one, and no other."""
    checked = 0
    for name in dir(modeling_auto):
        auto = getattr(modeling_auto, name)
        mapping = getattr(auto, "_model_mapping", None)
        if not isinstance(auto, type) or mapping is None or not name.startswith("AutoModel"):
            continue
        for family, config_class in CONFIGS.items():
            stock_config = config_class.__bases__[-1]
            if stock_config in mapping:
                stock = mapping[stock_config]
                stock = stock[0] if isinstance(stock, tuple) else stock
                assert mapping[config_class] is COUNTERPARTS[stock], (name, family)
                checked += 1
            else:
                assert config_class not in mapping, (name, family)
    assert checked == sum(len(stocks) for stocks in AUTO_CLASSES.values())


def test_auto_tokenizer_of_a_converted_config() -> None:
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    assert TOKENIZER_MAPPING[hf_linattn.LinAttnBertConfig] is TOKENIZER_MAPPING[transformers.BertConfig]
    assert TOKENIZER_MAPPING[hf_linattn.LinAttnGPT2Config] is TOKENIZER_MAPPING[transformers.GPT2Config]
    assert hf_linattn.LinAttnViTConfig in IMAGE_PROCESSOR_MAPPING


@pytest.mark.compat("convert")
@pytest.mark.parametrize("case", [BERT, GPT2, VIT], ids=lambda case: case.name)
def test_selected_layers(case: ModelCase, tmp_path: Any) -> None:
    """Layers left on softmax compute exactly what the stock model computes, also after reloading."""
    model, inputs = case.build(), case.inputs()
    layers = family_layers(model)
    seen: dict[int, Any] = {}
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda module, args, out, index=index: seen.__setitem__(index, out[0]))
    logits(model, **inputs)
    stock_first = seen[0]
    hf_linattn.convert(model, case.settings("favor_plus"), layers=[1])
    converted = logits(model, **inputs)
    assert largest(seen[0] - stock_first) < 1e-6
    assert not hasattr(layers[0], "linattn")
    assert hasattr(layers[1], "linattn")
    assert model.config.linear_attention["layers"] == [1]
    model.save_pretrained(tmp_path)
    loaded = case.auto.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, **inputs), converted)
    if case is not VIT:
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, :7], mask[1, 30:] = 0, 0
        logits(model, attention_mask=mask, **inputs)
        ours = seen[0]
        model.set_attn_implementation("sdpa")
        logits(model, attention_mask=mask, **inputs)
        real = mask.bool()
        assert largest((ours - seen[0])[real]) < 1e-6


def test_attention_dropout(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Conversion sets it to 0 where it cannot be applied, says so, keeps it for softmax layers and gives it back."""
    model = BERT.build()
    layers = family_layers(model)
    with caplog.at_level(logging.INFO, logger="hf_linattn"):
        hf_linattn.convert(model, "favor_plus", layers=[0])
    assert "Attention dropout was 0.1 and is now 0" in caplog.text
    assert "BertForMaskedLM to LinAttnBertForMaskedLM: favor_plus in layers [0] of 2" in caplog.text
    assert model.config.attention_probs_dropout_prob == 0
    assert model.config.linear_attention["attention_dropout"] == 0.1
    assert [layer.dropout.p for layer in layers] == [0, 0.1]
    model.save_pretrained(tmp_path)
    loaded = BERT.auto.from_pretrained(tmp_path)
    assert [layer.dropout.p for layer in family_layers(loaded)] == [0, 0.1]
    for one in (model, loaded):
        hf_linattn.revert(one)
        assert one.config.attention_probs_dropout_prob == 0.1
        assert [layer.dropout.p for layer in family_layers(one)] == [0.1, 0.1]


def test_config_forms() -> None:
    """A kind's name, its settings object and a dictionary mean the same."""
    settings = hf_linattn.FavorPlusConfig()
    forms = ["favor_plus", settings, {"kind": "favor_plus"}, settings.to_dict()]
    models = [hf_linattn.convert(BERT.build(), form) for form in forms]
    for model in models:
        assert model.config.linear_attention == models[0].config.linear_attention
        assert torch.equal(logits(model, **BERT.inputs()), logits(models[0], **BERT.inputs()))
    assert models[0].config.linear_attention["window_size"] is not None


def test_copy_leaves_the_original_alone() -> None:
    model, inputs = BERT.build(), BERT.inputs()
    before = logits(model, **inputs)
    converted = hf_linattn.convert(model, BERT.settings("favor_plus"), copy=True)
    assert type(model) is BERT.stock
    assert torch.equal(logits(model, **inputs), before)
    assert type(model.config) is transformers.BertConfig
    assert largest(logits(converted, **inputs) - before) > 1e-3


def test_config_is_replaced_everywhere() -> None:
    for case in (BERT, GPT2, VIT):
        model = hf_linattn.convert(case.build(), "favor_plus")
        for name, module in model.named_modules():
            held = module.__dict__.get("config")
            if isinstance(held, transformers.PreTrainedConfig):
                assert held is model.config, name


def test_hidden_states_of_a_converted_model() -> None:
    for case in (BERT, GPT2, VIT):
        stock = case.build()
        expected = stock(**case.inputs(), output_hidden_states=True).hidden_states
        model = hf_linattn.convert(stock, case.settings("favor_plus"))
        states = model(**case.inputs(), output_hidden_states=True).hidden_states
        assert [s.shape for s in states] == [s.shape for s in expected]
        assert torch.equal(states[0], expected[0])


@pytest.mark.compat("train")
def test_loss_is_that_of_the_head() -> None:
    """Transformers picks the loss by class name."""
    case = BY_NAME["bert-classifier"]
    model = hf_linattn.convert(case.build(), "favor_plus")
    model = type(model)(model.config)
    out = model(**case.inputs(), labels=torch.tensor([0, 1]))
    expected = torch.nn.functional.cross_entropy(out.logits, torch.tensor([0, 1]))
    assert largest(out.loss - expected) < 1e-6


@pytest.mark.compat("train")
def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    for kind, case in [(k, c) for k in KINDS for c in (BERT, VIT)]:
        model = hf_linattn.convert(case.build(hidden_dropout_prob=0.0), case.settings(kind)).train()
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                checkpoint_activations(model)
            model.zero_grad()
            torch.manual_seed(1)
            model(**case.inputs())[0].square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for a, b in zip(*gradients, strict=True):
            assert largest(a - b) <= 1e-5 * (1 + largest(a))


@pytest.mark.compat("train")
@pytest.mark.parametrize("case", [BERT, GPT2, VIT], ids=lambda case: case.name)
def test_every_learned_parameter_gets_a_gradient(case: ModelCase) -> None:
    for kind in KINDS:
        model = converted(case, kind).train()
        model(**case.inputs())[0].square().sum().backward()
        for name, parameter in model.named_parameters():
            if "linattn" in name:
                assert parameter.grad is not None, (kind, name)
                assert torch.isfinite(parameter.grad).all(), (kind, name)


@pytest.mark.compat("save and load")
def test_config_round_trip(tmp_path: Any) -> None:
    config = hf_linattn.LinAttnBertConfig(**{**BERT.config().to_dict(), "linear_attention": "favor_plus"})
    assert config.model_type == "linattn_bert"
    assert config._attn_implementation == "favor_plus"
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is hf_linattn.LinAttnBertConfig
    assert loaded.linear_attention == config.linear_attention
    assert loaded._attn_implementation == "favor_plus"
    model = AutoModel.from_config(loaded)
    assert isinstance(model, hf_linattn.LinAttnBertModel)


def test_image_of_another_size() -> None:
    """The grid follows the pixels, not the config: rows and columns are not mixed up for a wide image."""
    case = VIT
    settings = case.settings("favor_plus", num_features=16)
    model = hf_linattn.convert(case.build(), settings)
    grids: list[Any] = []
    layer = family_layers(model)[0].linattn
    original = layer.forward
    layer.forward = lambda *args, **kwargs: grids.append(kwargs["grid"]) or original(*args, **kwargs)
    logits(model, **case.inputs())
    wide = torch.randn(1, 3, 16, 40)
    assert torch.isfinite(logits(model, pixel_values=wide, interpolate_pos_encoding=True)).all()
    assert grids == [(6, 6), (4, 10)]
