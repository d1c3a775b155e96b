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
from ..inputs import LARGEST_FACTOR, check_projection, checked_attention, factor_of, prepare_tokens
from ..noise import SlotDropout
from ..slot_attention import SlotOptions, exact_attention, slots_alone
from ..slot_weights import DenseSlotWeights
from ..softmax import without_empty

# Below it `log(softplus(z))` is `z` to the last digit of a float64, and above it no logarithm is of a tiny number.
_SOFTPLUS_TAIL = -40.0


# -- kernels --------------------------------------------------------------------------------------------------------


def _log_of(feature: Tensor, epsilon: float) -> Tensor:
    """`log(feature + epsilon)`; `-inf` with zero gradient where that is the logarithm of 0."""
    if epsilon:
        return (feature + epsilon).log()
    empty = feature == 0
    return feature.masked_fill(empty, 1.0).log().masked_fill(empty, float("-inf"))


def _log_plus(log_feature: Tensor, epsilon: float) -> Tensor:
    """`log(exp(log_feature) + epsilon)`."""
    return torch.logaddexp(log_feature, log_feature.new_full((), math.log(epsilon))) if epsilon else log_feature


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

    def query_weights(self, query: Tensor) -> DenseSlotWeights:
        """Log-features of scaled queries, or keys, `[batch, heads, tokens, head_dim]`."""
        features = generalized_log_features(query, self.projection.to(query), self.kernel, self.kernel_epsilon)
        return DenseSlotWeights(features)

    key_weights = query_weights


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
    slot_dropout: float | SlotDropout = 0.0,
    is_cross: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    real_first: bool = False,
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
        cu_seqlens, max_seqlen, real_first: As in `favor_attention`.
    Returns: `[batch, heads, queries, head_dim]`, dtype of `query`; zeros for padded queries.
    Raises: InputError if shapes do not fit, for an unknown kernel or a negative or infinite `kernel_epsilon`;
        UnsupportedError for an exact window, heavy keys or global tokens.
    Cost: O((queries + keys) * num_features * head_dim); keeps the log-features for the backward pass. Random: no (but
        for `slot_dropout`). Epsilon: `kernel_epsilon` alone.
    """
    if kernel not in KERNELS:
        raise InputError(f"kernel must be one of {list(KERNELS)}; got {kernel!r}.{did_you_mean(kernel, KERNELS)}")
    if not 0 <= kernel_epsilon <= LARGEST_FACTOR:
        raise InputError(
            f"kernel_epsilon must be a finite number >= 0 and <= {LARGEST_FACTOR:g}; got {kernel_epsilon!r}."
        )
    check_projection(projection, query)
    options = SlotOptions(is_causal, chunk_size=chunk_size, dropout=slot_dropout)
    options.check(grid)
    exact = {
        "window_size": window_size,
        "overlap_window": overlap_window,
        "num_heavy_keys": num_heavy_keys,
        "num_global_tokens": num_global_tokens,
    }
    for name, option in exact.items():
        if option:
            raise UnsupportedError(f"{NO_SOFTMAX} Got {name}={option!r}; set it to {type(option)()!r}.")
    scaling = factor_of(query, scaling)
    feature_map = GeneralizedFeatureMap(projection, kernel, kernel_epsilon)
    if not is_causal:
        query, key = query * scaling**0.5, key * scaling**0.5
        return slots_alone(query, key, value, feature_map, key_mask=key_mask, is_cross=is_cross, dropout=slot_dropout)
    if is_cross:
        raise InputError("Cross-attention (is_cross=True) needs is_causal=False; got is_causal=True.")
    tokens = prepare_tokens(
        query, key, value, key_mask, scaling=scaling, is_causal=True, grid=grid, real_first=real_first
    )
    if tokens.key.shape[2] == 0:
        return tokens.finish(None)
    query_weights, key_weights = feature_map.query_weights(tokens.query), feature_map.key_weights(tokens.key)
    state = exact_attention(tokens, options).with_slots(query_weights, key_weights)
    # A first token whose features do not even overlap with its own has no weight to be a mean with.
    return tokens.finish(without_empty(state))
