"""`attend` in Triton against dense attention in float64: both results and every gradient.

Without a GPU in Triton's interpreter, on small shapes; with one (`gpu`) on realistic ones.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.kernels import triton_common as _common
from hf_linattn.kernels.attend import triton_launch as attend

INF = float("inf")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shapes are cut into parts as well."""
    if not ON_GPU:
        monkeypatch.setattr(attend, "_LEAST_PART", 64)
        monkeypatch.setattr(_common, "ENOUGH_PROGRAMS", 12)


class Case(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    visible: Tensor | None
    grad_output: Tensor
    grad_mass: Tensor


def make(
    queries: int = 20,
    keys: int = 33,
    dim: int = 16,
    value_dim: int = 16,
    *,
    groups: tuple[int, int] = (2, 2),
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    bias: bool = True,
    masked: str | None = None,
) -> Case:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*groups, *shape, generator=generator)

    visible = None
    if masked == "keys":
        visible = (torch.rand(groups[0], 1, 1, keys, generator=generator) < 0.7).expand(*groups, queries, keys)
    elif masked == "pairs":
        visible = torch.rand(groups[0], 1, queries, keys, generator=generator) < 0.7
        visible[0, 0, queries // 2] = False
        visible = visible.expand(*groups, queries, keys)
    elif masked == "all":
        visible = torch.zeros(1, 1, 1, 1, dtype=torch.bool).expand(*groups, queries, keys)
    case = Case(
        (random(queries, dim) * (scale / dim**0.5)).to(dtype),
        random(keys, dim).to(dtype),
        random(keys, value_dim).to(dtype),
        random(keys) * scale if bias else None,
        visible,
        random(queries, value_dim).to(dtype),
        random(queries),
    )
    return Case(*[t if t is None else t.to(DEVICE) for t in case])


def dense(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Output, log mass and gradients by autograd through all weights, computed in `dtype`."""
    leaves = [t.to(dtype).requires_grad_() for t in (case.query, case.key, case.value)]
    query, key, value = leaves
    logits = query @ key.transpose(-1, -2)
    wide = torch.promote_types(dtype, torch.float32)
    if case.bias is not None:
        leaves.append(case.bias.to(wide).requires_grad_())
        logits = logits + leaves[3].unsqueeze(-2)
    if case.visible is not None:
        logits = logits.masked_fill(~case.visible, -INF)
    top = logits.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    safe = total.masked_fill(total == 0, 1.0)
    output = (weights / safe).to(dtype) @ value
    lse = (safe.log() + top).squeeze(-1).to(wide)
    empty = (total == 0).squeeze(-1)
    grads = (case.grad_output.to(dtype), case.grad_mass.to(wide).masked_fill(empty, 0.0))
    found = torch.autograd.grad([output, lse], leaves, grads)
    return [output.detach(), lse.detach().masked_fill(empty, -INF), *found]


def ours(case: Case) -> list[Tensor]:
    inputs = case[:5]
    output, lse = attend.attend_forward(*inputs)
    assert output.dtype == case.value.dtype
    assert lse.dtype == torch.float32
    needs = (True, True, True, case.bias is not None)
    found = attend.attend_backward(case.grad_output, case.grad_mass, *inputs, output, lse, needs)
    present = [g for g in found if g is not None]
    assert len(present) == sum(needs)
    for gradient, leaf in zip(present, inputs, strict=False):
        assert leaf is not None
        assert (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape)
    return [output, lse, *present]


NAMES = ["output", "log_mass", "query", "key", "value", "bias"]


def assert_close(case: Case, limit: float = 3e-6) -> None:
    """Absolute error at most `limit` times the largest entry (or 1) of the exact answer in float64."""
    for name, fast, exact in zip(NAMES, ours(case), dense(case, torch.float64), strict=False):
        assert torch.equal(fast == -INF, exact == -INF), name
        fast, exact = fast.double().nan_to_num(nan=INF, neginf=0.0), exact.nan_to_num(neginf=0.0)
        if exact.numel():
            error = (fast - exact).abs().max() / exact.abs().max().clamp_min(1.0)
            assert error <= limit, f"{name} is off by {error:.2e}"


def assert_no_worse(case: Case, factor: float = 2.0) -> None:
    """Errors at most `factor` times those of plain torch in the same dtype."""
    exact, plain = dense(case, torch.float64), dense(case, case.value.dtype)
    for name, fast, other, best in zip(NAMES, ours(case), plain, exact, strict=False):
        hidden = best == -INF  # the log mass of a row that sees no key
        assert torch.equal(fast == -INF, hidden), name
        fast_error, plain_error = ((t.double() - best).masked_fill(hidden, 0.0).abs().max() for t in (fast, other))
        best = best.masked_fill(hidden, 0.0)
        limit = factor * plain_error + 1e-5 * best.abs().max()
        assert fast_error <= limit, f"{name} is off by {fast_error:.2e}, plain torch by {plain_error:.2e}"


# -- small shapes, in the interpreter or on a GPU --------------------------------------------------------------------


@pytest.mark.parametrize("masked", [None, "keys", "pairs"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 65), (63, 1), (65, 63), (5, 130), (130, 5)])
def test_results_and_gradients(queries: int, keys: int, masked: str | None) -> None:
    assert_close(make(queries, keys, masked=masked, groups=(1, 2) if masked is None else (2, 1)))


@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (3, 20), (20, 3), (33, 64), (80, 16), (130, 256)])
def test_head_dims_need_not_be_powers_of_two(dim: int, value_dim: int) -> None:
    assert_close(make(9, 18, dim, value_dim, groups=(1, 1), masked="pairs"))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("queries", "keys"), [(17, 140), (140, 17)])
def test_half_precision_is_no_worse_than_plain_torch(queries: int, keys: int, dtype: torch.dtype) -> None:
    assert_no_worse(make(queries, keys, 32, 32, groups=(2, 1), dtype=dtype, masked="keys"))


def test_results_are_rounded_once() -> None:
    """The output in bfloat16 is the nearest to that in float32: only weights are rounded before."""
    case = make(5, 2, dtype=torch.bfloat16, bias=False)
    case = case._replace(query=torch.zeros_like(case.query))  # both weights are exactly 1/2
    assert torch.equal(ours(case)[0], case.value.float().mean(-2, keepdim=True).bfloat16().expand_as(case.grad_output))


def test_triton_attend_without_bias() -> None:
    assert_close(make(70, 7, bias=False))


@pytest.mark.parametrize(("queries", "keys"), [(5, 150), (150, 5)])
def test_nothing_visible_gives_zeros_and_zero_gradients(queries: int, keys: int) -> None:
    output, lse, *gradients = ours(make(queries, keys, masked="all"))
    assert not output.any()
    assert (lse == -INF).all()
    assert not any(g.any() for g in gradients)


def test_a_bias_of_minus_infinity_hides_a_key() -> None:
    case = make(6, 150)
    assert case.bias is not None
    case.bias[:, :, 10:140] = -INF
    case.bias[0, 1] = -INF  # a head that sees nothing at all
    assert_close(case)


def test_gradients_of_rows_that_see_nothing() -> None:
    """`lse` is -inf there, and what comes back through it is often NaN."""
    case = make(6, 9, masked="pairs")
    assert case.visible is not None
    empty = ~case.visible.any(-1)
    case.grad_mass[empty] = float("nan")
    assert all(g.isfinite().all() for g in ours(case)[2:])


@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_huge_logits(scale: float) -> None:
    """Rounding of a logit is relative to its size, and becomes a relative error of a weight."""
    assert_close(make(20, 90, groups=(1, 1), scale=scale), limit=2e-7 * scale * 10)


def test_large_inputs_stay_finite_in_half_precision() -> None:
    for dtype in HALF:
        case = make(20, 90, dtype=dtype, bias=False)
        case = case._replace(query=case.query * 100, key=case.key * 100)
        assert all(t.isfinite().all() for t in ours(case)), dtype


@pytest.mark.parametrize("needed", range(4))
def test_each_gradient_alone(needed: int) -> None:
    case = make(20, 18, masked="keys")
    every = ours(case)
    needs = tuple(i == needed for i in range(4))
    found = attend.attend_backward(case.grad_output, case.grad_mass, *case[:5], *every[:2], needs)  # type: ignore[arg-type]
    assert [g is not None for g in found] == list(needs)
    assert torch.equal(found[needed], every[2 + needed])  # type: ignore[arg-type]


def test_no_gradient_of_the_mass_is_one_of_zeros() -> None:
    case = make(20, 18)
    case = case._replace(grad_mass=torch.zeros_like(case.grad_mass))
    results = ours(case)
    found = attend.attend_backward(case.grad_output, None, *case[:5], *results[:2], (True,) * 4)
    assert all(torch.equal(a, b) for a, b in zip(found, results[2:], strict=True))  # type: ignore[arg-type]


def strided(t: Tensor) -> Tensor:
    """The same numbers in a larger tensor with dimensions in another order."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), float("nan") if t.is_floating_point() else True)
    wide = wide.to(t.device, t.dtype).transpose(0, 2).contiguous().transpose(0, 2)
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]


@pytest.mark.parametrize("masked", ["keys", "pairs"])
def test_strides_change_nothing(masked: str) -> None:
    case = make(20, 70, 12, 20, groups=(2, 1), masked=masked)
    moved = Case(*[None if t is None else strided(t) for t in case])
    for same, other in zip(ours(case), ours(moved), strict=True):  # a mask written out takes other blocks
        torch.testing.assert_close(same, other, rtol=1e-5, atol=1e-5)
    names = ("query", "key", "value", "grad_output")
    swapped = {name: getattr(case, name).transpose(-1, -2).contiguous().transpose(-1, -2) for name in names}
    swapped = case._replace(**swapped)
    assert all(torch.equal(a, b) for a, b in zip(ours(case), ours(swapped), strict=True))


def test_expanded_inputs_are_not_confused() -> None:
    """Slots are shared by the batch, masks by the heads: strides of 0."""
    case = make(20, 70)
    shared = case._replace(query=case.query[:1].expand_as(case.query), bias=case.bias[:, :1].expand_as(case.bias))  # type: ignore[index]
    copied = shared._replace(query=shared.query.contiguous(), bias=shared.bias.contiguous())  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(ours(shared), ours(copied), strict=True))
    assert_close(shared)


def test_mixed_dtypes() -> None:
    """Float32 slots and half-precision tokens: products are those of float32."""
    case = make(20, 70)
    case = case._replace(key=case.key.bfloat16(), value=case.value.bfloat16(), grad_output=case.grad_output.bfloat16())
    assert_close(case, limit=2e-2)
    torch.testing.assert_close(ours(case)[1].double(), dense(case, torch.float64)[1], rtol=1e-6, atol=1e-5)
    assert_close(case._replace(value=case.value.float(), grad_output=case.grad_output.float()), limit=5e-3)


def test_repeated_runs_agree_bit_for_bit() -> None:
    case = make(5, 150, groups=(1, 1))
    assert all(torch.equal(a, b) for a, b in zip(ours(case), ours(case), strict=True))


@pytest.mark.parametrize(("groups", "queries", "keys"), [((0, 2), 3, 3), ((1, 2), 0, 3), ((1, 2), 3, 0)])
def test_triton_attend_without_queries_or_keys(groups: tuple[int, int], queries: int, keys: int) -> None:
    output, lse, *gradients = ours(make(queries, keys, groups=groups))
    assert not output.any()
    assert (lse == -INF).all() or keys
    assert not any(g.any() for g in gradients)


def test_parts_cover_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of parts, the same answer: it is a matter of speed."""
    case = make(5, 300, groups=(1, 1))
    whole = dense(case, torch.float64)
    for programs in (1, 2, 3, 100):
        monkeypatch.setattr(_common, "ENOUGH_PROGRAMS", programs)
        for fast, exact in zip(ours(case), whole, strict=True):
            torch.testing.assert_close(fast.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_long_side_is_cut() -> None:
    """Few slots and one head must not leave a GPU idle."""
    with _common.recording() as launches:
        query, key = torch.empty(1, 1, 256, 64, device="meta"), torch.empty(1, 1, 65536, 64, device="meta")
        output, lse = attend.attend_forward(query, key, key, None, None)
        needs = (True, True, True, False)
        attend.attend_backward(output, lse, query, key, key, None, None, output, lse, needs)
    names = [launch.kernel.fn.__name__ for launch in launches]
    assert names == ["forward", "merge", "row_sums", "of_queries", "of_keys"]
    assert all(launch.programs >= 8 for launch in launches)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(2, 2, 20, 16, dtype=torch.float64)}, UnsupportedError, "float64"),
        ({"key": torch.zeros(2, 2, 33, 8)}, InputError, "key must have shape"),
        ({"bias": torch.zeros(2, 2, 1)}, InputError, "bias must have shape"),
        ({"visible": torch.ones(2, 2, 20, 33)}, InputError, "bool"),
        ({"visible": torch.ones(2, 1, 20, 33, dtype=torch.bool)}, InputError, "expand"),
    ],
)
def test_what_cannot_be_computed_is_refused(change: dict[str, Tensor], error: type, message: str) -> None:
    case = make()._replace(**{name: tensor.to(DEVICE) for name, tensor in change.items()})
    with pytest.raises(error, match=message):
        attend.attend_forward(*case[:5])


def test_wide_heads_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="1 to 256; got 257"):
        attend.attend_forward(*make(4, 4, 257)[:5])


# -- realistic shapes, on a GPU --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [None, "keys", "pairs"])
@pytest.mark.parametrize("dim", [64, 80, 256])  # 128 and float16: `scripts/gpu_check.py`
@pytest.mark.parametrize(("queries", "keys"), [(256, 16384), (16384, 256), (1000, 1001), (63, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_realistic_shapes(dtype: torch.dtype, queries: int, keys: int, dim: int, masked: str | None) -> None:
    case = make(queries, keys, dim, dim, groups=(2, 3), dtype=dtype, masked=masked)
    if dtype == torch.float32:
        assert_close(case, limit=2e-5)
    else:
        assert_no_worse(case)
    assert all(torch.equal(a, b) for a, b in zip(ours(case), ours(case), strict=True))


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """A tensor of more than 2**31 entries: the last rows are read from where they are."""
    base = torch.zeros(5, 1, 2**23, 64, dtype=torch.bfloat16, device="cuda")
    key = base[:, :, ::4096]
    key.copy_(torch.randn(key.shape, device="cuda"))
    query = torch.randn(5, 1, 16, 64, device="cuda").bfloat16() / 8
    output, lse = attend.attend_forward(query, key, key, None, None)
    expected = attend.attend_forward(query, key.contiguous(), key.contiguous(), None, None)
    assert torch.equal(output, expected[0])
    assert torch.equal(lse, expected[1])
