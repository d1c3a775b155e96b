"""What is measured: the shape of a call, its inputs, and the contenders that take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, LinAttnError, did_you_mean
from ..modules.config import AttentionConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = ("forward", "forward+backward")
AttentionCall = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


class Unavailable(LinAttnError):
    """A contender cannot run here; the message says why, in a few words for a table."""


@dataclass(frozen=True)
class Workload:
    """One call of attention: everything that its cost depends on."""

    tokens: int
    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    is_causal: bool = False
    dtype: str = "float32"
    mode: str = "forward"
    device: str = "cpu"

    @property
    def is_training(self) -> bool:
        return self.mode == "forward+backward"

    @property
    def direction(self) -> str:
        return "causal" if self.is_causal else "bidirectional"


@dataclass(frozen=True)
class Contender:
    """Something that computes attention: a kind, softmax under one backend, or another library.

    Args:
        name: Unique in a run; also what a table shows.
        group: "linear" (the kinds), "softmax" or "peer".
        build: From a workload, the function to call on query, key and value `[batch, heads, tokens, head_dim]`.
            Raises `Unavailable` where there is none.
        config: The settings of a kind.
    """

    name: str
    group: str
    build: Callable[[Workload], AttentionCall]
    config: AttentionConfig | None = None


def check_length(work: Workload, longest: int | None) -> None:
    """Raise `Unavailable` where softmax would get a longer input than it should."""
    if longest is not None and work.tokens > longest:
        raise Unavailable(f"longer than the {longest} tokens set for softmax")


def choose(what: str, value: str, allowed: Any) -> str:
    """`value` if it is one of the allowed names. Raises `ConfigError` naming them."""
    if value not in allowed:
        raise ConfigError(f"{what} must be one of {list(allowed)}; got {value!r}.{did_you_mean(value, allowed)}")
    return value


def make_inputs(work: Workload, seed: int = 0) -> Inputs:
    """Query, key, value and the gradient of the output: standard normal, in the memory layout that models hand over.

    Returns: Four tensors `[batch, heads, tokens, head_dim]`, views of `[batch, tokens, heads, head_dim]`.
    """
    generator = torch.Generator().manual_seed(seed)
    size = (work.batch, work.tokens, work.heads, work.head_dim)
    drawn = (torch.randn(size, generator=generator).to(work.device, DTYPES[work.dtype]) for _ in range(4))
    query, key, value, grad_output = (tensor.transpose(1, 2) for tensor in drawn)
    for tensor in (query, key, value):
        tensor.requires_grad_(work.is_training)
    return query, key, value, grad_output


def make_step(attention: AttentionCall, inputs: Inputs, work: Workload) -> Callable[[], object]:
    """What is timed: one forward pass without autograd, or a forward pass and the gradients of all three inputs."""
    query, key, value, grad_output = inputs

    def step() -> object:
        with torch.set_grad_enabled(work.is_training):
            output = attention(query, key, value)
        if not work.is_training:
            return output
        grad = grad_output if output.shape == grad_output.shape else grad_output.transpose(1, 2)
        return torch.autograd.grad(output, (query, key, value), grad.to(output.dtype))

    return step
