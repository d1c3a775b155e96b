"""Every seam to Transformers, changed as a release might change it: each ends in the canary's sentence."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from caches import cache_keyword, cache_of, given_cache
from cases import BERT, GPT2, converted, gpt2_config, native
from mutations import MUTATIONS
from release_changes import KIND, Change, Patch, dropped, renamed, replaced
from release_uses import Use, converting, generating, loading_stock, native_call, token_ids
from torch import nn
from transformers import (
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

import hf_linattn
from hf_linattn.bench.kinds import layer_for
from hf_linattn.bench.workload import Workload
from hf_linattn.errors import InputError, UnsupportedTransformersError
from hf_linattn.integrations import canary, seams
from hf_linattn.integrations.expected import SEAMS, TESTED_RELEASES
from hf_linattn.integrations.masks import linattn_mask
from hf_linattn.training import LinAttnCallback


@pytest.fixture(autouse=True)
def _new_canary(monkeypatch: Patch) -> None:
    """As in a process in which nothing has been asked yet."""
    monkeypatch.setattr(canary, "passed", set())


def sentence(name: str) -> Any:
    """What must be raised for a seam: all parts of the sentence, in the error of the library."""
    oldest, newest = TESTED_RELEASES
    parts = (
        rf"does not work with the installed Transformers {transformers.__version__}",
        rf"tested: {oldest} to {newest}",
        rf"{name}: expected .+; found .+: install a tested release \(pip install 'transformers=={newest}'\)",
        r"newer hf_linattn",
    )
    return pytest.raises(UnsupportedTransformersError, match=r"(?s)" + ".*".join(parts))


CASES = [
    pytest.param(name, *mutation, id=f"{name}-{number}")
    for name, mutations in MUTATIONS.items()
    for number, mutation in enumerate(mutations)
]


def test_every_seam_has_a_mutation() -> None:
    assert set(MUTATIONS) == set(SEAMS)
    assert all((seam.probe is None) == (seam.when == "use") for seam in SEAMS.values())


@pytest.mark.parametrize(("name", "change", "use"), CASES)
def test_a_changed_seam_ends_in_one_sentence(name: str, change: Change, use: Use, monkeypatch: Patch) -> None:
    if name == "static cache" and not seams.has_static_layer_types():
        pytest.skip("static caches of this release keep keys and values for all types")
    run = use()
    hf_linattn.models.vit._register_renaming.cache_clear()
    monkeypatch.setattr(canary, "passed", set())
    change(monkeypatch)
    with sentence(name), torch.no_grad():
        run()


def _touches() -> Iterator[Any]:
    """Every way in which the library meets a model first."""
    ids = token_ids()
    batch = [{"input_ids": ids}]
    yield "convert", converting()
    yield "revert", lambda: (lambda model: lambda: hf_linattn.revert(model))(converted(GPT2, KIND))
    config = hf_linattn.LinAttnGPT2Config(**gpt2_config().to_dict(), linear_attention=KIND)
    yield "construct", lambda: lambda: hf_linattn.LinAttnGPT2LMHeadModel(config)
    yield "from_pretrained", loading_stock()
    yield "call", lambda: (lambda model: lambda: model(ids))(converted(GPT2, KIND))
    yield "native", native_call()
    yield "generate", generating()
    yield "calibrate", lambda: (lambda model: lambda: hf_linattn.calibrate(model, batch))(converted(GPT2, "lara"))
    yield "compare", lambda: (lambda model: lambda: hf_linattn.compare(model, batch))(native(GPT2, KIND))
    yield "extend_positions", lambda: (lambda model: lambda: hf_linattn.extend_positions(model, 128))(GPT2.build())
    yield "cache", lambda: (lambda model: lambda: DynamicCache(config=model.config))(converted(GPT2, KIND))


@pytest.mark.parametrize("touch", [pytest.param(use, id=name) for name, use in _touches()])
def test_the_first_touch_of_a_model(touch: Use, monkeypatch: Patch) -> None:
    run = touch()
    monkeypatch.setattr(canary, "passed", set())
    replaced(seams, "is_tracing", lambda: False)(monkeypatch)
    with sentence("tracing"):
        run()


def test_a_compiled_native_model_asks_too(monkeypatch: Patch) -> None:
    model = GPT2.build()
    model.set_attn_implementation(KIND)
    torch._dynamo.reset()
    hf_linattn.integrations.native._settings.cache_clear()
    dropped(PreTrainedModel, "get_correct_attn_implementation")(monkeypatch)
    with pytest.raises(Exception, match="model methods: expected"):
        torch.compile(model, backend="eager", fullgraph=True)(token_ids(), use_cache=False)
    torch._dynamo.reset()


def test_a_compiled_model_that_was_never_called(monkeypatch: Patch) -> None:
    """Nothing of the canary is traced, and yet it asks."""
    model = GPT2.build()
    model.set_attn_implementation(KIND)
    torch._dynamo.reset()
    hf_linattn.integrations.native._settings.cache_clear()
    with torch.no_grad():
        found = torch.compile(model, backend="eager", fullgraph=True)(token_ids(), use_cache=False).logits
        assert "always" in canary.passed
        assert torch.allclose(found, model(token_ids(), use_cache=False).logits, atol=1e-5)
    torch._dynamo.reset()


def test_a_mask_function_called_with_less() -> None:
    arguments = dict.fromkeys(("batch_size", "q_length", "kv_length", "q_offset", "kv_offset"), 1)
    with sentence("arguments of a mask function"):
        linattn_mask(**arguments, mask_function=seams.causal_mask_function)


def test_a_method_that_would_read_the_keys_of_a_state() -> None:
    model = converted(GPT2, KIND)
    cache = DynamicCache(config=model.config)
    model(token_ids(), **given_cache(cache))
    assert not hasattr(cache.layers[0], "keys")
    with sentence("cache layers"):
        cache.layers[0].keys.shape  # noqa: B018


def test_heads_and_tokens_exchanged_in_another_architecture() -> None:
    """Of three families a module is tried out; elsewhere only the numbers of tokens tell."""
    module, tokens = layer_for(Workload(5, heads=2, head_dim=4)), torch.randn(1, 5, 2, 4)
    sizes = {"batch_size": 1, "q_length": 5, "kv_length": 5, "q_offset": 0, "kv_offset": 0}
    mask = linattn_mask(**sizes, mask_function=seams.bidirectional_mask_function, attention_mask=None)
    right = tokens.transpose(1, 2)
    transformers.AttentionInterface()[KIND](module, right, right, right, mask, scaling=0.5, dropout=0.0)
    with sentence("attention modules"):
        transformers.AttentionInterface()[KIND](module, tokens, tokens, tokens, mask, scaling=0.5, dropout=0.0)


def test_steps_that_are_counted_late() -> None:
    callback, state = LinAttnCallback(), transformers.TrainerState()
    model = converted(BERT, "favor_plus", redraw_interval=2)
    callback.on_train_begin(None, state, None, model=model)
    with sentence("trainer events"):
        callback.on_step_end(None, state, None, model=model)


# -- what must not be refused ----------------------------------------------------------------------------------------
def test_asked_once_and_cheaply(monkeypatch: Patch) -> None:
    """No random numbers, nothing at the second touch; under modes of the caller too."""
    state, start = torch.get_rng_state(), time.process_time()
    with torch.device("meta"), torch.inference_mode():
        for family in ("bert", "gpt2", "vit"):
            canary.check_seams(family)
    assert time.process_time() - start < 3  # measured: 0.3 s; a machine may be busy
    assert torch.equal(torch.get_rng_state(), state)
    asked_again: list[str] = []
    monkeypatch.setattr(canary, "_probe", lambda seam, *args: asked_again.append(seam.name))
    canary.check_seams("linattn_gpt2")
    assert not asked_again


def test_a_newer_release_is_not_refused_for_its_number(monkeypatch: Patch) -> None:
    monkeypatch.setattr(transformers, "__version__", "99.0.0")
    hf_linattn.convert(GPT2.build(), KIND)(token_ids())


def test_a_failed_probe_is_asked_again(monkeypatch: Patch) -> None:
    with monkeypatch.context() as patch:
        dropped(PreTrainedModel, "get_correct_attn_implementation")(patch)
        for _ in range(2):
            with sentence("model methods"):
                canary.check_seams()
    canary.check_seams()


def test_the_name_of_the_cache_argument_does_not_matter(monkeypatch: Patch) -> None:
    """An attention module that takes its cache as `memory`: generation as before."""
    model, ids = hf_linattn.convert(GPT2.build(), KIND), token_ids()
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(ids, **options)
    forward, block, name = GPT2Attention.forward, transformers.models.gpt2.modeling_gpt2.GPT2Block.forward, "memory"
    monkeypatch.setattr(GPT2Attention, "forward", renamed(forward, cache_keyword(), name))

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs[name] = kwargs.pop(cache_keyword(), None)
        return nn.Module.__call__(self, *args, **kwargs)

    monkeypatch.setattr(GPT2Attention, "__call__", call, raising=False)
    assert block is transformers.models.gpt2.modeling_gpt2.GPT2Block.forward
    found = model.generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert [type(layer).__name__ for layer in cache_of(found).layers] == ["RecurrentLayer"] * 2


@pytest.mark.parametrize("place", ["by name", "by another name", "by place"])
def test_positions_are_counted_wherever_the_cache_is(place: str) -> None:
    model, ids = hf_linattn.convert(GPT2.build(), KIND), token_ids(40)
    with torch.no_grad():
        cache = cache_of(model(ids, use_cache=True))
        args = (ids[:, :30], cache) if place == "by place" else (ids[:, :30],)
        kwargs = {} if place == "by place" else given_cache(cache) if place == "by name" else {"memory": cache}
        with pytest.raises(InputError, match="64 positions; got a text of 70 tokens"):
            model(*args, **kwargs)


def test_a_static_cache_of_the_release(monkeypatch: Patch) -> None:
    model = hf_linattn.convert(GPT2.build(), KIND)
    layers = StaticCache(config=model.config, max_cache_len=8).layers
    ours = "StaticRecurrentLayer" if seams.has_static_layer_types() else "StaticLayer"
    assert [type(layer).__name__ for layer in layers] == [ours] * 2


def test_warnings_of_transformers_about_its_own_names() -> None:
    """They are errors where our code is at fault, or for anything but a new name."""
    renamed = "`past_key_values` is deprecated and will be removed in version 5.40.0 for `f`. Use `cache` instead."
    warnings.warn_explicit(renamed, FutureWarning, "f.py", 1, module="transformers.models.gpt2.modeling_gpt2")
    for text, module in ((renamed, "hf_linattn.integrations.cache"), ("gone", "transformers.models.gpt2")):
        with pytest.raises(FutureWarning):
            warnings.warn_explicit(text, FutureWarning, "f.py", 2, module=module)
