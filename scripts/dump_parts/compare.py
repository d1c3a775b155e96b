"""Two dumps side by side: the worst difference of every group, and what only one of them has."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from .record import Record

# Largest difference allowed, relative to the largest entry of the tensor. Other matrix kernels of the same library
# (`ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2`) stay within these limits.
OUTPUT_LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
# Sums over all tokens of a batch, after all layers of a model.
GRADIENT_LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2}
STATE_LIMIT = 1e-4  # float32 sums over the tokens before, of a second layer
# A gradient that is 0 but for rounding (that of a key's bias) is measured against this share of the largest of its
# case, more in bfloat16.
LEAST_SHARE = 1e-3
LEAST_SHARE_OF_HALF = 5e-2
TINY = 1e-30


def compare(before: Record, after: Record, shown: int = 20) -> bool:
    """Print the differences of two dumps. Returns whether all are within the limits and nothing is missing."""
    faults = _missing(before, after)
    for name in sorted(before.texts.keys() & after.texts.keys()):
        if before.texts[name] != after.texts[name]:
            faults.append(f"{name}: {before.texts[name]!r} has become {after.texts[name]!r}")
    least = _least_scales(before)
    groups: dict[str, list[tuple[float, float, float, str]]] = defaultdict(list)
    for name in before.tensors.keys() & after.tensors.keys():
        absolute, relative = _difference(before.tensors[name], after.tensors[name], least.get(_case(name), 0.0))
        limit = _limit(name, before.tensors[name])
        groups[_group(name)].append((relative, absolute, limit, name))
        if not relative <= limit:
            faults.append(f"{name}: off by {absolute:.2e}, relative {relative:.2e}, limit {limit:.0e}")
    print(f"{'group':34} {'tensors':>7} {'absolute':>9} {'relative':>9}  worst")
    for group, rows in sorted(groups.items()):
        relative, _, _, name = max(rows, key=lambda row: (math.isnan(row[0]), row[0] / max(row[2], TINY)))
        absolute = max(row[1] for row in rows)
        print(f"{group:34} {len(rows):7} {absolute:9.1e} {relative:9.1e}  {name.partition('/')[2]}")
    for fault in faults[:shown]:
        print("FAULT", fault)
    if len(faults) > shown:
        print(f"... and {len(faults) - shown} more faults")
    print(f"{len(before.tensors)} tensors and {len(before.texts)} texts before: {len(faults)} faults")
    return not faults


def _missing(before: Record, after: Record) -> list[str]:
    faults = []
    for kind in ("tensors", "texts"):
        old, new = getattr(before, kind), getattr(after, kind)
        faults += [f"{name}: missing after" for name in sorted(old.keys() - new.keys())]
        faults += [f"{name}: missing before" for name in sorted(new.keys() - old.keys())]
    return faults


def _difference(before: Tensor, after: Tensor, least: float) -> tuple[float, float]:
    """Largest difference, absolute and relative to the largest entry, or to `least`. NaN and inf have to be equal."""
    if before.shape != after.shape or before.dtype != after.dtype:
        return math.inf, math.inf
    if not before.numel() or torch.equal(before, after):
        return 0.0, 0.0
    if not before.is_floating_point():
        return math.inf, math.inf
    before, after = before.double(), after.double()
    finite = before.isfinite()
    if not torch.equal(finite, after.isfinite()) or not torch.equal(
        before[~finite].nan_to_num(), after[~finite].nan_to_num()
    ):
        return math.inf, math.inf
    if not finite.any():
        return 0.0, 0.0
    absolute = float((before - after)[finite].abs().max())
    scale = max(float(before[finite].abs().max()), least)
    return absolute, absolute / scale if scale else math.inf


def _limit(name: str, tensor: Tensor) -> float:
    limits = GRADIENT_LIMITS if _is_gradient(name) else OUTPUT_LIMITS
    if tensor.dtype == torch.float32 and "bfloat16" in name:
        return limits[torch.bfloat16]  # made of halves
    return STATE_LIMIT if "/state " in name and tensor.dtype == torch.float32 else limits.get(tensor.dtype, 0.0)


def _least_scales(record: Record) -> dict[str, float]:
    """Of each case: a share of the largest entry of all its gradients."""
    scales: dict[str, float] = defaultdict(float)
    for name, tensor in record.tensors.items():
        if _is_gradient(name) and tensor.numel():
            share = LEAST_SHARE_OF_HALF if tensor.dtype == torch.bfloat16 else LEAST_SHARE
            largest = float(tensor.double().abs().nan_to_num().max())
            scales[_case(name)] = max(scales[_case(name)], share * largest)
    return scales


def _is_gradient(name: str) -> bool:
    return "gradient " in name


def _case(name: str) -> str:
    return name.rpartition("/")[0] if _is_gradient(name) else ""


def _group(name: str) -> str:
    return name.partition("/")[0] + (" gradients" if _is_gradient(name) else "")
