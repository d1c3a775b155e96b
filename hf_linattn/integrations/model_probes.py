"""How whole models are tried out: tiny ones under one of our kinds, whose answers have to agree with each other.

What one attention module cannot show: how a model hands padding, positions and cache on to its layers.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..modules.registry import list_kinds
from . import seams
from .family_probes import MODULES
from .probes import probes

# A hundredth of what padding or a lost position changes with these weights, a thousand times the roundings.
TOLERANCE = 1e-4
# Token ids of two rows of six; the encoder's vocabulary has two.
_IDS = {"bert": [[0, 1, 1, 0, 1, 0], [1, 0, 1, 1, 0, 1]], "gpt2": [[3, 1, 2, 0, 5, 4], [4, 6, 2, 7, 1, 3]]}


@probes("models")
def _models(family: str) -> str | None:
    model = _model(family)
    if family == "vit":
        output = _output(model, pixel_values=torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8))
        return None if tuple(output.shape) == (2, 5, 4) else f"an output of shape {tuple(output.shape)}"
    ids = torch.tensor(_IDS[family])
    return _encoder(model, ids) if family == "bert" else _decoder(model, ids)


def _model(family: str) -> Any:
    """Two layers of four channels in evaluation mode, under a kind, with fixed weights (no random numbers)."""
    source, _, _, name, make_config, _ = MODULES[family]
    config = make_config()
    config.is_decoder = False
    if family == "gpt2":
        config.vocab_size, config.n_positions = 8, 8
    if family == "vit":
        config.image_size, config.patch_size = 8, 4
    config.linear_attention = {"num_features": 8, "window_size": 2}
    kind = "favor_plus" if "favor_plus" in list_kinds() else list_kinds()[0]
    seams.select_attention(config, kind)
    with torch.random.fork_rng(devices=[]):
        model = getattr(importlib.import_module(source), name)(config).float().eval()
    for number, parameter in enumerate(model.parameters()):
        # Under from_pretrained nothing is initialised while a model is built.
        parameter.copy_(torch.arange(parameter.numel()).mul(2.1).add(number).sin().div(2).view_as(parameter))
    return model


def _output(model: Any, **inputs: Any) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return model(**inputs).last_hidden_state


def _differs(found: Tensor, expected: Tensor) -> bool:
    return found.shape != expected.shape or not torch.allclose(found, expected, atol=TOLERANCE)


def _encoder(model: Any, ids: Tensor) -> str | None:
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    alone = _output(model, input_ids=ids[:1, :4])
    if _differs(_output(model, input_ids=ids, attention_mask=mask)[:1, :4], alone):
        return "padding that changes what is real"
    return None


def _decoder(model: Any, ids: Tensor) -> str | None:
    whole = _output(model, input_ids=ids, use_cache=False)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = _output(model, input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    if _differs(padded[:1, 2:], _output(model, input_ids=ids[:1, 2:], use_cache=False)):
        return "padding that changes what is real"
    other = ids.clone()
    other[:, -1] = 0
    if _differs(_output(model, input_ids=other, use_cache=False)[:, :-1], whole[:, :-1]):
        return "tokens that see later ones"
    cache = seams.DynamicCache(config=model.config)
    name = seams.cache_argument(model)
    pieces = [_output(model, input_ids=part, use_cache=True, **{name: cache}) for part in ids.split(4, dim=1)]
    return "a cache that changes what follows" if _differs(torch.cat(pieces, 1), whole) else None
