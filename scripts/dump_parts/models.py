"""Tiny BERT, GPT-2 and ViT under every kind, native and converted: logits, gradients, state dicts, settings."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

import hf_linattn
from hf_linattn.training import redraw_projections

from .record import Record, random

VOCAB, TOKENS = 60, 40
CONFIGS = {
    "favor_plus": hf_linattn.FavorPlusConfig,
    "favor_sharp": hf_linattn.FavorSharpConfig,
    "lara": hf_linattn.LaraConfig,
    "eva": hf_linattn.EvaConfig,
}
# Weights large enough that attention is far from uniform.
COMMON: dict[str, Any] = {
    "initializer_range": 0.2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GPT2 = {"initializer_range": 0.2, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "pad_token_id": 0}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def bert(**changes: Any) -> Any:
    return BertForMaskedLM(BertConfig(**{**COMMON, "vocab_size": VOCAB, "max_position_embeddings": 64, **changes}))


def gpt2(**changes: Any) -> Any:
    return GPT2LMHeadModel(
        GPT2Config(**{**GPT2, "eos_token_id": None, "n_positions": 64, "vocab_size": VOCAB, **changes})
    )


def vit(**changes: Any) -> Any:
    return ViTForImageClassification(ViTConfig(**{**COMMON, "image_size": 24, "patch_size": 4, **changes}))


FAMILIES: dict[str, Callable[..., Any]] = {"bert": bert, "gpt2": gpt2, "vit": vit}


def build(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return FAMILIES[family](**changes).eval()


def inputs(family: str, mask: str = "none") -> dict[str, Tensor]:
    if family == "vit":
        return {"pixel_values": random("pixels", 2, 3, 24, 24)}
    ids = torch.randint(3, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    if mask == "none":
        return {"input_ids": ids}
    keep = torch.ones_like(ids)
    keep[1, slice(0, 17) if mask == "left" else slice(-17, None)] = 0
    return {"input_ids": ids * keep, "attention_mask": keep}


def settings(kind: str, family: str, **changes: Any) -> Any:
    """Small settings of a kind, in which the slots do the work."""
    small: dict[str, dict[str, Any]] = {
        "favor_plus": {"num_features": 32},
        "favor_sharp": {"num_features": 32},
        "lara": {"num_landmarks": 8},
        "eva": {"num_chunks": 8},
    }
    window = 2 if family == "vit" else 8
    return CONFIGS[kind](**{"window_size": window, **small[kind], **changes})


def native(family: str, config: Any) -> Any:
    model = build(family)
    model.config.linear_attention = config.to_dict()
    model.set_attn_implementation(config.kind)
    return model


def converted(family: str, config: Any, **options: Any) -> Any:
    """Calibrated where it has to be, with learned maps and biases that do something."""
    model = hf_linattn.convert(build(family), config, **options)
    if hf_linattn.needs_calibration(model):
        hf_linattn.calibrate(model, calibration_batches(family))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "linattn" in name:
                parameter += 0.2 * random(name, *parameter.shape)
    return model


def calibration_batches(family: str) -> list[dict[str, Tensor]]:
    if family == "vit":
        return [{"pixel_values": random(f"pixels {index}", 4, 3, 24, 24)} for index in range(2)]
    generator = torch.Generator().manual_seed(11)
    return [{"input_ids": torch.randint(3, VOCAB, (4, TOKENS), generator=generator)} for _ in range(2)]


MODES: dict[str, Callable[..., Any]] = {"native": native, "converted": converted}


def variants(kind: str, family: str) -> dict[str, dict[str, Any]]:
    """Settings by name: those that every kind has, and those of its own."""
    found: dict[str, dict[str, Any]] = {
        "window": {},
        "default": {"window_size": None},
        "no-window": {"window_size": 0},
        "overlap": {"overlap_window": True},
        "seed": {"seed": 5},
    }
    if family == "bert":
        found["global"] = {"num_global_tokens": 2}
    if kind == "eva":
        del found["no-window"]
        found |= {
            "published": {"conventions": "published", "sample_noise": False, "chunk_size": 4},
            "spread": {"weighting": "spread", "proposals": "sum"},
            "table": {"relative_position": "table", "overlap_window": True},
            "t5": {"relative_position": "t5"},
            "bounded": {"max_chunks": 2, "chunk_size": 4},
        }
        return found
    found["heavy"] = {"num_heavy_keys": 3}
    if kind == "favor_plus":
        found |= {
            "relu": {"kernel": "relu", "window_size": 0},
            "regularized": {"regularized": True},
            "independent": {"orthogonal": False, "shared_projection": True},
        }
    if kind == "favor_sharp":
        found |= {name: {"variant": name, "window_size": 0} for name in ("gerf", "aderf", "sderf", "dense")}
        found["calibrated"] = {"statistics": "calibrated", "variant": "dense"}
    if kind == "lara":
        found |= {
            "published": {"conventions": "published", "sample_noise": False},
            "optimal": {"weighting": "optimal", "mixing": "key"},
            "calibrated": {"proposal_source": "calibrated"},
        }
    return found


def forward_and_backward(model: Any, given: dict[str, Tensor]) -> dict[str, Any]:
    with torch.no_grad():
        alone = model(**given)[0]
    output = model(**given)[0]
    keep = given.get("attention_mask", torch.ones(output.shape[:2]))
    weight = random("weight", *output.shape) * (keep[..., None] if output.ndim == 3 else 1)
    (output.float() * weight).sum().backward()
    gradients = {f"gradient {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"inference": alone, "output": output, **gradients}


def passes(record: Record) -> None:
    """Every setting under every mask in float32, and the main ones in bfloat16."""
    for mode, kind, family in itertools.product(MODES, CONFIGS, FAMILIES):
        for name, changes in variants(kind, family).items():
            for dtype in DTYPES if name in ("window", "no-window", "default", "global") else ("float32",):
                _model_case(record, f"{family} {mode} {dtype}", f"{kind}-{name}", mode, changes)


def _model_case(record: Record, group: str, name: str, mode: str, changes: dict[str, Any]) -> None:
    family, _, dtype = group.split()
    models: list[Any] = []

    def prepare() -> dict[str, Any]:
        model = MODES[mode](family, settings(name.partition("-")[0], family, **changes))
        kept: dict[str, Any] = {"config": _settings_text(model)}
        if mode == "converted":
            kept |= {f"state {key}": value for key, value in model.state_dict().items() if "linattn" in key}
        models.append(model.to(DTYPES[dtype]))
        return kept

    record.case(group, f"{name}/model", prepare)
    for mask in ("none",) if family == "vit" else ("none", "right", "left"):
        if models:
            record.case(
                group, f"{name}/{mask}", lambda mask=mask: forward_and_backward(models[0], inputs(family, mask))
            )


def _settings_text(model: Any) -> str:
    """The config as it would be saved, without what depends on the installed Transformers."""
    values = json.loads(model.config.to_json_string())
    return json.dumps({"linear": values.get("linear_attention"), "architectures": values.get("architectures")})


def training(record: Record) -> None:
    """Redraws, noise and dropout under a fixed seed, layers left on softmax, `revert`, `compare`, more positions."""
    for kind in ("favor_plus", "favor_sharp"):
        record.case("training", f"{kind}-redraws", partial(_redraws, kind))
    for kind, changes in (("lara", {"sample_noise": True}), ("eva", {"sample_noise": True}), ("favor_plus", {})):
        for mode in MODES:
            run = partial(_noisy, mode, kind, {"slot_dropout": 0.2, **changes})
            record.case("training", f"{kind}-noise-{mode}", run)
    for kind, family in itertools.product(CONFIGS, FAMILIES):
        record.case("training", f"{kind}-{family}-conversion", partial(_conversion, kind, family))
    for method in ("tile", "interpolate"):
        record.case("training", f"positions-{method}", partial(_positions, method))


def _redraws(kind: str) -> dict[str, Any]:
    model = converted("bert", settings(kind, "bert", redraw_interval=3))
    results: dict[str, Any] = {}
    for step in (0, 2, 3, 7):
        results[f"{step} layers"] = redraw_projections(model, step)
        results[f"{step} logits"] = model(**inputs("bert"))[0]
        results |= {f"{step} {name}": t for name, t in model.state_dict().items() if "projection" in name}
    return results


def _noisy(mode: str, kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    model = MODES[mode]("vit", settings(kind, "vit", **changes))
    model.config.hidden_dropout_prob = 0.0
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.manual_seed(5)
    return {"output": model(**inputs("vit"))[0]}


def _conversion(kind: str, family: str) -> dict[str, Any]:
    model = converted(family, settings(kind, family), layers=[1])
    report = hf_linattn.compare(model, calibration_batches(family))
    results = {
        "mixed layers": model(**inputs(family))[0],
        "layer errors": torch.tensor([[x.error, x.uniform_error, x.cosine] for x in report.layers]),
        "hidden cosine": torch.tensor(report.hidden_cosine),
        "layer names": [x.name for x in report.layers],
    }
    hf_linattn.revert(model)
    return {**results, "reverted": model(**inputs(family))[0], "keys": sorted(model.state_dict())}


def _positions(method: str) -> dict[str, Any]:
    model = converted("bert", settings("favor_plus", "bert"))
    hf_linattn.extend_positions(model, 150, method=method)
    ids = torch.randint(3, VOCAB, (1, 150), generator=torch.Generator().manual_seed(1))
    return {"logits": model(input_ids=ids)[0]}


GROUPS = (passes, training)
