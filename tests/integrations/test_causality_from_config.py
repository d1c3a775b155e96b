"""`config.is_causal` decides: a bidirectional decoder is so with every kind, and a contradiction raises."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import cache_of, given_cache
from cases import GPT2, KINDS, VOCAB, ModelCase, bert_config, gpt2_config, largest, logits, ready
from transformers import (
    AutoModelForCausalLM,
    BertLMHeadModel,
    BertModel,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import hf_linattn
from hf_linattn.errors import UnsupportedError

EXACT = 64  # a window that holds the row: every kind is softmax


def bert_decoder(**changes: Any) -> Any:
    return bert_config(is_decoder=True, use_cache=False, **changes)


def llama_config(**changes: Any) -> Any:
    sizes: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    return LlamaConfig(vocab_size=VOCAB, initializer_range=0.2, **sizes, **changes)


GPT = GPT2
BERT_DECODER = dataclasses.replace(GPT2, name="bert-decoder", stock=BertLMHeadModel, config=bert_decoder)
LLAMA = dataclasses.replace(GPT2, name="llama", stock=LlamaForCausalLM, config=llama_config)
CONVERTED = [pytest.param(kind, case, id=f"{kind}-{case.name}") for kind in KINDS for case in (GPT, BERT_DECODER)]
NATIVE = [*CONVERTED, *(pytest.param(kind, LLAMA, id=f"{kind}-llama") for kind in KINDS)]


def build(case: ModelCase, kind: str, *, native: bool, window_size: int, **changes: Any) -> Any:
    settings = own_settings(case, kind, is_causal=changes.get("is_causal") is not False, window_size=window_size)
    model = case.build(**changes)
    if not native:
        return ready(hf_linattn.convert(model, settings))
    model.config.linear_attention = settings.to_dict()
    model.set_attn_implementation(kind)
    return model


def own_settings(case: ModelCase, kind: str, *, is_causal: bool, **changes: Any) -> Any:
    """EVA's size of a chunk is one of causal layers."""
    return case.settings(kind, **{**changes, **({} if is_causal or kind != "eva" else {"chunk_size": None})})


def padded() -> dict[str, torch.Tensor]:
    inputs = GPT2.inputs()
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, 30:] = 0
    return {**inputs, "attention_mask": mask}


def sees_later(model: Any) -> bool:
    """Whether the first position depends on the last."""
    embeddings = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    model(inputs_embeds=embeddings)[0][:, 0].sum().backward()
    assert embeddings.grad is not None
    return largest(embeddings.grad[:, -1]) > 0


@pytest.mark.parametrize("native", [True, False], ids=["native", "converted"])
@pytest.mark.parametrize(("kind", "case"), NATIVE)
def test_bidirectional_decoders(kind: str, case: ModelCase, native: bool, tmp_path: Path) -> None:
    if case is LLAMA and not native:
        pytest.skip("not a family that can be converted")
    stock = case.build(is_causal=False)
    stock.set_attn_implementation("eager")
    for inputs in (GPT2.inputs(), padded()):
        exact = build(case, kind, native=native, window_size=EXACT, is_causal=False)
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        torch.testing.assert_close(logits(exact, **inputs)[real], logits(stock, **inputs)[real], rtol=0, atol=1e-3)
    model = build(case, kind, native=native, window_size=8, is_causal=False)
    assert sees_later(model)
    want = logits(model, **padded())
    assert want.isfinite().all()
    model.save_pretrained(tmp_path)
    options = {"attn_implementation": kind} if native else {}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()
    assert again.config.is_causal is False
    assert torch.equal(logits(again, **padded()), want)
    assert sees_later(again)


@pytest.mark.parametrize(("kind", "case"), CONVERTED)
def test_a_causal_decoder_stays_causal(kind: str, case: ModelCase) -> None:
    for changes in ({}, {"is_causal": True}):
        assert not sees_later(build(case, kind, native=False, window_size=8, **changes))


@pytest.mark.parametrize("case", [GPT, BERT_DECODER, LLAMA], ids=lambda case: case.name)
def test_asked_for_in_a_call(case: ModelCase) -> None:
    """`model(..., is_causal=False)` of Transformers: the same as the config's, in native mode."""
    want = logits(build(case, "eva", native=True, window_size=8, is_causal=False), **padded())
    model = build(case, "eva", native=True, window_size=8)
    assert torch.equal(logits(model, **padded(), is_causal=False), want)
    assert getattr(model.config, "is_causal", None) is None


@pytest.mark.parametrize("kind", KINDS)
def test_direction_of_a_converted_layer_and_the_advice(kind: str) -> None:
    model = build(GPT, kind, native=False, window_size=8)
    with pytest.raises(UnsupportedError, match=r"set config\.is_causal = False and convert it again"):
        model(**GPT2.inputs(), is_causal=False)
    stock = hf_linattn.revert(model)
    stock.config.is_causal = False
    again = hf_linattn.convert(stock, own_settings(GPT, kind, is_causal=False))
    assert sees_later(again)
    with pytest.raises(UnsupportedError, match=r"set config\.is_causal = True and convert it again"):
        again(**GPT2.inputs(), is_causal=True)
    stock = hf_linattn.revert(again)
    stock.config.is_causal = True
    assert not sees_later(ready(hf_linattn.convert(stock, GPT2.settings(kind))))


@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_config_raises(kind: str) -> None:
    model = build(GPT, kind, native=False, window_size=8)
    model.config.is_causal = False
    with pytest.raises(UnsupportedError, match=r"converted with is_causal=True, but.*set config\.is_causal = False"):
        model(**GPT2.inputs())
    encoder = hf_linattn.convert(BertModel(bert_config()), kind)
    encoder.config.is_decoder = True
    with pytest.raises(UnsupportedError, match="converted with is_causal=False, but.*load it with is_decoder=True"):
        encoder(**GPT2.inputs())
    stock = BertModel(bert_config())
    stock.set_attn_implementation(kind)
    stock.config.is_decoder = True
    with pytest.raises(UnsupportedError, match="made a causal attention mask"):
        stock(**GPT2.inputs())
    with pytest.raises(UnsupportedError, match="made a bidirectional attention mask"):
        build(GPT, "eva", native=True, window_size=8, is_causal=None)(**GPT2.inputs())


def test_an_encoder_asked_to_be_causal() -> None:
    model: PreTrainedModel = BertModel(bert_config()).eval()
    with pytest.raises(UnsupportedError, match="load it with is_decoder=True"):
        hf_linattn.convert(model, "favor_plus", copy=True)(**padded(), is_causal=True)
    model.set_attn_implementation("favor_plus")
    changed = {**padded(), "input_ids": padded()["input_ids"].clone()}
    changed["input_ids"][:, 29] = 3
    before, after = (logits(model, **inputs, is_causal=True) for inputs in (padded(), changed))
    assert torch.equal(before[:, :29], after[:, :29])
    assert largest(before[:, 29] - after[:, 29]) > 0


@pytest.mark.parametrize("native", [True, False], ids=["native", "converted"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_after_a_cache(kind: str, native: bool) -> None:
    """Bidirectional layers see whole sequences: new tokens alone are refused."""
    model = build(GPT, kind, native=native, window_size=EXACT, is_causal=False)
    ids = GPT2.inputs(batch=1)["input_ids"]
    with torch.no_grad():
        cache = cache_of(model(ids[:, :30], use_cache=True))
    with pytest.raises(UnsupportedError, match="40 keys for 10 queries. Pass all tokens at once"):
        model(ids[:, 30:], **given_cache(cache))


def test_gpt2_without_the_field_has_the_defaults_of_decoders() -> None:
    causal = hf_linattn.convert(GPT2LMHeadModel(gpt2_config()), "lara").config.linear_attention
    both = hf_linattn.convert(GPT2LMHeadModel(gpt2_config(is_causal=False)), "lara").config.linear_attention
    assert (causal["proposal_source"], both["proposal_source"]) == ("calibrated", "landmarks")


@pytest.mark.parametrize(("kind", "case"), CONVERTED)
def test_compare_and_calibrate_follow_the_config(kind: str, case: ModelCase) -> None:
    """Softmax beside which a layer is compared, or with which it is calibrated, is bidirectional too."""
    changes = {"favor_sharp": {"statistics": "calibrated"}, "lara": {"proposal_source": "calibrated"}}.get(kind, {})
    settings = own_settings(case, kind, is_causal=False, window_size=EXACT, **changes)
    model = ready(hf_linattn.convert(case.build(is_causal=False), settings))
    report = hf_linattn.compare(model, [padded()])
    assert max(layer.error for layer in report.layers) < 1e-3
    assert report.hidden_cosine > 1 - 1e-5
