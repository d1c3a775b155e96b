"""Rows that fit into one window, in every attention function: softmax attention, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hf_linattn.errors import LinAttnError
from hf_linattn.functional import eva_attention, favor_attention, lara_attention
from hf_linattn.ops.ablation import SLOT_SHARE, ablate
from hf_linattn.ops.eva.learned import LearnedSummariser, learned_eva_attention
from hf_linattn.ops.exact import exact_softmax, in_one_window, with_exact_rows
from hf_linattn.ops.lara.proposals import CalibratedProposals
from hf_linattn.ops.learned import LearnedFeatureMap, learned_attention
from hf_linattn.ops.softmax import softmax_attention

BATCH, HEADS, TOKENS, DIM = 3, 2, 12, 8
SCALING = 0.3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def rand(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [rand(BATCH, HEADS, tokens, DIM, seed=seed, dtype=dtype) for seed in (1, 2, 3)]


def _maps() -> LearnedFeatureMap:
    lead, dims = rand(HEADS, 4, DIM), rand(HEADS, DIM)
    return LearnedFeatureMap(lead, lead, dims, dims, rand(HEADS, 4), rand(HEADS), dims)


def _summariser() -> LearnedSummariser:
    dims, square = rand(HEADS, DIM), rand(HEADS, DIM, DIM)
    return LearnedSummariser(dims, dims, square, square, rand(HEADS), dims, dims)


def _lara(*tokens: Tensor, is_causal: bool, **options: Any) -> Tensor:
    samples = rand(HEADS, 4, DIM)
    proposals = CalibratedProposals(samples, samples) if is_causal else None
    return lara_attention(*tokens, num_landmarks=4, proposals=proposals, is_causal=is_causal, **options)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "favor": lambda *tokens, **options: favor_attention(*tokens, rand(HEADS, 4, DIM), **options),
    "learned": lambda *tokens, **options: learned_attention(*tokens, _maps(), **options),
    "lara": _lara,
    "eva": lambda *tokens, **options: eva_attention(*tokens, num_chunks=4, proposals="key", **options),
    "learned_eva": lambda *tokens, **options: learned_eva_attention(*tokens, _summariser(), num_chunks=4, **options),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "window": {"window_size": TOKENS},
    "larger window": {"window_size": 2 * TOKENS, "overlap_window": True},
    "global tokens": {"window_size": 10, "num_global_tokens": 2},
    "grid": {"window_size": 4, "grid": (4, 3)},
    "causal": {"window_size": TOKENS, "is_causal": True},
    "causal overlap": {"window_size": TOKENS // 2, "overlap_window": True, "is_causal": True},
}
every = pytest.mark.parametrize("layout", LAYOUTS)
function = pytest.mark.parametrize("name", FUNCTIONS)


def options_of(layout: str) -> dict[str, Any]:
    return {"is_causal": False, "scaling": SCALING, **LAYOUTS[layout]}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@every
@function
def test_a_row_in_one_window_is_softmax_to_the_last_bit(name: str, layout: str, dtype: torch.dtype) -> None:
    options, parts = options_of(layout), inputs(dtype=dtype)
    found, expected = ([z.clone().requires_grad_() for z in parts] for _ in range(2))
    output = FUNCTIONS[name](*found, **options)
    softmax = F.scaled_dot_product_attention(*expected, is_causal=options["is_causal"], scale=SCALING)
    weight = rand(*output.shape, seed=9, dtype=dtype)
    torch.testing.assert_close(output, softmax, rtol=0, atol=0)
    gradients = [torch.autograd.grad(z, leaves, weight) for z, leaves in ((output, found), (softmax, expected))]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@every
@function
def test_one_token_more_is_an_estimate(name: str, layout: str) -> None:
    """The border: with a window of one token less (a global token less, a row of patches more) slots are read."""
    options, tokens = options_of(layout), TOKENS
    if "grid" in options:
        options["grid"], tokens = (5, 3), 15
    elif "num_global_tokens" in options:
        options["num_global_tokens"] = 1
    elif layout == "larger window":
        options["window_size"] = TOKENS - 2  # an even number
    else:
        options["window_size"] -= 1
    if options.get("overlap_window") and options["window_size"] % 2:
        options["window_size"] -= 1
    parts = inputs(tokens)
    assert not in_one_window(*parts[:2], None, **{k: v for k, v in options.items() if k != "scaling"})
    softmax = softmax_attention(*parts, scaling=SCALING, is_causal=options["is_causal"])
    assert (FUNCTIONS[name](*parts, **options) - softmax).abs().max() > 1e-3


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "grid"])
@function
@settings(max_examples=examples(10))
@given(bits=st.lists(st.booleans(), min_size=BATCH * TOKENS, max_size=BATCH * TOKENS), empty=st.booleans())
def test_padding_does_not_count(name: str, layout: str, bits: list[bool], empty: bool) -> None:
    """Wherever it is and whatever stands there; a row of padding alone gives 0, and its gradient is 0."""
    mask = torch.tensor(bits).view(BATCH, TOKENS)
    mask[0] &= not empty
    options, bad = options_of(layout), torch.tensor([float("nan"), float("inf")])[torch.arange(TOKENS) % 2, None]
    parts = [torch.where(mask[:, None, :, None], z, bad).double().requires_grad_() for z in inputs()]
    output = FUNCTIONS[name](*parts, key_mask=mask, **options)
    weight = rand(*output.shape, seed=9, dtype=torch.float64)
    gradients = torch.autograd.grad(output, parts, weight)
    with torch.no_grad():  # less is done then
        torch.testing.assert_close(FUNCTIONS[name](*parts, key_mask=mask, **options), output, rtol=0, atol=0)
    for row, real in enumerate(mask):
        alone = [z[row : row + 1, :, real].detach().requires_grad_() for z in parts]
        for z in (output, *gradients):
            assert not z[row, :, ~real].any()
        if not real.any():
            continue
        softmax = F.scaled_dot_product_attention(*alone, is_causal=options["is_causal"], scale=SCALING)
        expected = torch.autograd.grad(softmax, alone, weight[row : row + 1, :, real])
        for ours, theirs in zip((output, *gradients), (softmax, *expected), strict=True):
            torch.testing.assert_close(ours[row : row + 1, :, real], theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("masked", [False, True])
@function
def test_fewer_queries_than_keys_are_the_last(name: str, queries: int, masked: bool) -> None:
    query, key, value = (z.double() for z in inputs())
    mask = torch.arange(TOKENS) >= torch.tensor([0, 3, 9])[:, None] if masked else None
    options = {**options_of("causal"), "key_mask": mask}
    whole = FUNCTIONS[name](query, key, value, **options)
    last = FUNCTIONS[name](query[:, :, -queries:], key, value, **options)
    torch.testing.assert_close(last, whole[:, :, -queries:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
def test_rows_whose_tokens_come_first(is_causal: bool) -> None:
    """The shorter way for rows that have been sorted out already gives real tokens the same."""
    mask = torch.arange(TOKENS) < torch.tensor([12, 7, 3])[:, None]
    parts = [z.double().masked_fill(~mask[:, None, :, None], 0.0).requires_grad_() for z in inputs()]
    real, weight = mask[:, None, :, None], rand(BATCH, HEADS, TOKENS, DIM, seed=9, dtype=torch.float64)
    for exact_below in (TOKENS, 7, 5):

        def attention(real_first: bool, exact_below: int = exact_below) -> Tensor:
            if exact_below == TOKENS:
                return exact_softmax(*parts, mask, scaling=SCALING, is_causal=is_causal, real_first=real_first)
            options = {"exact_below": exact_below, "is_causal": is_causal, "real_first": real_first}
            return with_exact_rows(parts[0].square(), *parts, mask, scaling=SCALING, **options)  # type: ignore[arg-type]

        outputs = [attention(real_first) * real for real_first in (False, True)]
        gradients = [torch.autograd.grad(output, parts, weight) for output in outputs]
        for slow, fast in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
            torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)


def test_refusals_stay_what_they_are() -> None:
    """Short inputs are no reason to take what long ones may not."""
    parts, short = inputs(), inputs(5)
    for name, options in {
        "grid must fit": {"grid": (4, 4), "window_size": 4},
        "mask over a 2-D grid": {"grid": (4, 3), "window_size": 4, "key_mask": torch.rand(BATCH, TOKENS) < 0.5},
        "global tokens": {"num_global_tokens": 1, "window_size": TOKENS, "is_causal": True},
        "cross-attention": {"window_size": TOKENS},
        "scaling": {"window_size": TOKENS, "scaling": float("nan")},
        "window_size": {"window_size": -1},
    }.items():
        tokens = [short[0], *parts[1:]] if name == "cross-attention" else parts
        with pytest.raises(LinAttnError):
            FUNCTIONS["favor"](*tokens, **options)


def test_the_published_chunks_and_biases_are_not_softmax() -> None:
    parts = inputs()
    exact = exact_softmax(*parts, scaling=SCALING)
    for options in ({"chunking": "published"}, {"window_bias": rand(HEADS, TOKENS, TOKENS)}):
        output = eva_attention(*parts, window_size=TOKENS, num_chunks=4, scaling=SCALING, **options)  # type: ignore[arg-type]
        assert (output - exact).abs().max() > 1e-3


def test_ablations_reach_short_rows() -> None:
    parts = inputs()
    with ablate(SLOT_SHARE) as asked:
        assert not FUNCTIONS["favor"](*parts, window_size=TOKENS).any()
    assert asked.was_followed


def test_mixed_dtypes_and_autocast() -> None:
    """Computed in the widest of the three, given in that of the query; autocast has no say."""
    query, key, value = inputs()
    found = exact_softmax(query.bfloat16(), key, value, scaling=SCALING)
    assert found.dtype == torch.bfloat16
    expected = exact_softmax(query.bfloat16().float(), key, value, scaling=SCALING)
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = exact_softmax(query, key, value, scaling=SCALING)
    torch.testing.assert_close(inside, exact_softmax(query, key, value, scaling=SCALING), rtol=0, atol=0)


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@settings(max_examples=examples(40))
@given(data=st.data())
def test_exact_rows_against_one_row_at_a_time(is_causal: bool, data: Any) -> None:
    """`with_exact_rows`: which rows, or queries, are softmax, and that the others are left alone."""
    exact_below = data.draw(st.integers(1, TOKENS - 1))
    queries = data.draw(st.integers(1, TOKENS)) if is_causal else TOKENS
    bits = data.draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=24, max_size=24)))
    mask = None if bits is None else torch.tensor(bits).view(2, TOKENS)
    query, key, value = (z[:2].double() for z in inputs())
    query = query[:, :, TOKENS - queries :]
    if mask is not None:
        key, value = (z.masked_fill(~mask[:, None, :, None], float("nan")) for z in (key, value))
    estimate = torch.full_like(query, 7.0)
    found = with_exact_rows(
        estimate, query, key, value, mask, scaling=SCALING, exact_below=exact_below, is_causal=is_causal
    )
    for row in range(2):
        real = torch.ones(TOKENS, dtype=torch.bool) if mask is None else mask[row]
        for number in range(queries):
            place = TOKENS - queries + number
            before = int(real[:place].sum())
            is_exact = before < exact_below if is_causal else int(real.sum()) <= exact_below
            if not (is_exact and real[place]):
                assert (found[row, :, number] == 7).all()
                continue
            seen = real & (torch.arange(TOKENS) <= place) if is_causal else real
            logits = SCALING * (key[row][:, seen] @ query[row, :, number, :, None]).squeeze(-1)
            expected = (logits.softmax(-1).unsqueeze(-2) @ value[row][:, seen]).squeeze(-2)
            torch.testing.assert_close(found[row, :, number], expected, rtol=0, atol=1e-12)
