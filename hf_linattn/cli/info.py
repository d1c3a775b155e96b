"""`hf-linattn info`: what a checkpoint is, without loading its weights."""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from typing import Any

from ..errors import LinAttnError
from ..integrations.advice import can_convert
from ..integrations.attach import build_layers, family_layers, settings_of
from ..integrations.canary import check_model
from ..integrations.families import defaults_family, is_causal_model, is_converted
from ..integrations.layers import linear_layer
from ..integrations.names import natively
from ..integrations.settings import parse_settings
from ..modules.contract import CALIBRATED_TOKENS
from ..modules.registry import get_kind, list_kinds
from .checkpoints import read_config
from .options import Json, Model, Revision
from .output import print_json, print_line, print_table
from .stored import StoredTensors, empty_model, stored_tensors

EXAMPLE = "Example: hf-linattn info gpt2-trained"


def info(model: Model, revision: Revision = "main", json: Json = False) -> None:
    """Tell what a checkpoint is: kind, settings, layers, what it lacks and needs; of a stock model what it can become.

    Reads config.json and the headers of the weights.
    """
    config = read_config(model, revision)
    empty, stored = empty_model(config), stored_tensors(model, revision)
    found: dict[str, Any] = {
        "model": model,
        "class": type(empty).__name__,
        "model_type": config.model_type,
        "parameters": empty.num_parameters(),
        "dtypes": sorted(Counter(stored.dtypes.values())) if stored else None,
        "positions": getattr(config, "max_position_embeddings", None),
        "converted": is_converted(config),
    }
    found |= _converted(empty, stored) if is_converted(config) else _stock(empty)
    found["needs"] = _needs(config)
    if json:
        print_json(found)
    else:
        _show(found)


# -- a converted checkpoint -------------------------------------------------------------------------------------------
def _converted(model: Any, stored: StoredTensors | None) -> dict[str, Any]:
    """Its attention: the settings, the layers, and what they lack."""
    settings = settings_of(model.config)
    kind = get_kind(settings.config.kind)
    names = {module: name for name, module in model.named_modules()}
    layers = [_layer(index, module, names[module], stored) for index, module in enumerate(family_layers(model))]
    states = [layer["calibrated"] for layer in layers if "calibrated" in layer]
    return {
        "kind": kind.name,
        "title": kind.title,
        "settings": settings.config.to_dict(),
        "learned": settings.config.learned,
        "calibrated": (None if None in states else all(states)) if states else "not needed",
        "attention_dropout": settings.attention_dropout,
        "layers": layers,
        "missing": stored.missing(model) if stored else None,
    }


def _layer(index: int, module: Any, name: str, stored: StoredTensors | None) -> dict[str, Any]:
    layer = linear_layer(module)
    if layer is None:
        return {"layer": index, "name": name, "attention": "softmax", "learned_parameters": 0}
    told = {
        "layer": index,
        "name": name,
        "attention": layer.kind,
        "learned_parameters": sum(parameter.numel() for parameter in layer.parameters()),
    }
    if CALIBRATED_TOKENS in layer.tensors():
        tokens = stored.calibrated_tokens(name) if stored else None
        told |= {"calibrated": None if tokens is None else tokens > 0, "calibrated_tokens": tokens}
    return told


# -- a stock model ----------------------------------------------------------------------------------------------------
def _stock(model: Any) -> dict[str, Any]:
    """What it can become."""
    if not can_convert(model.config):
        return {"kinds": {}, "without_conversion": natively(model, None)}
    check_model(model)
    return {"kinds": {kind: _possible(model, kind) for kind in list_kinds()}}


def _possible(model: Any, kind: str) -> str:
    """Whether a model can be converted to a kind, in words."""
    config = model.config
    try:
        settings = parse_settings(kind, family=defaults_family(config), num_layers=config.num_hidden_layers)
        build_layers(family_layers(model), settings)
    except LinAttnError as error:
        return f"no: {error}"
    needs = is_causal_model(config) and get_kind(kind).causal == "calibrated"
    return "yes, then calibrate" if needs else "yes"


# -- what it takes to load one ----------------------------------------------------------------------------------------
def _needs(config: Any) -> dict[str, Any]:
    """Versions: what the checkpoint was saved with, and what this library requires and has."""
    needs: dict[str, Any] = {"saved_with_transformers": config.transformers_version}
    if is_converted(config):
        needs["settings_version"] = config.linear_attention["version"]
        needs["import"] = "hf_linattn"
    for package in ("hf-linattn", "transformers", "torch"):
        needs[package] = {"installed": _version(package), "required": _required(package)}
    return needs


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _required(package: str) -> str | None:
    """The releases of a package that this library runs on, such as ">=5.10,<6"."""
    try:
        requirements = importlib.metadata.requires("hf-linattn") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (line.removeprefix(package) for line in requirements if line.startswith(package) and ";" not in line)
    return next((rest.strip() for rest in found if rest[:1] in "<>=!~ "), None)


# -- for people -------------------------------------------------------------------------------------------------------
def _show(found: dict[str, Any]) -> None:
    told = {
        "class": found["class"],
        "parameters": f"{found['parameters']:,}",
        "dtype": ", ".join(found["dtypes"] or ["unknown"]),
        "positions": found["positions"],
    }
    if found["converted"]:
        calibrated = {None: "unknown: the weights are not on this machine", True: "yes", False: "no"}
        told |= {
            "attention": f"{found['title']} ({found['kind']})",
            **{name: value for name, value in found["settings"].items() if name != "kind"},
            "calibrated": calibrated.get(found["calibrated"], found["calibrated"]),
            "missing tensors": found["missing"] and ", ".join(found["missing"]),
        }
    needs = found["needs"]
    told["saved with"] = f"Transformers {needs['saved_with_transformers']}"
    told["needs"] = (
        "Transformers "
        + str(needs["transformers"]["required"])
        + (", hf_linattn imported before it is loaded" if found["converted"] else "")
    )
    print_table(("", found["model"]), ((name, str(value)) for name, value in told.items() if value not in (None, [])))
    if found["converted"]:
        rows = [
            (str(layer["layer"]), layer["attention"], f"{layer['learned_parameters']:,}") for layer in found["layers"]
        ]
        print_table(("layer", "attention", "learned parameters"), rows)
    elif found["kinds"]:
        print_table(("kind", "can be converted to"), found["kinds"].items())
    else:
        print_line(found["without_conversion"])
