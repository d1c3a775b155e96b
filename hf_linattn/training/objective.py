"""What attention transfer minimises: how far linear attention is from softmax, layer by layer.

First stage (target "attention"): `Objective.of_layer`, the error of the attention output, and with a `row_weight` the
cross-entropy of the attention rows. Second stage ("hidden_states"): the error of the hidden states (`teacher.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ConfigError, InputError
from ..integrations.call import Call
from ..integrations.interface import linear_output
from ..ops.softmax import mask_logits, visible_keys

TARGETS = ("attention", "hidden_states")
# Rows of attention are compared weight by weight, which takes [batch, heads, tokens, tokens] several times.
MAX_ROW_TOKENS = 512
_SMALLEST_WEIGHT = torch.finfo(torch.float32).eps  # of linear attention, in the logarithm


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised. See `transfer_attention` for the fields.

    Raises: ConfigError for a target that does not exist, a weight that is none, and rows of hidden states.
    """

    target: str = "attention"
    row_weight: float = 0.0

    def __post_init__(self) -> None:
        weight: Any = self.row_weight
        if self.target not in TARGETS:
            raise ConfigError(f"target must be one of {list(TARGETS)}; got {self.target!r}.")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise ConfigError(f"row_weight must be a finite number >= 0; got {weight!r}.")
        if weight and self.target != "attention":
            raise ConfigError(
                f"row_weight must be 0 with target={self.target!r}, whose layers have other inputs than those of"
                f" softmax; got {weight!r}. Use target='attention'."
            )

    def of_layer(self, module: nn.Module, call: Call, target: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of one layer on what softmax attends to, and the squared relative error that is part of it."""
        error = relative_error(linear_output(module, call), target, call.key_mask)
        loss = error + self.row_weight * row_divergence(module, call) if self.row_weight else error
        return loss, error.detach()


def relative_error(output: Tensor, target: Tensor, key_mask: Tensor | None) -> Tensor:
    """Squared error over variance of the target, a mean over heads.

    The variance is that of the real tokens of all processes, so that a mean over processes is the error of their
    batches together.

    Args:
        output, target: `[batch, tokens, heads, head_dim]`.
        key_mask: `[batch, keys]` bool, True where a token is real; the tokens are the last keys.
    Raises: InputError for a batch without a real token.
    """
    target, output = target.float(), output.float()
    real = _real(key_mask, target[..., :1, :1])
    mean = mean_of((target * real).sum((0, 1), keepdim=True), real.sum())
    error, spread = (((target - z).square() * real).sum((0, 1, 3)) for z in (output, mean))
    return (error / average(spread.detach()).clamp_min(torch.finfo(torch.float32).tiny)).mean()


def row_divergence(module: nn.Module, call: Call) -> Tensor:
    """Cross-entropy between the attention rows of softmax and of linear attention, less the entropy of softmax's.

    A mean over queries and heads. The entropy has no gradient; without it the divergence of equal rows is 0.

    Source: Zhang et al. 2024, arXiv:2402.04347 (Hedgehog).
    Raises: InputError for more than `MAX_ROW_TOKENS` tokens, or a batch without a real token; ConfigError for layers
        that add a convolution of the values, whose output is more than weights of the values.
    Cost: O(tokens^2) memory, and tokens / head_dim times the time of linear attention.
    """
    tokens = call.key.shape[2]
    if tokens > MAX_ROW_TOKENS:
        raise InputError(
            f"row_weight compares attention rows key by key, for inputs of at most {MAX_ROW_TOKENS} tokens; got"
            f" {tokens}. Pass shorter inputs, or row_weight=0."
        )
    if call.layer is not None and call.layer.config.value_convolution:
        raise ConfigError(
            "row_weight must be 0 with value_convolution=True: a convolution of the values beside attention has no"
            " attention rows."
        )
    rows = linear_rows(module, call).float().clamp_min(_SMALLEST_WEIGHT).log()
    softmax = softmax_rows(call)
    divergence = (torch.xlogy(softmax, softmax) - softmax * rows).sum(-1)  # [batch, heads, queries]
    real = _real(call.key_mask, divergence[:, 0, :, None, None]).squeeze(-1).mT
    return (divergence * real).sum() / (average(real.sum(dtype=torch.float32)) * divergence.shape[1])


@torch.no_grad()
def softmax_rows(call: Call) -> Tensor:
    """Weights with which queries read keys under softmax, `[batch, heads, queries, keys]`, float32; 0 in padding."""
    key = call.key.float().repeat_interleave(call.group_size, dim=1)
    logits = call.query.float() @ key.mT * call.scaling
    visible = visible_keys(call.query, call.key, call.key_mask, call.is_causal)
    return mask_logits(logits, visible).softmax(-1).nan_to_num(0.0)


def linear_rows(module: nn.Module, call: Call) -> Tensor:
    """The same under linear attention of any kind: what it makes of values that are the rows of an identity matrix.

    Its columns are the values of further rows of the batch, as many of them in each as a head has dimensions.
    """
    batch, heads, keys, dim = call.value.shape
    parts = -(-keys // dim)
    identity = torch.eye(keys, parts * dim, dtype=call.value.dtype, device=call.value.device)
    columns = identity.unflatten(-1, (parts, dim)).movedim(1, 0)[None, :, None]  # [1, parts, 1, keys, dim]
    parts_of_call = dataclasses.replace(
        call,
        query=call.query.repeat_interleave(parts, dim=0),
        key=call.key.repeat_interleave(parts, dim=0),
        value=columns.expand(batch, parts, heads, keys, dim).flatten(0, 1),
        key_mask=None if call.key_mask is None else call.key_mask.repeat_interleave(parts, dim=0),
        sequences=None,  # groups of the rows that there were; the mask says the same
    )
    rows = linear_output(module, parts_of_call).unflatten(0, (batch, parts))  # [batch, parts, queries, heads, dim]
    return rows.permute(0, 3, 2, 1, 4).flatten(-2)[..., :keys]


def _real(key_mask: Tensor | None, like: Tensor) -> Tensor:
    """`[batch, tokens, 1, 1]`, True where a token is real. Raises InputError if none is."""
    real = torch.ones_like(like, dtype=torch.bool) if key_mask is None else key_mask[:, -like.shape[1] :, None, None]
    if not real.any():
        raise InputError("A batch has no real token (its attention_mask is all 0). Leave such batches out.")
    return real


def check_finite(errors: Tensor) -> None:
    """Raise `InputError` before a step with errors that are not finite, after which learned maps would be NaN."""
    if not bool(errors.isfinite().all()):
        raise InputError(
            f"The errors of the layers are {errors.tolist()} on a batch: its inputs, or what the model makes of them,"
            " are not finite. Nothing was learned from it. Leave it out, or load the model in float32."
        )


def is_exact(error: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether squared relative errors are no more than the rounding of outputs in `dtype`."""
    return error < max(1e-9, torch.finfo(dtype).eps ** 2)


def average(z: Tensor) -> Tensor:
    """The mean of a tensor without gradient over all processes."""
    return total(z) / processes()


def mean_of(z: Tensor, count: Tensor) -> Tensor:
    """The mean over all processes of what is summed in `z` on this one, where it is `count` things."""
    return total(z) / total(count.to(z.dtype))


def total(z: Tensor) -> Tensor:
    """The sum of a tensor without gradient over all processes."""
    if processes() == 1:
        return z
    z = z.clone()
    dist.all_reduce(z)
    return z


def processes() -> int:
    """How many train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
