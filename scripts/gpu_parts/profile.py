"""Where the time of one call goes: the kernels that took most of it, and the processor's share."""

from __future__ import annotations

import time
from collections.abc import Iterator

from torch.profiler import ProfilerActivity, profile

from hf_linattn.bench.kinds import KindOptions, kind_contender
from hf_linattn.bench.timing import explain
from hf_linattn.bench.workload import MODES, Workload, make_inputs, make_step
from isolated import Finding

from .context import Context

CALLS = 3
SHOWN = 12


def profiled(context: Context) -> Iterator[Finding]:
    """Every kind at one length, with and without causality: microseconds of each GPU kernel per call."""
    tokens, batch, heads, dim = (32, 1, 2, 8) if context.is_rehearsal else (4096, 8, 12, 64)
    small = KindOptions(16, 8, 8, 0, 16, 8)
    for mode in MODES:
        for kind, window in (("favor_plus", 0), ("favor_plus", 32), ("eva", 0), ("lara", 0), ("favor_sharp", 0)):
            for is_causal in (False, True):
                options = small if context.is_rehearsal else KindOptions(window_size=window)
                dtype = "float32" if context.is_rehearsal else "bfloat16"
                work = Workload(tokens, batch, heads, dim, is_causal, dtype, mode, context.device)
                finding: Finding = {
                    "profiled": f"{kind}, window {window}" + (", causal" if is_causal else ""),
                    "mode": mode,
                    "tokens": tokens,
                }
                try:
                    attention = kind_contender(kind, options).build(work)
                    yield finding | _profile(context, make_step(attention, make_inputs(work), work))
                except Exception as error:
                    yield finding | {"failed": True, "reason": explain(error)}


def _profile(context: Context, step: object) -> Finding:
    assert callable(step)
    for _ in range(2):
        step()
    context.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        step()
    issued = (time.perf_counter() - start) / CALLS  # until the calls are on their way
    context.synchronize()
    took = (time.perf_counter() - start) / CALLS
    activities = [ProfilerActivity.CPU] if context.is_rehearsal else [ProfilerActivity.CUDA]
    with profile(activities=activities) as record:
        for _ in range(CALLS):
            step()
        context.synchronize()
    events = record.key_averages()
    clock = "self_cpu_time_total" if context.is_rehearsal else "self_device_time_total"
    costs = sorted(((getattr(e, clock), e.key, e.count) for e in events), reverse=True)
    return {
        "call_us": took * 1e6,
        "issue_us": issued * 1e6,
        "device_us": sum(cost for cost, _, _ in costs) / CALLS,
        "kernels": sum(count for _, _, count in costs) / CALLS,
        "top": [[name[:80], round(cost / CALLS, 1), count / CALLS] for cost, name, count in costs[:SHOWN]],
    }
