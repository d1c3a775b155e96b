"""A tiny stock model of any type: inputs it takes, what it answers, and who computes its attention."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from . import inputs as guesses
from .configs import config_class, fit_rope, model_class, tiny_config

LARGEST = 32_000_000  # parameters
RECORDER = "sweep_recorder"
_SOFTMAX = {"softmax", "scaled_dot_product_attention", "multi_head_attention_forward"}


class Own(TorchFunctionMode):
    """Collects the modules that compute attention by themselves: softmax outside of an attention function."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _SOFTMAX and not _in_interface() and (name != "softmax" or _is_square(args[0])):
            self.found.add(_caller())
        return func(*args, **(kwargs or {}))


def _is_square(tensor: Any) -> bool:
    """Whether logits are of queries and keys rather than of experts or classes."""
    return isinstance(tensor, Tensor) and tensor.ndim >= 3 and tensor.shape[-1] > 1


def _in_interface() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name in ("kind_attention", "_recorder"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _caller() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and not isinstance(owner, nn.Softmax):
            return type(owner).__name__
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


_calls: list[tuple[str, bool]] = []


def _recorder(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
) -> Any:
    _calls.append((type(module).__name__, query.shape[2] == key.shape[2]))
    kept = {name: kwargs.get(name) for name in ("scaling", "is_causal")}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kept)


@dataclass
class Model:
    """A tiny stock model, what it answers and who computes its attention."""

    model_type: str
    cls: Any = None
    config: Any = None
    state: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    answer: list[Tensor] = field(default_factory=list)
    stock: str = ""
    layers: int = 0
    cross: int = 0
    own: list[str] = field(default_factory=list)
    switched: Any = None  # goes from kind to kind


def configs_of(config: Any) -> Iterator[Any]:
    """A config and those inside it, also those that its class does not name as its parts."""
    yield config
    parts = [getattr(config, name, None) for name in type(config).sub_configs]
    for part in {id(part): part for part in [*parts, *vars(config).values()]}.values():
        if isinstance(part, PreTrainedConfig):
            yield from configs_of(part)


def tensors(output: Any) -> list[Tensor]:
    """Floating-point tensors of an output, without caches."""
    if isinstance(output, Tensor):
        return [output.detach().float()] if output.is_floating_point() else []
    if isinstance(output, dict):
        return [
            t for name, value in output.items() if "past" not in name and "cache" not in name for t in tensors(value)
        ]
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in tensors(value)]
    return []


def run(model: Any, given: dict[str, Tensor]) -> list[Tensor]:
    torch.default_generator.manual_seed(2)
    with torch.no_grad():
        return tensors(model(**{name: value.clone() for name, value in given.items()}))


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference relative to the largest value of a tensor (at least 1)."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if one.numel():
            difference = (one - other).nan_to_num(0 if bool((one.isnan() == other.isnan()).all()) else 1e9)
            worst = max(worst, float(difference.abs().max() / other.nan_to_num().abs().max().clamp(min=1)))
    return worst


def settle(model: Any, seed: int = 0) -> None:
    """Weights with which attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim >= 2 and parameter.is_floating_point() and "norm" not in name:
                fan = parameter[0].numel()
                scale = 1.5 * fan**-0.5 if fan else 1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif name.endswith(".temp"):  # factors of the logits, which start at 0
                parameter.fill_(1.0)


def first_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:1000]


def build(model_type: str) -> Model:
    """A model with inputs it can be run on; `inputs` stays empty if none were found. Raises what building raises."""
    _calls.clear()
    AttentionInterface.register(RECORDER, _recorder)
    AttentionMaskInterface.register(RECORDER, sdpa_mask)
    found = Model(model_type, cls=model_class(model_type))
    found.config = tiny_config(config_class(model_type))
    for part in configs_of(found.config):
        fit_rope(part)
    torch.default_generator.manual_seed(0)
    model = found.cls._from_config(copy.deepcopy(found.config)).float().eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > LARGEST:
        raise MemoryError(f"{count / 1e6:.0f} million parameters: not made small")
    settle(model)
    found.state = {name: value.clone() for name, value in model.state_dict().items()}
    found.stock = str(model.config._attn_implementation)
    error: BaseException | None = None
    for given in guesses.candidates(model, found.config):
        try:
            answer = run(model, given)
        except Exception as caught:
            error = error or caught
            continue
        if (
            answer
            and all(t.isfinite().any() for t in answer if t.numel())
            and distance(run(model, given), answer) < 1e-6
        ):
            found.inputs, found.answer = given, answer
            break
    if not found.inputs:
        found.stock = first_line(error) if error else "no inputs guessed"
        return found
    with Own() as own, contextlib.suppress(KeyError):  # a table of attention classes of the model's own
        recorded = found.cls._from_config(copy.deepcopy(found.config), attn_implementation=RECORDER).float().eval()
        recorded.load_state_dict(found.state, strict=False)
        _calls.clear()
        run(recorded, found.inputs)
        if not _calls:  # a name that only this reaches
            recorded.set_attn_implementation(RECORDER)
            own.found.clear()
            run(recorded, found.inputs)
    found.layers, found.cross, found.own = len(_calls), sum(not same for _, same in _calls), sorted(own.found)
    return found
