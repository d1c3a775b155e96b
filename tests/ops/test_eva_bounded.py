"""Causal EVA with a bounded number of chunk summaries: the latest singly, one for everything older."""

from __future__ import annotations

import math
from typing import Any

import naive
import pytest
import torch
from helpers import assert_same, examples, inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_linattn.errors import ConfigError, InputError, UnsupportedError
from hf_linattn.functional import eva_attention
from hf_linattn.modules.base import LayerShape
from hf_linattn.modules.defaults import resolve
from hf_linattn.modules.kinds.eva import EvaAttention, EvaConfig
from hf_linattn.ops.eva.bounded import latest_chunks
from hf_linattn.ops.eva.chunks import Summaries

quick = settings(max_examples=examples(60), derandomize=True, database=None)
Part = tuple[Tensor, Tensor, Tensor, float]  # mean key, value, spread, log-weight


def merged(first: Part, second: Part) -> Part:
    """Two summaries as one, by their weights."""
    total = math.log(math.exp(first[3]) + math.exp(second[3]))
    a, b = math.exp(first[3] - total), math.exp(second[3] - total)
    spread = a * first[2] + b * second[2] + a * b * (first[0] - second[0]) ** 2
    return a * first[0] + b * second[0], a * first[1] + b * second[1], spread, total


def reference(
    x: Tensor,
    y: Tensor,
    v: Tensor,
    window: int,
    chunk: int,
    max_chunks: int,
    overlap: bool = False,
    proposals: str = "key",
    weighting: str = "size",
    noise: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Token by token; older chunks are merged two at a time. `bias` `[window, slots]`."""
    out = []
    for t in range(len(x)):
        start = t // window * window
        first = max(0, start - window) if overlap else start
        parts: list[Part] = []
        for begin in range(0, first, chunk):
            keys, members = y[begin : begin + chunk], slice(begin, begin + chunk)
            mean = keys.mean(0)
            both = x[members].mean(0) + mean
            mu = {"sum": both, "mean": both / 2, "key": mean, "none": 0 * mean}[proposals]
            mu = mu if noise is None else mu + noise[begin // chunk]
            value = torch.softmax(naive.log_xi(keys, mu), 0) @ v[members]
            spread = ((keys - mean) ** 2).mean(0) * (weighting == "spread")
            parts.append((mean, value, spread, 0.0 if weighting == "none" else math.log(chunk)))
        while len(parts) > max_chunks + 1:
            parts = [merged(parts[0], parts[1]), *parts[2:]]
        if weighting != "spread":
            parts = [(mean, value, 0 * spread, weight) for mean, value, spread, weight in parts]
        logits = [x[t] @ mean + weight + x[t] ** 2 @ spread / 2 for mean, _, spread, weight in parts]
        values = [value for _, value, _, _ in parts]
        for s in range(first, t + 1):
            reach = 0 if bias is None else bias.shape[1] - window
            logits.append(x[t] @ y[s] + (0.0 if bias is None else bias[t - start, s - start + reach]))
            values.append(v[s])
        out.append(torch.softmax(torch.stack(logits), 0) @ torch.stack(values))
    return torch.stack(out)


@quick
@given(
    tokens=st.integers(1, 50),
    window_chunk=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4), (6, 2), (6, 3), (8, 2)]),
    max_chunks=st.integers(1, 9),
    overlap=st.booleans(),
    proposals=st.sampled_from(["sum", "mean", "key", "none"]),
    weighting=st.sampled_from(["none", "size", "spread"]),
    is_noisy=st.booleans(),
    is_biased=st.booleans(),
    lengths=st.none() | st.tuples(st.integers(0, 50), st.integers(0, 50)),
    seed=st.integers(0, 99),
)
def test_against_a_reference(
    tokens: int,
    window_chunk: tuple[int, int],
    max_chunks: int,
    overlap: bool,
    proposals: str,
    weighting: str,
    is_noisy: bool,
    is_biased: bool,
    lengths: tuple[int, int] | None,
    seed: int,
) -> None:
    (q, k, v), (window, chunk) = inputs(tokens), window_chunk
    generator = torch.Generator().manual_seed(seed)
    mask = None
    if lengths is not None:  # as many real tokens, anywhere
        order = torch.rand(2, tokens, generator=generator).argsort(-1)
        mask = order < torch.tensor(lengths)[:, None]
    options: dict[str, Any] = {"max_chunks": max_chunks, "proposals": proposals, "weighting": weighting}
    ours, per_head = dict(options), []
    if is_noisy:
        noise = torch.randn(2, 2, 50, 4, generator=generator, dtype=torch.float64)
        ours["noise"] = noise
        per_head.append(lambda b, h: {"noise": noise[b, h]})
    if is_biased:
        bias = torch.randn(2, window, window * (2 if overlap else 1), generator=generator, dtype=torch.float64)
        ours["window_bias"] = bias
        per_head.append(lambda b, h: {"bias": bias[h]})
    result = eva_attention(
        q, k, v, window_size=window, chunk_size=chunk, is_causal=True, key_mask=mask, overlap_window=overlap, **ours
    )
    expected = naive.per_row(
        reference, q, k, v, mask, per_head=per_head, window=window, chunk=chunk, overlap=overlap, **options
    )
    assert_same(result, expected)


@pytest.mark.parametrize("weighting", ["none", "size", "spread"])
@pytest.mark.parametrize("overlap", [False, True])
def test_enough_chunks_is_the_unbounded_form(weighting: str, overlap: bool) -> None:
    q, k, v = inputs(45)
    options = {"window_size": 6, "chunk_size": 3, "is_causal": True, "weighting": weighting, "overlap_window": overlap}
    mask = torch.rand(2, 45, generator=torch.Generator().manual_seed(0)) < 0.8
    read = 12 if overlap else 14  # by the last window, from token 42 on
    for key_mask in (None, mask):
        full = eva_attention(q, k, v, key_mask=key_mask, **options)
        for enough in (read, read + 5):
            assert torch.equal(full, eva_attention(q, k, v, key_mask=key_mask, max_chunks=enough, **options))
        # A summary of one chunk is that chunk.
        assert_same(full, eva_attention(q, k, v, key_mask=key_mask, max_chunks=read - 1, **options))
    full, fewer = (eva_attention(q, k, v, max_chunks=bound, **options) for bound in (None, read - 2))
    assert_same(fewer[:, :, :42], full[:, :, :42])
    assert float((fewer - full)[:, :, 42:].abs().amax(-1).min()) > 1e-6


@pytest.mark.parametrize("weighting", ["size", "spread"])
@pytest.mark.parametrize("overlap", [False, True])
def test_nothing_of_a_later_token_enters(weighting: str, overlap: bool) -> None:
    q, k, v = (z.requires_grad_() for z in inputs(40))
    options = {"window_size": 4, "chunk_size": 2, "is_causal": True, "max_chunks": 3, "overlap_window": overlap}
    out = eva_attention(q, k, v, weighting=weighting, proposals="sum", **options)
    for t in (0, 3, 4, 19, 30, 38):
        for grad in torch.autograd.grad(out[:, :, : t + 1].square().sum(), (q, k, v), retain_graph=True):
            assert not grad[:, :, t + 1 :].any()
    for t in (1, 5, 24, 31):
        prefix = eva_attention(*(z[:, :, :t] for z in (q, k, v)), weighting=weighting, proposals="sum", **options)
        assert_same(prefix, out[:, :, :t])
    later = [z.detach().clone() for z in (q, k, v)]
    for z in later:
        z[:, :, 33:] = float("inf")
    spoiled = eva_attention(*later, weighting=weighting, proposals="sum", **options)
    assert_same(spoiled[:, :, :32], out[:, :, :32])


@pytest.mark.parametrize("weighting", ["none", "size", "spread"])
def test_gradients_with_bounded_chunks(weighting: str) -> None:
    q, k, v = (z.requires_grad_() for z in inputs(13, dim=2, heads=1))
    generator = torch.Generator().manual_seed(3)
    bias = torch.randn(1, 2, 4, generator=generator, dtype=torch.float64).requires_grad_()
    key_map = torch.randn(1, 2, 2, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[True] * 13, [False, True, True, False] + [True] * 8 + [False]])

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, key_map: Tensor) -> Tensor:
        return eva_attention(
            q,
            k,
            v,
            window_size=2,
            chunk_size=1 if weighting == "none" else 2,
            max_chunks=2,
            is_causal=True,
            overlap_window=True,
            proposals="mean",
            weighting=weighting,
            key_mask=mask,
            window_bias=bias,
            key_map=lambda z: z @ key_map,
        )

    assert torch.autograd.gradcheck(run, (q, k, v, bias, key_map), fast_mode=True)


def test_padding_reaches_neither_values_nor_gradients() -> None:
    q, k, v = inputs(40)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :17], mask[1, ::3] = False, False
    options: dict[str, Any] = {"window_size": 4, "chunk_size": 2, "is_causal": True, "max_chunks": 3}
    for z in (q, k, v):
        z[~mask[:, None].expand(2, 2, 40)] = float("nan")
        z.requires_grad_()
    out = eva_attention(q, k, v, key_mask=mask, weighting="spread", **options)
    assert torch.isfinite(out).all()
    for grad in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert torch.isfinite(grad).all()
        assert not grad[~mask[:, None].expand(2, 2, 40)].any()
    nothing = eva_attention(q, k, v, key_mask=torch.zeros_like(mask), weighting="spread", **options)
    assert not nothing.any()


def test_slot_dropout_drops_summaries_only() -> None:
    q, k, v = (torch.zeros(1, 1, 24, 2) for _ in range(3))
    v[:, :, :20] = 1.0
    options: dict[str, Any] = {"window_size": 4, "chunk_size": 2, "is_causal": True, "max_chunks": 3}
    torch.manual_seed(0)
    out = eva_attention(q, k, v, slot_dropout=0.5, **options)[0, 0, :, 0]
    assert torch.equal(out[:4], torch.ones(4))  # the window's own keys
    assert torch.isfinite(out).all()
    plain = eva_attention(q, k, v, **options)[0, 0, :, 0]
    assert not torch.isclose(out[12:], plain[12:]).all()  # where not all chunks are read singly
    expected = 20 / torch.arange(21, 25)  # every key counts once
    torch.testing.assert_close(plain[20:], expected)


def test_uniform_attention_is_the_exact_mean() -> None:
    v = torch.randn(1, 1, 61, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    zero = torch.zeros_like(v)
    expected = v.cumsum(2) / torch.arange(1, 62)[:, None]
    for overlap in (False, True):
        options = {"window_size": 6, "chunk_size": 3, "is_causal": True, "max_chunks": 4, "overlap_window": overlap}
        assert_same(eva_attention(zero, zero, v, weighting="spread", **options), expected)


def test_half_precision_stays_close() -> None:
    q, k, v = inputs(200, dim=16)
    options: dict[str, Any] = {"window_size": 16, "chunk_size": 4, "is_causal": True, "max_chunks": 8}
    exact = eva_attention(q, k, v, weighting="spread", **options)
    for dtype, limit in ((torch.bfloat16, 0.03), (torch.float32, 1e-5)):
        out = eva_attention(q.to(dtype), k.to(dtype), v.to(dtype), weighting="spread", **options)
        assert out.dtype == dtype
        assert float((out.double() - exact).abs().max()) < limit
    large = eva_attention(*(100 * z.to(torch.bfloat16) for z in (q, k, v)), weighting="spread", **options)
    assert torch.isfinite(large).all()


def test_merging_many_chunks_loses_nothing_to_rounding() -> None:
    """7000 chunks (112k tokens of 16) far from the origin: relative to the spread, as exact as a single one."""
    generator = torch.Generator().manual_seed(0)
    mean, value = (torch.randn(1, 1, 7000, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    wide = Summaries(mean + 30, value + 5, torch.zeros(1, 1, 7000, dtype=torch.float64), torch.rand(1, 1, 7000, 3))
    narrow = Summaries(*(z.float() for z in (wide.key_mean, wide.value, wide.log_weight)), wide.spread)
    exact, ours = (latest_chunks(z, 4, 3500, 2, 0) for z in (wide, narrow))
    assert exact is not None
    assert ours is not None
    last = (wide.key_mean[:, :, :6994].var(2, correction=0) + wide.spread[:, :, :6994].mean(2)).squeeze()
    torch.testing.assert_close(exact.spread[0, 0, -1, 0], last, rtol=1e-6, atol=0)
    for name in ("key_mean", "value", "spread"):
        torch.testing.assert_close(getattr(ours, name).double(), getattr(exact, name).double(), rtol=3e-6, atol=3e-6)


def test_compiled_eva_with_bounded_chunks() -> None:
    q, k, v = (z.float() for z in inputs(50))
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1, :9] = False
    options: dict[str, Any] = {"window_size": 8, "chunk_size": 4, "max_chunks": 3, "is_causal": True}
    run = torch.compile(eva_attention, fullgraph=True, backend="eager")
    for weighting in ("size", "spread"):
        ours = run(q, k, v, key_mask=mask, weighting=weighting, **options)
        torch.testing.assert_close(ours, eva_attention(q, k, v, key_mask=mask, weighting=weighting, **options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"is_causal": True, "max_chunks": 0}, InputError, "max_chunks must be an integer >= 1, or None; got 0"),
        ({"is_causal": True, "max_chunks": -3}, InputError, "got -3"),
        ({"is_causal": True, "max_chunks": 2.0}, InputError, "got 2.0"),
        ({"is_causal": True, "max_chunks": True}, InputError, "got True"),
        ({"max_chunks": 4}, UnsupportedError, "max_chunks=4, is_causal=False"),
        ({"max_chunks": 4, "is_causal": True, "chunking": "published"}, UnsupportedError, "chunking='published'"),
    ],
)
def test_options_that_bounded_chunks_exclude(options: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = inputs(9)
    with pytest.raises(error, match=message):
        eva_attention(q, k, v, window_size=4, **options)


def test_layers_have_the_option() -> None:
    q, k, v = inputs(50)
    config = EvaConfig(window_size=8, chunk_size=4, max_chunks=2, proposal_map="none")
    layer = EvaAttention(config, LayerShape(2, 4, is_causal=True)).double().eval()
    options = {"window_size": 8, "chunk_size": 4, "is_causal": True, "proposals": "key"}
    assert_same(layer(q, k, v), eva_attention(q, k, v, max_chunks=2, **options))
    assert float((layer(q, k, v) - eva_attention(q, k, v, **options)).abs().max()) > 1e-3
    with pytest.raises(ConfigError, match=r"EvaConfig.max_chunks must be an integer >= 1.*got 0"):
        EvaConfig(max_chunks=0)
    with pytest.raises(ConfigError, match="max_chunks must be None in a bidirectional layer.*got 2.*Use num_chunks"):
        EvaAttention(config, LayerShape(2, 4))
    with pytest.raises(ConfigError, match="max_chunks must be None with chunking='published'; got 2"):
        EvaAttention(config.replace(chunking="published"), LayerShape(2, 4, is_causal=True))
    with pytest.raises(ConfigError, match="chunk_size=16 and window_size=24. Set chunk_size=12, or 'auto'"):
        EvaAttention(EvaConfig(window_size=24, chunk_size=16), LayerShape(2, 4, is_causal=True))


def test_default_chunks() -> None:
    """16 tokens: two vectors for 16 pairs are an eighth of a cache of keys and values with room for the window."""
    q, k, v = inputs(90)
    assert resolve(EvaConfig(), "decoder").chunk_size == 16
    assert resolve(EvaConfig(window_size=8), "decoder").chunk_size == 8
    assert resolve(EvaConfig(chunk_size=None, conventions="published"), "decoder").chunk_size is None
    assert_same(eva_attention(q, k, v, is_causal=True), eva_attention(q, k, v, is_causal=True, chunk_size=16))
    for window, chunk in ((8, 8), (32, 16), (24, 12), (7, 7), (17, 17), (34, 17), (9, 9)):
        options = {"window_size": window, "is_causal": True}
        assert_same(eva_attention(q, k, v, **options), eva_attention(q, k, v, chunk_size=chunk, **options))
