"""Decoders with a cache: pieces, states, gradients, and generated tokens."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertLMHeadModel, Cache, DynamicCache, GPT2LMHeadModel, StaticCache

import hf_linattn

from . import models
from .record import Record, random

NEW = 24
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "favor_plus": ("favor_plus", {}),
    "favor_plus-no-window": ("favor_plus", {"window_size": 0}),
    "favor_plus-overlap": ("favor_plus", {"overlap_window": True}),
    "favor_plus-relu": ("favor_plus", {"kernel": "relu", "window_size": 0}),
    "favor_sharp": ("favor_sharp", {}),
    "favor_sharp-dense": ("favor_sharp", {"window_size": 0, "variant": "dense"}),
    "lara": ("lara", {}),
    "lara-no-window": ("lara", {"window_size": 0}),
    "lara-overlap": ("lara", {"overlap_window": True}),
    "eva": ("eva", {}),
    "eva-overlap-t5": ("eva", {"overlap_window": True, "relative_position": "t5"}),
    "eva-published": ("eva", {"conventions": "published", "sample_noise": False, "chunk_size": 4}),
    "eva-spread": ("eva", {"weighting": "spread", "proposals": "sum", "relative_position": "table"}),
    "eva-bounded": ("eva", {"max_chunks": 3, "chunk_size": 4}),
    "eva-bounded-overlap": ("eva", {"max_chunks": 2, "overlap_window": True, "proposals": "sum"}),
}


def _decoder(family: str) -> Any:
    torch.manual_seed(0)
    if family == "gpt2":
        # Untied from the input embeddings: with tied ones a model without training repeats its last token.
        return models.gpt2(n_positions=200, tie_word_embeddings=False).eval()
    tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False}
    sizes = {"vocab_size": models.VOCAB, "max_position_embeddings": 200}
    return BertLMHeadModel(BertConfig(**{**models.COMMON, **sizes, **tokens, "is_decoder": True})).eval()


def _converted(family: str, name: str) -> Any:
    kind, changes = SETTINGS[name]
    model = hf_linattn.convert(_decoder(family), models.settings(kind, "gpt2", **changes))
    if hf_linattn.needs_calibration(model):
        hf_linattn.calibrate(model, models.calibration_batches("gpt2"))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "linattn" in key:
                parameter += 0.2 * random(key, *parameter.shape)
    return model


def _cache_argument() -> str:
    names = inspect.signature(GPT2LMHeadModel.forward).parameters
    return "past_key_values" if "past_key_values" in names else "cache"


def _cache_of(output: Any) -> Cache:
    return next(value for value in output.values() if isinstance(value, Cache))


def state_tensors(part: Any) -> Iterator[Tensor]:
    """Every floating-point tensor in a tree of tuples, lists and objects of the library."""
    if isinstance(part, Tensor):
        if part.is_floating_point():
            yield part
    elif isinstance(part, (tuple, list)):
        for item in part:
            yield from state_tensors(item)
    elif dataclasses.is_dataclass(part) or type(part).__module__.startswith("hf_linattn"):
        for item in vars(part).values():
            yield from state_tensors(item)


def state_of(cache: Cache) -> dict[str, Tensor]:
    """What each layer keeps, by layer and shape, in an order that does not depend on the names of its parts."""
    # A copy holds no tensors of the model's.
    kept: dict[str, list[Tensor]] = {}
    for index, layer in enumerate(copy.deepcopy(cache).layers):
        for tensor in state_tensors(layer):
            kept.setdefault(f"state {index} {tuple(tensor.shape)} {tensor.dtype}", []).append(tensor.detach())
    return {
        name: torch.stack(sorted(tensors, key=lambda tensor: float(tensor.double().nan_to_num(0, 0, 0).norm())))
        for name, tensors in kept.items()
    }


def in_pieces(model: Any, given: dict[str, Tensor], sizes: list[int], cache: Any = None) -> tuple[Tensor, Any]:
    """Logits of a text that is read piece by piece through one cache, and the cache."""
    logits, start = [], 0
    for size in sizes:
        stop = start + size
        arguments: dict[str, Any] = {"input_ids": given["input_ids"][:, start:stop], "use_cache": True}
        if "attention_mask" in given:
            arguments["attention_mask"] = given["attention_mask"][:, :stop]
        if cache is not None:
            arguments[_cache_argument()] = cache
        output = model(**arguments)
        cache = _cache_of(output)
        logits.append(output.logits)
        start = stop
    return torch.cat(logits, dim=1), cache


def _read(model: Any, mask: str) -> dict[str, Any]:
    given = models.inputs("gpt2", mask)
    with torch.no_grad():
        logits, cache = in_pieces(model, given, [19, 1, 1, 12, 7])
    return {"logits": logits, "bytes": getattr(cache.layers[0], "nbytes", None), **state_of(cache)}


def _read_static(model: Any) -> dict[str, Any]:
    given = models.inputs("gpt2")
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=models.TOKENS)
        logits, cache = in_pieces(model, given, [19, *[1] * 21], cache)
    return {"logits": logits, **state_of(cache)}


def _cropped(model: Any) -> dict[str, Any]:
    ids = models.inputs("gpt2")["input_ids"]
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        _, cache = in_pieces(model, {"input_ids": ids[:, :30]}, [13, 17], cache)
        cache.crop(-6)
        logits, _ = in_pieces(model, {"input_ids": ids[:, 24:]}, [1, 9], cache)
    return {"logits": logits}


def _learned(model: Any) -> dict[str, Any]:
    logits, _ = in_pieces(model, models.inputs("gpt2"), [17, 1, 22])
    (logits * random("weight", *logits.shape)).sum().backward()
    gradients = {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"logits": logits, **gradients}


def _generated(model: Any, mask: str, **options: Any) -> dict[str, Any]:
    given = models.inputs("gpt2", mask)
    torch.manual_seed(9)
    result = model.generate(
        **{"attention_mask": torch.ones_like(given["input_ids"]), **given},
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return {"tokens": result.sequences, "logits": torch.stack(result.logits)}


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "sample": {"do_sample": True, "top_k": 20},
    "static": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "prefill-pieces": {"do_sample": False, "prefill_chunk_size": 13},
    "no-cache": {"do_sample": False, "use_cache": False},
}


def generated(record: Record) -> None:
    for family, name in itertools.product(("gpt2", "bert"), SETTINGS):
        if family == "bert" and name not in ("favor_plus", "favor_sharp", "lara-overlap", "eva"):
            continue
        made: list[Any] = []
        record.case("cache", f"{family}-{name}/model", lambda: made.append(_converted(family, name)) or {})  # noqa: B023
        if not made:
            continue
        model = made[0]
        for mask in ("none", "left"):
            record.case("cache", f"{family}-{name}/{mask}", partial(_read, model, mask))
        record.case("cache", f"{family}-{name}/static", partial(_read_static, model))
        record.case("cache", f"{family}-{name}/crop", partial(_cropped, model))
        record.case("cache", f"{family}-{name}/learned", partial(_learned, model))
        quick = name in ("favor_plus", "favor_sharp", "lara", "eva", "eva-bounded")
        for way, options in WAYS.items():
            if quick or way in ("greedy", "static"):
                run = partial(_generated, model, "left" if way != "static" else "none", **options)
                record.case("generated", f"{family}-{name}/{way}", run)
        for dtype in (torch.bfloat16,) if quick else ():
            half = copy.deepcopy(model).to(dtype)
            record.case("cache", f"{family}-{name}/{dtype}", partial(_read, half, "left"))
    for kind in models.CONFIGS:
        run = partial(_native, kind)
        record.case("generated", f"native-{kind}", run)


def _native(kind: str) -> dict[str, Any]:
    model = models.native("gpt2", models.settings(kind, "gpt2"))
    return _generated(model, "left", do_sample=False)


GROUPS = (generated,)
