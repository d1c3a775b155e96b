"""Windows and slots of short inputs: against one dense softmax in float64, with gradients.

Float32 goes both roads: C and torch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import INF, assert_same, differentiated, logsumexp, random, softmax
from torch import Tensor

from hf_linattn.kernels.backends import use_backend
from hf_linattn.kernels.short_slots import inputs as parts
from hf_linattn.kernels.short_slots import reading, short_slot_attention
from hf_linattn.kernels.short_slots.inputs import ShortInputs, ShortOptions

BATCH, HEADS, SLOTS, DIM = 3, 2, 5, 4


def case(
    tokens: int = 20, *, scale: float = 1.0, others: bool = False, own_slots: bool = False, hidden: int = 0
) -> list[Tensor | None]:
    """The last `hidden` keys of the first row are hidden."""
    rows = BATCH if own_slots else 1
    shape = (BATCH, tokens, HEADS)
    bias = random(*shape, seed=6, scale=scale)
    if hidden:
        bias[0, -hidden:] = -INF
    return [
        random(*shape, DIM, seed=0, scale=scale**0.5),
        random(*shape, DIM, seed=1),
        random(*shape, 3, seed=2),
        random(*shape, DIM + 1, seed=3) if others else None,
        random(*shape, DIM + 1, seed=4) if others else None,
        random(*shape, seed=5, scale=scale),
        bias,
        random(rows, HEADS, SLOTS, DIM + others, seed=7),
        random(rows, HEADS, SLOTS, seed=8),
        random(rows, HEADS, SLOTS, DIM + others, seed=9),
        random(rows, HEADS, SLOTS, seed=10),
    ]


def dense(options: ShortOptions, *given: Any) -> tuple[Tensor, Tensor]:
    """One softmax over all keys: exact logits in the window, logs of sums over slots elsewhere."""
    *tokens, query_slots, query_slot_bias, key_slots, key_slot_bias = given
    query, key, value, query_tokens, key_tokens, query_bias, key_bias = (
        None if z is None else z.transpose(1, 2) for z in tokens
    )
    query, key, query_tokens, key_tokens = (
        None if z is None else z * options.root for z in (query, key, query_tokens, key_tokens)
    )

    def logits_of(x: Tensor, slots: Tensor, slot_bias: Any, bias: Any, norm: float, *, spreads: bool) -> Tensor:
        logits = x @ slots.mT if slot_bias is None else x @ slots.mT + slot_bias.unsqueeze(-2)
        logits = logits - logsumexp(logits).unsqueeze(-1) if spreads else logits
        logits = logits - norm * x.square().sum(-1, keepdim=True) / 2
        return logits if bias is None else logits + bias.unsqueeze(-1)

    x, y = query if query_tokens is None else query_tokens, key if key_tokens is None else key_tokens
    reading = logits_of(x, query_slots, query_slot_bias, query_bias, options.query_norm, spreads=False) + options.shift
    writing = logits_of(y, key_slots, key_slot_bias, key_bias, options.key_norm, spreads=options.spreads)

    def through(reading: Tensor, writing: Tensor) -> Tensor:
        return logsumexp(reading.unsqueeze(-2) + writing.unsqueeze(-3))

    far, exact = through(reading, writing), query @ key.mT
    if options.probes:
        probes = list(options.probes)
        found = far if key_slot_bias is None else through(reading, writing - key_slot_bias.unsqueeze(-2))
        shift = (logsumexp(exact[:, :, probes]) - logsumexp(found[:, :, probes])).mean(-1).detach()
        far = far + shift[..., None, None]
    window = torch.arange(query.shape[2]) // options.places
    if options.grid:
        height, width, side = options.grid
        window = (torch.arange(height)[:, None] // side * width + torch.arange(width) // side).flatten()
    logits = torch.where(window[:, None] == window, exact, far)
    if key_bias is not None:
        logits = logits.masked_fill((key_bias == -INF).unsqueeze(-2), -INF)
    return (softmax(logits) @ value).transpose(1, 2), logsumexp(logits).transpose(1, 2)


def ours(places: int, *given: Any, has_hidden: bool) -> tuple[Tensor, Tensor]:
    return short_slot_attention(ShortInputs(*given), ShortOptions(places, has_hidden=has_hidden))


def check(
    given: list[Tensor | None], options: ShortOptions | int, dtype: torch.dtype, limit: float, *, hides: bool = False
) -> None:
    options = ShortOptions(options, has_hidden=hides) if isinstance(options, int) else options
    expected = differentiated(lambda *z: dense(options, *z), given)
    for backend in ["torch", *(["auto"] if dtype == torch.float32 else [])]:
        with use_backend(backend):
            found = differentiated(lambda *z: short_slot_attention(ShortInputs(*z), options), given, dtype)
        assert_same(found, expected, limit)


LIMITS = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("others", [False, True], ids=["same tokens", "other tokens"])
@pytest.mark.parametrize("own_slots", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize(("tokens", "hidden"), [(20, 0), (19, 0), (18, 7), (20, 20)], ids=str)
def test_results_and_gradients(tokens: int, hidden: int, own_slots: bool, others: bool, dtype: torch.dtype) -> None:
    """Whole windows and a part of one, a row that fits in some of its windows, and one without any key."""
    given = case(tokens, others=others, own_slots=own_slots, hidden=hidden)
    check(given, 5, dtype, LIMITS[dtype], hides=bool(hidden))


@pytest.mark.parametrize("own_slots", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("others", [False, True], ids=["same tokens", "other tokens"])
@pytest.mark.parametrize("tokens", [20, 18])
@pytest.mark.parametrize("scale", [1.0, 3000.0])
@pytest.mark.parametrize(
    "options",
    [
        ShortOptions(5, root=0.6),
        ShortOptions(5, query_norm=1.0, shift=-0.7),
        ShortOptions(5, (), 0.6, 0.5, 1.0, 0.3),
        ShortOptions(5, (), 0.6, spreads=True),
        ShortOptions(5, (), 0.6, 1.0, 1.0, -0.7, spreads=True),
        ShortOptions(5, (), 0.6, 1.0, 1.0, -0.7, probes=(0, 3, 11)),
        ShortOptions(5, probes=tuple(range(18))),
    ],
    ids=str,
)
def test_options(options: ShortOptions, tokens: int, others: bool, own_slots: bool, scale: float) -> None:
    """Scaled tokens, half norms, weights that add up to one and a corrected mass; also where float64 has to help."""
    given = case(tokens, others=others, own_slots=own_slots, scale=scale)
    check(given, options, torch.float64, 1e-12 * scale)
    for absent in (5, 6, 8, 10):
        given[absent] = None
    check(given, options, torch.float64, 1e-12 * scale)
    if scale == 1.0:
        check(given, options, torch.float32, 2e-5)


@pytest.mark.parametrize("own_slots", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("grid", [(4, 6, 2), (5, 4, 2), (4, 5, 2), (5, 7, 3), (2, 9, 4), (3, 3, 2)], ids=str)
def test_images(grid: tuple[int, int, int], own_slots: bool) -> None:
    """Windows are squares, at the edges parts of squares."""
    given = case(grid[0] * grid[1], own_slots=own_slots, hidden=2)
    for dtype, limit in LIMITS.items():
        check(given, ShortOptions(grid[2] ** 2, grid, has_hidden=True), dtype, limit)
    for absent in (5, 6, 8, 10):
        given[absent] = None
    check(given, ShortOptions(grid[2] ** 2, grid, query_norm=1.0, key_norm=1.0), torch.float64, 1e-12)


@pytest.mark.parametrize("scale", [30.0, 300.0, 3000.0])
@pytest.mark.parametrize("hidden", [0, 7])
def test_large_logits(scale: float, hidden: int) -> None:
    """What one window's keys make underflow beside them, and what rounding takes from large sums, is all there."""
    given = [None if z is None else z.float().double() for z in case(scale=scale, hidden=hidden)]
    check(given, 5, torch.float32, 3e-7 * scale, hides=bool(hidden))


@pytest.mark.parametrize("hidden", [0, 7])
def test_a_key_that_dwarfs_the_others(hidden: int) -> None:
    """Others are read through slots although one key of the window weighs e^200 times as much in every slot."""
    given = case(hidden=hidden)
    assert given[6] is not None
    given[6][:, 2] += 200.0
    given[0][:, 2] = 0.0  # its own window sees it with an ordinary logit
    check(given, 5, torch.float32, 1e-4, hides=bool(hidden))


def test_parts_that_are_large_and_cancel() -> None:
    """The sum of a query's and a slot's logit is rounded by 1e-3 in float32, and the parts not at all."""
    given = [None if z is None else z.float().double() for z in case()]
    assert given[5] is not None
    assert given[6] is not None
    given[5], given[6] = given[5].mul(2**9).round() / 2**9 - 2**13, given[6].mul(2**9).round() / 2**9 + 2**13
    options = ShortOptions(5)
    found, _ = short_slot_attention(ShortInputs(*(z if z is None else z.float() for z in given)), options)
    assert_same([found], [dense(options, *given)[0]], 1e-6)


@pytest.mark.parametrize("own_slots", [False, True])
@pytest.mark.parametrize("budget", [1, 2000, 6000])
def test_tiles_change_nothing(budget: int, own_slots: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(18, hidden=7, own_slots=own_slots)
    whole = differentiated(lambda *z: ours(5, *z, has_hidden=True), given)
    monkeypatch.setattr(parts, "_TILE", budget)
    inputs = ShortInputs(*given)  # type: ignore[arg-type]
    assert len(list(parts.tiles(inputs, ShortOptions(5)))) > 1
    assert_same(differentiated(lambda *z: ours(5, *z, has_hidden=True), given), whole, 1e-12)


@pytest.mark.parametrize("hidden", [0, 7])
def test_gradcheck(hidden: int) -> None:
    given = [None if z is None else z.requires_grad_() for z in case(13, hidden=hidden)]
    assert torch.autograd.gradcheck(lambda *z: ours(5, *z, has_hidden=bool(hidden))[0], given)


@given(st.lists(st.booleans(), min_size=17, max_size=17), st.integers(2, 9))
def test_any_hidden_keys(seen: list[bool], places: int) -> None:
    given = case(17)
    assert given[6] is not None
    given[6][0].masked_fill_(~torch.tensor(seen)[:, None], -INF)
    check(given, places, torch.float64, 1e-12, hides=True)


def test_the_slow_road_is_taken_where_it_has_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.dtype] = []
    own = reading._own_references

    def spy(log_features: Tensor, *rest: Any) -> Any:
        taken.append(log_features.dtype)
        return own(log_features, *rest)

    monkeypatch.setattr(reading, "_own_references", spy)
    for scale, expected in ((1.0, []), (3000.0, [torch.float64])):
        taken.clear()
        ours(5, *[None if z is None else z.float() for z in case(scale=scale)], has_hidden=False)
        assert taken == expected


def test_a_log_sum_exp_that_is_not_asked_for_is_nan() -> None:
    state = short_slot_attention(ShortInputs(*case()), ShortOptions(5, with_lse=False))  # type: ignore[arg-type]
    assert state.lse.isnan().all()
    assert not state.output.isnan().any()
