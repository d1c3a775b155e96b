"""The merge of blocks in Triton against the torch form in float64, with all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hf_linattn.errors import UnsupportedError
from hf_linattn.kernels.attention_state import AttentionState
from hf_linattn.kernels.block_slots import BlockReach
from hf_linattn.kernels.block_slots import torch_kernel as portable
from hf_linattn.kernels.block_slots.triton_launch import scan_backward, scan_forward
from hf_linattn.ops.softmax import softmax_with_lse

INF = float("inf")
# Units per block, margin, is_causal. The defaults first: all blocks before, and all other blocks.
REACHES = [
    BlockReach(1, 0, True),
    BlockReach(1, 0, False),
    BlockReach(3, 1, True),
    BlockReach(2, 3, False),
    BlockReach(2, 2, False),
]
every_reach = pytest.mark.parametrize("reach", REACHES, ids=lambda r: "-".join(map(str, r)))


def num_blocks(units: int, reach: BlockReach) -> int:
    return -(-units // reach.units)


def reference(output: Tensor, lse: Tensor, reach: BlockReach) -> AttentionState:
    """Slot by slot a softmax over the units that a block reads."""
    unit, block = torch.arange(output.shape[1]), torch.arange(num_blocks(output.shape[1], reach))[:, None]
    visible = unit < block * reach.units - reach.margin
    if not reach.is_causal:
        visible = visible | (unit >= (block + 1) * reach.units + reach.margin)
    logits = lse.transpose(1, 2).unsqueeze(2).masked_fill(~visible.to(lse.device), -INF)
    merged = softmax_with_lse(logits, output.transpose(1, 2))
    return AttentionState(merged.output.transpose(1, 2), merged.lse.transpose(1, 2))


def exact(output: Tensor, lse: Tensor, grads: AttentionState, reach: BlockReach) -> tuple[Tensor, ...]:
    """Results and gradients in float64."""
    inputs = [z.double().requires_grad_() for z in (output, lse)]
    result = reference(*inputs, reach)
    seen = result.lse > -INF  # the gradient of a mass that is -inf counts for nothing
    given = (grads.output.double(), grads.lse.double().masked_fill(~seen, 0.0))
    return *(z.detach() for z in result), *torch.autograd.grad(tuple(result), inputs, given)


def ours(output: Tensor, lse: Tensor, grads: AttentionState, reach: BlockReach) -> tuple[Tensor, ...]:
    merged = scan_forward(output, lse, num_blocks(output.shape[1], reach), reach)
    return *merged, *scan_backward(*grads, output, lse, *merged, reach)


def random(*shape: int, seed: int, scale: float = 1.0, device: str = "cpu") -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device)


def case(
    reach: BlockReach, groups: int, units: int, slots: int, dim: int, scale: float = 1.0, device: str = "cpu"
) -> tuple[Tensor, Tensor, AttentionState]:
    shape, of_blocks = (groups, units, slots), (groups, num_blocks(units, reach), slots)
    output, lse = random(*shape, dim, seed=0, device=device), random(*shape, seed=1, scale=scale, device=device)
    return (
        output,
        lse,
        AttentionState(random(*of_blocks, dim, seed=2, device=device), random(*of_blocks, seed=3, device=device)),
    )


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], limit: float) -> None:
    for name, ours, exact in zip(("output", "mass", "grad output", "grad mass"), found, expected, strict=True):
        assert not ours.isnan().any(), name
        torch.testing.assert_close(
            ours.double(), exact, rtol=limit, atol=limit, msg=lambda m, name=name: f"{name}: {m}"
        )


@every_reach
@pytest.mark.parametrize(("units", "slots", "dim"), [(1, 3, 4), (2, 1, 16), (5, 17, 3), (7, 6, 33)])
def test_matches_float64(reach: BlockReach, units: int, slots: int, dim: int) -> None:
    given = case(reach, 2, units, slots, dim)
    assert_close(ours(*given, reach), exact(*given, reach), 2e-5)


@every_reach
def test_masses_far_apart(reach: BlockReach) -> None:
    """Differences of hundreds of nats, in both directions: nothing overflows, and no block drowns its rivals."""
    output, lse, grads = case(reach, 2, 7, 5, 4, scale=300.0)
    lse[0] = lse[0].sort(dim=0).values
    lse[1] = lse[1].sort(dim=0, descending=True).values
    # Masses of about 300 are given in float32 with a resolution of 3e-5, and so are weights.
    assert_close(ours(output, lse, grads, reach), exact(output, lse, grads, reach), 3e-4)


@every_reach
def test_one_block_outweighs_all(reach: BlockReach) -> None:
    """What is left without it is resolved as well as if it were not there: nothing is subtracted."""
    output, lse, grads = case(reach, 1, 5, 3, 4)
    lse[:, 2] += 80.0
    assert_close(ours(output, lse, grads, reach), exact(output, lse, grads, reach), 2e-5)


@every_reach
def test_empty_states(reach: BlockReach) -> None:
    output, lse, grads = case(reach, 2, 6, 4, 3)
    lse[0] = -INF  # nothing anywhere
    lse[1, :2] = -INF
    lse[1, 4] = -INF
    lse[1, 5, 1] = -INF
    expected = exact(output, lse, grads, reach)
    output = output.masked_fill((lse == -INF)[..., None], float("nan"))  # must not be looked at
    missing = expected[1] == -INF
    grads = AttentionState(
        grads.output.masked_fill(missing[..., None], float("nan")), grads.lse.masked_fill(missing, float("nan"))
    )
    found = ours(output, lse, grads, reach)
    assert_close(found, expected, 2e-5)
    assert (found[2][lse == -INF] == 0).all()
    assert (found[3][lse == -INF] == 0).all()


@pytest.mark.parametrize("reach", REACHES[:2])
def test_many_blocks_keep_their_precision(reach: BlockReach) -> None:
    """Rounding does not pile up: the masses are large, so a log taken at each step would."""
    output, lse, grads = case(reach, 1, 60, 2, 3)
    lse += 1000.0
    found, expected = ours(output, lse, grads, reach), exact(output, lse, grads, reach)
    # Both sides take one log, between its two walks.
    limit = 3e-5 if not reach.is_causal else 1e-6
    torch.testing.assert_close(found[0].double(), expected[0], rtol=0, atol=limit)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_reach
def test_half_precision_is_no_worse_than_torch(reach: BlockReach, dtype: torch.dtype) -> None:
    output, lse, grads = case(reach, 2, 6, 5, 8)
    output, grads = output.to(dtype), AttentionState(grads.output.to(dtype), grads.lse)
    expected, found = exact(output, lse, grads, reach), ours(output, lse, grads, reach)
    merged = portable.scan_forward(output, lse, expected[0].shape[1], reach)
    plain = (*merged, *portable.scan_backward(*grads, output, lse, *merged, reach))
    for a, b, c in zip(found, plain, expected, strict=True):
        assert a.dtype == b.dtype
        seen = c > -INF
        errors = [(z.double() - c)[seen].abs().max() for z in (a, b)]
        assert errors[0] <= 2 * errors[1] + 1e-6


def test_rows_are_taken_with_their_strides() -> None:
    reach = BlockReach(1, 0, False)
    output, lse, grads = case(reach, 4, 4, 5, 6)
    output, lse = output.transpose(0, 1), lse.transpose(0, 1)
    grads = AttentionState(grads.output.transpose(0, 1), grads.lse.transpose(0, 1))
    assert_close(ours(output, lse, grads, reach), exact(output, lse, grads, reach), 2e-5)


def test_refuses_what_it_cannot_do() -> None:
    output, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    with pytest.raises(UnsupportedError, match="float64"):
        scan_forward(output.double(), lse, 2, BlockReach())
    with pytest.raises(UnsupportedError, match="257"):
        scan_forward(torch.zeros(1, 2, 3, 257), lse, 2, BlockReach())


@pytest.mark.gpu
@every_reach
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_triton_block_slots_on_a_gpu(reach: BlockReach, dim: int) -> None:
    given = case(reach, 16, 130, 256, dim, scale=4.0, device="cuda")
    first, again = ours(*given, reach), ours(*given, reach)
    for found, expected in zip(first, exact(*given, reach), strict=True):
        seen = expected > -INF  # sums of up to 256 terms of either sign: errors are those of the largest entry
        assert torch.equal(found > -INF, seen)
        assert (found.double() - expected)[seen].abs().max() <= 1e-5 * expected[seen].abs().max()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
