"""How a release of Transformers may change each seam, and the uses that meet the change."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import transformers.conversion_mapping as conversion_mapping
from caches import cache_keyword, given_cache
from cases import BERT, GPT2, VIT, VOCAB, ModelCase
from torch import nn
from transformers import (
    Cache,
    EncoderDecoderCache,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    TrainerCallback,
    cache_utils,
    initialization,
    masking_utils,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
from transformers.models.bert.modeling_bert import BertModel, BertSelfAttention
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Model
from transformers.models.vit.modeling_vit import ViTAttention
from transformers.utils import output_capturing

import hf_linattn
from hf_linattn.bench.generation import fill
from hf_linattn.errors import UnsupportedTransformersError
from hf_linattn.integrations import canary, seams
from hf_linattn.integrations.masks import linattn_mask
from hf_linattn.modules.registry import list_kinds
from hf_linattn.training import LinAttnCallback

Patch = pytest.MonkeyPatch
Change = Callable[[Patch], None]
KIND = list_kinds()[0]
PACKAGE = Path(hf_linattn.__file__).parent
TABLES = ("DYNAMIC_LAYER_TYPE_MAPPING", "LAYER_TYPE_CACHE_MAPPING", "STATIC_LAYER_TYPE_MAPPING")


def replaced(owner: Any, name: str, value: Any) -> Change:
    return lambda patch: patch.setattr(owner, name, value)


def dropped(owner: Any, name: str) -> Change:
    return lambda patch: patch.delattr(owner, name)


def _drop_entries(*names: str) -> Change:
    def change(patch: Patch) -> None:
        for name in names:
            if hasattr(cache_utils, name):
                patch.delitem(getattr(cache_utils, name), seams.LAYER_TYPE)

    return change


def _mask_called_with(**changes: Any) -> Change:
    """Mask functions that are called with other arguments: a new name for an old one, or a value for a new one."""

    def renamed(**kwargs: Any) -> Any:
        for old, new in changes.items():
            kwargs[new if isinstance(new, str) else old] = kwargs.pop(old, new)
        return linattn_mask(**kwargs)

    registered = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    return lambda patch: patch.setitem(registered, KIND, renamed)


def _attention_called_without(*names: str) -> Change:
    """Models that no longer pass some arguments on to attention functions."""

    def change(patch: Patch) -> None:
        from transformers.modeling_utils import AttentionInterface

        stock = AttentionInterface.get_interface

        def get_interface(self: Any, *args: Any) -> Any:
            function = stock(self, *args)

            def attention(*inputs: Any, **kwargs: Any) -> Any:
                return function(*inputs, **{name: value for name, value in kwargs.items() if name not in names})

            attention.__name__ = function.__name__
            return attention

        patch.setattr(AttentionInterface, "get_interface", get_interface)

    return change


def _other_field(patch: Patch) -> None:
    """Configs that keep the attention implementation elsewhere."""
    field = property(lambda self: self.__dict__.get("_elsewhere"), lambda self, v: self.__dict__.update(_elsewhere=v))
    patch.setattr(PreTrainedConfig, "_attn_implementation", field)


def _unseen_cache(patch: Patch) -> None:
    """Attention modules that get their cache in another way than as an argument."""
    forward, taken = GPT2Attention.forward, []

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken.append(kwargs.pop(cache_keyword(), None))
        return nn.Module.__call__(self, *args, **kwargs)

    patch.setattr(GPT2Attention, "__call__", call, raising=False)

    @functools.wraps(forward)
    def given(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **given_cache(taken.pop()), **kwargs)

    patch.setattr(GPT2Attention, "forward", given)


def renamed(forward: Any, old: str, new: str) -> Any:
    """A forward that takes one argument under another name only."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert old not in kwargs, f"unexpected keyword argument {old!r}"
        if new in kwargs:
            kwargs[old] = kwargs.pop(new)
        return forward(self, *args, **kwargs)

    signature = inspect.signature(forward)
    parameters = [p.replace(name=new) if p.name == old else p for p in signature.parameters.values()]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


class OtherRegistry(dict[Any, Any]):
    """A registry of recorded outputs that has other keys."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(getattr(type(key), "__name__", key), value)


def _closed(forward: Any) -> Any:
    """A forward that no longer takes arguments it does not know."""
    known = [name for name in inspect.signature(forward).parameters if name not in ("self", "kwargs")]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in known:
                raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
        return forward(self, *args, **kwargs)

    call.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return call


def _without(forward: Any, name: str) -> Any:
    """A forward that takes an argument and does nothing with it."""

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **{key: None if key == name else value for key, value in kwargs.items()})

    return call


def _inverted_mask(*args: Any, **kwargs: Any) -> Any:
    mask = masking_utils.create_causal_mask(*args, **kwargs)
    if mask.tokens is not None:
        mask.tokens = ~mask.tokens
    return mask


def _inverted_softmax(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, query, key, value, None if mask is None else ~mask, **kwargs)


def _initialise_all(self: Any) -> None:
    for module in self.modules():
        self._init_weights(module)


def _not_causal(init: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        del self.is_causal

    return __init__


# -- uses: a model is made before the change, and used after it ------------------------------------------------------
Use = Callable[[], Callable[[], Any]]


def token_ids(tokens: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, tokens), generator=torch.Generator().manual_seed(1))


def converting(case: ModelCase = GPT2) -> Use:
    def prepare() -> Callable[[], Any]:
        model = case.build()
        return lambda: hf_linattn.convert(model, KIND)

    return prepare


def generating(**config: Any) -> Use:
    def prepare() -> Callable[[], Any]:
        model = hf_linattn.convert(GPT2.build(**config), KIND)
        return lambda: model.generate(token_ids(), max_new_tokens=3, do_sample=False)

    return prepare


def loading_stock(case: ModelCase = BERT) -> Use:
    def prepare() -> Callable[[], Any]:
        import tempfile

        folder = tempfile.TemporaryDirectory()
        model = case.build()
        model.save_pretrained(folder.name)
        cls = type(hf_linattn.convert(model, KIND))
        return lambda: (folder, cls.from_pretrained(folder.name, linear_attention=KIND))

    return prepare


def native_call(**config: Any) -> Use:
    def prepare() -> Callable[[], Any]:
        model = GPT2.build(**config)
        model.set_attn_implementation(KIND)
        return lambda: model(token_ids(), use_cache=False)

    return prepare


def asked(*groups: str) -> Change:
    """As if the canary had found these groups in order: what only the use itself can tell."""
    return lambda patch: patch.setattr(canary, "_passed", set(groups))


def _both(*changes: Change) -> Change:
    return lambda patch: [change(patch) for change in changes] and None


def _renamed_blocks() -> Callable[[], Any]:
    model = GPT2.build()
    model.transformer.blocks = model.transformer.h
    del model.transformer.h
    return lambda: hf_linattn.convert(model, KIND)


def _other_buffers() -> Callable[[], Any]:
    model = BERT.build()
    model.bert.embeddings.register_buffer("default_positions", torch.arange(64)[None], persistent=False)
    return lambda: hf_linattn.extend_positions(model, 128)


def _importing_without(module: str, name: str) -> Callable[[], Any]:
    code = f"import {module} as m; del m.{name}; import hf_linattn"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    kind, _, message = run.stderr.strip().splitlines()[-1].partition(": ")
    assert kind == "hf_linattn.errors.UnsupportedTransformersError", run.stderr

    def use() -> None:
        raise UnsupportedTransformersError(message)

    return use


def nothing(patch: Patch) -> None:
    """The model itself is what differs."""


# Seam -> ways in which a release may change it, each with a use that meets it.
MUTATIONS: dict[str, list[tuple[Change, Use]]] = {
    "names": [
        (nothing, lambda: _importing_without("transformers.masking_utils", "causal_mask_function")),
        (nothing, lambda: _importing_without("transformers.cache_utils", "CacheLayerMixin")),
        (nothing, lambda: _importing_without("transformers.models.gpt2.modeling_gpt2", "GPT2DoubleHeadsModel")),
    ],
    "attention functions": [
        (dropped(transformers.AttentionInterface, "get_interface"), converting()),
        (replaced(transformers.AttentionInterface, "get_interface", lambda self, name, other: other), native_call()),
    ],
    "mask functions": [
        (lambda p: p.delitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, KIND), converting()),
        (replaced(seams, "create_causal_mask", lambda config, embeds, cache, mask, positions: None), generating()),
        (replaced(masking_utils, "create_bidirectional_mask", lambda *args, **kwargs: None), converting(BERT)),
        (replaced(seams, "create_causal_mask", _inverted_mask), native_call()),
    ],
    "arguments of a mask function": [
        (_mask_called_with(attention_mask="padding_mask"), native_call()),
        (_mask_called_with(mask_function="pattern"), converting(BERT)),
        (_mask_called_with(overlay=True), native_call()),
        (_both(_mask_called_with(overlay=True), asked("always", "gpt2")), native_call()),
    ],
    "tracing": [(replaced(seams, "is_tracing", lambda: False), converting())],
    "softmax attention": [
        (
            replaced(seams, "sdpa_attention_forward", lambda m, q, k, v, mask, dropout, scale, is_causal: (q, None)),
            converting(),
        ),
        (replaced(seams, "sdpa_attention_forward", _inverted_softmax), converting()),
    ],
    "dynamic cache": [
        (_drop_entries(*TABLES[:2]), generating()),
        (_drop_entries(*TABLES[:2]), lambda: lambda: hf_linattn.convert(GPT2.build(), KIND)),
    ],
    "static cache": [(_drop_entries(TABLES[2]), generating())],
    "cache layers": [
        (replaced(Cache, "reorder_cache", lambda self, index: None), generating()),
        (replaced(Cache, "get_mask_sizes", lambda self, query, layer: (query, 0)), generating()),
        (replaced(Cache, "update", lambda self, key, value, **kwargs: (key, value)), generating()),
        (dropped(Cache, "crop"), generating()),
    ],
    "encoder decoder cache": [
        (lambda p: p.setattr(EncoderDecoderCache, "self_attention_cache", property(id), raising=False), converting()),
    ],
    "cache in use": [
        (_unseen_cache, generating()),
        (
            _both(replaced(Cache, "update", lambda self, key, *args, **kw: (key, args[0])), asked("always", "gpt2")),
            generating(),
        ),
    ],
    "cache argument": [
        (
            replaced(GPT2LMHeadModel, "forward", lambda self, input_ids=None, **kwargs: None),
            lambda: (lambda model: lambda: fill(model, token_ids(), 4))(GPT2.build()),
        ),
    ],
    "masks of generate": [
        (replaced(masking_utils, "create_masks_for_generate", lambda settings, embeds, mask: mask), generating()),
        (dropped(masking_utils, "create_masks_for_generate"), generating()),
    ],
    "recorded outputs": [
        (replaced(output_capturing, "_CAN_RECORD_REGISTRY", OtherRegistry()), converting()),
        (dropped(output_capturing, "_CAN_RECORD_REGISTRY"), converting()),
    ],
    "initialisation": [
        (replaced(initialization, "copy_", lambda tensor, other: tensor.copy_(other)), loading_stock()),
        (dropped(PreTrainedModel, "_init_weights"), converting()),
        (replaced(PreTrainedModel, "initialize_weights", _initialise_all), converting()),
    ],
    "initialised weights": [
        (
            _both(replaced(PreTrainedModel, "initialize_weights", lambda self: None), asked("always", "bert")),
            loading_stock(),
        ),
    ],
    "config": [
        (_other_field, converting()),
        (dropped(PreTrainedConfig, "get_text_config"), converting()),
    ],
    "model methods": [
        (dropped(PreTrainedModel, "get_correct_attn_implementation"), converting()),
        (replaced(PreTrainedModel, "get_correct_attn_implementation", lambda self, *args: "sdpa"), converting()),
    ],
    "names given to models": [(replaced(PreTrainedModel, "post_init", lambda self: None), converting())],
    "saving": [(replaced(PreTrainedModel, "save_pretrained", lambda self, folder, **kwargs: None), converting(VIT))],
    "loading": [
        (
            lambda patch: patch.setattr(
                PreTrainedModel, "from_pretrained", classmethod(lambda cls, *args, **kwargs: (BERT.build(), {}))
            ),
            loading_stock(),
        ),
    ],
    "auto classes": [(lambda patch: patch.delitem(CONFIG_MAPPING._extra_content, "linattn_bert"), converting())],
    "preprocessing": [
        (lambda p: p.delitem(TOKENIZER_MAPPING._reverse_config_mapping, "LinAttnBertConfig"), converting()),
    ],
    "weight names": [
        (
            replaced(conversion_mapping, "get_checkpoint_conversion_mapping", lambda name: None),
            loading_stock(VIT),
        ),
    ],
    "attention modules": [
        (replaced(GPT2Attention, "forward", _closed(GPT2Attention.forward)), converting()),
        (replaced(BertSelfAttention, "__init__", _not_causal(BertSelfAttention.__init__)), converting(BERT)),
        (replaced(ViTAttention, "forward", _closed(ViTAttention.forward)), converting(VIT)),
        (_attention_called_without("scaling"), native_call()),
        (_attention_called_without(seams.ARGUMENT), generating()),
        (_attention_called_without("dropout"), converting(BERT)),
    ],
    "forward arguments": [
        (replaced(BertModel, "forward", renamed(BertModel.forward, "input_ids", "tokens")), converting(BERT)),
        (replaced(BertModel, "forward", lambda self, input_ids: None), converting(BERT)),
    ],
    "models": [
        (replaced(GPT2Model, "forward", _without(GPT2Model.forward, "attention_mask")), native_call()),
        (replaced(GPT2Model, "forward", _without(GPT2Model.forward, "position_ids")), converting()),
        (replaced(BertModel, "forward", _without(BertModel.forward, "attention_mask")), converting(BERT)),
    ],
    "layers of a model": [(nothing, _renamed_blocks)],
    "position buffers": [(nothing, _other_buffers)],
    "scaling": [
        (
            _both(_attention_called_without("scaling"), asked("always", "gpt2")),
            native_call(scale_attn_by_inverse_layer_idx=True),
        ),
    ],
    "trainer events": [(dropped(TrainerCallback, "on_step_end"), lambda: LinAttnCallback)],
}
