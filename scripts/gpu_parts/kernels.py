"""Every Triton kernel, forward and backward, against plain torch in float64, in every dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_linattn.bench.kinds import KindOptions, kind_contender
from hf_linattn.bench.timing import explain
from hf_linattn.bench.workload import DTYPES, Workload, make_inputs
from hf_linattn.functional import use_backend
from hf_linattn.kernels.attend import attend
from hf_linattn.kernels.attention_state import AttentionState
from hf_linattn.kernels.block_slots import BlockReach, block_slot_attention
from hf_linattn.kernels.causal_slots import causal_slot_attention
from hf_linattn.kernels.decode import decode_step
from hf_linattn.kernels.slot_inputs import SlotInputs
from hf_linattn.kernels.window_chunks import window_chunk_attention
from hf_linattn.modules.registry import list_kinds
from isolated import Finding

from .context import Context
from .pool import in_processes

KERNELS = (
    "attend, few keys",
    "attend, few queries",
    "causal",
    "blocks",
    "blocks, causal",
    "window_chunks",
    "window_chunks, causal",
    "decode_step",
)

# Processes at a time, in each of the parts that run side by side: more of them only wait for each other.
WORKERS = 4
# Relative errors may be twice those of plain torch in the same dtype, and so many roundings.
ROUNDINGS = {"float32": 32.0, "bfloat16": 2.0, "float16": 2.0}


@dataclass(frozen=True)
class Case:
    """A call of a kernel.

    Args:
        function: Its results, from the tensors of `inputs`.
        inputs: By name, float64. A name with "bias" or "mass" stays float32 where the rest is half precision.
    """

    name: str
    function: Callable[..., Sequence[Tensor]]
    inputs: dict[str, Tensor]
    has_gradients: bool = True


class _Maker:
    """Normal numbers, other ones for every tensor."""

    def __init__(self, device: str) -> None:
        self.generator, self.device = torch.Generator().manual_seed(0), device

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.device) * scale


def case(name: str, device: str, dim: int, small: bool) -> Case:
    """One of `KERNELS` at a realistic size, or at a small one."""
    make, scale = _Maker(device), dim**-0.25
    lead = (1, 2) if small else (4, 8)
    tokens, slots, length = (70, 20, 16) if small else (2000, 256, 64)
    units, groups = tokens // length, lead[0] * lead[1]
    is_causal = name.endswith(", causal")

    def tokens_and_value(*shape: int, bias: bool = True) -> dict[str, Tensor]:
        sides = {"query": make(*shape, dim, scale=scale), "key": make(*shape, dim, scale=scale)}
        biases = {"query bias": make(*shape), "key bias": make(*shape)} if bias else {}
        return sides | biases | {"value": make(*shape, dim)}

    maps = {
        "query slots": make(*lead, slots, dim, scale=scale),
        "query slot bias": make(*lead, slots),
        "key slots": make(*lead, slots, dim, scale=scale),
        "key slot bias": make(*lead, slots),
    }
    if name.startswith("attend"):
        queries, keys = (tokens, slots) if name == "attend, few keys" else (slots, tokens)
        inputs = {
            "query": make(*lead, queries, dim, scale=scale),
            "key": make(*lead, keys, dim, scale=scale),
            "value": make(*lead, keys, dim),
            "bias": make(*lead, keys),
        }
        return Case(name, lambda query, key, value, bias: attend(query, key, value, bias=bias), inputs)
    order = [name.replace("_", " ") for name in SlotInputs._fields]
    if name == "causal":
        inputs = tokens_and_value(*lead, tokens) | maps
        return Case(name, lambda *z: causal_slot_attention(SlotInputs(*z), 64), {name: inputs[name] for name in order})
    if name.startswith("blocks"):
        inputs = tokens_and_value(*lead, units, length) | maps
        reach = BlockReach(1, 0, is_causal)
        return Case(
            name, lambda *z: block_slot_attention(SlotInputs(*z), reach), {name: inputs[name] for name in order}
        )
    if name.startswith("window_chunks"):
        start = torch.arange(units, device=device)
        end = torch.full_like(start, units) if is_causal else start + 1
        inputs = tokens_and_value(groups, units, length, bias=False) | {
            "chunk key": make(groups, units, dim, scale=scale),
            "chunk bias": make(groups, units),
            "chunk value": make(groups, units, dim),
        }
        return Case(name, lambda *z: window_chunk_attention(*z[:3], None, is_causal, *z[3:], start, end), inputs)
    state = {"state mean": make(*lead, slots, dim), "state mass": make(*lead, slots)}
    inputs = tokens_and_value(*lead, 1) | maps
    return Case(name, _decoded, {name: inputs[name] for name in order} | state, has_gradients=False)


def _decoded(*tensors: Tensor) -> tuple[Tensor, ...]:
    found = decode_step(SlotInputs(*tensors[:8]), AttentionState(*tensors[8:]))
    return found.output, found.lse, *found.state


def kernels(context: Context) -> Iterator[Finding]:
    """A finding for every kernel, head_dim and dtype: its largest relative error, and that of plain torch."""
    dims = ("8",) if context.is_rehearsal else ("64", "80+128+32")
    names = [f"{name}/{dtype}/{several}" for several in dims for dtype in DTYPES for name in KERNELS]
    return in_processes(one_kernel, context, names, 2 if context.is_rehearsal else WORKERS)


def one_kernel(context: Context, name: str) -> Iterator[Finding]:
    name, dtype, dims = name.split("/")
    for dim in map(int, dims.split("+")):
        finding: Finding = {"kernel": name, "head_dim": dim, "dtype": dtype}
        try:
            yield finding | _compare(case(name, context.device, dim, context.is_rehearsal), dtype)
        except Exception as error:
            yield finding | {"failed": True, "reason": explain(error)}
        context.synchronize()


def kinds(context: Context) -> Iterator[Finding]:
    """The same for whole attention functions, as models call them: every kind, with and without a window."""
    dtypes = ("float32",) if context.is_rehearsal else tuple(DTYPES)
    names = [f"{kind}/{dtype}" for dtype in dtypes for kind in list_kinds()]
    return in_processes(one_kind, context, names, 2 if context.is_rehearsal else WORKERS)


def one_kind(context: Context, name: str) -> Iterator[Finding]:
    kind, dtype = name.split("/")
    tokens, heads, dim = (48, 2, 8) if context.is_rehearsal else (2000, 8, 64)
    options = KindOptions(16, 8, 8, 0, 16, 8) if context.is_rehearsal else KindOptions()
    windows = (16 if context.is_rehearsal else 64,) if kind == "eva" else (0, 16 if context.is_rehearsal else 64)
    for is_causal in (False, True):
        for window in windows:
            title = f"{kind}, window {window}" + (", causal" if is_causal else "")
            finding: Finding = {"kernel": title, "head_dim": dim, "dtype": dtype}
            work = Workload(tokens, 2, heads, dim, is_causal, dtype, device=context.device)
            try:
                attention = kind_contender(kind, replace(options, window_size=window)).build(work)
                query, key, value, _ = (z.detach() for z in make_inputs(work))
                inputs = {"query": query, "key": key, "value": value}
                yield finding | _compare(Case(title, lambda *z, a=attention: (a(*z),), inputs), dtype)
            except Exception as error:
                yield finding | {"failed": True, "reason": explain(error)}
            context.synchronize()


def _compare(case: Case, dtype: str) -> Finding:
    given = {name: z.to(_dtype_of(name, dtype)) for name, z in case.inputs.items()}
    exact = _run(case, {name: z.double() for name, z in given.items()}, "torch")
    plain = _run(case, given, "torch")
    found, again = _run(case, given, "triton"), _run(case, given, "triton")
    roundings = ROUNDINGS[dtype] * torch.finfo(DTYPES[dtype]).eps
    worst: dict[str, Any] = {"share": -1.0}
    for name, best in exact.items():
        error, other = _relative(found[name], best), _relative(plain[name], best)
        share = error / (2 * other + roundings)  # of what is allowed
        if not share <= worst["share"]:  # NaN is the worst
            worst = {"error": error, "torch_error": other, "share": share, "tensor": name}
            if share != share:
                break
    if not worst["share"] <= 1:
        worst |= {"failed": True, "reason": f"{worst['tensor']}: less exact than plain torch in this dtype"}
    elif not all(torch.equal(found[name], again[name]) for name in found):
        worst |= {"failed": True, "reason": "two runs differ"}
    return worst


def _dtype_of(name: str, dtype: str) -> torch.dtype:
    is_wide = "bias" in name or "mass" in name or name.startswith("state")
    return torch.float32 if is_wide else DTYPES[dtype]


def _run(case: Case, inputs: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Results and gradients by name."""
    leaves = {name: z.detach().clone().requires_grad_(case.has_gradients) for name, z in inputs.items()}
    with use_backend(backend):
        results = case.function(*leaves.values())
    found = {f"result {number}": z.detach() for number, z in enumerate(results)}
    if case.has_gradients:
        seen = [z.masked_fill(z == float("-inf"), 0.0) for z in results]
        make = _Maker(str(seen[0].device))
        grads = [make(*z.shape).to(z.dtype) for z in seen]
        of_inputs = torch.autograd.grad(seen, list(leaves.values()), grads)
        found |= {f"gradient of {name}": z for name, z in zip(leaves, of_inputs, strict=True)}
    return found


def _relative(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||; infinite entries have to be the same ones."""
    infinite = exact == float("-inf")
    if not torch.equal(infinite, found == float("-inf")):
        return float("nan")
    off = (found.double() - exact).masked_fill(infinite, 0.0).norm()
    return float(off / exact.masked_fill(infinite, 0.0).norm().clamp_min(1e-30))
