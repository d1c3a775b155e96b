"""Time and memory beside softmax and other libraries: attention alone, whole models, generation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hf_linattn.bench.attention import run_attention
from hf_linattn.bench.generation import run_generation
from hf_linattn.bench.kinds import KindOptions
from hf_linattn.bench.memory import peak_bytes
from hf_linattn.bench.models import run_models
from hf_linattn.bench.plan import Plan, new_row
from hf_linattn.bench.results import Row
from hf_linattn.bench.timing import explain
from hf_linattn.bench.workload import MODES, make_inputs, make_step
from hf_linattn.modules.registry import list_kinds
from isolated import Finding

from .context import Context
from .kernels import WORKERS
from .pool import in_processes

PEERS = ("sdpa", "performer-pytorch", "flash-linear-attention")
REHEARSED = KindOptions(num_features=16, num_landmarks=8, num_chunks=8, window_size=0, eva_window=16, eva_chunk_size=8)
FEW = KindOptions(num_features=64, num_landmarks=64, num_chunks=64)  # and a window of 32
MANY = KindOptions()


def _plan(context: Context, **changes: Any) -> Plan:
    """BERT-base's heads on a GPU, in bfloat16; almost nothing in a rehearsal."""
    common: dict[str, Any] = {"kinds": tuple(list_kinds()), "device": context.device, "max_softmax_length": None}
    if context.is_rehearsal:
        small = {"lengths": (32,), "batch": 1, "heads": 2, "head_dim": 8, "options": REHEARSED, "dtypes": ("float32",)}
        return Plan(**common | changes | small | {"seconds": 1e-3, "windows": (0,)})
    sizes = {"batch": 8, "heads": 12, "dtypes": ("bfloat16",), "options": MANY, "seconds": 0.08}
    return Plan(**common | sizes | changes)


def _rows(rows: list[Row]) -> Iterator[Finding]:
    for row in rows:
        yield {"row": row.to_dict()}


def attention(context: Context) -> Iterator[Finding]:
    """Every kind beside every backend of softmax at three lengths, forward and training step, then peak memory."""
    lengths = (512, 2048, 16384)
    few = _plan(context, lengths=lengths, options=FEW, windows=(32,), peers=("sdpa",))
    many = _plan(context, lengths=lengths)
    for mode in MODES:
        for is_causal in (False, True):
            for plan in (many, few):
                for rows in run_attention(replace(plan, modes=(mode,), causal=(is_causal,))):
                    yield from _rows(_renamed(rows, plan))
    for is_causal in (False, True):
        yield from _peaks(replace(many, causal=(is_causal,)))


def warm_up(context: Context) -> Iterator[Finding]:
    """Compile, on all processors, the kernels of the parts that measure time; Triton keeps them on disk."""
    names = [
        f"{kind}/{mode}/{int(is_causal)}/{int(is_few)}"
        for mode in reversed(MODES)
        for kind in list_kinds()
        for is_causal in (False, True)
        for is_few in (False, True)
    ]
    return in_processes(_warm_up, context, names, 2 if context.is_rehearsal else WORKERS)


def _warm_up(context: Context, name: str) -> Iterator[Finding]:
    kind, mode, is_causal, is_few = name.split("/")
    options = {"options": FEW, "windows": (32,)} if int(is_few) else {}
    plan = _plan(context, lengths=(512, 2048, 16384), **options, kinds=(kind,), peers=())
    # The batch too is that of the measurement: Triton compiles anew for sizes that are 1 or no multiple of 16.
    plan = replace(plan, kinds=(kind,), modes=(mode,), causal=(bool(int(is_causal)),))
    start = time.perf_counter()
    for work in plan.workloads():
        for contender in plan.contenders():
            make_step(contender.build(work), make_inputs(work), work)()
    context.synchronize()
    yield {"warmed_up": name, "seconds": round(time.perf_counter() - start, 1)}


def _renamed(rows: list[Row], plan: Plan) -> list[Row]:
    """Rows of few features have names of their own; softmax was measured once more beside them and is left out."""
    if plan.options != FEW:
        return rows
    options = plan.options
    return [replace(row, name=f"{row.name}, {options.num_features} slots") for row in rows if row.group == "linear"]


def _peaks(plan: Plan) -> Iterator[Finding]:
    for work in plan.workloads("forward+backward"):
        rows = []
        for contender in plan.contenders():
            row = new_row("memory", contender, work)
            try:
                step = make_step(contender.build(work), make_inputs(work), work)
                step()  # what is made once is not part of a step
                row = replace(row, peak=peak_bytes(step, plan.device))
            except Exception as error:
                row = replace(row, reason=explain(error))
            rows.append(row)
        yield from _rows(rows)


def other_lengths(context: Context) -> Iterator[Finding]:
    """From 128 to 65536 tokens, then the other dtypes; the most wanted first, since this part ends with the time."""
    long = _plan(context, lengths=(128, 1024, 4096, 8192, 32768, 65536), batch=1, seconds=0.06, peers=PEERS)
    for mode in MODES:
        for is_causal in (False, True):
            for rows in run_attention(replace(long, modes=(mode,), causal=(is_causal,))):
                yield from _rows(rows)
    for dtype in ("float16", "float32"):
        plan = _plan(context, lengths=(2048, 16384), batch=2, dtypes=(dtype,), seconds=0.06)
        for rows in run_attention(plan):
            yield from _rows(rows)


def models(context: Context) -> Iterator[Finding]:
    """Training step and forward pass of BERT-base, GPT-2 and ViT-base sizes, converted."""
    plan = _plan(context, lengths=(512, 4096), options=FEW, seconds=0.08, models=("bert", "gpt2", "vit"))
    plan = replace(plan, layers=1 if context.is_rehearsal else None)
    plan = replace(plan, windows=(16,) if context.is_rehearsal else (32,))
    for mode in reversed(MODES):
        for rows in run_models(replace(plan, modes=(mode,))):
            yield from _rows(rows)


def generation(context: Context) -> Iterator[Finding]:
    """Time per token and size of the cache behind short and long contexts, kind by kind; GPT-2's width."""
    sizes = {"layers": 1, "piece": 32} if context.is_rehearsal else {"layers": 6, "piece": 4096}
    for number, kind in enumerate(("favor_plus", "lara", "favor_sharp", "eva")):
        plan = _plan(context, lengths=(1024, 16384), batch=8, seconds=0.2, causal=(True,), kinds=(kind,), **sizes)
        for rows in run_generation(replace(plan, windows=(None,))):
            yield from _rows([row for row in rows if row.group == "linear" or not number])
