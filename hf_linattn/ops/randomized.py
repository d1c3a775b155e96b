"""RA: randomized attention, the quadratic method that LARA makes linear (Zheng et al. 2022, arXiv:2204.04667)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .exact import attention_function, causal_visibility, scale_inputs, without_padding
from .lara import add_noise, log_feature
from .slots import mask_logits, weigh

PROPOSALS = ("softmax_mean", "mean")


@attention_function
def randomized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool = False,
    proposal: str = "softmax_mean",
    noise: Tensor | bool = False,
) -> Tensor:
    r"""One random direction per query, drawn around that query's own proposal: a reference, O(queries * keys).

    In scaled coordinates `w_t = mu_t + noise` and the output is `softmax_n(w_t . y_n - |y_n|^2 / 2) v_n`, with
    `mu_t = x_t + sum_n softmax_n(x_t . y_n) y_n` ("softmax_mean") or `x_t + mean_n y_n` ("mean").

    Source: Zheng et al. 2022, arXiv:2204.04667, section 3. Differs from it: masked keys are never read.

    Args:
        query: `[batch, heads, queries, head_dim]`. key, value: `[batch, heads, keys, head_dim]`.
        key_mask: `[batch, keys]` bool, True where a key is real.
        scaling: Factor of the dot product; `head_dim ** -0.5` if `None`.
        is_causal: No query sees a later key; the last query is aligned with the last key.
        noise: Standard normal like `query`, or True to draw it; False evaluates at the mean.
    Returns: `[batch, heads, queries, head_dim]`, dtype of `query`; zeros for a query without a visible key.
    Raises: InputError if shapes or options do not fit. Random: only through `noise`.
    """
    if proposal not in PROPOSALS:
        raise InputError(f"proposal must be one of {list(PROPOSALS)}; got {proposal!r}.")
    key, value = without_padding(key, value, key_mask)
    x, y = scale_inputs(query, key, scaling)
    visible = None if key_mask is None else key_mask[:, None, None, :]
    if is_causal:
        causal = causal_visibility(x.shape[2], y.shape[2], x.device)
        visible = causal if visible is None else causal & visible
    near = (
        x @ y.transpose(-1, -2)
        if proposal == "softmax_mean"
        else torch.zeros_like(x[..., :1] @ y[..., :1].transpose(-1, -2))
    )
    mu = x + weigh(mask_logits(near, visible), y).output
    samples = add_noise(mu, noise)
    return weigh(mask_logits(log_feature(y, samples).transpose(-1, -2), visible), value).output
