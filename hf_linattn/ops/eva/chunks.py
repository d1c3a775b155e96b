"""EVA's chunks: from the tokens of a chunk to the one key and value that stand for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...kernels.attend import attend
from ...kernels.attention_state import AttentionState, merge_logits, merge_states
from ...kernels.half_norm import half_norm
from ..layout import masked_mean
from ..noise import add_noise, noise_factor
from ..slots import mask_logits, softmax_with_lse
from .layout import Chunks

MeanMap = Callable[[Tensor], Tensor]
PROPOSALS = ("sum", "mean", "key", "none")
WEIGHTINGS = ("none", "size", "spread")


@dataclass(frozen=True)
class Summaries:
    """What a query needs of the chunks: mean key, value, weight, spread; `[batch, heads, chunks(, head_dim)]`.

    `log_weight` is `-inf` for a chunk that no query reads.
    """

    key_mean: Tensor
    value: Tensor
    log_weight: Tensor
    spread: Tensor | None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Summaries:
        """`fn` of everything, given as `[batch, heads, ..., chunks, dim]`: `log_weight` has one dimension there."""
        weight = fn(self.log_weight.unsqueeze(-1)).squeeze(-1)
        return Summaries(fn(self.key_mean), fn(self.value), weight, None if self.spread is None else fn(self.spread))

    def then(self, others: Summaries) -> Summaries:
        """These chunks and the others behind them."""
        spread = None
        if self.spread is not None and others.spread is not None:
            spread = torch.cat([self.spread, others.spread], dim=-2)
        return Summaries(
            torch.cat([self.key_mean, others.key_mean], dim=-2),
            torch.cat([self.value, others.value], dim=-2),
            torch.cat([self.log_weight, others.log_weight], dim=-1),
            spread,
        )

    def first(self, number: Tensor) -> Summaries:
        """The first `number` `[batch]` chunks of every row; the others then weigh nothing."""
        is_one = torch.arange(self.value.shape[2], device=number.device) < number[:, None]
        return Summaries(self.key_mean, self.value, mask_logits(self.log_weight, is_one[:, None]), self.spread)

    def select(self, index: Tensor) -> Summaries:
        """Pick chunks per group: `index` `[batch or 1, groups, members]`, negative for none."""
        batch, heads = self.key_mean.shape[:2]
        flat = index.clamp_min(0).flatten(1).expand(batch, -1)

        def pick(z: Tensor) -> Tensor:
            rows = flat[:, None, :, None].expand(-1, heads, -1, z.shape[-1])
            return z.gather(2, rows).unflatten(2, tuple(index.shape[1:]))

        weight = pick(self.log_weight.unsqueeze(-1)).squeeze(-1).masked_fill((index < 0)[:, None], float("-inf"))
        return Summaries(
            pick(self.key_mean), pick(self.value), weight, None if self.spread is None else pick(self.spread)
        )

    def factors(self, block_x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The estimated log-weight of a chunk, `x . key_mean + log_weight (+ x^2 . spread / 2)`, as dot products.

        Returns: queries `[batch, heads, windows, queries, dim]`, keys `[batch, heads, windows or 1, chunks, dim]`,
            bias and values of the keys.
        """
        queries, keys = block_x.to(self.key_mean.dtype), self.key_mean
        if self.spread is not None:
            queries, keys = torch.cat([queries, queries.square()], -1), torch.cat([keys, self.spread / 2], -1)
        value, bias = self.value, self.log_weight
        if keys.ndim == 4:
            keys, value, bias = keys.unsqueeze(2), value.unsqueeze(2), bias.unsqueeze(2)
        return queries, keys, bias, value

    def read(self, block_x: Tensor, visible: Tensor | None, *, dropout: float = 0.0) -> AttentionState:
        """Queries read the chunks.

        Args:
            block_x: `[batch, heads, windows, queries, head_dim]`.
            visible: As in `Chunks`, or `None` with the chunks of every window, `[batch, heads, windows, chunks(,
                head_dim)]`.
        """
        queries, keys, bias, value = self.factors(block_x)
        seen = None if visible is None else visible[:, None]
        if dropout:
            logits = queries @ keys.transpose(-1, -2) + bias.unsqueeze(-2)
            return softmax_with_lse(mask_logits(logits, seen), value, dropout=dropout)
        if self.key_mean.ndim > 4:
            return attend(queries, keys, value, bias=bias)
        # Windows as one row of queries: keys, and their gradients, are then not repeated for every window.
        shape = queries.shape[2:4]
        if seen is not None:
            seen = seen.expand(-1, -1, *shape, -1).flatten(2, 3)
        read = attend(queries.flatten(2, 3), keys[:, :, 0], value[:, :, 0], bias=bias[:, :, 0], visible=seen)
        return AttentionState(read.output.unflatten(2, shape), read.lse.unflatten(2, shape))

    def join(self, partial: AttentionState, block_x: Tensor, *, dropout: float = 0.0) -> AttentionState:
        """What queries have read already, and the few chunks of every window, under one softmax."""
        queries, keys, bias, value = self.factors(block_x)
        if dropout or keys.shape[-2] > value.shape[-1]:
            return merge_states([partial, self.read(block_x, None, dropout=dropout)])
        return merge_logits(partial, queries @ keys.transpose(-1, -2) + bias.unsqueeze(-2), value)


@dataclass(frozen=True)
class Summariser:
    """The options of `eva_attention` that decide what a chunk's summary is. `root` is the square root of `scaling`."""

    proposals: str
    weighting: str
    query_map: MeanMap | None
    key_map: MeanMap | None
    noise_scale: str
    root: float

    @property
    def uses_queries(self) -> bool:
        return self.proposals in ("sum", "mean")

    def check(self) -> None:
        noise_factor(self.noise_scale, 1.0)  # raises for an unknown one
        # No getattr: torch 2.11's compiler does not know the fields of a dataclass made in the compiled code by name.
        for name, given, allowed in (
            ("proposals", self.proposals, PROPOSALS),
            ("weighting", self.weighting, WEIGHTINGS),
        ):
            if given not in allowed:
                raise InputError(f"{name} must be one of {list(allowed)}; got {given!r}.")

    def _mapped(self, mean: Tensor, given: MeanMap | None) -> Tensor:
        """Maps are defined on the means of the queries and keys as they came, before scaling."""
        return mean if given is None else given(mean / self.root) * self.root

    def _noisy(self, mu: Tensor, noise: Tensor | bool, count: int) -> Tensor:
        if isinstance(noise, Tensor):
            if noise.ndim != 4 or noise.shape[2] < count or noise.shape[-1] != mu.shape[-1]:
                raise InputError(
                    f"noise must be [batch, heads, chunks, head_dim] with at least {count} chunks here and head_dim"
                    f" {mu.shape[-1]}; got {tuple(noise.shape)}."
                )
            noise = torch.nn.functional.pad(noise.to(mu), (0, 0, 0, mu.shape[2] - noise.shape[2]))
        return add_noise(mu, noise, noise_factor(self.noise_scale, self.root**2))

    def __call__(
        self, x: Tensor | None, y: Tensor, value: Tensor, chunks: Chunks, noise: Tensor | bool = False
    ) -> Summaries:
        """Summaries of all chunks, in float32 or wider.

        Args:
            x, y: Scaled queries (needed by proposals that are made of them) and keys, `[batch, heads, tokens, dim]`.
            noise: As in `eva_attention`.
        """
        member, wide = chunks.member, torch.promote_types(y.dtype, torch.float32)
        keys = chunks.take(y).to(wide)

        def mean_of(z: Tensor) -> Tensor:
            return masked_mean(z, member) if chunks.slots is None else z.sum(-2) / chunks.slots[:, None, :, None]

        centre = masked_mean(keys, member)
        key_mean = self._mapped(centre if chunks.slots is None else mean_of(keys), self.key_map)
        # `mu . y - |y|^2 / 2` is a softmax of the distances between keys and `mu`, which do not change when both are
        # taken relative to the chunk's centre, nor with it: what all keys have in common costs no digits then.
        centre = centre.detach()
        centred = keys - centre.unsqueeze(-2)
        if self.proposals == "none":
            mu = -centre
        else:
            mu = key_mean - centre
            if self.proposals != "key":
                assert x is not None
                mu = mu + self._mapped(mean_of(chunks.take(x).to(wide)), self.query_map)
            mu = (mu - centre) / 2 if self.proposals == "mean" else mu
        mu = self._noisy(mu, noise, chunks.count)
        bias = mask_logits(-half_norm(centred), member[:, None])
        value = attend(mu.unsqueeze(-2), centred, chunks.take(value).to(wide), bias=bias).output.squeeze(-2)

        log_weight = member.sum(-1).to(keys.dtype).log()
        if self.weighting == "none":
            # The published layout keeps chunks of padding alone: they have a logit, and the value 0.
            log_weight = log_weight.masked_fill(member.any(-1) | (chunks.slots is not None), 0.0)
        spread = None
        if self.weighting == "spread":
            spread = masked_mean(centred.square().masked_fill(~member[:, None, ..., None], 0.0), member)
        return Summaries(key_mean, value, log_weight[:, None].expand(*mu.shape[:-1]), spread)
