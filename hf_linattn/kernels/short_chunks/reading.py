"""What the queries of some rows read from their windows and from summaries, and the way back.

Both are read by torch's flash kernel, windows where they are neighbours and summaries by all queries of a row at once;
their results are one softmax by their log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .cutting import Places, Sizes, places, to_places, to_tokens
from .sorts import AllSummaries, Summarise
from .summaries import Summaries

# Logits that are made at a time, where torch's kernel does not make them.
_PART = 1 << 18
# exp() of less takes ten times as long.
_LEAST = -80.0


def flash(tokens: Iterable[Tensor], mask: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, `[batch, heads, tokens(, dim)]`; in memory tokens come before heads."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(*tokens, attn_mask=mask, scale=scaling)


def flash_backward(
    grads: Sequence[Tensor | None], tokens: Sequence[Tensor], results: Sequence[Any], *mask_and_scaling: Any
) -> Sequence[Tensor]:
    """Gradients of queries, keys and values.

    Args:
        grads: Of the output, and of the log-sum-exp if it has one.
        results: Output and log-sum-exp. They may be those of more keys, read elsewhere.
    """
    (grad, grad_lse), (output, lse), (mask, scaling) = grads, results, mask_and_scaling
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found = kernel(grad, *tokens, output, lse, 0.0, False, attn_mask=mask, scale=scaling)
    if grad_lse is None:
        return found
    # With values of 1 in one dimension and an output of 0, the gradient of a logit is the weight's part of `grad_lse`.
    one = [torch.zeros_like(z) for z in (output, tokens[2])]
    one[0][..., 0], one[1][..., 0] = grad_lse, 1.0
    of_lse = kernel(
        one[0], *tokens[:2], one[1], torch.zeros_like(output), lse, 0.0, False, attn_mask=mask, scale=scaling
    )
    return found[0] + of_lse[0], found[1] + of_lse[1], found[2]


class Reading:
    """Some rows that are cut alike.

    Args:
        tokens: Queries, keys and values `[batch, tokens, heads, dim]`, global ones included.
        parameters: Of the summaries, `[heads, ...]`.
        kept: Of the summaries, in the backward pass.
    """

    def __init__(
        self,
        tokens: Sequence[Tensor],
        parameters: Sequence[Any],
        sizes: Sizes,
        summarise: Summarise,
        kept: Sequence[Tensor] | None = None,
    ) -> None:
        self.tokens = [z if z.stride(-1) == 1 else z.contiguous() for z in tokens]
        self.sizes, self.count = sizes, tokens[0].shape[1] - sizes.num_global
        self.fixed: Places = places(sizes, len(tokens[0]), self.count, tokens[0].dtype)
        # The fewer steps, the faster a short input.
        if self.fixed.is_plain:
            self.placed = [z.contiguous() for z in self.tokens]
        else:
            self.placed = [to_places(z, sizes, self.fixed.total) for z in self.tokens]
        sorts = self.fixed.sorts
        if len(sorts) == 1:
            self.summaries: Summaries = summarise(self.placed, sorts[0], parameters, kept)
        else:
            self.summaries = AllSummaries(self.placed, sorts, parameters, summarise, kept)  # type: ignore[assignment]
        self.key, self.value = self.summaries.key, self.summaries.value
        if sizes.num_global:
            of_all = [z[:, : sizes.num_global].transpose(1, 2) for z in self.tokens[1:]]
            self.key, self.value = torch.cat([self.key, of_all[0]], 2), torch.cat([self.value, of_all[1]], 2)

    @property
    def kept(self) -> Sequence[Tensor]:
        return self.summaries.kept

    def _windows(self, x: Tensor) -> Tensor:
        """`[batch, places, heads(, dim)]` -> `[batch * windows, heads, window(, dim)]`."""
        return x.view(-1, self.fixed.window, *x.shape[2:]).transpose(1, 2)

    def _own(self, x: Tensor) -> Tensor:
        """Without global tokens."""
        return x[:, self.sizes.num_global :] if self.sizes.num_global else x

    def _bias(self) -> Tensor | None:
        """Of the summaries, with global tokens: `[batch, heads, 1, summaries]`."""
        bias = self.summaries.bias
        if bias is not None and self.sizes.num_global:
            bias = F.pad(bias, (0, self.sizes.num_global))
        return None if bias is None else bias.unsqueeze(2)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output `[batch, tokens, heads, dim]` and log-sum-exp."""
        sizes, scaling = self.sizes, self.sizes.scaling
        batch, length, heads, dim = self.tokens[0].shape
        windows = [z.view(-1, self.fixed.window, heads, dim).transpose(1, 2) for z in self.placed]
        near, near_lse = flash(windows, self.fixed.near, scaling)
        near = near.transpose(1, 2).reshape(batch, -1, heads, dim)
        near_lse = near_lse.transpose(1, 2).reshape(batch, -1, heads)
        if not self.fixed.is_plain:
            near, near_lse = to_tokens(near, sizes, self.count), to_tokens(near_lse, sizes, self.count)
        far, far_lse = self._far()
        share = (near_lse - far_lse).sigmoid_().unsqueeze(-1)  # of the window
        if not sizes.num_global:
            return far.lerp_(near, share), torch.logaddexp(near_lse, far_lse)
        output, lse = far.new_empty(batch, length, heads, dim), far_lse.new_empty(batch, length, heads)
        torch.lerp(far, near, share, out=output[:, sizes.num_global :])
        torch.logaddexp(near_lse, far_lse, out=lse[:, sizes.num_global :])
        first = flash(self._global_reads(), None, scaling)
        for x, found in zip((output, lse), first, strict=True):
            x[:, : sizes.num_global].copy_(found.transpose(1, 2))
        return output, lse

    def _global_reads(self) -> list[Tensor]:
        """Global queries, and keys and values of all tokens."""
        query, key, value = (z.transpose(1, 2) for z in self.tokens)
        return [query[:, :, : self.sizes.num_global], key, value]

    def _far(self) -> tuple[Tensor, Tensor]:
        """What queries read of summaries, `[batch, tokens, heads(, dim)]`."""
        query, mask = self.tokens[0].transpose(1, 2)[:, :, self.sizes.num_global :], self.fixed.shown
        bias = None if self.summaries.bias is None else self._bias()
        if bias is None:
            far, lse = flash((query, self.key, self.value), mask, self.sizes.scaling)
        else:
            parts = []
            for some in _rows(len(query), query[0, ..., 0].numel() * self.key.shape[2]):
                part = bias[some] + (mask if len(mask) == 1 else mask[some])
                parts.append(flash((query[some], self.key[some], self.value[some]), part, self.sizes.scaling))
            far, lse = parts[0] if len(parts) == 1 else (torch.cat(each) for each in zip(*parts, strict=True))
        far, lse = far.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()
        if bias is not None:  # torch gives a row without anything to see a finite one
            lse.masked_fill_((bias == float("-inf")).all(-1).transpose(1, 2), float("-inf"))
        if self.fixed.alone is not None:
            lse.masked_fill_(self.fixed.alone, float("-inf"))
        return far, lse

    def backward(self, grad: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor) -> list[Tensor | None]:
        """Gradients of the tokens and the parameters, from those of the results (`None` for none) and the results."""
        sizes, scaling = self.sizes, self.sizes.scaling
        batch, _, heads, dim = self.tokens[0].shape
        given = grad, grad_lse, output, lse
        placed: list[Any] = [None if z is None else to_places(z, sizes, self.fixed.total) for z in given]
        if self.fixed.empty is not None:  # which would count a token twice
            placed[3].masked_fill_(self.fixed.empty.unsqueeze(-1), float("inf"))
        placed = [None if z is None else self._windows(z) for z in placed]
        tokens = [self._windows(z) for z in self.placed]
        near = flash_backward(placed[:2], tokens, placed[2:], self.fixed.near, scaling)
        found = [z.transpose(1, 2).reshape(batch, -1, heads, dim) for z in near]
        own: list[Any] = [None if z is None else self._own(z) for z in given]
        of_query, of_key, of_value, of_bias = self._far_backward(*own)
        count = self.key.shape[2] - sizes.num_global
        of_summaries = of_key[:, :, :count], of_value[:, :, :count], None if of_bias is None else of_bias[..., :count]
        of_parameters = self.summaries.backward(*of_summaries, found)
        grads = [to_tokens(z, sizes, self.count) for z in found]
        grads[0] = of_query.add_(grads[0])
        if sizes.num_global:
            first = slice(0, sizes.num_global)
            upstream = [None if z is None else z[:, first].transpose(1, 2) for z in given]
            of_first, *of_all = flash_backward(upstream[:2], self._global_reads(), upstream[2:], None, scaling)
            of_all = [z.transpose(1, 2) for z in of_all]
            for total, part, extra in zip(of_all, grads[1:], (of_key, of_value), strict=True):
                total[:, sizes.num_global :].add_(part)
                total[:, first].add_(extra[:, :, count:].transpose(1, 2))
            grads = [torch.cat([of_first.transpose(1, 2), grads[0]], 1), *of_all]
        return [*(z.contiguous() for z in grads), *of_parameters]

    def _far_backward(
        self, grad: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of queries `[batch, tokens, heads, dim]`, of keys and values of the summaries, `[batch, heads,
        summaries, dim]`, and of their bias."""
        query, bias, scaling = self._own(self.tokens[0]), self._bias(), self.sizes.scaling
        mask, read = self.fixed.far, self.fixed.read
        if bias is None:
            given = [None if z is None else z.transpose(1, 2) for z in (grad, grad_lse, output, lse)]
            tokens = query.transpose(1, 2), self.key, self.value
            of_query, *others = flash_backward(given[:2], tokens, given[2:], mask, scaling)
            return of_query.transpose(1, 2), others[0], others[1], None
        of_query, of_bias = grad.new_empty(grad.shape), bias.new_empty(bias.shape)
        of_key, of_value = bias.new_empty(self.key.shape), bias.new_empty(self.key.shape)
        shift = (grad * output).sum(-1)
        if grad_lse is not None:
            shift -= grad_lse
        for row in range(len(query)):
            own = 0 if len(read) == 1 else row
            for some in _rows(query.shape[2], query.shape[1] * self.key.shape[2]):
                queries, upstream = query[row, :, some].transpose(0, 1), grad[row, :, some].transpose(0, 1)
                key, value = self.key[row, some], self.value[row, some]
                weights = torch.baddbmm(bias[row, some] + mask[own], queries, key.mT, alpha=scaling)
                weights.sub_(lse[row, :, some].T.unsqueeze(-1)).clamp_(_LEAST, 0.0).exp_().mul_(read[own])
                torch.bmm(weights.mT, upstream, out=of_value[row, some])
                of_logits = torch.bmm(upstream, value.mT).sub_(shift[row, :, some].T.unsqueeze(-1)).mul_(weights)
                torch.sum(of_logits, 1, keepdim=True, out=of_bias[row, some])
                of_query[row, :, some] = torch.bmm(of_logits, key).mul_(scaling).transpose(0, 1)
                torch.bmm(of_logits.mT, queries, out=of_key[row, some]).mul_(scaling)
        return of_query, of_key, of_value, of_bias.squeeze(2)


def _rows(count: int, each: int) -> list[slice]:
    """Some of `count` at a time, with so many logits each."""
    step = max(1, _PART // max(1, each))
    return [slice(start, start + step) for start in range(0, count, step)]
