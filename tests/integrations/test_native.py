"""Native mode: stock models of many architectures under an attention kind, without conversion."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    GPT2,
    KINDS,
    NATIVE_CAUSAL_KINDS,
    NATIVE_MATRIX,
    TOKENS,
    VIT,
    VOCAB,
    ModelCase,
    bert_config,
    checkpoint_activations,
    gpt2_config,
    largest,
    left_padded,
    logits,
    native,
    ready,
    vit_config,
)
from transformers import (
    AutoModel,
    BertLMHeadModel,
    BertModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    DistilBertConfig,
    DistilBertModel,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    SiglipVisionConfig,
    ViTConfig,
    ViTModel,
    YolosConfig,
)

import hf_linattn
from hf_linattn.errors import ConfigError, UnsupportedError
from hf_linattn.integrations.native import image_grid
from hf_linattn.modules.registry import get_kind

TEXT = {"vocab_size": VOCAB, "max_position_embeddings": 64, "initializer_range": 0.2}


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


IMAGE = {"image_size": 24, "patch_size": 4, "initializer_range": 0.2}


OTHERS: dict[str, Callable[[], Any]] = {
    "roberta": lambda: RobertaModel(RobertaConfig(**TEXT, **SIZES)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=VOCAB, max_position_embeddings=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, **SIZES, num_key_value_heads=2)),
    "deit": lambda: DeiTModel(DeiTConfig(**IMAGE, **SIZES)),
    "dinov2": lambda: Dinov2Model(
        Dinov2Config(**IMAGE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2)
    ),
}


VISION = ("deit", "dinov2")


OTHER_CASES = [
    pytest.param(kind, name, id=f"{kind}-{name}")
    for kind in KINDS
    for name in OTHERS
    if name != "llama" or kind in NATIVE_CAUSAL_KINDS
]


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = OTHERS[name]().eval()
    if name == "distilbert":  # its init ignores the range
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(8)
    return model


def inputs_for(name: str, batch: int = 2) -> dict[str, torch.Tensor]:
    if name in VISION:
        return {"pixel_values": torch.randn(batch, 3, 24, 24)}
    return {"input_ids": torch.randint(3, VOCAB, (batch, TOKENS))}


@pytest.mark.compat("native")
@pytest.mark.parametrize(("kind", "case"), NATIVE_MATRIX)
def test_from_pretrained_with_a_kind(kind: str, case: ModelCase, tmp_path: Any) -> None:
    """`attn_implementation=kind` and `set_attn_implementation(kind)` agree, differ from softmax, add no parameters."""
    stock, inputs = case.build(), case.inputs()
    expected = logits(stock, **inputs)
    stock.config.linear_attention = case.settings(kind).to_dict()
    stock.save_pretrained(tmp_path)
    loaded = case.auto.from_pretrained(tmp_path, attn_implementation=kind)
    assert type(loaded) is case.stock
    assert loaded.state_dict().keys() == stock.state_dict().keys()
    got = logits(loaded, **inputs)
    assert largest(got - expected) > 1e-4
    stock.set_attn_implementation(kind)
    assert torch.equal(logits(stock, **inputs), got)
    assert torch.equal(logits(stock, **inputs), got), "the second call differs: something is drawn inside"
    stock.set_attn_implementation("sdpa")
    assert torch.equal(logits(stock, **inputs), expected)


@pytest.mark.compat("native")
@pytest.mark.parametrize(("kind", "case"), NATIVE_MATRIX)
def test_native_equals_converted_before_training(kind: str, case: ModelCase) -> None:
    """Same settings, same seeds: conversion starts from what native mode computes (but for ViT's layer index)."""
    ours, inputs = hf_linattn.convert(case.build(), case.settings(kind)), case.inputs()
    if case.name == "vit":
        second = ours.vit.layers[1].attention.linattn
        second.shape = ours.vit.layers[0].attention.linattn.shape  # native ViT layers do not know their index
        second.reset_parameters()
    for name, buffer in ours.named_buffers():
        if name.endswith("calibrated_tokens"):
            buffer.fill_(1)  # keep the neutral statistics, which are those of native mode
    assert largest(logits(ours, **inputs) - logits(native(case, kind), **inputs)) < 1e-4


@pytest.mark.compat("native")
@pytest.mark.parametrize(("kind", "name"), OTHER_CASES)
def test_other_architectures(kind: str, name: str) -> None:
    """More features come closer to softmax; padding and batch composition change nothing."""
    model, inputs = build(name), inputs_for(name)
    exact = logits(model, **inputs)
    model.set_attn_implementation(kind)
    errors = []
    for size, window in ((2, 2), (64 if kind in ("lara", "eva") else 4096, 4)):
        model.config.linear_attention = {"kind": kind, "window_size": window, get_kind(kind).size_field: size}
        if kind == "eva":
            model.config.linear_attention["chunk_size"] = 1 if window == 4 else 2
        errors.append(float((logits(model, **inputs) - exact).square().mean()))
    assert 0 < errors[1] < errors[0], errors
    if name in VISION:
        return
    alone = logits(model, input_ids=inputs["input_ids"][:1, :25])
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 25:] = 0
    assert largest(logits(model, attention_mask=mask, **inputs)[0, :25] - alone[0]) < 2e-5


def test_grouped_query_heads() -> None:
    """The same as the model with its key and value heads written out."""
    few = build("llama")
    config = LlamaConfig(**TEXT, **SIZES, num_key_value_heads=4)
    many = LlamaForCausalLM(config).eval()
    state = few.state_dict()
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = tensor.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    many.load_state_dict(state)
    inputs = inputs_for("llama")
    for kind in NATIVE_CAUSAL_KINDS:
        few.set_attn_implementation(kind)
        many.set_attn_implementation(kind)
        assert largest(logits(few, **inputs) - logits(many, **inputs)) < 1e-5


def test_leading_tokens_of_an_image_are_global() -> None:
    """ViT's [CLS], and DeiT's [CLS] and distillation token, are exact: with a window over the whole image all is."""
    for kind in KINDS:
        for model, leading in ((ViTModel(vit_config()), 1), (build("deit"), 2)):
            model.eval()
            inputs = inputs_for("deit")
            exact = logits(model, **inputs)
            model.set_attn_implementation(kind)
            model.config.linear_attention = {"kind": kind, "window_size": 6}
            assert largest(logits(model, **inputs) - exact) < 1e-4, (kind, leading)
            model.config.linear_attention = {"kind": kind, "window_size": 6, "num_global_tokens": 0}
            if "favor" in kind:  # the others are exact at one token per chunk or landmark
                assert largest(logits(model, **inputs) - exact) > 1e-4, (kind, leading)


def test_causal_favor_sharp_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import hf_linattn.modules.kinds.favor_sharp as module

    monkeypatch.setattr(module, "_checked_statistics", weakref.WeakValueDictionary())
    model = GPT2.build()
    model.set_attn_implementation("favor_sharp")
    with pytest.warns(UserWarning, match="behaves like FAVOR\\+"):
        out = logits(model, **GPT2.inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, **GPT2.inputs())
    model.set_attn_implementation("favor_plus")
    assert largest(out - logits(model, **GPT2.inputs())) < 1e-4


def test_settings_of_native_mode() -> None:
    """They come from config.linear_attention; the seed changes the result and equal seeds agree."""
    model, inputs = GPT2.build(), GPT2.inputs()
    model.set_attn_implementation("favor_plus")
    outs = []
    for seed in (0, 1, 0):
        model.config.linear_attention = {"kind": "favor_plus", "seed": seed, "window_size": 4}
        outs.append(logits(model, **inputs))
    assert torch.equal(outs[0], outs[2])
    assert largest(outs[0] - outs[1]) > 1e-4
    for form in ("favor_plus", hf_linattn.FavorPlusConfig(), None):
        model.config.linear_attention = form
        outs.append(logits(model, **inputs))
    assert torch.equal(outs[3], outs[4])
    assert torch.equal(outs[3], outs[5])
    model.config.linear_attention = 5
    with pytest.raises(ConfigError, match=r"must be the name of a kind.*got 5"):
        model(**inputs)


def test_settings_object_can_be_saved_after_use(tmp_path: Any) -> None:
    model = GPT2.build()
    model.set_attn_implementation("favor_plus")
    model.config.linear_attention = GPT2.settings("favor_plus")
    expected = logits(model, **GPT2.inputs())
    assert model.config.linear_attention == GPT2.settings("favor_plus").to_dict()
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="favor_plus")
    assert torch.equal(logits(loaded, **GPT2.inputs()), expected)


@pytest.mark.parametrize(
    ("config", "tokens", "expected"),
    [
        (ViTConfig(image_size=32, patch_size=4), 65, ((8, 8), 1)),
        (ViTConfig(image_size=32, patch_size=4), 64, None),  # 9 x 7 patches and [CLS]
        (ViTConfig(image_size=32, patch_size=4), 71, None),  # 10 x 7
        (DeiTConfig(image_size=32, patch_size=4), 66, ((8, 8), 2)),
        (DeiTConfig(image_size=32, patch_size=4), 65, None),  # 9 x 7
        (Dinov2Config(image_size=32, patch_size=4), 65, ((8, 8), 1)),
        (Dinov2Config(image_size=32, patch_size=4), 66, None),
        (Dinov2WithRegistersConfig(image_size=32, patch_size=4, num_register_tokens=4), 69, ((8, 8), 5)),
        (Dinov2WithRegistersConfig(image_size=32, patch_size=4, num_register_tokens=4), 65, None),
        (SiglipVisionConfig(image_size=32, patch_size=4), 64, ((8, 8), 0)),
        (YolosConfig(image_size=[32, 32], patch_size=4), 65, ((8, 8), 1)),
        (YolosConfig(image_size=[32, 32], patch_size=4), 64, None),
        (YolosConfig(image_size=[32, 32], patch_size=4), 67, None),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "model_type") else None,
)
def test_image_of_another_size_is_no_grid(config: Any, tokens: int, expected: Any) -> None:
    """Only with exactly the tokens that the model puts before the patches; else the tokens are a sequence."""
    assert image_grid(config, tokens) == expected


def test_image_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """7 x 5 patches and [CLS] are as many tokens as 6 x 6 patches: taken as a sequence, [CLS] exact."""
    import hf_linattn.integrations.native as native

    seen: list[Any] = []
    original = native.AttentionInputs
    monkeypatch.setattr(native, "AttentionInputs", lambda *a, **kw: seen.append(kw["grid"]) or original(*a, **kw))
    model = VIT.build()
    model.set_attn_implementation("favor_plus")
    logits(model, pixel_values=torch.randn(1, 3, 28, 20), interpolate_pos_encoding=True)
    logits(model, **VIT.inputs())
    assert seen == [None, None, (6, 6), (6, 6)]


def test_state_drawn_in_inference_mode_can_be_trained_with() -> None:
    model = BertModel(bert_config()).eval()
    model.set_attn_implementation("favor_plus")
    model.config.linear_attention = {"kind": "favor_plus", "seed": 12345}
    with torch.inference_mode():
        model(input_ids=torch.randint(3, VOCAB, (1, 10)))
    model(input_ids=torch.randint(3, VOCAB, (1, 10)))[0].sum().backward()


@pytest.mark.compat("native")
def test_cross_attention() -> None:
    """Done without window and global tokens by the kinds that can; encoder and decoder padding are kept apart."""
    torch.manual_seed(0)
    model = BertLMHeadModel(bert_config(is_decoder=True, add_cross_attention=True)).eval()
    ids, states = torch.randint(3, VOCAB, (2, 12)), torch.randn(2, 12, 32)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 7:] = 0
    inputs = {"input_ids": ids, "encoder_hidden_states": states, "encoder_attention_mask": mask}
    exact = logits(model, **inputs)
    model.set_attn_implementation("favor_plus")
    with pytest.raises(UnsupportedError, match="window_size=0"):
        model(**inputs)
    settings = {"kind": "favor_plus", "window_size": 0, "num_global_tokens": 0}
    errors = []
    for size in (8, 8192):
        model.config.linear_attention = {**settings, "num_features": size}
        close = logits(model, **inputs)
        errors.append(float((close - exact).square().mean()))
    assert 0 < errors[1] < 0.2 * errors[0], errors
    other = {**inputs, "encoder_hidden_states": states.clone()}
    other["encoder_hidden_states"][0, 7:] = 9.0
    assert largest(logits(model, **other) - close) < 1e-5
    shorter = {**inputs, "encoder_hidden_states": states[:1, :7], "encoder_attention_mask": None, "input_ids": ids[:1]}
    assert largest(logits(model, **shorter)[0] - close[0]) < 1e-5
    for kind, message in (("eva", "cannot do cross-attention"), ("lara", "which only a converted model can keep")):
        model.set_attn_implementation(kind)
        model.config.linear_attention = None
        with pytest.raises(UnsupportedError, match=message):
            model(**inputs)


def test_cross_attention_stays_on_softmax_when_converted() -> None:
    torch.manual_seed(0)
    model = BertLMHeadModel(bert_config(is_decoder=True, add_cross_attention=True)).eval()
    hf_linattn.convert(model, "eva")
    layer = model.bert.encoder.layer[0]
    seen: list[Any] = []
    layer.crossattention.self.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    states, mask = torch.randn(2, 9, 32), torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    logits(model, input_ids=torch.randint(3, VOCAB, (2, 9)), encoder_hidden_states=states, encoder_attention_mask=mask)
    attention = layer.crossattention.self
    hidden: list[Any] = []
    attention.register_forward_pre_hook(lambda module, args, kwargs: hidden.append(args[0]), with_kwargs=True)
    logits(model, input_ids=torch.randint(3, VOCAB, (2, 9)), encoder_hidden_states=states, encoder_attention_mask=mask)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(2, -1, 4, 8).transpose(1, 2)

    expected = torch.nn.functional.scaled_dot_product_attention(
        heads(attention.query(hidden[0])),
        heads(attention.key(states)),
        heads(attention.value(states)),
        attn_mask=mask.bool()[:, None, None, :],
    )
    assert largest(seen[1] - expected.transpose(1, 2).reshape(2, 9, 32)) < 1e-5


BASE_MODELS: dict[str, tuple[Any, Any]] = {
    "bert": (BertModel, bert_config),
    "gpt2": (GPT2Model, gpt2_config),
    "vit": (ViTModel, vit_config),
}


@pytest.mark.parametrize(
    ("name", "kind", "is_converted"),
    [
        pytest.param(
            name,
            kind,
            is_converted,
            id=f"{'converted' if is_converted else 'native'}-{kind}-{name}",
            marks=[] if kind in ("favor_plus", "eva") else pytest.mark.slow,
        )
        for name in BASE_MODELS
        for kind in KINDS
        for is_converted in (False, True)
        if is_converted or name != "gpt2" or kind in NATIVE_CAUSAL_KINDS
    ],
)
def test_compile_without_graph_breaks(name: str, kind: str, is_converted: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    cls, config = BASE_MODELS[name]
    layers = {"n_layer": 1} if name == "gpt2" else {"num_hidden_layers": 1}  # each layer is traced anew
    model = cls(config(**layers)).eval()
    if is_converted:
        ready(hf_linattn.convert(model, kind))
    else:
        model.set_attn_implementation(kind)
    ids = torch.randint(3, VOCAB, (2, TOKENS))
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    text = {"input_ids": ids, "use_cache": False}
    for inputs in (VIT.inputs(),) if name == "vit" else (text, {**text, "attention_mask": mask}):
        with torch.no_grad():
            expected = model(**inputs)[0]
            got = compiled(**inputs)[0]
        assert largest(got - expected) < 1e-5


def test_automodel_loads_every_kind_by_name(tmp_path: Any) -> None:
    GPT2LMHeadModel(gpt2_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="favour_plus"):
        AutoModel.from_pretrained(tmp_path, attn_implementation="favour_plus")
    for kind in KINDS:
        assert AutoModel.from_pretrained(tmp_path, attn_implementation=kind).config._attn_implementation == kind


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """The mask passes through the checkpointed layers."""
    inputs = left_padded()
    gradients = []
    for checkpointing in (False, True):
        model = GPT2.build(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0).train()
        model.set_attn_implementation("favor_plus")
        if checkpointing:
            checkpoint_activations(model, {"use_reentrant": reentrant})
        model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()].square().sum().backward()
        gradients.append(model.transformer.wte.weight.grad)
    assert largest(gradients[0] - gradients[1]) < 1e-3
