"""A refused call leaves the cache as it was: the next right call gives the right result, or raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from caches import given_cache
from cases import NATIVE_CAUSAL_KINDS, ModelCase, largest
from decoders import BERT, GPT2, KINDS, STATIC_KEEPS_KEYS, TOLERANCE, Setting, decoder, prompt
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from hf_linattn.errors import LinAttnError

PAST, NEW = 20, 3

# What is refused inside the layers, where the cache has been given the new keys already.
REFUSED: dict[str, dict[str, Any]] = {
    "an argument that attention reads": {"softcap": 3.0},
    "packed": {"seq_idx": torch.zeros(2, NEW, dtype=torch.long)},
    "packed positions": {"position_ids": torch.tensor([[20, 0, 1]]).repeat(2, 1)},
    "a mask of pairs": {"attention_mask": torch.ones(2, 1, NEW, PAST + NEW)},
    "a short mask": {"attention_mask": torch.ones(2, PAST, dtype=torch.long)},
    "a mask that hides the past": {"attention_mask": torch.tensor([[0] * 4 + [1] * (PAST + NEW - 4)] * 2)},
    "the other direction": {"is_causal": False},
    "attention weights": {"output_attentions": True},
}


def native(case: ModelCase, setting: Setting, **config: Any) -> Any:
    model = case.build(**config)
    model.config.linear_attention = case.settings(setting.kind, **setting.changes).to_dict()
    model.set_attn_implementation(setting.kind)
    return model


def mixed(first_is_softmax: bool) -> Callable[..., Any]:
    return lambda case, setting: decoder(case, setting, layers=[1] if first_is_softmax else [0])


def one_layer(case: ModelCase, setting: Setting) -> Any:
    """Nothing but the layer's own cache could notice."""
    return native(case, setting, **{"n_layer" if case is GPT2 else "num_hidden_layers": 1})


BUILD: dict[str, Callable[..., Any]] = {
    "converted": decoder,
    "native": native,
    "native-one-layer": one_layer,
    "softmax-first": mixed(True),
    "softmax-last": mixed(False),
}
MATRIX = [
    pytest.param(
        build, case, setting, id=f"{name}-{case.name}-{setting.name}", marks=[] if case is GPT2 else pytest.mark.slow
    )
    for name, build in BUILD.items()
    for case in (GPT2, BERT)
    for setting in KINDS
    if setting.kind in NATIVE_CAUSAL_KINDS or not name.startswith("native")
]


def dynamic(model: Any) -> Any:
    return DynamicCache(config=model.config)


def static(model: Any) -> Any:
    return StaticCache(config=model.config, max_cache_len=64)


def step(model: Any, ids: Tensor, cache: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **given_cache(cache), **options).logits


def check(model: Any, make_cache: Callable[..., Any], refuse: Callable[[Any], None], *, must_work: bool) -> None:
    """Refuse, as the first thing and in the middle; then go on as if nothing had been."""
    ids = prompt(2, PAST + 2 * NEW)
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    cache = make_cache(model)
    for start, end in ((0, PAST), (PAST, PAST + NEW), (PAST + NEW, PAST + 2 * NEW)):
        if start:
            refuse(cache)
        try:
            got = step(model, ids[:, start:end], cache, attention_mask=torch.ones(2, end, dtype=torch.long))
        except Exception:
            if must_work:
                raise
            return
        assert largest(got - want[:, start:end]) < TOLERANCE


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize(("build", "case", "setting"), MATRIX)
def test_the_right_call_goes_on(build: Any, case: ModelCase, setting: Setting, name: str) -> None:
    if build in (native, one_layer) and name in ("a mask that hides the past", "attention weights"):
        pytest.skip("a cache of keys can be masked later; of weights GPT-2 gives none, as under sdpa")
    model = build(case, setting)

    def refuse(cache: Any) -> None:
        with pytest.raises(Exception, match="."):
            step(model, prompt(2, NEW, seed=9), cache, **REFUSED[name])

    check(model, dynamic, refuse, must_work=name != "a mask that hides the past")


@pytest.mark.skipif(STATIC_KEEPS_KEYS, reason="before 5.14 every static cache keeps keys and values")
@pytest.mark.parametrize("name", ["an argument that attention reads", "packed positions", "a mask of pairs"])
@pytest.mark.parametrize(("build", "case", "setting"), [p for p in MATRIX if "gpt2" in str(p.id)])
def test_static_cache_after_a_refusal(build: Any, case: ModelCase, setting: Setting, name: str) -> None:
    model = build(case, setting)

    def refuse(cache: Any) -> None:
        with pytest.raises(Exception, match="."):
            step(model, prompt(2, NEW, seed=9), cache, **REFUSED[name])

    check(model, static, refuse, must_work=True)


@pytest.mark.parametrize("error", [RuntimeError, pytest.param(KeyboardInterrupt, marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("build", "case", "setting"), [p for p in MATRIX if "one-layer" not in str(p.id)])
def test_an_error_from_elsewhere(
    build: Any, case: ModelCase, setting: Setting, layer: int, place: str, error: type[BaseException]
) -> None:
    """Out of memory, a hook, Ctrl-C: what a layer has read cannot be taken back, and is not taken for granted."""
    model = build(case, setting)
    block = (model.transformer.h if case is GPT2 else model.bert.encoder.layer)[layer]
    attention = block.attn if case is GPT2 else block.attention.self

    def refuse(cache: Any) -> None:
        def fail(*_: Any) -> None:
            raise error

        register = attention.register_forward_pre_hook if place == "before" else attention.register_forward_hook
        handle = register(fail)
        with pytest.raises(error):
            step(model, prompt(2, NEW, seed=9), cache)
        handle.remove()

    check(model, dynamic, refuse, must_work=(layer, place) == (0, "before"))


# -- caches whose keys are not those that the attention function gets -------------------------------------------------
def deepseek(layers: int) -> Any:
    """Its attention puts two parts of a key together after the cache has been updated."""
    config = DeepseekV3Config(
        vocab_size=60,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=layers,
        first_k_dense_replace=layers,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
    )
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM._from_config(config, attn_implementation="favor_plus").eval()


class OwnLayer(DynamicLayer):
    """A layer that does something else with its keys."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        return super().update(*args, **kwargs)


@pytest.mark.parametrize("layers", [1, 2])
def test_keys_that_are_changed_after_the_cache(layers: int) -> None:
    model = deepseek(layers)

    def refuse(cache: Any) -> None:
        with pytest.raises(LinAttnError):
            step(model, prompt(2, NEW, seed=9), cache, softcap=3.0)

    check(model, dynamic, refuse, must_work=True)


def test_a_layer_that_cannot_give_tokens_back_raises() -> None:
    model = native(GPT2, KINDS[0])
    cache = DynamicCache(config=model.config)
    cache.layers = [OwnLayer() for _ in range(2)]
    step(model, prompt(2, PAST), cache)
    with pytest.raises(LinAttnError, match="soft cap"):
        step(model, prompt(2, NEW), cache, softcap=3.0)
    with pytest.raises(LinAttnError, match=r"cannot give them back\. Start with a new cache"):
        step(model, prompt(2, NEW), cache)
