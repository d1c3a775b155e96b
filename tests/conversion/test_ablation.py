"""`ablated`: what is left when a part of the attention is taken away, and a model that is as before afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BERT, GPT2, MODELS, TOKENS, VIT, ModelCase, away_from_start, largest, left_padded, logits, matrix
from torch import Tensor

import hf_linattn
from hf_linattn.conversion.ablation import ablated
from hf_linattn.errors import ConfigError, UnsupportedError
from hf_linattn.modules.base import LinearAttention
from hf_linattn.modules.registry import get_kind
from hf_linattn.ops.ablation import ABLATED, ABLATIONS

LEARNED = [pytest.param(learned, id="learned" if learned else "random") for learned in (False, True)]
every_ablation = pytest.mark.parametrize("what", ABLATIONS)
every_model = pytest.mark.parametrize(("kind", "case"), matrix(*MODELS))


def made(kind: str, case: ModelCase, *, learned: bool = False, layers: int = 2, **changes: Any) -> Any:
    """A converted model, its learned tensors away from zero."""
    if learned:
        changes = {"learned": True, get_kind(kind).size_field: 6, **changes}
    field = "n_layer" if case is GPT2 else "num_hidden_layers"
    model = hf_linattn.convert(case.build(**{field: layers}), case.settings(kind, **changes))
    return away_from_start(model, case)


def ablated_logits(model: Any, what: str, **inputs: Tensor) -> Tensor:
    with ablated(model, what):
        return logits(model, **inputs)


@every_ablation
@pytest.mark.parametrize("learned", LEARNED)
@every_model
def test_something_is_gone_and_comes_back(kind: str, case: ModelCase, learned: bool, what: str) -> None:
    model, inputs = made(kind, case, learned=learned), case.inputs()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config, before = model.config.to_dict(), logits(model, **inputs)
    without = ablated_logits(model, what, **inputs)
    assert without.isfinite().all()
    assert largest(without - before) > 1e-4
    assert torch.equal(logits(model, **inputs), before)
    assert model.config.to_dict() == config
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("learned", LEARNED)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("kind", "case"), matrix(BERT, GPT2))
def test_a_window_alone_sees_nothing_else(kind: str, case: ModelCase, learned: bool, overlap: bool) -> None:
    model = made(kind, case, learned=learned, layers=1, overlap_window=overlap, num_global_tokens=0)
    ids = case.inputs()["input_ids"]
    changed = ids.clone()
    changed[:, :4] = 7
    far = slice(16, None)
    assert largest(logits(model, input_ids=ids)[:, far] - logits(model, input_ids=changed)[:, far]) > 1e-5
    first, second = (ablated_logits(model, "window_alone", input_ids=z)[:, far] for z in (ids, changed))
    assert torch.equal(first, second)


@pytest.mark.parametrize("learned", LEARNED)
@pytest.mark.parametrize("kind", ["favor_plus", "favor_sharp", "lara"])
@pytest.mark.parametrize("case", [BERT, GPT2, VIT], ids=lambda case: case.name)
def test_slots_alone_are_a_model_without_a_window(kind: str, case: ModelCase, learned: bool) -> None:
    exact = {"num_heavy_keys": 2} if case is BERT else {}
    model = made(kind, case, learned=learned, **exact)
    without = made(kind, case, learned=learned, window_size=0, num_global_tokens=0)
    for layer, other in zip(layers(model), layers(without), strict=True):
        other.load_state_dict({name: value for name, value in layer.state_dict().items() if name != "mass_offset"})
    inputs = case.inputs()
    torch.testing.assert_close(ablated_logits(model, "slots_alone", **inputs), logits(without, **inputs))


def layers(model: Any) -> list[LinearAttention[Any]]:
    return [module for module in model.modules() if isinstance(module, LinearAttention)]


@pytest.mark.parametrize("kind", ["favor_plus", "favor_sharp", "lara"])
def test_slots_shuffled_as_often_as_there_are_slots(kind: str) -> None:
    """Directions of queries moved by hand, in a layer that has some."""
    model, inputs = made(kind, BERT, learned=True), BERT.inputs()
    shuffled = ablated_logits(model, "shuffled_slots", **inputs)
    with torch.no_grad():
        for layer in layers(model):
            for name in ("query_directions", "slot_bias"):
                tensor = layer.tensors()[name]
                tensor.copy_(tensor.roll(1, dims=1))
    torch.testing.assert_close(logits(model, **inputs), shuffled)


@every_ablation
@pytest.mark.parametrize("learned", LEARNED)
@pytest.mark.parametrize(("kind", "case"), matrix(GPT2))
def test_no_token_sees_a_later_one(kind: str, case: ModelCase, learned: bool, what: str) -> None:
    model, ids = made(kind, case, learned=learned), case.inputs()["input_ids"]
    changed = ids.clone()
    changed[:, 25:] = 3
    first, second = (ablated_logits(model, what, input_ids=z)[:, :25] for z in (ids, changed))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


@every_ablation
@pytest.mark.parametrize("learned", LEARNED)
@pytest.mark.parametrize(("kind", "case"), matrix(BERT))
def test_padding_changes_nothing(kind: str, case: ModelCase, learned: bool, what: str) -> None:
    model, batch = made(kind, case, learned=learned), left_padded()
    found = ablated_logits(model, what, **batch)
    for row, real in enumerate(batch["attention_mask"].bool()):
        positions = real.nonzero().T
        alone = ablated_logits(model, what, input_ids=batch["input_ids"][row, real][None], position_ids=positions)
        torch.testing.assert_close(found[row, real][None], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["favor_plus", "eva"])
def test_a_convolution_of_values_is_no_slot(kind: str) -> None:
    model, inputs = made(kind, VIT, learned=True, value_convolution=True), VIT.inputs()
    plain = made(kind, VIT, learned=True)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(*(ablated_logits(each, "slots_alone", **inputs) for each in (model, plain)))
    assert (
        largest(ablated_logits(model, "window_alone", **inputs) - ablated_logits(plain, "window_alone", **inputs)) > 0
    )
    report = hf_linattn.compare(model, [inputs])
    assert all(0 <= share <= 1 for layer in report.layers for share in layer.slot_shares)


@pytest.mark.parametrize("learned", LEARNED)
def test_chunks_of_one_token_are_softmax(learned: bool) -> None:
    """All keys of a text, each a chunk of its own, without a window."""
    model = hf_linattn.convert(BERT.build(), BERT.settings("eva", num_chunks=64, learned=learned, num_global_tokens=0))
    model.set_attn_implementation("sdpa")
    expected = logits(model, **BERT.inputs())
    model.set_attn_implementation("eva")
    torch.testing.assert_close(ablated_logits(model, "slots_alone", **BERT.inputs()), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("window", [1, 2, 8, 64])
def test_a_decoder_reads_the_chunks_before_its_own(window: int) -> None:
    """Those of one token: softmax of all but the token itself. Whatever the window, which is not there."""
    model = made("eva", GPT2, layers=1, window_size=window, chunk_size=1, proposal_map="none")
    inputs, seen = GPT2.inputs(1)["input_ids"], torch.ones(TOKENS, TOKENS).tril(-1).bool()
    attention, hidden = model.transformer.h[0].attn, []
    handle = attention.c_proj.register_forward_hook(lambda module, args, output: hidden.append(args[0]))
    projected = attention.c_attn.register_forward_hook(lambda module, args, output: hidden.append(output))
    ablated_logits(model, "slots_alone", input_ids=inputs)
    handle.remove(), projected.remove()
    query, key, value = (z.unflatten(-1, (4, 8)).transpose(1, 2) for z in hidden[0].split(32, -1))
    expected = torch.nn.functional.scaled_dot_product_attention(query[:, :, 1:], key, value, attn_mask=seen[1:])
    torch.testing.assert_close(hidden[1][:, 1:], expected.transpose(1, 2).flatten(-2), rtol=0, atol=1e-5)
    assert not hidden[1][:, 0].any()


def test_a_window_over_everything_is_softmax() -> None:
    model = hf_linattn.convert(BERT.build(), BERT.settings("favor_plus", window_size=64))
    expected = logits(BERT.build(), **BERT.inputs())
    torch.testing.assert_close(ablated_logits(model, "window_alone", **BERT.inputs()), expected, rtol=0, atol=1e-4)


@every_ablation
def test_everything_is_as_before_after_an_error(what: str) -> None:
    model = made("favor_plus", GPT2)
    with pytest.raises(IndexError), ablated(model, what):
        model(input_ids=torch.tensor([[10**6]]))
    assert model.config.use_cache is True
    assert all(layer.ablation is None and "ablation" not in vars(layer) for layer in layers(model))
    with pytest.raises(UnsupportedError, match="use_cache=False"), ablated(model, what):
        model(**GPT2.inputs(), use_cache=True)
    assert not ABLATED


def test_other_models_are_not_concerned() -> None:
    model, other = made("favor_plus", BERT), made("favor_plus", BERT)
    before = logits(other, **BERT.inputs())
    with ablated(model, "window_alone"):
        assert torch.equal(logits(other, **BERT.inputs()), before)
        assert not torch.equal(logits(model, **BERT.inputs()), before)


@pytest.mark.parametrize("kind", ["favor_plus", "eva"])
def test_a_model_keeps_no_cache(kind: str) -> None:
    model, ids = made(kind, GPT2), GPT2.inputs(1)["input_ids"]
    with ablated(model, "window_alone"):
        assert model(input_ids=ids).past_key_values is None
        with pytest.raises(UnsupportedError, match="use_cache=False"):
            model(input_ids=ids, use_cache=True)
        expected = logits(model, input_ids=ids)[:, -1].argmax(-1)
        generated = model.generate(ids, max_new_tokens=2, do_sample=False, use_cache=False)
    assert torch.equal(generated[:, ids.shape[1]], expected)


def test_a_layer_with_an_adapter() -> None:
    peft = pytest.importorskip("peft")
    model = made("favor_plus", BERT, learned=True)
    expected = ablated_logits(model, "shuffled_slots", **BERT.inputs())
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], modules_to_save=["linattn"]))
    assert torch.equal(ablated_logits(wrapped, "shuffled_slots", **BERT.inputs()), expected)
    assert not torch.equal(logits(wrapped, **BERT.inputs()), expected)


@pytest.mark.slow
def test_compiled_code_is_not_ablated() -> None:
    model, inputs = made("favor_plus", BERT, layers=1), BERT.inputs()
    before, without = logits(model, **inputs), ablated_logits(model, "window_alone", **inputs)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled, **inputs), before, rtol=0, atol=1e-4)
    found = ablated_logits(compiled, "window_alone", **inputs)
    torch.testing.assert_close(found, without, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(compiled, **inputs), before, rtol=0, atol=1e-4)
    with pytest.raises(Exception, match="not compiled|Dynamo"), ablated(model, "window_alone"):
        torch.compile(model, backend="eager", fullgraph=True)(**inputs)
    with pytest.raises(UnsupportedError, match="not compiled"), ablated(model, "window_alone"):
        torch.jit.trace(model, (inputs["input_ids"],), strict=False)


@pytest.mark.parametrize(
    ("make", "what", "error", "message"),
    [
        (lambda: made("favor_plus", BERT), "window_alon", ConfigError, "Did you mean 'window_alone'"),
        (BERT.build, "window_alone", ConfigError, "needs a converted model; got BertForMaskedLM"),
        (
            lambda: made("favor_plus", BERT, window_size=0, num_global_tokens=0),
            "window_alone",
            UnsupportedError,
            r"read exactly.*window_size=0",
        ),
        (lambda: made("favor_plus", BERT, num_features=1), "shuffled_slots", UnsupportedError, "num_features=1"),
    ],
)
def test_what_has_no_meaning(make: Any, what: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), ablated(make(), what):
        pass


def test_a_model_on_softmax_or_ablated_already() -> None:
    model = made("lara", BERT)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match=r"'sdpa'.*set_attn_implementation\('lara'\)"), ablated(model, "slots_alone"):
        pass
    model.set_attn_implementation("lara")
    with ablated(model, "slots_alone"):
        with pytest.raises(UnsupportedError, match="already"), ablated(model, "window_alone"):
            pass
        assert layers(model)[0].ablation == "slots_alone"
