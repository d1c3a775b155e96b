"""How the seams to BERT, GPT-2 and ViT are tried out.

One attention module is called, without a model around it. Then tiny models run under one of our kinds, whose answers
have to agree with each other: how a model hands padding, positions and cache on to its layers.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, GPT2Config, ViTConfig

from ..modules.registry import list_kinds
from . import seams
from .expected import expects
from .families import layer_shape, set_attention_dropout
from .keywords import check_keywords
from .probes import lacks

# Name under which the attention function of the probes is registered.
CANARY = "linattn_canary"

_SIZES: dict[str, Any] = {"hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 2}
# Family -> attention class with its arguments, base model, config.
CLASSES: dict[str, tuple[str, dict[str, Any], str, Callable[[], Any]]] = {
    "bert": (
        "BertSelfAttention",
        {"is_causal": True, "layer_idx": 1},
        "BertModel",
        lambda: BertConfig(**_SIZES, vocab_size=2, is_decoder=True),
    ),
    "gpt2": (
        "GPT2Attention",
        {"layer_idx": 1},
        "GPT2Model",
        lambda: GPT2Config(
            n_embd=4, n_head=2, n_layer=2, bos_token_id=0, eos_token_id=0, scale_attn_by_inverse_layer_idx=True
        ),
    ),
    "vit": ("ViTAttention", {}, "ViTModel", lambda: ViTConfig(**_SIZES)),
}
_TEXT = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "use_cache")


def _class(family: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


@expects("forward of a base model to take the inputs by their names, and others", when="family")
def forward_arguments(family: str) -> str | None:
    name, inputs = CLASSES[family][2], ("pixel_values",) if family == "vit" else _TEXT
    forward = _class(family, name).forward
    lacking = lacks(forward, *inputs)
    if lacking:
        return lacking
    parameters = list(inspect.signature(forward).parameters.values())
    if parameters[1].name != inputs[0] or parameters[-1].kind is not inspect.Parameter.VAR_KEYWORD:
        return f"{name}.forward({', '.join(map(str, parameters))})"
    return None


class _Updated(seams.Cache):
    """A cache that notes who updates it, and returns tensors that can be recognised."""

    def __init__(self, calls: list[Any]) -> None:
        super().__init__(layers=[])
        self.calls = calls

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        returned = key_states.clone(), value_states.clone()
        self.calls.append(("update", layer_idx, tuple(key_states.shape), returned))
        return returned


@expects(
    "a layer to update the cache, then to call the attention function with (module, query, key, value, mask, "
    "scaling=, dropout=) and what it was passed besides",
    when="family",
)
def attention_modules(family: str) -> str | None:
    """Call one attention module, without values, as a layer of a converted model is called."""
    name, options, _, make_config = CLASSES[family]
    config, calls = make_config(), []  # type: tuple[Any, list[Any]]

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        calls.append(("attention", module, query, key, value, attention_mask, kwargs))
        return query.transpose(1, 2).contiguous(), None

    seams.register_attention(CANARY, attention, lambda **kwargs: None)
    seams.select_attention(config, CANARY)
    with torch.device("meta"):  # no values, no random numbers drawn
        layer = _class(family, name)(config, **options).train()
        hidden = torch.zeros(1, 3, 4)
    shape = layer_shape(layer, 1)
    if (shape.num_heads, shape.head_dim, shape.is_causal) != (2, 2, family != "vit"):
        return f"{name} with {shape}"
    if family != "vit" and layer.layer_idx != 1:
        return f"layer_idx {layer.layer_idx} in layer 1"
    set_attention_dropout(layer, 0.25)
    mask, marker = object(), object()
    given: dict[str, Any] = {"attention_mask": mask, seams.ARGUMENT: marker}
    if family != "vit":
        given[seams.cache_argument(layer)] = _Updated(calls)
    output = layer(hidden, **given)
    output = output if isinstance(output, Tensor) else output[0]
    if output.shape != hidden.shape:
        return f"an output of shape {tuple(output.shape)} for {tuple(hidden.shape)}"
    order = [call[0] for call in calls]
    if order != (["attention"] if family == "vit" else ["update", "attention"]):
        return f"calls {order} from {name}"
    _, module, query, key, value, got, kwargs = calls[-1]
    if module is not layer or got is not mask or {tuple(t.shape) for t in (query, key, value)} != {(1, 2, 3, 2)}:
        return f"another module, mask or shape ({tuple(query.shape)}) in the call of the attention function"
    if family != "vit" and (calls[0][1:3] != (1, (1, 2, 3, 2)) or key is not calls[0][3][0]):
        return f"an update of layer {calls[0][1]} with keys {calls[0][2]}, or other keys afterwards"
    expected = {"scaling": 2**-0.5 / (2 if family == "gpt2" else 1), "dropout": 0.25, seams.ARGUMENT: marker}
    wrong = {key: kwargs.pop(key, "nothing") for key in expected if kwargs.get(key) != expected[key]}
    if wrong:
        return f"{wrong} in the call of the attention function"
    check_keywords("canary", layer, {key: value for key, value in kwargs.items() if key not in expected})
    return None


# -- whole models ---------------------------------------------------------------------------------------------------
# A hundredth of what padding or a lost position changes with these weights, a thousand times the roundings.
TOLERANCE = 1e-4
# Token ids of two rows of six; the encoder's vocabulary has two.
_IDS = {"bert": [[0, 1, 1, 0, 1, 0], [1, 0, 1, 1, 0, 1]], "gpt2": [[3, 1, 2, 0, 5, 4], [4, 6, 2, 7, 1, 3]]}


@expects(
    "a model under an attention of ours to hand padding, positions and the cache to its layers, so that a row does "
    "not depend on its padding, a token on later ones, or a continued text on the cache",
    when="family",
)
def models(family: str) -> str | None:
    model = _model(family)
    if family == "vit":
        output = _output(model, pixel_values=torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8))
        return None if tuple(output.shape) == (2, 5, 4) else f"an output of shape {tuple(output.shape)}"
    ids = torch.tensor(_IDS[family])
    return _encoder(model, ids) if family == "bert" else _decoder(model, ids)


def _model(family: str) -> Any:
    """Two layers of four channels in evaluation mode, under a kind, with fixed weights (no random numbers)."""
    _, _, name, make_config = CLASSES[family]
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
        model = _class(family, name)(config).float().eval()
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
    # Positions that go on from the padding: if they began again, they alone would say where the row begins.
    positions = torch.arange(2, ids.shape[1])[None]
    alone = _output(model, input_ids=ids[:1, 2:], position_ids=positions, use_cache=False)
    if _differs(_output(model, input_ids=ids, attention_mask=mask, use_cache=False)[:1, 2:], alone):
        return "padding that changes what is real"
    other = ids.clone()
    other[:, -1] = 0
    if _differs(_output(model, input_ids=other, use_cache=False)[:, :-1], whole[:, :-1]):
        return "tokens that see later ones"
    cache = seams.DynamicCache(config=model.config)
    name = seams.cache_argument(model)
    pieces = [_output(model, input_ids=part, use_cache=True, **{name: cache}) for part in ids.split(4, dim=1)]
    return "a cache that changes what follows" if _differs(torch.cat(pieces, 1), whole) else None
