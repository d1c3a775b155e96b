"""Rows of similar length, taken out of packed and padded batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_linattn.errors import InputError
from hf_linattn.ops import row_groups
from hf_linattn.ops.row_groups import RowGroups
from hf_linattn.ops.row_partition import partition

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


def tokens(batch: int, count: int, heads: int = 2, dim: int = 3) -> Tensor:
    """`[batch, heads, tokens, dim]`, numbers that differ, the heads of a token side by side."""
    return torch.randn(batch, count, heads, dim).transpose(1, 2).requires_grad_()


def sequences_of(groups: RowGroups, parts: list[Tensor]) -> dict[int, Tensor]:
    """Number of a sequence -> its tokens `[heads, tokens, dim]`, without padding, which has to be 0."""
    found = {}
    for group, part in zip(groups.groups, parts, strict=True):
        for row, number in enumerate(group.sequences.tolist()):
            length = part.shape[2] if group.real is None else int(group.real[row].sum())
            assert group.real is None or bool(group.real[row, :length].all()), "real tokens stand first"
            assert not part[row, :, length:].any()
            found[number] = part[row, :, :length]
    return found


@settings(max_examples=examples(40), deadline=None)
@given(LENGTHS, st.integers(0, 45))
def test_split_cuts_sequences_out_and_join_puts_them_back(lengths: list[int], exact_length: int) -> None:
    total = sum(lengths)
    groups, x = RowGroups.from_lengths(lengths, (1, total), exact_length=exact_length), tokens(1, total)
    parts = groups.split(x)
    found = sequences_of(groups, parts)
    assert sorted(found) == [n for n, length in enumerate(lengths) if length]
    for number, piece in enumerate(x[0].split(lengths, dim=1)):
        if piece.shape[1]:
            assert torch.equal(found[number], piece)
    for group in groups.groups:
        longest = group.index.shape[1]
        assert group.is_exact == (longest <= exact_length)
        assert group.is_exact or all(lengths[n] > exact_length for n in group.sequences.tolist())
    assert torch.equal(groups.join(parts), x)


@settings(max_examples=examples(25), deadline=None)
@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 2**30), st.integers(0, 20))
def test_padding_may_stand_anywhere(batch: int, count: int, seed: int, exact_length: int) -> None:
    mask = torch.rand(batch, count, generator=torch.Generator().manual_seed(seed)) < 0.6
    groups, x = RowGroups.from_key_mask(mask, exact_length=exact_length), tokens(batch, count)
    if groups is None:
        assert not mask.any()
        return
    found = sequences_of(groups, groups.split(x))
    assert sorted(found) == mask.any(-1).nonzero().squeeze(-1).tolist()
    for number, row in found.items():
        assert torch.equal(row, x[number][:, mask[number]])
    assert torch.equal(groups.join(groups.split(x)), x * mask[:, None, :, None])


@pytest.mark.parametrize("cost", [0, 50, 10**6])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_are_those_of_indexing(cost: int, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(row_groups._GROUP_COST, "cpu", cost)
    lengths = [7, 1, 30, 12, 11, 0, 12]
    if padded:
        mask = torch.arange(30) < torch.tensor(lengths)[:, None]
        groups, x = RowGroups.from_key_mask(mask), tokens(len(lengths), 30)
    else:
        groups, x = RowGroups.from_lengths(lengths, (1, sum(lengths))), tokens(1, sum(lengths))
    assert groups is not None
    assert (len(groups.groups) == 1) == (cost == 10**6)
    weights = [torch.randn_like(part) for part in groups.split(x)]
    output = groups.join([part.sin() * weight for part, weight in zip(groups.split(x), weights, strict=True)])
    by_token = x.transpose(1, 2).flatten(0, 1)
    expected = torch.zeros_like(by_token)
    for group, weight in zip(groups.groups, weights, strict=True):
        real = torch.ones_like(group.index, dtype=torch.bool) if group.real is None else group.real
        piece = by_token[group.index[real]].sin() * weight.transpose(1, 2)[real]
        expected = expected.index_put((group.index[real],), piece)
    assert torch.equal(output.transpose(1, 2).flatten(0, 1), expected)
    grad = torch.randn_like(output)
    mine = torch.autograd.grad(output, x, grad, retain_graph=True)[0]
    theirs = torch.autograd.grad(expected, x, grad.transpose(1, 2).flatten(0, 1))[0]
    assert torch.equal(mine, theirs)


def test_hostile_padding_reaches_nothing() -> None:
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    x = tokens(2, 4).detach()
    x[~mask[:, None, :, None].expand_as(x)] = float("nan")
    x.requires_grad_()
    groups = RowGroups.from_key_mask(mask)
    assert groups is not None
    output = groups.join(groups.split(x))
    output.square().sum().backward()
    assert bool(output.isfinite().all())
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_sequences_of_one_length_are_a_view() -> None:
    groups, x = RowGroups.from_lengths([5, 5, 5], (1, 15)), tokens(1, 15)
    (part,) = groups.split(x)
    assert part.data_ptr() == x.data_ptr()
    assert groups.groups[0].real is None
    assert torch.equal(groups.join([part]), x)


def test_rows_of_a_batch_may_hold_several_sequences() -> None:
    groups, x = RowGroups.from_lengths([3, 5, 8], (2, 8)), tokens(2, 8)
    found = sequences_of(groups, groups.split(x))
    assert torch.equal(found[1], x[0, :, 3:])
    assert torch.equal(found[2], x[1])


@pytest.mark.parametrize("lengths", [[0, 6, 0, 2], pytest.param([5, 3, 9, 1], marks=pytest.mark.slow)])
def test_compiled_is_one_group_and_the_same(lengths: list[int]) -> None:
    total, borders = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)

    def there_and_back(x: Tensor, borders: Tensor) -> Tensor:
        groups = RowGroups.from_cu_seqlens(borders, (1, total), max_length=9)
        return groups.join([part.cumsum(2) for part in groups.split(x)])

    x = tokens(1, total)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    output = compiled(x, borders)
    expected = torch.cat([piece.cumsum(2) for piece in x.split(lengths, dim=2)], dim=2)
    assert torch.allclose(output, expected, atol=1e-6)
    grad = torch.randn_like(output)
    mine, theirs = (torch.autograd.grad(y, x, grad)[0] for y in (output, expected))
    assert torch.allclose(mine, theirs, atol=1e-5)
    with pytest.raises(RuntimeError, match="cu_seqlens must start at 0"):
        compiled(x, borders.clone().fill_(0))


def test_groups_cost_less_than_one_row_length() -> None:
    assert partition([512, 500, 64, 64, 60], 100) == [(0, 2), (2, 5)]
    assert partition([512, 500, 64, 64, 60], 10**6) == [(0, 5)]
    falling = list(range(2000, 0, -1))
    cuts = partition(falling, 0)
    assert cuts[0][0] == 0
    assert cuts[-1][1] == len(falling)
    assert sum((b - a) * falling[a] for a, b in cuts) < 1.1 * sum(falling)


@pytest.mark.parametrize(
    ("borders", "options", "words"),
    [
        ([1, 4], {}, "start at 0"),
        ([0, 3], {}, "end at the number of tokens"),
        ([0, 3, 2, 4], {}, "never fall"),
        ([0, 4], {"max_length": 3}, "max_length"),
        ([4], {}, "at least two numbers"),
        ([[0, 4]], {}, "at least two numbers"),
        ([0.0, 4.0], {}, "int32 or int64"),
    ],
)
def test_borders_that_are_none_raise(borders: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        RowGroups.from_cu_seqlens(torch.tensor(borders), (1, 4), **options)


def test_another_batch_raises() -> None:
    with pytest.raises(InputError, match="rows are those of a batch"):
        RowGroups.from_lengths([4], (1, 4)).split(tokens(2, 4))
