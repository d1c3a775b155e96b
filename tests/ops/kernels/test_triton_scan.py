"""The merge of blocks in Triton against the torch form in float64, with all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.ops.kernels.triton.scan import scan_backward, scan_forward
from hf_linattn.ops.slots import Partial, states_before, states_elsewhere

INF = float("inf")
MODES = ("before", "after", "elsewhere")


def reference(output: Tensor, log_mass: Tensor, mode: str) -> Partial:
    states = Partial(output, log_mass)
    if mode == "elsewhere":
        return states_elsewhere(states)
    if mode == "before":
        return states_before(states)
    reverse = states_before(Partial(output.flip(-3), log_mass.flip(-2)))
    return Partial(reverse.output.flip(-3), reverse.log_mass.flip(-2))


def exact(output: Tensor, log_mass: Tensor, grads: Partial, mode: str) -> tuple[Tensor, ...]:
    """Results and gradients in float64."""
    inputs = [z.double().requires_grad_() for z in (output, log_mass)]
    result = reference(*inputs, mode)
    seen = result.log_mass > -INF  # the gradient of a mass that is -inf counts for nothing
    given = (grads.output.double(), grads.log_mass.double().masked_fill(~seen, 0.0))
    return *(z.detach() for z in result), *torch.autograd.grad(tuple(result), inputs, given)


def ours(output: Tensor, log_mass: Tensor, grads: Partial, mode: str) -> tuple[Tensor, ...]:
    return *scan_forward(output, log_mass, mode), *scan_backward(*grads, output, log_mass, mode)


def random(*shape: int, seed: int, scale: float = 1.0, device: str = "cpu") -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device)


def case(
    groups: int, blocks: int, slots: int, dim: int, scale: float = 1.0, device: str = "cpu"
) -> tuple[Tensor, Tensor, Partial]:
    shape = (groups, blocks, slots)
    output, log_mass = random(*shape, dim, seed=0, device=device), random(*shape, seed=1, scale=scale, device=device)
    return output, log_mass, Partial(random(*shape, dim, seed=2, device=device), random(*shape, seed=3, device=device))


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], limit: float) -> None:
    for name, ours, exact in zip(("output", "mass", "grad output", "grad mass"), found, expected, strict=True):
        assert not ours.isnan().any(), name
        torch.testing.assert_close(
            ours.double(), exact, rtol=limit, atol=limit, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("blocks", "slots", "dim"), [(1, 3, 4), (2, 1, 16), (5, 17, 3), (9, 40, 33)])
def test_matches_float64(mode: str, blocks: int, slots: int, dim: int) -> None:
    given = case(2, blocks, slots, dim)
    assert_close(ours(*given, mode), exact(*given, mode), 2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_masses_far_apart(mode: str) -> None:
    """Differences of hundreds of nats, in both directions: nothing overflows, and no block drowns its rivals."""
    output, log_mass, grads = case(2, 7, 5, 4, scale=300.0)
    log_mass[0] = log_mass[0].sort(dim=0).values
    log_mass[1] = log_mass[1].sort(dim=0, descending=True).values
    # Masses of about 300 are given in float32 with a resolution of 3e-5, and so are weights.
    assert_close(ours(output, log_mass, grads, mode), exact(output, log_mass, grads, mode), 3e-4)


@pytest.mark.parametrize("mode", MODES)
def test_one_block_outweighs_all(mode: str) -> None:
    """What is left without it is resolved as well as if it were not there: nothing is subtracted."""
    output, log_mass, grads = case(1, 5, 3, 4)
    log_mass[:, 2] += 80.0
    assert_close(ours(output, log_mass, grads, mode), exact(output, log_mass, grads, mode), 2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_empty_states(mode: str) -> None:
    output, log_mass, grads = case(2, 6, 4, 3)
    log_mass[0] = -INF  # nothing anywhere
    log_mass[1, :2] = -INF
    log_mass[1, 4] = -INF
    log_mass[1, 5, 1] = -INF
    expected = exact(output, log_mass, grads, mode)
    output = output.masked_fill((log_mass == -INF)[..., None], float("nan"))  # must not be looked at
    missing = expected[1] == -INF
    grads = Partial(
        grads.output.masked_fill(missing[..., None], float("nan")), grads.log_mass.masked_fill(missing, float("nan"))
    )
    found = ours(output, log_mass, grads, mode)
    assert_close(found, expected, 2e-5)
    assert (found[2][log_mass == -INF] == 0).all()
    assert (found[3][log_mass == -INF] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_many_blocks_keep_their_precision(mode: str) -> None:
    """Rounding does not pile up: the masses are large, so a log taken at each step would."""
    output, log_mass, grads = case(1, 150, 2, 3)
    log_mass += 1000.0
    found, expected = ours(output, log_mass, grads, mode), exact(output, log_mass, grads, mode)
    # "elsewhere" takes one log, between its two walks.
    limit = 3e-5 if mode == "elsewhere" else 1e-6
    torch.testing.assert_close(found[0].double(), expected[0], rtol=0, atol=limit)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_is_no_worse_than_torch(mode: str, dtype: torch.dtype) -> None:
    output, log_mass, grads = case(2, 6, 5, 8)
    output, grads = output.to(dtype), Partial(grads.output.to(dtype), grads.log_mass)
    expected, found = exact(output, log_mass, grads, mode), ours(output, log_mass, grads, mode)
    inputs = [output.clone().requires_grad_(), log_mass.clone().requires_grad_()]
    merged = reference(inputs[0].float(), inputs[1], mode)
    result = (merged.output.to(dtype), merged.log_mass)
    given = (grads.output, grads.log_mass.masked_fill(result[1] == -INF, 0.0))
    plain = (*(z.detach() for z in result), *torch.autograd.grad(result, inputs, given))
    for a, b, c in zip(found, plain, expected, strict=True):
        assert a.dtype == b.dtype
        seen = c > -INF
        errors = [(z.double() - c)[seen].abs().max() for z in (a, b)]
        assert errors[0] <= 2 * errors[1] + 1e-6


def test_rows_are_taken_with_their_strides() -> None:
    output, log_mass, grads = case(4, 3, 5, 6)
    output, log_mass = output.transpose(0, 1), log_mass.transpose(0, 1)
    grads = Partial(grads.output.transpose(0, 1), grads.log_mass.transpose(0, 1))
    assert_close(ours(output, log_mass, grads, "before"), exact(output, log_mass, grads, "before"), 2e-5)


def test_refuses_what_it_cannot_do() -> None:
    output, log_mass, _ = case(1, 2, 3, 4)
    with pytest.raises(InputError, match="'before', 'after', 'elsewhere'"):
        scan_forward(output, log_mass, "behind")
    with pytest.raises(UnsupportedError, match="float64"):
        scan_forward(output.double(), log_mass, "before")
    with pytest.raises(UnsupportedError, match="257"):
        scan_forward(torch.zeros(1, 2, 3, 257), log_mass, "before")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_on_a_gpu(mode: str, dim: int) -> None:
    given = case(16, 130, 256, dim, scale=4.0, device="cuda")
    first, again = ours(*given, mode), ours(*given, mode)
    assert_close(first, exact(*given, mode), 1e-4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
