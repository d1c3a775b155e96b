"""RA: randomized attention, the quadratic method that LARA makes linear (Zheng et al. 2022, arXiv:2204.04667)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import InputError
from ..inputs import checked_attention, factor_of
from ..noise import add_noise, noise_factor
from ..padding import without_padding
from ..softmax import mask_logits, softmax_with_lse, visible_keys
from .features import log_feature

PROPOSALS = ("softmax_mean", "mean", "sampled")


@checked_attention
def randomized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool = False,
    proposal: str = "softmax_mean",
    key_index: Tensor | None = None,
    noise: Tensor | bool = False,
    noise_scale: str = "corrected",
) -> Tensor:
    r"""One random direction per query, drawn around that query's own proposal: a reference, O(queries * keys).

    In scaled coordinates `w_t = mu_t + noise` and the output is `softmax_n(w_t . y_n - |y_n|^2 / 2) v_n`, with
    `mu_t = x_t + sum_n softmax_n(x_t . y_n) y_n` ("softmax_mean"), `x_t + mean_n y_n` ("mean") or `x_t + y_n` with one
    `n` drawn from `softmax_n(x_t . y_n)` ("sampled"; with noise this is an exact draw of the query's own density).

    Source: Zheng et al. 2022, arXiv:2204.04667, section 3. Differs from it: masked keys are never read.

    Args:
        query: `[batch, heads, queries, head_dim]`. key, value: `[batch, heads, keys, head_dim]`.
        key_mask: `[batch, keys]` bool, True where a key is real.
        scaling: Factor of the dot product; `head_dim ** -0.5` if `None`.
        is_causal: No query sees a later key; the last query is aligned with the last key.
        key_index: The keys of "sampled", `[batch, heads, queries]` int64; drawn if `None`. No gradient goes through
            the draw.
        noise: Standard normal like `query`, or True to draw it; False evaluates at the mean.
        noise_scale: "corrected", the scale that the densities assume, or "published", smaller by `scaling ** 0.5`.
    Returns: `[batch, heads, queries, head_dim]`, dtype of `query`; zeros for a query without a visible key.
    Raises: InputError if shapes or options do not fit. Random: only through `noise` and the draw of "sampled".
    """
    if proposal not in PROPOSALS:
        raise InputError(f"proposal must be one of {list(PROPOSALS)}; got {proposal!r}.")
    if key_index is not None:
        _check_index(key_index, query, proposal)
    key, value = without_padding(key, value, key_mask)
    scaling = factor_of(query, scaling)
    x, y = query * scaling**0.5, key * scaling**0.5
    factor = noise_factor(noise_scale, scaling)
    visible = visible_keys(query, key, key_mask, is_causal)
    if key_index is not None:
        key_part = _pick(y, key_index)
    elif proposal == "sampled":
        key_part = _pick(y, _draw_key(mask_logits(x @ y.transpose(-1, -2), visible)))
    else:
        key_part = proposal_key_mean(x, y, visible, uniform=proposal == "mean")
    samples = add_noise(x + key_part, noise, factor)
    return softmax_with_lse(mask_logits(log_feature(y, samples).transpose(-1, -2), visible), value).output


def proposal_key_mean(x: Tensor, y: Tensor, visible: Tensor | None, *, uniform: bool = False) -> Tensor:
    """The keys' part of a query's proposal: their softmax mean or, `uniform`, their mean; scaled coordinates."""
    if uniform:
        logits = torch.zeros_like(x[..., :1] @ y[..., :1].transpose(-1, -2))
    else:
        logits = x @ y.transpose(-1, -2)
    return softmax_with_lse(mask_logits(logits, visible), y).output


def _pick(y: Tensor, index: Tensor) -> Tensor:
    return y.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, y.shape[-1]))


def _draw_key(logits: Tensor) -> Tensor:
    """One member per row from the softmax of its logits (the Gumbel-max rule); 0 where nothing is visible."""
    uniform = torch.rand_like(logits).clamp_min(torch.finfo(logits.dtype).tiny)
    return (logits - (-uniform.log()).log()).argmax(-1)


def _check_index(key_index: Tensor, query: Tensor, proposal: str) -> None:
    if proposal != "sampled":
        raise InputError(f"key_index belongs to proposal='sampled'; got proposal={proposal!r}. Leave it out.")
    if key_index.dtype != torch.int64 or key_index.shape != query.shape[:3]:
        raise InputError(
            f"key_index must be int64 [batch, heads, queries] = {tuple(query.shape[:3])}; got {key_index.dtype}"
            f" {tuple(key_index.shape)}."
        )
