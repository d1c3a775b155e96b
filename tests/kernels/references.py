"""The kernels as dense formulas, one logsumexp over everything, and how kernels are compared with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hf_linattn.kernels.block_slots import BlockReach

INF = float("inf")


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


# -- formulas --------------------------------------------------------------------------------------------------------


def logsumexp(x: Tensor) -> Tensor:
    """Along the last dimension; where all entries are -inf the gradients are 0, not NaN."""
    empty = (x == -INF).all(-1)
    return x.masked_fill(empty.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(empty, -INF)


def softmax(x: Tensor) -> Tensor:
    """The same of a softmax, whose weights are then 0."""
    empty = (x == -INF).all(-1, keepdim=True)
    return x.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def dense_attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    logits = query @ key.mT
    if bias is not None:
        logits = logits + bias.unsqueeze(-2)
    if visible is not None:
        logits = logits.masked_fill(~visible, -INF)
    return softmax(logits).to(value.dtype) @ value, logsumexp(logits)


def dense_slots(query_logits: Tensor, key_logits: Tensor, value: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Every query reads visible keys through all slots: `[..., queries, slots]` and `[..., keys, slots]`."""
    pairs = logsumexp(query_logits.unsqueeze(-2) + key_logits.unsqueeze(-3)).masked_fill(~visible, -INF)
    return softmax(pairs).to(value.dtype) @ value, logsumexp(pairs)


def dense_causal(
    query: Tensor, query_slots: Tensor, query_slot_bias: Tensor,
    key: Tensor, key_bias: Tensor, key_slots: Tensor, key_slot_bias: Tensor, value: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    reading = query @ query_slots.mT + query_slot_bias.unsqueeze(-2)
    writing = key @ key_slots.mT + key_bias.unsqueeze(-1) + key_slot_bias.unsqueeze(-2)
    tokens = query.shape[-2]
    return dense_slots(reading, writing, value, torch.ones(tokens, tokens, dtype=torch.bool).tril())


def dense_blocks(
    query: Tensor, query_slots: Tensor, query_slot_bias: Tensor,
    key: Tensor, key_bias: Tensor, key_slots: Tensor, key_slot_bias: Tensor, value: Tensor,
    reach: BlockReach,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All blocks in a row, all units in a row."""
    shape = query.shape[:-1]
    block = torch.arange(shape[-2]).repeat_interleave(shape[-1]).unsqueeze(-1)
    unit = torch.arange(key.shape[-3]).repeat_interleave(key.shape[-2])
    visible = unit < block * reach.units - reach.margin
    if not reach.is_causal:
        visible = visible | (unit >= (block + 1) * reach.units + reach.margin)
    reading = query.flatten(-3, -2) @ query_slots.mT + query_slot_bias.unsqueeze(-2)
    writing = key.flatten(-3, -2) @ key_slots.mT + key_bias.flatten(-2).unsqueeze(-1) + key_slot_bias.unsqueeze(-2)
    output, mass = dense_slots(reading, writing, value.flatten(-3, -2), visible)
    return output.unflatten(-2, shape[-2:]), mass.unflatten(-1, shape[-2:])


def recurrent_causal(
    query: Tensor, query_slots: Tensor, query_slot_bias: Tensor,
    key: Tensor, key_bias: Tensor, key_slots: Tensor, key_slot_bias: Tensor, value: Tensor,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """One token after the other: every slot remembers its mean and its mass."""
    mass = torch.full(key_slot_bias.expand(*value.shape[:-2], -1).shape, -INF, dtype=value.dtype)
    mean = torch.zeros(*mass.shape, value.shape[-1], dtype=value.dtype)
    for t in range(query.shape[-2]):
        new = (key_slots @ key[..., t, :, None]).squeeze(-1) + key_bias[..., t, None] + key_slot_bias
        shares = softmax(torch.stack([mass, new], -1))
        mean = shares[..., :1] * mean + shares[..., 1:] * value[..., t, None, :]
        mass = logsumexp(torch.stack([mass, new], -1))
        logits = (query_slots @ query[..., t, :, None]).squeeze(-1) + query_slot_bias + mass
        yield (softmax(logits).unsqueeze(-2) @ mean).squeeze(-2), logsumexp(logits)


# -- comparisons -----------------------------------------------------------------------------------------------------


def cotangents(output: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients that come in, 0 for masses of -inf: those have none."""
    grads = random(*output.shape, seed=101).to(output), random(*mass.shape, seed=102).to(mass)
    return grads[0], grads[1].masked_fill(mass.detach() == -INF, 0.0)


def differentiated(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], dtype: torch.dtype | None = None
) -> list[Tensor | None]:
    """Output, log mass and the gradient of every input, computed in `dtype` if given."""
    leaves = [
        None if z is None else (z if dtype is None else z.to(dtype)).detach().clone().requires_grad_() for z in inputs
    ]
    results = tuple(function(*leaves))
    given = [z for z in leaves if z is not None]
    found = iter(torch.autograd.grad(results, given, cotangents(*results)))
    return [*(z.detach() for z in results), *(None if z is None else next(found) for z in leaves)]


def assert_same(
    found: Sequence[Tensor | None], expected: Sequence[Tensor | None], limit: float, names: Sequence[str] = ()
) -> None:
    """Off by at most `limit`, relative to the largest entry of each tensor if that is more than 1."""
    for number, (ours, exact) in enumerate(zip(found, expected, strict=True)):
        name = names[number] if names else str(number)
        if exact is None:
            assert ours is None, name
            continue
        assert ours is not None, name
        assert ours.shape == exact.shape, name
        assert not ours.isnan().any(), name
        assert torch.equal(ours == -INF, exact == -INF), name
        ours, exact = ours.detach(), exact.detach().double()
        error, size = (ours.double() - exact)[exact != -INF].abs(), exact[exact != -INF].abs()
        if error.numel():
            assert error.max() <= limit * max(1.0, float(size.max())), f"{name} is off by {error.max():.2e}"


def assert_no_worse(
    found: Sequence[Tensor | None], plain: Sequence[Tensor | None], exact: Sequence[Tensor | None], roundings: float
) -> None:
    """Errors at most twice those of plain torch in the same dtype, and some roundings of the largest entry."""
    for number, (ours, other, best) in enumerate(zip(found, plain, exact, strict=True)):
        if ours is None or other is None or best is None:
            continue
        assert not ours.isnan().any(), number
        seen = best != -INF
        ours_off, other_off = ((z.double() - best)[seen].abs().max() for z in (ours, other))
        limit = 2 * other_off + roundings * best[seen].abs().max()
        assert ours_off <= limit, f"{number}: off by {ours_off:.1e}, plain torch by {other_off:.1e}"
