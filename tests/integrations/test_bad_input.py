"""Every bad input gets an error that names the wrong value, what is allowed and what to do; nothing is lost."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from caches import cache_of, given_cache
from cases import (
    BERT,
    BY_NAME,
    GPT2,
    KINDS,
    TOKENS,
    VIT,
    VOCAB,
    ModelCase,
    bert_config,
    converted,
    largest,
    logits,
    native,
    supported,
)
from transformers import (
    BertModel,
    GPT2LMHeadModel,
    MistralConfig,
    MistralModel,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_linattn
from hf_linattn.errors import InputError, UnsupportedError

TEXT_CASES = [
    pytest.param(case, is_converted, id=f"{case.name}-{'converted' if is_converted else 'native'}")
    for case in (BERT, GPT2)
    for is_converted in (False, True)
]


def build(case: ModelCase, is_converted: bool, kind: str = "favor_plus") -> Any:
    return (converted if is_converted else native)(case, kind)


# -- masks ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("case", "is_converted"), TEXT_CASES)
def test_masks_that_are_refused(case: ModelCase, is_converted: bool) -> None:
    model, inputs = build(case, is_converted), case.inputs()
    full = torch.ones(2, 1, TOKENS, TOKENS)
    for mask in (full, full.bool(), full.bool().tril()):
        with pytest.raises(InputError, match=r"must be 2-D.*got 4-D \(2, 1, 40, 40\)"):
            model(**inputs, attention_mask=mask)
    with pytest.raises(InputError, match="attention_mask"):
        model(**inputs, attention_mask=full[:, 0])
    with pytest.raises(InputError, match="attention_mask must cover"):
        model(**inputs, attention_mask=full[:, 0, 0, :30])


def test_mask_of_new_tokens_only_with_a_cache() -> None:
    model = build(GPT2, False)
    ids = GPT2.inputs()["input_ids"]
    past = cache_of(model(input_ids=ids[:, :20], use_cache=True))
    with pytest.raises(InputError, match=r"past ones included: \[batch, 40\]; got \(2, 20\)"):
        model(input_ids=ids[:, 20:], **given_cache(past), attention_mask=torch.ones(2, 20))


def test_sliding_window() -> None:
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    model = MistralModel(config).eval()
    model.set_attn_implementation("favor_plus")
    for compiled in (False, True):
        torch._dynamo.reset()
        forward = torch.compile(model, backend="eager") if compiled else model
        with pytest.raises(Exception, match="sliding-window attention"):
            forward(**GPT2.inputs())
    config.sliding_window = None
    without = MistralModel(config).eval()
    without.set_attn_implementation("favor_plus")
    assert torch.isfinite(logits(without, **GPT2.inputs())).all()


# -- packed sequences -----------------------------------------------------------------------------------------------
PACKED = torch.cat([torch.arange(25), torch.arange(15)])[None].expand(2, -1)


@pytest.mark.parametrize(
    ("case", "is_converted", "kind"),
    [
        pytest.param(*param.values, kind, id=f"{param.id}-{kind}")
        for kind in KINDS
        for param in TEXT_CASES
        if supported(kind, param.values[0], native=not param.values[1])
    ],
)
def test_packed_sequences(case: ModelCase, is_converted: bool, kind: str) -> None:
    """With a mask, which says that a row is one sequence, and with a cache, which keeps one."""
    model, inputs = build(case, is_converted, kind), case.inputs()
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    for extra in ({"attention_mask": mask}, *([{}] if case.is_causal else [])):
        with pytest.raises((InputError, UnsupportedError), match=r"[Pp]acked sequences"):
            model(**inputs, position_ids=PACKED.clone(), **extra)
    positions = torch.arange(TOKENS)[None]
    expected = logits(model, **inputs, position_ids=positions, attention_mask=mask)
    positions[0, 25:] -= 25  # the same tensor again, changed in place
    with pytest.raises((InputError, UnsupportedError), match=r"[Pp]acked sequences"):
        model(**inputs, position_ids=positions, attention_mask=mask)
    positions[0, 25:] += 25
    assert torch.equal(logits(model, **inputs, position_ids=positions, attention_mask=mask), expected)
    # Positions of padding may be anything; gaps between real tokens are fine.
    mask[0, :9] = 0
    padded = torch.arange(TOKENS).repeat(2, 1) + 3
    padded[0, :9] = 1
    assert torch.isfinite(logits(model, **inputs, position_ids=padded, attention_mask=mask)).all()
    with torch.inference_mode(), pytest.raises((InputError, UnsupportedError), match=r"[Pp]acked sequences"):
        model(**inputs, position_ids=PACKED.clone(), attention_mask=torch.ones_like(mask))


# -- arguments that cannot be honoured ------------------------------------------------------------------------------
@pytest.mark.parametrize("case", [BERT, GPT2, VIT], ids=lambda case: case.name)
def test_output_attentions(case: ModelCase, tmp_path: Any) -> None:
    model, inputs = build(case, True), case.inputs()
    with pytest.raises(InputError, match="output_attentions=True.*eager"):
        model(**inputs, output_attentions=True)
    if case is GPT2:
        with pytest.raises(InputError, match="output_attentions=True"):
            model.generate(**inputs, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    else:
        with pytest.raises(InputError, match="output_attentions=True"):
            build(case, False)(**inputs, output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True
    model.save_pretrained(tmp_path)
    with pytest.raises(Exception, match="output_attentions.*'eager'"):
        case.auto.from_pretrained(tmp_path, output_attentions=True)
    model.set_attn_implementation("eager")
    weights = model(**inputs, output_attentions=True).attentions
    assert len(weights) == 2
    assert largest(weights[0].sum(-1) - 1) < 1e-5


@pytest.mark.parametrize("is_converted", [False, True], ids=["native", "converted"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("softcap", 30.0, "soft cap"),
        ("position_bias", torch.zeros(1), "bias on attention logits"),
        ("s_aux", torch.zeros(4), "sinks"),
        ("seq_idx", torch.zeros(2, TOKENS - 1, dtype=torch.int), "Packed sequences|seq_idx must be"),
        ("is_causal", True, "is_causal"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_arguments_of_a_model(name: str, value: Any, message: str, is_converted: bool) -> None:
    model = build(BERT, is_converted)
    if name == "is_causal" and not is_converted:
        assert torch.isfinite(logits(model, **BERT.inputs(), is_causal=True)).all()
        return
    with pytest.raises((InputError, UnsupportedError), match=message):
        model(**BERT.inputs(), **{name: value})


def test_harmless_arguments() -> None:
    for is_converted in (False, True):
        model = build(BERT, is_converted)
        expected = logits(model, **BERT.inputs())
        extra = {"output_attentions": False, "output_hidden_states": True, "num_items_in_batch": torch.tensor(4)}
        assert torch.equal(logits(model, **BERT.inputs(), **extra, softcap=None), expected)


def test_is_causal_given_to_the_model_is_honoured() -> None:
    """An encoder run causally, as Transformers allows: no token sees a later one."""
    model = build(BERT, False)
    embeddings = torch.randn(1, TOKENS, 32, requires_grad=True)
    model(inputs_embeds=embeddings, is_causal=True)[0][:, 10].square().sum().backward()
    assert embeddings.grad is not None
    assert largest(embeddings.grad[:, 11:]) == 0
    assert largest(embeddings.grad[:, :11]) > 0


def test_module_that_does_not_say_whether_it_is_causal() -> None:
    model = build(BERT, False)
    del model.bert.encoder.layer[0].attention.self.is_causal
    with pytest.raises(UnsupportedError, match="BertSelfAttention does not say whether it is causal"):
        model(**BERT.inputs())


def test_relative_positions() -> None:
    """T5 adds a bias to its attention logits; ignoring it would be silently wrong."""
    small = {"d_model": 32, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16, "vocab_size": VOCAB}
    model = T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0)).eval()
    ids = BERT.inputs()["input_ids"]
    model.set_attn_implementation("favor_plus")
    with pytest.raises(UnsupportedError, match="bias on attention logits"):
        model(input_ids=ids, decoder_input_ids=ids)


# -- attention dropout ----------------------------------------------------------------------------------------------
def test_attention_dropout_warns_once() -> None:
    model = build(BERT, False).train()
    with pytest.warns(UserWarning, match=r"Attention dropout \(p=0.1\) is not applied.*slot_dropout"):
        model(**BERT.inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**BERT.inputs())


def test_no_warning_after_conversion(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_linattn"):
        model = hf_linattn.convert(BERT.build(), "favor_plus").train()
    assert caplog.text.count("Attention dropout") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**BERT.inputs())


# -- not silently wrong ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_batch_composition_changes_nothing(kind: str) -> None:
    case = BY_NAME["bert-classifier"]
    model = build(case, True, kind)
    ids = case.inputs(batch=4)["input_ids"]
    together = logits(model, input_ids=ids)
    for row in range(4):
        assert largest(logits(model, input_ids=ids[row : row + 1])[0] - together[row]) < 1e-5


def test_every_kind_name_is_registered_with_both_interfaces() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    for kind in KINDS:
        assert kind in AttentionInterface._global_mapping
        assert kind in AttentionMaskInterface._global_mapping
    assert isinstance(BertModel(bert_config()), BertModel)
    assert issubclass(hf_linattn.LinAttnGPT2LMHeadModel, GPT2LMHeadModel)


# -- what is checked once per forward -------------------------------------------------------------------------------
@pytest.mark.parametrize("inference", [False, True])
def test_positions_are_checked_again_with_another_mask(inference: bool) -> None:
    """A tensor of positions that was in order under one mask need not be under another, or under none."""
    model = GPT2.build()
    model.set_attn_implementation("favor_plus")
    ids = GPT2.inputs(batch=1)["input_ids"][:, :6]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    hidden = torch.tensor([[0, 0, 0, 1, 1, 1]])
    with torch.inference_mode(inference):
        model(input_ids=ids, position_ids=positions, attention_mask=hidden)
        with pytest.raises(InputError, match="position_ids must increase"):
            model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(hidden))
        model(input_ids=ids, position_ids=positions, attention_mask=hidden)
        with pytest.raises(InputError, match="position_ids must increase"):
            model(input_ids=ids, position_ids=positions, attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]))


def test_positions_are_checked_once_per_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    import hf_linattn.integrations.checks as checks

    mask, positions = torch.tensor([[False, True, True]]), torch.tensor([[1, 0, 1]])
    checks.check_positions(positions, mask, 3)
    last = checks._last_checked
    checks.check_positions(positions, mask, 3)
    assert checks._last_checked is last
    with pytest.raises(InputError, match="must increase"):
        checks.check_positions(positions, None, 3)
    mask[0, 0] = True
    with pytest.raises(InputError, match="must increase"):
        checks.check_positions(positions, mask, 3)


@pytest.mark.parametrize(
    ("case", "message"),
    [(BERT, r"a row for each of the 2 inputs.*got \(3, 40\)"), (GPT2, r"must cover all tokens.*got \(2, 60\)")],
    ids=["bert", "gpt2"],  # GPT-2 first brings its mask to the batch size
)
def test_mask_of_another_batch_size(case: ModelCase, message: str) -> None:
    mask = torch.ones(3, TOKENS, dtype=torch.long)
    mask[:, -1] = 0
    for model in (build(case, False), build(case, True)):
        with pytest.raises(InputError, match=message):
            model(**case.inputs(), attention_mask=mask)
