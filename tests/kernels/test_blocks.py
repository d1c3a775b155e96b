"""Blocks of queries that read units of keys through slots, in plain torch, against all pairs of tokens in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import INF, assert_no_worse, assert_same, cotangents, dense_blocks, differentiated, random
from torch import Tensor

from hf_linattn.kernels.attend import torch_kernel as portable_attend
from hf_linattn.kernels.backends import use_backend
from hf_linattn.kernels.block_slots import BlockReach, block_slot_attention, inter_block
from hf_linattn.kernels.block_slots import torch_kernel as portable_scan
from hf_linattn.kernels.slot_inputs import SlotInputs

NAMES = (
    "output", "mass", "query", "query slots", "query slot bias", "key", "key bias", "key slots", "key slot bias",
    "value",
)  # fmt: skip
QUERY, KEY, KEY_BIAS, VALUE = 0, 3, 4, 7
# Units per block, margin, is_causal. The defaults first: all blocks before, and all other blocks.
REACHES = [
    BlockReach(1, 0, True),
    BlockReach(1, 0, False),
    BlockReach(3, 1, True),
    BlockReach(2, 3, False),
    BlockReach(2, 2, False),
]
every_reach = pytest.mark.parametrize("reach", REACHES, ids=lambda r: "-".join(map(str, r)))


@pytest.fixture(autouse=True)
def _torch() -> Any:
    with use_backend("torch"):
        yield


def make(
    reach: BlockReach,
    units: int = 7,
    *,
    queries: int = 5,
    keys: int = 3,
    slots: int = 6,
    head_dim: int = 3,
    lead: tuple[int, int] = (2, 2),
    scale: float = 1.0,
) -> list[Tensor]:
    blocks = -(-units // reach.units)
    return [
        random(*lead, blocks, queries, 4, seed=0, scale=scale),
        random(*lead, slots, 4, seed=1),
        random(*lead, slots, seed=2),
        random(*lead, units, keys, 4, seed=3, scale=scale),
        random(*lead, units, keys, seed=4),
        random(*lead, slots, 4, seed=5),
        random(*lead, slots, seed=6),
        random(*lead, units, keys, head_dim, seed=7),
    ]


def ours(reach: BlockReach) -> Any:
    return lambda *tensors: block_slot_attention(SlotInputs(*tensors), reach)


def dense(reach: BlockReach) -> Any:
    return lambda *tensors: dense_blocks(*tensors, reach)


def check(inputs: list[Tensor], reach: BlockReach, limit: float = 1e-11) -> list[Any]:
    found = differentiated(ours(reach), inputs)
    assert_same(found, differentiated(dense(reach), inputs, torch.float64), limit, NAMES)
    return found


@every_reach
@pytest.mark.parametrize(
    ("units", "queries", "keys", "slots"), [(1, 1, 1, 1), (2, 5, 3, 6), (7, 1, 65, 3), (8, 63, 1, 2), (9, 3, 4, 40)]
)
@pytest.mark.parametrize("head_dim", [4, 3], ids=["flash", "tiles"])
def test_results_and_gradients(
    reach: BlockReach, units: int, queries: int, keys: int, slots: int, head_dim: int
) -> None:
    check(make(reach, units, queries=queries, keys=keys, slots=slots, head_dim=head_dim), reach)


def test_reach_says_what_is_read() -> None:
    reach = BlockReach(1, 0, True)
    inputs = make(reach, 3)
    output, mass = block_slot_attention(SlotInputs(*inputs), reach)
    assert (mass[:, :, 0] == -INF).all()
    assert (output[:, :, 0] == 0).all()
    assert (mass[:, :, 1:] > -INF).all()
    changed = [z.clone() for z in inputs]
    changed[VALUE][:, :, 1] += 1.0
    moved = (block_slot_attention(SlotInputs(*changed), reach).output != output).flatten(3).any(-1)
    assert moved[0, 0].tolist() == [False, False, True]


@pytest.mark.parametrize("states", [1, 300, 1 << 22])
@pytest.mark.parametrize("reach", [REACHES[0], REACHES[3]])
def test_some_groups_at_a_time(states: int, reach: BlockReach, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(inter_block._STATES, "cpu", states)
    monkeypatch.setitem(portable_attend._TILE, "cpu", 50)
    sizes: list[int] = []
    scan = portable_scan.scan_forward

    def counted(output: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        sizes.append(output.shape[0])
        return scan(output, *given)

    counting = portable_scan._inter_block._replace(scan_forward=counted)
    monkeypatch.setattr(portable_scan, "blocks_forward", counting.forward)
    monkeypatch.setattr(portable_scan, "blocks_backward", counting.backward)
    check(make(reach, lead=(5, 1)), reach)
    per_group = 7 * 6 * 3
    assert max(sizes) == min(5, max(1, states // per_group))
    assert sum(sizes) == 2 * 5  # forward and backward


@every_reach
def test_slots_and_biases_may_be_shared(reach: BlockReach) -> None:
    inputs = make(reach)
    for shared in (inputs[1][:1], inputs[1][0]):
        few = list(inputs)
        few[1], few[5] = shared, inputs[5][0] if shared.ndim == 3 else inputs[5][:1]
        few[2], few[6] = (inputs[i][0] if shared.ndim == 3 else inputs[i][:1] for i in (2, 6))
        few[KEY_BIAS] = inputs[KEY_BIAS][:1, :1]
        check(few, reach)


@every_reach
def test_keys_that_nothing_reads(reach: BlockReach) -> None:
    inputs = make(reach)
    inputs[KEY_BIAS][0, 0, :4] = -INF
    inputs[KEY_BIAS][0, 1] = -INF  # nothing anywhere
    inputs[KEY_BIAS][1, :, 2:, 1] = -INF
    output, mass, *grads = check(inputs, reach)
    empty, hidden = mass == -INF, inputs[KEY_BIAS] == -INF
    assert empty[0, 1].all()
    assert (output[empty] == 0).all()
    assert (grads[QUERY][empty] == 0).all()
    assert all((grads[i][hidden] == 0).all() for i in (KEY, KEY_BIAS, VALUE))


@every_reach
def test_gradients_of_queries_that_read_nothing(reach: BlockReach) -> None:
    inputs = make(reach)
    inputs[KEY_BIAS][0, 0, :4] = -INF
    leaves = [z.requires_grad_() for z in inputs]
    result = block_slot_attention(SlotInputs(*leaves), reach)
    grads = cotangents(*result)
    expected = torch.autograd.grad(tuple(result), leaves, grads, retain_graph=True)
    grads[1][result.lse == -INF] = float("nan")
    assert all(map(torch.equal, torch.autograd.grad(tuple(result), leaves, grads), expected))


@every_reach
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("pattern", ["rising", "falling", "one", "random"])
def test_units_far_apart(pattern: str, dtype: torch.dtype, reach: BlockReach) -> None:
    inputs = make(reach, 9)
    nats = 3000.0 if dtype == torch.float64 else 300.0
    place = torch.linspace(0, nats, 9, dtype=torch.float64).unsqueeze(-1)
    if pattern == "one":
        inputs[KEY][:, :, 4, 1] *= nats
    elif pattern == "random":
        inputs[KEY] *= nats / 10
    else:
        inputs[KEY_BIAS] += place if pattern == "rising" else -place
    inputs = [z.to(dtype) for z in inputs]
    check(inputs, reach, limit=32 * 4 * nats * torch.finfo(dtype).eps)


@every_reach
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_torch(dtype: torch.dtype, reach: BlockReach) -> None:
    inputs = [z.to(dtype) if i in (0, 1, 3, 5, 7) else z.float() for i, z in enumerate(make(reach))]
    found = differentiated(ours(reach), inputs)
    assert [z.dtype for z in found[2:]] == [z.dtype for z in inputs]
    exact = differentiated(dense(reach), inputs, torch.float64)
    # States and their gradients are rounded on the way, which those of plain torch are not.
    assert_no_worse(found, differentiated(dense(reach), inputs, dtype), exact, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("needed", range(8))
@pytest.mark.parametrize("reach", [REACHES[0], REACHES[3]])
def test_gradients_one_at_a_time(needed: int, reach: BlockReach) -> None:
    inputs = make(reach)
    every = differentiated(ours(reach), inputs)[2 + needed]
    inputs[needed].requires_grad_()
    result = block_slot_attention(SlotInputs(*inputs), reach)
    (alone,) = torch.autograd.grad(tuple(result), inputs[needed], cotangents(*result))
    assert torch.equal(alone, every)


@every_reach
def test_a_second_backward_pass_gives_the_same(reach: BlockReach) -> None:
    inputs = [z.requires_grad_() for z in make(reach)]
    result = block_slot_attention(SlotInputs(*inputs), reach)
    grads = cotangents(*result)
    first = torch.autograd.grad(tuple(result), inputs, grads, retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(tuple(result), inputs, grads), first))


def test_strides_change_nothing() -> None:
    inputs = make(BlockReach())

    def turned(*tensors: Tensor) -> Any:
        moved = SlotInputs(*(z.transpose(0, -1).contiguous().transpose(0, -1) for z in tensors))
        return block_slot_attention(moved, BlockReach())

    assert_same(differentiated(turned, inputs), differentiated(ours(BlockReach()), inputs), 1e-13)


@every_reach
def test_masses_far_below_zero(reach: BlockReach) -> None:
    """They are not taken for those of empty units."""
    inputs = make(reach)
    inputs[KEY_BIAS] = torch.full_like(inputs[KEY_BIAS], -(2.0**32))  # resolved to 1e-6
    inputs[KEY] *= 0
    check(inputs, reach, limit=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@every_reach
def test_the_scan_by_itself(reach: BlockReach, dtype: torch.dtype) -> None:
    """States and their masses given, hundreds of nats apart: a softmax over the units that a block reads."""
    units, wide = 11, torch.promote_types(dtype, torch.float32)
    output, mass = random(3, units, 4, 5, seed=0).to(dtype), random(3, units, 4, seed=1, scale=100.0).to(wide)
    mass[0, :3] = mass[1, :, 2] = -INF
    blocks = -(-units // reach.units)
    unit, block = torch.arange(units), torch.arange(blocks).unsqueeze(-1)
    visible = unit < block * reach.units - reach.margin
    if not reach.is_causal:
        visible = visible | (unit >= (block + 1) * reach.units + reach.margin)

    def plain(output: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        logits = mass.transpose(1, 2).unsqueeze(2).masked_fill(~visible, -INF)
        empty = (logits == -INF).all(-1, keepdim=True)
        weights = logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
        total = logits.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty.squeeze(-1), -INF)
        return (weights @ output.transpose(1, 2)).transpose(1, 2), total.transpose(1, 2)

    merged = portable_scan.scan_forward(output, mass, blocks, reach)
    grads = cotangents(*merged)
    found = [*merged, *portable_scan.scan_backward(*grads, output, mass, *merged, reach)]
    expected = differentiated(plain, [output, mass], torch.float64)
    limit = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    assert_same(found, expected, limit, ("output", "mass", "grad output", "grad mass"))
