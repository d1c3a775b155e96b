"""Native mode in other architectures: grouped heads, images and their leading tokens, cross-attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import KINDS, NATIVE_CAUSAL_KINDS, TOKENS, VIT, VOCAB, bert_config, largest, logits, vit_config
from transformers import (
    BertLMHeadModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    DistilBertConfig,
    DistilBertModel,
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
from hf_linattn.errors import UnsupportedError
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
    # EVA with chunks of one token is softmax attention.
    assert errors[1] < errors[0], errors
    assert errors[1] > 0 or kind == "eva"
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
