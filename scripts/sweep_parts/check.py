"""What a kind does with one tiny model, by every road on which its name can be given.

A kind is right in a model if it computes softmax attention where its settings leave nothing to estimate (one window
over all tokens), computes something else where they do not, and is called by as many layers as call any attention
function.
"""

from __future__ import annotations

import contextlib
import copy
import re
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedConfig

import hf_linattn
from hf_linattn.errors import LinAttnError, UnsupportedError
from hf_linattn.integrations import interface
from hf_linattn.integrations.advice import can_convert
from hf_linattn.integrations.canary import check_seams
from hf_linattn.modules.registry import get_kind, list_kinds

from .advice import failures
from .model import Model, build, configs_of, distance, first_line, run

TOLERANCE = 1e-4
ROADS = ("from_config", "from_pretrained", "set_attn_implementation")


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """The modules for which our attention function is called, call by call."""
    calls: list[str] = []
    original = interface.kind_attention

    def kind_attention(kind: str, module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(type(module).__name__)
        return original(kind, module, *args, **kwargs)

    interface.kind_attention = kind_attention
    try:
        yield calls
    finally:
        interface.kind_attention = original


@contextlib.contextmanager
def exact(kind: str) -> Iterator[None]:
    """The kind's mathematics replaced by softmax: for cross-attention, which has no window and so no exact limit."""
    cls = get_kind(kind).module_cls

    def compute(config: Any, state: Any, given: Any, *args: Any, **kwargs: Any) -> Tensor:
        logits = given.query @ given.key.transpose(-1, -2) * given.scaling
        if given.key_mask is not None:
            logits = logits.masked_fill(~given.key_mask[:, None, None, :], -torch.inf)
        if given.is_causal:
            queries, keys = logits.shape[-2:]
            seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            logits = logits.masked_fill(~seen, -torch.inf)
        return logits.softmax(-1).nan_to_num() @ given.value

    with mock.patch.object(cls, "compute", staticmethod(compute)):
        yield


def settings(kind: str, window: int) -> dict[str, Any]:
    small = {"favor_plus": {"num_features": 16}, "favor_sharp": {"num_features": 16}, "lara": {"num_landmarks": 4}}
    return {"kind": kind, "window_size": window, **small.get(kind, {"num_chunks": 2, "chunk_size": "auto"})}


def make(found: Model, kind: str, road: str, folder: str) -> Any:
    """The model under a kind's name, given on one of the roads."""
    if road == "from_config":
        model = found.cls._from_config(copy.deepcopy(found.config), attn_implementation=kind)
    elif road == "from_pretrained":
        model = found.cls.from_pretrained(folder, attn_implementation=kind, dtype=torch.float32)
    else:
        if found.switched is None:
            found.switched = found.cls._from_config(copy.deepcopy(found.config))
        model = found.switched
        model.set_attn_implementation(kind)
    model = model.float().eval()
    model.load_state_dict(found.state, strict=False)
    return model


def with_settings(model: Any, values: dict[str, Any]) -> Any:
    seen = {id(config): config for config in configs_of(model.config)}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            seen[id(config)] = config
    for config in seen.values():
        config.linear_attention = dict(values)
    return model


def judge(found: Model, kind: str, road: str, folder: str) -> dict[str, Any]:
    """`{"verdict": "works" | "refused" | "stock" | "fault" | "accepted", "why": ...}`."""
    try:
        model = make(found, kind, road, folder)
    except LinAttnError as error:
        return {"verdict": "refused", "why": first_line(error), "at": "name"}
    except Exception as error:
        return {"verdict": "stock", "why": first_line(error), "at": "name"}
    taken = {getattr(c, "_attn_implementation", None) for c in configs_of(model.config)}
    if kind not in taken:
        return {"verdict": "stock", "why": "Transformers warns and keeps its own attention", "at": "name"}
    if not found.inputs:
        return {"verdict": "accepted", "why": f"not run: {found.stock}"}
    has_cross = False
    try:
        with counted() as calls:
            limit = run(with_settings(model, settings(kind, 4096)), found.inputs)
    except LinAttnError as error:
        if "Cross-attention under" not in str(error):
            return {"verdict": "refused", "why": first_line(error), "at": "call"}
        has_cross = True
    except Exception as error:
        return {"verdict": "fault", "why": first_line(error)}
    try:
        if has_cross:
            with counted() as calls, exact(kind):
                limit = run(with_settings(model, {**settings(kind, 0), "num_global_tokens": 0}), found.inputs)
        if not calls:
            return {"verdict": "fault", "why": f"the name is taken and ignored; {found.own} attend"}
        if len(calls) != found.layers:
            return {"verdict": "fault", "why": f"{len(calls)} of {found.layers} calls are of the kind"}
        error = distance(limit, found.answer)
        if not error <= TOLERANCE:
            return {"verdict": "fault", "why": f"differs from softmax by {error:.1e} in the limit"}
        if road != ROADS[0]:
            return {"verdict": "works"}
        # FAVOR+ without a window, EVA with one of two tokens, has something to estimate.
        other = {**settings(kind, 2 if kind == "eva" else 0), "num_global_tokens": 0}
        away = distance(run(with_settings(model, other), found.inputs), found.answer)
        if not TOLERANCE / 10 < away < float("inf"):
            return {"verdict": "fault", "why": f"differs from softmax by {away:.1e} outside of the limit"}
    except LinAttnError as error:
        return {"verdict": "refused", "why": first_line(error), "at": "call"}
    except Exception as error:
        return {"verdict": "fault", "why": first_line(error)}
    return {"verdict": "works"}


def try_out(found: Model, config: Any, name: Any) -> str | None:
    """What goes wrong when a model is made of a config under a name, and run; None if nothing does."""
    try:
        try:
            model = found.cls._from_config(copy.deepcopy(config), attn_implementation=name)
        except UnsupportedError as error:
            if "Make the model without it, then call" not in str(error):
                raise
            model = found.cls._from_config(config)
            model.set_attn_implementation(name)
        model = model.float().eval()
        if found.inputs:
            run(model, found.inputs)
    except Exception as error:
        return first_line(error)
    return None


def wrong_advice(found: Model, kinds: dict[str, Any]) -> dict[str, list[str]]:
    """Refusal -> what of its advice does not work."""
    followed: set[str] = set()
    wrong = {}
    for kind, roads in kinds.items():
        for verdict in roads.values():
            message = verdict.get("why", "")
            alike = message.replace(repr(kind), "a kind")
            if verdict["verdict"] != "refused" or alike in followed:
                continue
            followed.add(alike)
            advice = failures(
                message,
                found.config,
                kind,
                lambda config: list(configs_of(config)),
                lambda config, name: try_out(found, config, name),
            )
            if advice:
                wrong[message] = advice
    return wrong


def converting(found: Model, kinds: dict[str, Any]) -> dict[str, str]:
    """Kind -> what is wrong with what `convert` advises for a model that it cannot convert: no circle."""
    if can_convert(found.config):
        return {}
    wrong = {}
    for kind in list_kinds():
        try:
            hf_linattn.convert(found.switched, kind)
        except LinAttnError as error:
            advised = re.search(r"set_attn_implementation\('(\w+)'\)", str(error))
            then = {} if advised is None else kinds[advised[1]]
            back = [verdict["why"] for verdict in then.values() if "hf_linattn.convert" in verdict.get("why", "")]
            if back:
                wrong[kind] = f"{first_line(error)} {back[0]}"
        except Exception as error:
            wrong[kind] = first_line(error)
    return wrong


def warm_up() -> None:
    """What is asked once per process, so that no child has to."""
    for family in (None, "bert", "gpt2", "vit"):
        check_seams(family)
    for model_type in ("clip", "llama"):
        sweep_one(model_type)


def sweep_one(model_type: str) -> dict[str, Any]:
    """Everything about one model type, as JSON."""
    try:
        found = build(model_type)
    except Exception as error:
        return {"built": False, "why": first_line(error)}
    result: dict[str, Any] = {
        "built": True,
        "class": found.cls.__name__,
        "run": bool(found.inputs),
        "inputs": sorted(found.inputs),
        "stock": found.stock,
        "layers": found.layers,
        "cross": found.cross,
        "own": found.own,
        "kinds": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        model = found.cls._from_config(copy.deepcopy(found.config))
        model.load_state_dict(found.state, strict=False)
        try:
            model.save_pretrained(folder)
            found.cls.from_pretrained(folder)
            roads = ROADS
        except Exception as error:  # of Transformers, without any name
            result["not saved and loaded"] = first_line(error)
            roads = (ROADS[0], ROADS[2])
        for kind in list_kinds():
            # What from_pretrained does with one name it does with all.
            own = roads if kind == list_kinds()[0] else [road for road in roads if road != "from_pretrained"]
            result["kinds"][kind] = {road: judge(found, kind, road, folder) for road in own}
    result["convert"] = converting(found, result["kinds"])
    result["advice"] = wrong_advice(found, result["kinds"])
    return result
