"""`attend` in plain torch against a dense softmax in float64: both results and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import INF, assert_no_worse, assert_same, cotangents, dense_attend, differentiated, random
from torch import Tensor

from hf_linattn.kernels.attend import attend
from hf_linattn.kernels.attend import torch_kernel as portable
from hf_linattn.kernels.backends import use_backend

NAMES = ("output", "mass", "query", "key", "value", "bias")
# Keys and values of the same dimension take torch's flash kernel on a CPU, others tiles.
both = pytest.mark.parametrize("head_dim", [4, 3], ids=["flash", "tiles"])
LEAD = (2, 3)


@pytest.fixture(autouse=True)
def _torch() -> Any:
    with use_backend("torch"):
        yield


def make(queries: int, keys: int, head_dim: int, *, lead: tuple[int, ...] = LEAD, scale: float = 1.0) -> list[Any]:
    return [
        random(*lead, queries, 4, seed=0, scale=scale),
        random(*lead, keys, 4, seed=1, scale=scale),
        random(*lead, keys, head_dim, seed=2),
        random(*lead, keys, seed=3, scale=scale),
    ]


def ours(visible: Tensor | None = None) -> Any:
    return lambda query, key, value, bias: attend(query, key, value, bias=bias, visible=visible)


def dense(visible: Tensor | None = None) -> Any:
    return lambda query, key, value, bias: dense_attend(query, key, value, bias, visible)


def check(inputs: list[Any], visible: Tensor | None = None, limit: float = 1e-12) -> list[Any]:
    found = differentiated(ours(visible), inputs)
    assert_same(found, differentiated(dense(visible), inputs, torch.float64), limit, NAMES)
    return found


@both
@pytest.mark.parametrize("masked", ["", "bias", "keys", "pairs"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 65), (63, 1), (65, 63), (63, 130), (200, 5)])
def test_results_and_gradients(queries: int, keys: int, masked: str, head_dim: int) -> None:
    inputs, visible = make(queries, keys, head_dim), None
    if masked == "keys":
        visible = random(2, 1, 1, keys, seed=4) > -0.7
    elif masked == "pairs":
        visible = random(1, 3, queries, keys, seed=4) > -0.7
    elif masked == "":
        inputs[3] = None
    check(inputs, visible)


# One element; some of the heads; all heads and one batch entry; several batch entries.
@pytest.mark.parametrize("budget", [1, 20000, 50000, 100000])
@pytest.mark.parametrize(("queries", "keys"), [(130, 70), (70, 130)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tiles_cover_everything_once(
    budget: int, queries: int, keys: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of half precision as well, where several parts are not added up in the dtype of the result."""
    inputs = make(queries, keys, 3, lead=(3, 3))
    inputs[:3] = [z.to(dtype) for z in inputs[:3]]
    visible = random(3, 1, queries, keys, seed=4) > -0.7
    if dtype != torch.float64:
        inputs[3] = inputs[3].float()
    whole = differentiated(ours(visible), inputs)
    monkeypatch.setitem(portable._TILE, "cpu", budget)
    found = differentiated(ours(visible), inputs)
    assert_same(found, whole, 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps)
    if dtype == torch.float64:
        check(inputs, visible)


@pytest.mark.parametrize("budget", [1, 700, 1 << 20])
@pytest.mark.parametrize("lead", [(1, 1), (4, 1), (1, 4), (2, 3)])
@pytest.mark.parametrize("by_keys", [False, True])
def test_tiles_are_small(budget: int, lead: tuple[int, int], by_keys: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(portable._TILE, "cpu", budget)
    query, key = torch.zeros(*lead, 70, 2), torch.zeros(*lead, 9, 2)
    if by_keys:
        query, key = key, query
    seen = torch.zeros(*lead, query.shape[2], key.shape[2])
    for part in portable._tiles(query, key, by_keys=by_keys):
        seen[part.pairs] += 1
        # 64 at least along the side that is cut, one head, one batch entry.
        assert seen[part.pairs].numel() <= max(budget, 64 * 9)
    assert (seen == 1).all()


@both
@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 3, 4)])
def test_leading_dimensions(lead: tuple[int, ...], head_dim: int) -> None:
    check(make(3, 5, head_dim, lead=lead), random(3, 5, seed=4) > -1)


@both
@pytest.mark.parametrize(
    "leads",
    [
        ((3,), (2, 3), (2, 3), (2, 3)),
        ((3, 1), (2, 3, 4), (2, 3, 4), (2, 1, 4)),
        ((2, 3, 4), (3, 1), (2, 3, 4), ()),
        ((2, 3, 4), (2, 3, 1), (1,), (4,)),
        ((), (), (), (2,)),
        ((5, 1), (1, 6), (), ()),
    ],
)
def test_leading_dimensions_broadcast(leads: tuple[tuple[int, ...], ...], head_dim: int) -> None:
    """Slots are shared by the batch and by blocks, masks by heads; gradients are summed over what is shared."""
    shapes = ((3, 4), (5, 4), (5, head_dim), (5,))
    inputs = [random(*leads[i], *shape, seed=i) for i, shape in enumerate(shapes)]
    check(inputs)
    check(inputs, random(2, 1, 1, 3, 5, seed=9) > -1 if len(max(leads, key=len)) == 3 else None)


def test_what_is_shared_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    forward = portable.attend_forward
    monkeypatch.setattr(portable, "attend_forward", lambda *given: seen.extend(given[:4]) or forward(*given))
    slots, key = random(3, 1, 7, 4, seed=0), random(2, 3, 5, 6, 4, seed=1)
    attend(slots[:, 0], key[:, :, 0], key[:, :, 0], bias=random(6, seed=2))
    assert seen[0].untyped_storage().data_ptr() == slots.untyped_storage().data_ptr()
    attend(slots, key, key)
    assert seen[5].untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
    assert seen[4].untyped_storage().nbytes() <= 2 * slots.untyped_storage().nbytes()


@both
@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 1), (1, 5), (2, 1, 1, 5), (2, 3, 3, 5), (3, 3, 5)])
def test_masks_broadcast(shape: tuple[int, ...], head_dim: int) -> None:
    visible = random(*shape, seed=4) > -0.5
    check(make(3, 5, head_dim), visible)
    check([*make(3, 5, head_dim)[:3], None], visible)


@both
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 1)])
def test_masks_alone_have_leading_dimensions(lead: tuple[int, ...], head_dim: int) -> None:
    """Rows that are the same until they are masked."""
    check(make(3, 5, head_dim, lead=lead), random(2, 3, 3, 5, seed=4) > -0.5)


@both
def test_rows_and_keys_that_are_hidden(head_dim: int) -> None:
    inputs, visible = make(6, 9, head_dim), torch.ones(2, 3, 6, 9, dtype=torch.bool)
    inputs[3][:, :, 2:7] = -INF
    inputs[3][0, 1] = -INF  # a head that sees nothing at all
    visible[1, 2, 4] = False
    visible[1, 1, 3, [0, 1, 7, 8]] = False  # nothing but what the bias hides
    output, mass, *grads = check(inputs, visible)
    empty = mass == -INF
    assert empty.sum() == 8
    assert (output[empty] == 0).all()
    assert (grads[0][empty] == 0).all()
    assert all((grad[:, :, 2:7] == 0).all() for grad in grads[1:])


@both
@pytest.mark.parametrize("hidden", [512, 700, 1100])
@pytest.mark.parametrize("by", ["bias", "visible"])
def test_long_runs_of_hidden_keys_come_first(hidden: int, by: str, head_dim: int) -> None:
    """Whole blocks of a flash kernel without a visible key."""
    inputs, visible = make(70, 1100, head_dim, lead=(1, 2)), None
    if by == "bias":
        inputs[3][..., :hidden] = -INF
    else:
        visible = torch.arange(1100) >= hidden
        visible = visible.expand(1, 2, 70, 1100).clone()
        visible[0, 0, 50] = False
    check(inputs, visible)


@both
def test_nothing_is_visible(head_dim: int) -> None:
    inputs = make(70, 9, head_dim)
    output, mass, *grads = check(inputs, torch.zeros(1, 1, 1, 1, dtype=torch.bool))
    assert not output.any()
    assert (mass == -INF).all()
    assert not any(grad.any() for grad in grads)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_rows_that_see_nothing(dtype: torch.dtype, head_dim: int) -> None:
    """What comes back through a mass of -inf is often NaN."""
    inputs = [z.to(dtype).requires_grad_() for z in make(3, 5, head_dim)]
    visible = torch.ones(3, 5, dtype=torch.bool)
    visible[1] = False
    result = attend(*inputs[:3], bias=inputs[3], visible=visible)
    grads = cotangents(*result)
    expected = torch.autograd.grad(tuple(result), inputs, grads, retain_graph=True)
    grads[1][..., 1] = float("nan")
    assert all(map(torch.equal, torch.autograd.grad(tuple(result), inputs, grads), expected))


@both
@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0)])
def test_attend_without_queries_or_keys(queries: int, keys: int, head_dim: int) -> None:
    check(make(queries, keys, head_dim))
    check([*make(queries, keys, head_dim)[:3], None], torch.ones(queries, keys, dtype=torch.bool))


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_huge_values(dtype: torch.dtype, head_dim: int) -> None:
    inputs = [z.to(dtype) for z in make(20, 90, head_dim, scale=50.0)]  # logits of 1e4
    check(inputs, limit=1e4 * 8 * torch.finfo(dtype).eps)
    inputs[1][:, :, 17] = 1e4
    check(inputs, limit=1e7 * torch.finfo(dtype).eps)


@both
def test_logits_far_below_zero(head_dim: int) -> None:
    """They are not taken for hidden ones."""
    inputs = make(20, 9, head_dim)
    inputs[3] = torch.full_like(inputs[3], -(2.0**32))  # resolved to 1e-6
    check(inputs, limit=1e-4)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "keys"), [(17, 140), (140, 17)])
def test_half_precision_is_no_worse_than_torch(queries: int, keys: int, dtype: torch.dtype, head_dim: int) -> None:
    visible = random(2, 1, 1, keys, seed=4) > -1
    inputs = [z.to(dtype) if i < 3 else z.float() for i, z in enumerate(make(queries, keys, head_dim))]
    found, exact = differentiated(ours(visible), inputs), differentiated(dense(visible), inputs, torch.float64)
    assert [z.dtype for z in found] == [dtype, torch.float32, dtype, dtype, dtype, torch.float32]
    assert_no_worse(found, differentiated(dense(visible), inputs, dtype), exact, torch.finfo(dtype).eps)
    # Logits are in float32, and so is the mass; torch's flash kernel takes short exponentials of half precision.
    assert_same(found[1:2], exact[1:2], 2e-6 if head_dim == 3 else 1e-4)


def test_mixed_dtypes() -> None:
    """Float32 slots that read tokens in half precision, and the other way round."""
    inputs = [z.float() for z in make(20, 33, 4)]
    for halves in ((1, 2), (0,), (2,)):
        mixed = [z.bfloat16() if i in halves else z for i, z in enumerate(inputs)]
        found, exact = differentiated(ours(), mixed), differentiated(dense(), mixed, torch.float64)
        assert [z.dtype for z in found[2:]] == [z.dtype for z in mixed]
        assert_same(found, exact, 4 * torch.finfo(torch.bfloat16).eps, NAMES)
        assert_same(found[1:2], exact[1:2], 2e-6)


@both
@pytest.mark.parametrize("needed", range(4))
def test_gradients_one_at_a_time(needed: int, head_dim: int) -> None:
    inputs = make(20, 18, head_dim)
    every = differentiated(ours(), inputs)[2 + needed]
    inputs[needed].requires_grad_()
    result = ours()(*inputs)
    (alone,) = torch.autograd.grad(tuple(result), inputs[needed], cotangents(*result))
    assert torch.equal(alone, every)


@both
@pytest.mark.parametrize("used", [0, 1])
def test_one_result_is_used(used: int, head_dim: int) -> None:
    """The gradient of the other one counts as 0."""
    inputs = make(20, 18, head_dim)
    leaves = [z.clone().requires_grad_() for z in inputs]
    result = ours()(*leaves)
    found = torch.autograd.grad(result[used], leaves, cotangents(*result)[used], allow_unused=True)
    exact_leaves = [z.clone().requires_grad_() for z in inputs]
    result = dense()(*exact_leaves)
    exact = torch.autograd.grad(result[used], exact_leaves, cotangents(*result)[used], allow_unused=True)
    assert_same(found, [torch.zeros_like(z) if g is None else g for z, g in zip(inputs, exact, strict=True)], 1e-12)


@both
def test_a_second_backward_pass_gives_the_same(head_dim: int) -> None:
    inputs = [z.requires_grad_() for z in make(20, 18, head_dim)]
    result = ours()(*inputs)
    grads = cotangents(*result)
    first = torch.autograd.grad(tuple(result), inputs, grads, retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(tuple(result), inputs, grads), first))


@both
def test_strides_change_nothing(head_dim: int) -> None:
    inputs, visible = make(20, 18, head_dim), random(2, 3, 20, 18, seed=4) > -1

    def turned(*given: Tensor) -> Any:
        moved = [z.transpose(0, -1).contiguous().transpose(0, -1) for z in given]
        hidden = visible.transpose(-1, -2).contiguous().transpose(-1, -2)
        return attend(*moved[:3], bias=moved[3], visible=hidden)

    assert_same(differentiated(turned, inputs), differentiated(ours(visible), inputs), 1e-13)
