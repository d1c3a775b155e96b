"""FAVOR#'s log-weights with statistics taken on the way, against statistics taken before."""

from __future__ import annotations

import pytest
import torch
from helpers import MASKS, assert_same
from statistics_inputs import HEADS, centred_or_not, every_variant
from statistics_inputs import inputs as correlated
from torch import Tensor
from variants import directions

from hf_linattn.errors import InputError
from hf_linattn.functional import favor_attention, favor_statistics
from hf_linattn.ops.favor import attention, fitted
from hf_linattn.ops.favor.fitted import RowFit

DIAGONAL = ("gerf", "saderf")


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    query, key = correlated()
    return [z.to(dtype).requires_grad_() for z in (query, key, correlated(seed=1)[0])]


def both(tensors: list[Tensor], fit: RowFit, **options: object) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of them and of the directions, with statistics on the way and taken before."""
    found = []
    for is_before in (False, True):
        projection = directions(HEADS, tensors[0].shape[-1]).clone().to(tensors[0]).requires_grad_()
        statistics = fit
        if is_before:
            masks = {name: options[name] for name in ("key_mask", "scaling") if name in options}
            statistics = favor_statistics(*tensors[:2], variant=fit.variant, centring=fit.centring, **masks)
        output = favor_attention(*tensors, projection, statistics=statistics, **options)
        found.append([output, *torch.autograd.grad(output.sin().sum(), [*tensors, projection])])
    return found[0], found[1]


@every_variant
@centred_or_not
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("stacked", [256, 0])
def test_both_ways(
    variant: str, centring: bool, mask: str, window: int, stacked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitted, "_STACKED", stacked)
    options = {"key_mask": MASKS[mask], "window_size": window, "scaling": 0.4}
    for ours, expected in zip(*both(tensors(), RowFit(variant, centring), **options), strict=True):
        assert_same(ours, expected, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [{"num_heavy_keys": 3}, {"num_global_tokens": 2, "window_size": 3}, {"grid": (1, 23), "window_size": 3}],
    ids=str,
)
def test_beside_other_exact_keys(options: dict) -> None:
    for ours, expected in zip(*both(tensors(), RowFit(), **options), strict=True):
        assert_same(ours, expected, atol=1e-10)


@pytest.mark.parametrize("variant", DIAGONAL)
@pytest.mark.parametrize("window", [0, 3])
def test_as_precise_far_from_zero(variant: str, window: int) -> None:
    """Float32, means a thousand times the spread."""
    exact = tensors()
    with torch.no_grad():
        for z in exact[:2]:
            z += 1000
    wide = both(exact, RowFit(variant), window_size=window)[0][0]
    ours, before = both([z.float() for z in exact], RowFit(variant), window_size=window)
    error, least = ((z[0] - wide).abs().max() for z in (ours, before))
    assert error <= 2 * least + 1e-5


@pytest.mark.parametrize("variant", DIAGONAL)
@centred_or_not
@pytest.mark.parametrize("kind", ["equal keys", "zero queries", "all zero", "one token"])
def test_degenerate_rows(variant: str, centring: bool, kind: str) -> None:
    query, key, value = (z.detach() for z in tensors(torch.float32))
    query = query * 0 if kind in ("zero queries", "all zero") else query
    key = key * 0 if kind == "all zero" else key[:, :, :1].expand_as(key) if kind == "equal keys" else key
    mask = MASKS["one"] if kind == "one token" else None
    leaves = [z.clone().requires_grad_() for z in (query, key, value)]
    for ours, expected in zip(*both(leaves, RowFit(variant, centring), key_mask=mask, window_size=3), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", DIAGONAL)
@pytest.mark.parametrize("stacked", [256, 0])
def test_gradient_by_differences(variant: str, stacked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the function with the statistics held: those of the point itself, as constants."""
    monkeypatch.setattr(fitted, "_STACKED", stacked)
    query, key, value = (z[:1, :1, :7].detach().requires_grad_() for z in tensors())
    statistics = favor_statistics(query, key, variant=variant)
    w = directions(1, 4)
    held = favor_attention(query, key, value, w, statistics=statistics, window_size=2)
    ours = favor_attention(query, key, value, w, statistics=RowFit(variant), window_size=2)
    grads = [torch.autograd.grad(out.sin().sum(), (query, key, value)) for out in (ours, held)]
    for found, expected in zip(*grads, strict=True):
        assert_same(found, expected, atol=1e-10)
    torch.autograd.gradcheck(
        lambda *z: favor_attention(*z, w, statistics=statistics, window_size=2), (query, key, value), fast_mode=True
    )


@pytest.mark.parametrize("variant", ["saderf", "dense"])
def test_compiled_calls_take_statistics_before(variant: str) -> None:
    query, key, value = (z.detach() for z in tensors())
    w = directions(HEADS, 4)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return favor_attention(q, k, v, w, statistics=RowFit(variant), window_size=3)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_same(compiled(query, key, value), run(query, key, value), atol=1e-10)


def test_which_road(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = attention.fitted_weights
    monkeypatch.setattr(attention, "fitted_weights", lambda *a: calls.append(1) or real(*a))
    query, key, value = (z.detach() for z in tensors())
    w = directions(HEADS, 4)
    for variant in ("saderf", "dense"):
        favor_attention(query, key, value, w, statistics=RowFit(variant), window_size=3)
    assert len(calls) == 1
    with pytest.raises(InputError, match="Causal attention needs statistics of other data"):
        favor_attention(query, key, value, w, statistics=RowFit(), is_causal=True)
    with pytest.raises(InputError, match="Did you mean 'saderf'"):
        favor_attention(query, key, value, w, statistics=RowFit("saderff"), window_size=3)
