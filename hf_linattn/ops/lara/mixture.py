"""The density of LARA's samples under all proposals together, where the samples are the means of the proposals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.functions import call
from ...kernels.half_norm import half_norm
from ..softmax import mask_logits


def log_mixture_at_means(mu: Tensor, used: Tensor | None) -> Tensor:
    """`log sum_c exp(mu_c . mu_j - |mu_c|^2 / 2)`: `mixture_log_ratio` of the means, `[..., landmarks]`.

    Args:
        mu: `[..., landmarks, dim]`. used: `[..., 1, landmarks]`, False takes a proposal out; `None` for none.
    """
    if torch.compiler.is_compiling():
        return log_densities(mu, mu, used).logsumexp(-1)
    if mu.requires_grad and torch.is_grad_enabled():
        return call(_LogMixture, mu, used)[0]
    return _forward(mu, used)[0]


def log_densities(mu: Tensor, samples: Tensor, used: Tensor | None) -> Tensor:
    """Log density of each sample under each proposal, relative to N(0, I): `[..., samples, landmarks]`."""
    return mask_logits(samples @ mu.transpose(-1, -2) - half_norm(mu).unsqueeze(-2), used)


def _forward(mu: Tensor, used: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result, and how much each proposal has of the density at each mean, `[..., means, landmarks]`."""
    products = mu @ mu.transpose(-1, -2)
    weights = products.sub_(products.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) / 2)
    if used is None:
        top = weights.amax(-1, keepdim=True)
    else:
        top = weights.masked_fill_(~used, float("-inf")).amax(-1, keepdim=True).clamp_min_(torch.finfo(mu.dtype).min)
    total = weights.sub_(top).exp_().sum(-1, keepdim=True)
    # Where no proposal is used all weights are 0.
    shares = weights.div_(total if used is None else total.masked_fill(total == 0, 1.0))
    return total.log().add_(top).squeeze(-1), shares


class _LogMixture(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(mu: Tensor, used: Tensor | None) -> tuple[Tensor, Tensor]:
        return _forward(mu, used)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        mu, used, shares = ctx.saved_tensors
        if torch.is_grad_enabled():  # of which a derivative may be taken
            (grad_mu,) = torch.autograd.grad(log_densities(mu, mu, used).logsumexp(-1), mu, grad, create_graph=True)
            return grad_mu, None
        # With `p` the shares, sample j pulls at itself by `sum_c p_jc mu_c` and at mean c by `p_jc (mu_j - mu_c)`.
        weights = shares * grad.unsqueeze(-1)
        pulls = weights + weights.transpose(-1, -2)
        pulls.diagonal(dim1=-2, dim2=-1).sub_(weights.sum(-2))
        return pulls @ mu, None
