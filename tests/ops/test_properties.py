"""What must hold for every kind, on random shapes: padding, rows, constants, causality, permutations, garbage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from variants import BIDIRECTIONAL, CAUSAL, VARIANTS, Variant, name_of

from hf_linattn.errors import InputError
from hf_linattn.functional import randomized_attention, softmax_attention

pytestmark = pytest.mark.usefixtures("road")

quick = settings(max_examples=examples(25), derandomize=True, database=None)
every = pytest.mark.parametrize("attend", VARIANTS, ids=name_of)
every_causal = pytest.mark.parametrize("attend", CAUSAL, ids=name_of)


@dataclass
class Case:
    """Random inputs and options of one call."""

    tokens: int
    batch: int
    heads: int
    dim: int
    window: int
    count: int  # global tokens
    scale: float
    seed: int

    def inputs(self, tokens: int | None = None) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.heads, tokens or self.tokens, self.dim)
        return [
            torch.randn(*shape, generator=generator, dtype=torch.float64) * s for s in (self.scale, self.scale, 1.0)
        ]

    def options(self, attend: Variant) -> dict[str, int]:
        count = {} if attend.is_causal else {"num_global_tokens": self.count}
        return {"window_size": self.window, **count}


cases = st.builds(
    Case,
    tokens=st.integers(1, 18),
    batch=st.integers(1, 3),
    heads=st.integers(1, 2),
    dim=st.sampled_from([1, 2, 5]),
    window=st.sampled_from([0, 1, 2, 3, 4, 8, 20]),
    count=st.sampled_from([0, 0, 1, 3]),
    scale=st.sampled_from([0.3, 1.0, 4.0]),
    seed=st.integers(0, 2**16),
)


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Zeros for inputs that were not read: a single token returns its value whatever the query."""
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


def spread_out(z: Tensor, places: Tensor, length: int, fill: float) -> Tensor:
    """`z` at `places` (one set per row) of a longer sequence that is `fill` elsewhere."""
    index = places[:, None, :, None].expand_as(z)
    return z.new_full((*z.shape[:2], length, z.shape[-1]), fill).scatter(2, index, z)


@every
@given(case=cases, extra=st.integers(1, 9), where=st.sampled_from(["left", "right", "holes"]), data=st.data())
@quick
def test_padding_changes_nothing(attend: Variant, case: Case, extra: int, where: str, data: st.DataObject) -> None:
    q, k, v = (z.requires_grad_() for z in case.inputs())
    plain = attend(q, k, v, **case.options(attend))
    cotangent = torch.sin(torch.arange(plain.numel(), dtype=plain.dtype)).view_as(plain)
    plain_grads = gradients((plain * cotangent).sum(), q, k, v)

    length = case.tokens + extra
    if where == "holes":
        rows = [sorted(data.draw(st.permutations(range(length)))[: case.tokens]) for _ in range(case.batch)]
        places = torch.tensor(rows)
    else:
        places = (torch.arange(case.tokens) + (extra if where == "left" else 0)).expand(case.batch, -1)
    mask = torch.zeros(case.batch, length, dtype=torch.bool).scatter(1, places, True)
    fill = data.draw(st.sampled_from([0.0, 7.0, float("inf"), float("nan")]))
    padded = attend(*(spread_out(z, places, length, fill) for z in (q, k, v)), key_mask=mask, **case.options(attend))
    assert (padded.masked_select(~mask[:, None, :, None]) == 0).all()
    ours = padded.gather(2, places[:, None, :, None].expand_as(q))
    close(ours, plain)
    grads = gradients((ours * cotangent).sum(), q, k, v)
    # Dense statistics of fewer tokens than dimensions stretch what the tokens leave open a thousandfold, and with it
    # the rounding of the gradient there.
    limit = 1e-5 if "dense" in attend.name else 1e-7
    for grad, plain_grad in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(grad, plain_grad, rtol=limit, atol=limit)


@every
@given(case=cases, data=st.data())
@quick
def test_rows_do_not_depend_on_the_batch(attend: Variant, case: Case, data: st.DataObject) -> None:
    q, k, v = case.inputs()
    lengths = data.draw(st.lists(st.integers(0, case.tokens), min_size=case.batch, max_size=case.batch))
    mask = torch.arange(case.tokens) < torch.tensor(lengths)[:, None]
    together = attend(q, k, v, key_mask=mask, **case.options(attend))
    for b, n in enumerate(lengths):
        assert (together[b, :, n:] == 0).all()
        if n:
            alone = attend(*(z[b : b + 1, :, :n] for z in (q, k, v)), **case.options(attend))
            close(together[b : b + 1, :, :n], alone)


@every
@given(case=cases)
@quick
def test_a_constant_value_comes_back(attend: Variant, case: Case) -> None:
    q, k, v = case.inputs()
    constant = v[:, :, :1].expand_as(v)
    close(attend(q, k, constant, **case.options(attend)), constant)


@every
@given(case=cases)
@quick
def test_outputs_lie_between_the_values(attend: Variant, case: Case) -> None:
    q, k, v = case.inputs()
    out = attend(q, k, v, **case.options(attend))
    assert (out <= v.amax(2, keepdim=True) + 1e-12).all()
    assert (out >= v.amin(2, keepdim=True) - 1e-12).all()


@every_causal
@given(case=cases, data=st.data(), factor=st.sampled_from([-1.0, 0.0, 3.0, 100.0]))
@quick
def test_a_later_token_changes_nothing_earlier(
    attend: Variant, case: Case, data: st.DataObject, factor: float
) -> None:
    q, k, v = (z.requires_grad_() for z in case.inputs())
    split = data.draw(st.integers(0, case.tokens - 1))
    before = attend(q, k, v, **case.options(attend))
    changed = [torch.cat([z[:, :, :split], z[:, :, split:] * factor + 0.5], 2) for z in (q, k, v)]
    close(attend(*changed, **case.options(attend))[:, :, :split], before[:, :, :split])
    if split:
        for grad in gradients(before[:, :, :split].sin().sum(), q, k, v):
            assert (grad[:, :, split:] == 0).all()
            assert grad.isfinite().all()
        assert torch.autograd.grad(attend(q, k, v, **case.options(attend))[:, :, split].sum(), v)[0].abs().sum() > 0


@pytest.mark.parametrize("attend", [a for a in BIDIRECTIONAL if a.name.startswith("favor")], ids=name_of)
@given(case=cases, data=st.data())
@quick
def test_favor_is_permutation_equivariant(attend: Variant, case: Case, data: st.DataObject) -> None:
    q, k, v = case.inputs()
    order = torch.tensor(data.draw(st.permutations(range(case.tokens))))
    shuffled = attend(q[:, :, order], k[:, :, order], v[:, :, order])
    close(shuffled, attend(q, k, v)[:, :, order])


@every
@given(case=cases, garbage=st.sampled_from([0.0, 1e30, float("inf"), float("nan")]))
@quick
def test_rows_of_padding_alone_give_zeros(attend: Variant, case: Case, garbage: float) -> None:
    inputs = case.inputs()
    for z in inputs:
        z[0] = garbage
    q, k, v = (z.requires_grad_() for z in inputs)
    mask = torch.ones(case.batch, case.tokens, dtype=torch.bool)
    mask[0] = False
    out = attend(q, k, v, key_mask=mask, **case.options(attend))
    assert (out[0] == 0).all()
    assert out.isfinite().all()
    grads = gradients(out.sin().sum(), q, k, v)
    assert all((grad[0] == 0).all() for grad in grads)
    assert all(grad.isfinite().all() for grad in grads)


@every
@given(case=cases, data=st.data(), garbage=st.sampled_from([1e30, float("inf"), -float("inf"), float("nan")]))
@quick
def test_garbage_in_the_padding_has_no_influence(
    attend: Variant, case: Case, data: st.DataObject, garbage: float
) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=case.tokens * case.batch, max_size=case.tokens * case.batch))
    mask = torch.tensor(bits).view(case.batch, case.tokens)
    results = []
    for fill in (0.0, garbage):
        inputs = [z.masked_fill(~mask[:, None, :, None], fill).requires_grad_() for z in case.inputs()]
        out = attend(*inputs, key_mask=mask, **case.options(attend))
        grads = gradients(out.sin().sum(), *inputs)
        assert all((grad.masked_select(~mask[:, None, :, None]) == 0).all() for grad in grads)
        results.append([out, *grads])
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


@pytest.mark.parametrize("reference", [softmax_attention, randomized_attention])
@pytest.mark.parametrize("is_causal", [False, True])
def test_garbage_in_masked_keys_does_not_reach_the_references(
    reference: Callable[..., Tensor], is_causal: bool
) -> None:
    mask = torch.arange(6) != 2
    results = []
    for fill in (0.0, float("nan"), float("inf")):
        q, k, v = Case(6, 1, 1, 3, 0, 0, 1.0, 0).inputs()
        k[:, :, ~mask], v[:, :, ~mask] = fill, fill
        inputs = [z.requires_grad_() for z in (q, k, v)]
        out = reference(*inputs, key_mask=mask[None], is_causal=is_causal)
        results.append([out, *gradients(out.sin().sum(), *inputs)])
    for other in results[1:]:
        for clean, dirty in zip(results[0], other, strict=True):
            assert torch.equal(clean, dirty)


@every
def test_no_tokens_at_all_are_refused(attend: Variant) -> None:
    empty = torch.zeros(1, 1, 0, 2)
    for window in (0, 2):
        with pytest.raises(InputError, match="at least one token"):
            attend(empty, empty, empty, window_size=window)
    if "favor" in attend.name:
        with pytest.raises(InputError, match="at least one token"):
            attend(torch.zeros(1, 1, 3, 2), empty, empty)


@every
def test_a_full_mask_is_no_mask(attend: Variant) -> None:
    q, k, v = Case(13, 2, 2, 4, 3, 0, 1.0, 0).inputs()
    for window in (0, 3, 4):
        close(
            attend(q, k, v, window_size=window, key_mask=torch.ones(2, 13, dtype=torch.bool)),
            attend(q, k, v, window_size=window),
        )
