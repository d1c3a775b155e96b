"""Random numbers of rows: as good as random, and a function of the row and the place in it alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import inputs
from scipy import stats
from torch import Tensor

from hf_linattn.errors import InputError
from hf_linattn.functional import (
    CalibratedProposals,
    RowNoise,
    SlotDropout,
    draw_projection,
    eva_attention,
    favor_attention,
    favor_log_features,
    favor_statistics,
    generalized_attention,
    lara_attention,
)
from hf_linattn.ops import noise as noise_module

HEADS, TOKENS, SLOTS = 4, 64, 32


def keyed(*keys: int, rows: int = 8) -> RowNoise:
    """Of some rows, under one key or several."""
    key = torch.tensor(keys).repeat_interleave(rows)
    return RowNoise(RowNoise.keyed(key, torch.arange(rows).repeat(len(keys))).keys, key[:1])


def like(rows: int, heads: int = HEADS, tokens: int = TOKENS, slots: int = SLOTS) -> Tensor:
    return torch.zeros(rows, heads, tokens, slots)


def places(tokens: int = TOKENS, slots: int = SLOTS) -> tuple[Tensor, Tensor]:
    return torch.arange(tokens)[None, None, :, None], torch.arange(slots)[None, None, None]


# -- the numbers ----------------------------------------------------------------------------------------------------


def slow_hash(state: int) -> int:
    state ^= state >> 16
    state = state * 0x21F0AAAD % 2**32
    state ^= state >> 15
    state = state * 0x735A2D97 % 2**32
    return state ^ state >> 15


def slow_bits(key: int, row: int, *index: int) -> int:
    state = key
    for place in (row, 0, *index):  # 0: the only part of the row
        state = slow_hash((state + place * 0x9E3779B9) % 2**32)
    return state


def test_bits_are_those_of_python_numbers() -> None:
    noise = RowNoise.keyed(3000000000, torch.tensor([5, 2**31 - 1]))
    bits = noise.bits(like(2, 2, 3, 4), 7, torch.tensor([0, 9, 2**31 - 1])[None, None, :, None], places()[1][..., :4])
    assert bits.shape == (2, 2, 3, 4)
    for row, number in enumerate((5, 2**31 - 1)):
        for token, place in enumerate((0, 9, 2**31 - 1)):
            assert int(bits[row, 1, token, 3]) == slow_bits(3000000000, number, 7, 1, place, 3)


@pytest.mark.parametrize("dim", [1, 31, 32])
def test_normal_numbers_are_normal(dim: int) -> None:
    numbers = keyed(1, 2).normal(like(16, slots=dim)).double()
    assert numbers.shape == (16, HEADS, TOKENS, dim)
    for z in (numbers, numbers.square()):  # those of a pair come from the same two hashes
        pairs = torch.corrcoef(z.flatten(0, 2).T).view(dim, dim) - torch.eye(dim)
        assert pairs.abs().max() < 5 / math.sqrt(16 * HEADS * TOKENS)
    flat = numbers.flatten().numpy()
    assert stats.kstest(flat, "norm").pvalue > 1e-3
    count = len(flat)
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        spread = math.sqrt(stats.norm.moment(2 * power) - moment**2)
        assert abs((flat**power).mean() - moment) < 4 * spread / math.sqrt(count), power
    assert (abs(flat) > 3).mean() == pytest.approx(2.7e-3, rel=0.4)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_share_of_dropped_slots(share: float) -> None:
    dropped = keyed(3, 4).below(share, like(16), 5, *places()).double()
    for dims in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):  # of all, of a row, head, token, slot
        found = dropped.mean(dims).flatten()
        error = (found - share).abs() / math.sqrt(share * (1 - share) / (dropped.numel() / len(found)))
        assert error.max() < 4.5, dims


def test_a_large_batch_is_decided_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = keyed(1).below(0.3, like(8), 0, *places())
    monkeypatch.setattr(noise_module, "_AT_ONCE", 8 * TOKENS * SLOTS)  # of a head
    assert torch.equal(keyed(1).below(0.3, like(8), 0, *places()), whole)


@pytest.mark.parametrize("what", ["key", "row", "part", "head", "token", "slot", "use", "apart"])
def test_neighbours_are_independent(what: str) -> None:
    """No correlation of numbers, of their squares, nor of their bits."""
    number = torch.arange(64)
    one, other = {
        "key": (RowNoise.keyed(10, number), RowNoise.keyed(11, number)),
        "row": (RowNoise.keyed(10, number), RowNoise.keyed(10, number + 1)),
        "part": (RowNoise.keyed(10, number), RowNoise.keyed(10, number, torch.ones_like(number))),
        "apart": (RowNoise.keyed(10, number), RowNoise.keyed(10, number).apart()),
    }.get(what, (RowNoise.keyed(10, number),) * 2)
    ours = one.bits(like(64, 5, 65, 33), 0, *places(65, 33)).double()
    theirs = other.bits(like(64, 5, 65, 33), int(what == "use"), *places(65, 33)).double()
    dim = {"head": 1, "token": 2, "slot": 3}.get(what)
    if dim is not None:
        size = ours.shape[dim]
        ours, theirs = ours.narrow(dim, 0, size - 1), theirs.narrow(dim, 1, size - 1)
    least = 5 / math.sqrt(ours.numel())
    views: list[Callable[[Tensor], Tensor]] = [lambda z: z, lambda z: (z / 2**32 - 0.5) ** 2]
    views += [lambda z, bit=bit: z // 2**bit % 2 for bit in (0, 7, 15, 16, 24, 31)]
    for view in views:
        pair = torch.stack([view(ours).flatten(), view(theirs).flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() < least


def test_keys_of_another_batch_are_refused() -> None:
    q, k, v = inputs(6)
    dropout = SlotDropout(0.5, RowNoise.keyed(0, torch.arange(q.shape[0] + 1)))
    with pytest.raises(InputError, match=r"those of 3 rows; got a batch of 2"):
        favor_attention(q, k, v, draw_projection(q.shape[1], 8, q.shape[3], seed=0), slot_dropout=dropout)


# -- in attention ---------------------------------------------------------------------------------------------------
DIM, ROWS = 8, 3


def attention(name: str, noise: RowNoise, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **more: Any) -> Tensor:
    """A function under its short name, with noise and dropout of the rows."""
    heads = q.shape[1]
    projection = draw_projection(heads, 12, DIM, seed=0).double()
    options: dict[str, Any] = {"key_mask": mask, "slot_dropout": SlotDropout(0.4, noise), **more}
    kind, _, how = name.partition(" ")
    if "causal" in how:
        options["is_causal"] = True
    if "window" in how:
        options |= {"window_size": 4, "overlap_window": "overlap" in how}
    if "globals" in how:
        options["num_global_tokens"] = 0 if "causal" in how else 2
    if kind == "favor":
        statistics = None if "fitted" not in how else favor_statistics(q, k, key_mask=mask, variant="sderf")
        return favor_attention(q, k, v, projection, statistics=statistics, **options)
    if kind == "relu":
        return generalized_attention(q, k, v, projection, **options)
    if kind == "lara" and "calibrated" in how:
        centroids = draw_projection(heads, 4, DIM, seed=1).double()
        samples = centroids + noise.for_all_rows().normal(centroids[None])[0]
        return lara_attention(q, k, v, proposals=CalibratedProposals(centroids, samples), **options)
    if kind == "lara":
        own: dict[str, Any] = {"num_landmarks": 8, "samples_per_landmark": 2, "antithetic": True}
        return lara_attention(q, k, v, noise=noise, **own, **options)
    options = {"window_size": 4, "num_chunks": 3, **options}
    if "causal" in how:
        options = {"chunk_size": 2, "max_chunks": 2 if "bounded" in how else None, **options}
    return eva_attention(q, k, v, noise=noise, **options)


NAMES = [
    "favor",
    "favor fitted globals",
    "favor causal",
    "favor window",
    "favor causal window overlap",
    "relu causal",
    "lara",
    "lara window globals",
    "lara calibrated causal window",
    "eva",
    "eva overlap window",
    "eva causal",
    "eva causal bounded",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_row_has_its_numbers_in_any_batch_and_with_any_padding(name: str) -> None:
    q, k, v = (torch.randn(ROWS, 2, 21, DIM, dtype=torch.float64) for _ in range(3))
    lengths = (21, 13, 6)
    numbers = torch.tensor([7, 8, 9])
    mask = torch.arange(21) < torch.tensor(lengths)[:, None]
    together = attention(name, RowNoise.keyed(1, numbers), q, k, v, mask)
    for row, length in enumerate(lengths):
        one = [z[row : row + 1, :, :length] for z in (q, k, v)]
        alone = attention(name, RowNoise.keyed(1, numbers[row : row + 1]), *one, None)
        torch.testing.assert_close(together[row : row + 1, :, :length], alone, rtol=0, atol=1e-12)
        # Padding on the left.
        padded = [torch.cat([torch.randn(1, 2, 5, DIM, dtype=torch.float64), z], dim=2) for z in one]
        left = torch.arange(5 + length)[None] >= 5
        moved = attention(name, RowNoise.keyed(1, numbers[row : row + 1]), *padded, left)
        torch.testing.assert_close(moved[:, :, 5:], alone, rtol=0, atol=1e-12)
        other = attention(name, RowNoise.keyed(1, numbers[row : row + 1] + 3), *one, None)
        if length > 6:
            assert (other - alone).abs().max() > 1e-4


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("chunk_size", [1, 8, 64])
def test_a_slot_is_dropped_once_for_all_keys(is_causal: bool, window: int, chunk_size: int) -> None:
    """Against the definition: of the weights of query t for slot j, all or none are left."""
    q, k, v = (torch.randn(ROWS, 2, 19, DIM, dtype=torch.float64) for _ in range(3))
    projection = draw_projection(2, 12, DIM, seed=0).double()
    dropout = SlotDropout(0.4, RowNoise.keyed(1, torch.arange(ROWS)))
    options: dict[str, Any] = {"is_causal": is_causal, "window_size": window, "chunk_size": chunk_size}
    ours = favor_attention(q, k, v, projection, slot_dropout=dropout, **options)

    features = favor_log_features(q * DIM**-0.25, k * DIM**-0.25, projection)
    by_slot = (features[0].unsqueeze(-2) + features[1].unsqueeze(-3)).exp()  # [batch, heads, queries, keys, slots]
    number = torch.arange(19)
    exact = (number[:, None] // window == number // window) if window else torch.zeros(19, 19, dtype=torch.bool)
    seen = number[:, None] >= number if is_causal else torch.ones(19, 19, dtype=torch.bool)
    dropped = dropout.noise.below(0.4, like(ROWS, 2), 3, *places(19, 12))
    whole = torch.where(exact, (q @ k.mT * DIM**-0.5).exp(), by_slot.sum(-1)) * seen
    kept = (by_slot * ~dropped.unsqueeze(-2)).sum(-1) / 0.6
    weights = torch.where(exact, whole, kept * seen) / whole.sum(-1, keepdim=True)
    torch.testing.assert_close(ours, weights @ v, rtol=0, atol=1e-10)


def test_bounded_chunks_have_the_numbers_of_unbounded_ones() -> None:
    q, k, v = (torch.randn(ROWS, 2, 40, DIM, dtype=torch.float64) for _ in range(3))
    noise = RowNoise.keyed(1, torch.arange(ROWS))
    free = attention("eva causal", noise, q, k, v, None)
    for bound in (4, 20, 40):  # up to 18 chunks are seen
        bounded = attention("eva causal", noise, q, k, v, None, max_chunks=bound)
        equal = (bounded - free).abs().amax((0, 1, 3)) < 1e-12
        assert equal[: 4 + 2 * bound].all()
        assert equal.all() == (bound >= 18)
