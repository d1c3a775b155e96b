r"""Generalised kernel attention: features `phi(z) = f(W z) + epsilon` with `f >= 0` (Performer-ReLU and others).

With scaled queries and keys `x_t = sqrt(s) q_t`, `y_n = sqrt(s) k_n` and directions `w_j`,

    o_t = sum_n (phi(x_t) . phi(y_n)) v_n / sum_n phi(x_t) . phi(y_n),    phi_j(z) = f(w_j . z) + epsilon

(Choromanski et al. 2021, arXiv:2009.14794, section 2.2, and its published code). This is an attention of its own and
no estimate of softmax attention: its weights are not on the scale of `exp(x . y)`. Every feature is a slot with
log-weights `log phi`, so that the sums are evaluated in log space like all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError, UnsupportedError, did_you_mean
from ...kernels.attention_state import AttentionState
from ...kernels.block_slots import BlockReach
from ..exact import checked_attention, scale_inputs
from ..limits import LARGEST_FACTOR
from ..slot_attention import check_chunk_size, slot_attention
from ..slot_weights import causal_slots_dense, inter_block_dense
from ..slots import mask_logits, softmax_with_lse
from ..tokens import prepare

# Below it `log(softplus(z))` is `z` to the last digit of a float64, and above it no logarithm is of a tiny number.
_SOFTPLUS_TAIL = -40.0


@dataclass(frozen=True)
class DenseSlotWeights:
    """Log-weights that are no dot products: what `LinearSlotWeights` is for linear ones, with the same methods.

    log_features: `[batch, heads, ..., tokens, slots]`; `-inf` where a feature is 0.
    """

    log_features: Tensor

    def dense(self) -> Tensor:
        """`[batch, heads, ..., tokens, slots]`."""
        return self.log_features

    def map_tokens(self, fn: Callable[[Tensor], Tensor]) -> DenseSlotWeights:
        """Rearrange the tokens: `fn` gets `[batch, heads, tokens, slots]`."""
        return DenseSlotWeights(fn(self.log_features))

    def masked(self, visible: Tensor | None) -> DenseSlotWeights:
        """Weight 0 for tokens where `visible` (`[batch, 1, ..., tokens, 1]`) is False."""
        return DenseSlotWeights(mask_logits(self.log_features, visible))

    def unbiased(self) -> DenseSlotWeights:
        """Themselves: no factor is known to belong to a token alone."""
        return self

    def biased(self, read: AttentionState) -> AttentionState:
        """`read` as it is."""
        return read

    def summarise(self, values: Tensor) -> AttentionState:
        """Every slot reads all tokens: output `[batch, heads, ..., slots, head_dim]`, log_mass `[..., slots]`."""
        return softmax_with_lse(self.log_features.transpose(-1, -2), values)

    def read(self, slots: AttentionState, *, extra: Tensor | None = None, dropout: float = 0.0) -> AttentionState:
        """Every token reads all slots. `extra` is added to the log-weights, `[batch, heads, ..., tokens, slots]`."""
        logits = self.log_features + slots.lse.unsqueeze(-2)
        return softmax_with_lse(logits if extra is None else logits + extra, slots.output, dropout=dropout)

    def inter_block(
        self,
        key: DenseSlotWeights,
        value: Tensor,
        reach: BlockReach,
        *,
        extra: Tensor | None = None,
        dropout: float = 0.0,
    ) -> AttentionState:
        """Blocks of queries (`self`) read the units of keys that they reach, through slots."""
        return inter_block_dense(self, key, value, reach, extra=extra, dropout=dropout)

    def causal(
        self, key: DenseSlotWeights, value: Tensor, *, chunk: int, extra: Tensor | None = None, dropout: float = 0.0
    ) -> AttentionState:
        """Queries (`self`) read all keys up to themselves."""
        return causal_slots_dense(self, key, value, chunk=chunk, extra=extra, dropout=dropout)


# -- kernels --------------------------------------------------------------------------------------------------------


def _log_of(feature: Tensor, epsilon: float) -> Tensor:
    """`log(feature + epsilon)`; `-inf` with zero gradient where that is the logarithm of 0."""
    if epsilon:
        return (feature + epsilon).log()
    empty = feature == 0
    return feature.masked_fill(empty, 1.0).log().masked_fill(empty, float("-inf"))


def _log_plus(log_feature: Tensor, epsilon: float) -> Tensor:
    """`log(exp(log_feature) + epsilon)`."""
    return torch.logaddexp(log_feature, log_feature.new_tensor(math.log(epsilon))) if epsilon else log_feature


def _log_softplus(z: Tensor) -> Tensor:
    body = z.clamp_min(_SOFTPLUS_TAIL)
    return torch.where(z < _SOFTPLUS_TAIL, z, torch.logaddexp(body, torch.zeros_like(body)).log())


_LOG_KERNELS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda z, epsilon: _log_of(z.relu(), epsilon),
    "exp": _log_plus,
    "sigmoid": lambda z, epsilon: _log_plus(F.logsigmoid(z), epsilon),
    "softplus": lambda z, epsilon: _log_plus(_log_softplus(z), epsilon),
    "abs": lambda z, epsilon: _log_of(z.abs(), epsilon),
    "square": lambda z, epsilon: _log_of(z.square(), epsilon),
}
KERNELS = tuple(_LOG_KERNELS)

# Why nothing exact stands beside these features; also said by the settings of the module.
NO_SOFTMAX = (
    "A generalised kernel is not on the scale of the softmax weights exp(x . y), so exact weights beside it would"
    " count for more or less than their share."
)


def generalized_log_features(z: Tensor, projection: Tensor, kernel: str, kernel_epsilon: float) -> Tensor:
    """`log phi(z)`, `[batch, heads, tokens, features]`; `-inf` where a feature is 0 (never with `kernel_epsilon` > 0).

    Args:
        z: Scaled queries or keys, `[batch, heads, tokens, head_dim]`.
        projection: `[heads, features, head_dim]` or `[features, head_dim]`.
        kernel: One of `KERNELS`.
    """
    return _LOG_KERNELS[kernel](z @ projection.transpose(-1, -2), kernel_epsilon)


@dataclass(frozen=True)
class GeneralizedFeatureMap:
    """The features of a generalised kernel, for any number of queries and keys. `projection` as in the function."""

    projection: Tensor
    kernel: str
    kernel_epsilon: float

    def query(self, x: Tensor) -> DenseSlotWeights:
        """Log-features of scaled queries, or keys, `[batch, heads, tokens, head_dim]`."""
        return DenseSlotWeights(generalized_log_features(x, self.projection.to(x), self.kernel, self.kernel_epsilon))

    key = query


# -- attention ------------------------------------------------------------------------------------------------------


@checked_attention
def generalized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    *,
    kernel: str = "relu",
    kernel_epsilon: float = 1e-3,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool = False,
    window_size: int = 0,
    overlap_window: bool = False,
    num_heavy_keys: int = 0,
    grid: tuple[int, int] | None = None,
    num_global_tokens: int = 0,
    chunk_size: int | None = None,
    slot_dropout: float = 0.0,
    is_cross: bool = False,
) -> Tensor:
    """Attention with a generalised kernel, `phi(q) . phi(k)` in place of `exp(q . k)`.

    Source: Choromanski et al. 2021, arXiv:2009.14794, section 2.2 and the generalised kernel features of its published
    code. Differs from them: log space and slots (no prefix sums that grow with the sequence), dropout on slots. The
    inputs are scaled as there: queries and keys by `scaling ** 0.5` each, which is `head_dim ** -0.25` by default.

    Args:
        query: `[batch, heads, queries, head_dim]`. In the causal form queries may be fewer than keys: the last ones.
        key, value: `[batch, heads, keys, head_dim]`.
        projection: `[heads, num_features, head_dim]` or `[num_features, head_dim]`.
        kernel: The `f` of `phi(z) = f(W z) + kernel_epsilon`: "relu", "exp", "sigmoid", "softplus", "abs" or "square".
        kernel_epsilon: Part of the kernel's definition, not a stabiliser: it gives every key some weight for every
            query. With 0, a query whose features overlap those of no visible key ("relu") gives 0.
        key_mask: `[batch, keys]` bool, True where a key is real.
        scaling: Factor of the dot product; `head_dim ** -0.5` if `None`.
        is_causal: No query sees a later key.
        window_size, overlap_window, num_heavy_keys, num_global_tokens: As in `favor_attention`, whose arguments these
            are; nothing exact can stand beside a generalised kernel, so anything but 0 (False) is refused.
        grid: Without a window there are no neighbours on a grid: no effect (bidirectional only).
        chunk_size: Tokens, a power of two, within which queries and keys meet directly rather than through a state of
            the slots (causal only); changes cost, not the result. `None`: what was measured to be fast.
        slot_dropout: Dropout on the weights of the slots.
        is_cross: Queries and keys are of different sequences, so `key_mask` says nothing about queries
            (bidirectional). Implied by different lengths.
    Returns: `[batch, heads, queries, head_dim]`, dtype of `query`; zeros for padded queries.
    Raises: InputError if shapes do not fit, for an unknown kernel or a negative or infinite `kernel_epsilon`;
        UnsupportedError for an exact window, heavy keys or global tokens.
    Cost: O((queries + keys) * num_features * head_dim); keeps the log-features for the backward pass. Random: no (but
        for `slot_dropout`). Epsilon: `kernel_epsilon` alone.
    """
    _check(query, projection, kernel, kernel_epsilon, chunk_size)
    exact = {
        "window_size": window_size,
        "overlap_window": overlap_window,
        "num_heavy_keys": num_heavy_keys,
        "num_global_tokens": num_global_tokens,
    }
    for name, given in exact.items():
        if given:
            raise UnsupportedError(f"{NO_SOFTMAX} Got {name}={given!r}; set it to {type(given)()!r}.")
    x, y = scale_inputs(query, key, scaling)
    weights = GeneralizedFeatureMap(projection, kernel, kernel_epsilon).query
    if not is_causal:
        visible = None if key_mask is None else key_mask[:, None, :, None]
        is_self = x.shape[2] == y.shape[2] and not is_cross
        if visible is not None:
            # Before anything is computed, so that inf or NaN in the padding reaches neither values nor gradients.
            y, value = y.masked_fill(~visible, 0.0), value.masked_fill(~visible, 0.0)
            x = x.masked_fill(~visible, 0.0) if is_self else x
        output = weights(x).read(weights(y).masked(visible).summarise(value), dropout=slot_dropout).output
        return output.masked_fill(~visible, 0.0) if is_self and visible is not None else output
    if is_cross:
        raise InputError("Cross-attention (is_cross=True) needs is_causal=False; got is_causal=True.")
    tokens = prepare(x, y, value, key_mask, is_causal=True, grid=grid)
    if tokens.y.shape[2] == 0:
        return tokens.finish(None)
    estimate = slot_attention(
        tokens,
        weights(tokens.x),
        weights(tokens.y),
        is_causal=True,
        window_size=0,
        chunk_size=chunk_size,
        dropout=slot_dropout,
    )
    # A first token whose features do not even overlap with its own has no weight to be a mean with.
    nothing = (estimate.lse == float("-inf")).unsqueeze(-1)
    return tokens.finish(AttentionState(estimate.output.masked_fill(nothing, 0.0), estimate.lse))


def _check(query: Tensor, projection: Tensor, kernel: str, kernel_epsilon: float, chunk_size: int | None) -> None:
    if kernel not in KERNELS:
        raise InputError(f"kernel must be one of {list(KERNELS)}; got {kernel!r}.{did_you_mean(kernel, KERNELS)}")
    if not 0 <= kernel_epsilon <= LARGEST_FACTOR:
        raise InputError(
            f"kernel_epsilon must be a finite number >= 0 and <= {LARGEST_FACTOR:g}; got {kernel_epsilon!r}."
        )
    if (
        projection.ndim not in (2, 3)
        or projection.shape[-1] != query.shape[-1]
        or (projection.ndim == 3 and projection.shape[0] != query.shape[1])
    ):
        raise InputError(
            f"projection must be [heads, features, head_dim] = [{query.shape[1]}, features, {query.shape[-1]}] or"
            f" [features, {query.shape[-1]}]; got {tuple(projection.shape)}."
        )
    check_chunk_size(chunk_size)
