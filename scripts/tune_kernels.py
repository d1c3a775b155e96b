"""Measure block sizes of the Triton kernels on the GPU at hand: where the tables in `kernels/` come from.

    python scripts/tune_kernels.py --out tuning.json --seconds 120

Kernels are compiled on all processors first, then timed one by one. Nothing chooses block sizes at run time: a table
that a person has read is the same everywhere, and a first call compiles one kernel, not dozens.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import torch
import typer
from torch import Tensor

from hf_linattn.kernels import triton_common as _common
from hf_linattn.kernels.attend import triton_launch as attend
from hf_linattn.kernels.attention_state import AttentionState
from hf_linattn.kernels.causal_slots import triton_launch as intra_chunk
from hf_linattn.kernels.slot_inputs import SlotInputs
from hf_linattn.kernels.window_chunks import triton_launch as window_chunks
from hf_linattn.kernels.window_chunks.torch_kernel import WindowChunkInputs

GROUPS, LONG, SLOTS, WINDOW = (8, 12), 8192, 256, 64
WORKERS = 16
COMPILING = 0.75  # of the time


class Trial(NamedTuple):
    """One kernel at one choice of block sizes."""

    case: str
    dim: int
    dtype: str
    blocks: tuple[int, int]
    num_warps: int
    num_stages: int


ATTENDS = ("few keys", "few queries", "gradient of queries", "gradient of keys", "gradient of slots")


def trials() -> Iterator[Trial]:
    """The most wanted first: what is not compiled when most of the time is over is left out."""
    wide, narrow = ((64, 128), (32, 64, 128), (4, 8), (2, 3)), ((32, 64), (32, 64), (4, 8), (2,))
    for dim, dtype, choices in ((64, "bfloat16", wide), (64, "float32", narrow), (128, "bfloat16", wide)):
        for case in ATTENDS:
            for q, k, warps, stages in itertools.product(*choices):
                yield Trial(case, dim, dtype, (q, k), warps, stages)
        for case in ("windows", "windows backward") if dim == 64 else ():
            for q, k, warps in itertools.product((32, 64), (32, 64), (4, 8)):
                yield Trial(case, dim, dtype, (q, k), warps, 2)
        for case in ("intra-chunk", "intra-chunk backward") if dim == 64 else ():
            for tile, warps in itertools.product((16, 32, 64) if dtype == "bfloat16" else (16, 32), (4, 8)):
                yield Trial(case, dim, dtype, (64, tile), warps, 2 if dtype == "bfloat16" else 1)


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(*shape, device="cuda") / 4).to(dtype)


def call_of(trial: Trial) -> Callable[[], object]:
    """The call to time, on tensors of a realistic size."""
    dtype = getattr(torch, trial.dtype)
    groups = GROUPS[0] * GROUPS[1]
    if trial.case.startswith("intra-chunk"):
        x, slots = _random(groups, 2048, trial.dim, dtype=dtype), _random(groups, SLOTS, trial.dim, dtype=dtype)
        bias, slot_bias = torch.zeros(groups, 2048, device="cuda"), torch.zeros(groups, SLOTS, device="cuda")
        inputs = SlotInputs(x, slots, slot_bias, x, bias, slots, slot_bias, x)
        if trial.case == "intra-chunk":
            return lambda: intra_chunk.intra_chunk_forward(inputs, 64)
        result = AttentionState(*intra_chunk.intra_chunk_forward(inputs, 64))
        return lambda: intra_chunk.intra_chunk_backward(result, inputs, result, [True] * 8, 64)
    if trial.case.startswith("windows"):
        windows = LONG // WINDOW
        tokens = _random(groups, windows, WINDOW, trial.dim, dtype=dtype)
        chunk, chunk_bias = _random(groups, 64, trial.dim, dtype=dtype), torch.zeros(groups, 64, device="cuda")
        hidden = torch.zeros(windows, dtype=torch.int32, device="cuda")
        inputs = WindowChunkInputs(tokens, tokens, tokens, None, chunk, chunk_bias, chunk, hidden, hidden)
        if trial.case == "windows":
            return lambda: window_chunks.window_chunks_forward(inputs, False)
        result = AttentionState(*window_chunks.window_chunks_forward(inputs, False))
        return lambda: window_chunks.window_chunks_backward(result, inputs, result, [True] * 6, False)
    many, few = (_random(*GROUPS, n, trial.dim, dtype=dtype) for n in (LONG, SLOTS))
    if trial.case in ("few keys", "gradient of queries", "gradient of slots"):
        inputs = (many, few, few, torch.zeros(*GROUPS, SLOTS, device="cuda"), None)
    else:
        inputs = (few, many, many, torch.zeros(*GROUPS, LONG, device="cuda"), None)
    if trial.case.startswith("few"):
        return lambda: attend.attend_forward(*inputs)
    results = attend.attend_forward(*inputs)
    needs = (True, False, False, False) if trial.case == "gradient of queries" else (False, True, True, True)
    return lambda: attend.attend_backward(*results, *inputs, *results, needs)


class _Chosen:
    """Inside, kernels run with the blocks of a trial."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        size = 2 if trial.dtype == "bfloat16" else 4
        (q, k), key = trial.blocks, (size, trial.dim)
        row: Any = attend._Blocks(q, k, trial.num_warps, trial.num_stages)
        tables: list[Any] = []
        if trial.case.startswith("windows"):
            tables, row = [window_chunks._FORWARD, window_chunks._BACKWARD], (q, k)
        elif not trial.case.startswith("intra-chunk"):
            named = {"gradient of queries": attend._OF_QUERIES}
            default = attend._FORWARD if trial.case.startswith("few") else attend._OF_KEYS
            tables = [named.get(trial.case, default)]
        self.saved = [(table, key, table[key], row) for table in tables]

    def __enter__(self) -> None:
        for table, key, _, row in self.saved:
            table[key] = row
        trial = self.trial

        def launched(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
            if trial.case.startswith("intra-chunk"):
                options["TILE"] = trial.blocks[1]
            options |= {"num_warps": trial.num_warps, "num_stages": trial.num_stages}
            _common.launch(kernel, programs, *arguments, **options)

        if trial.case.startswith(("intra-chunk", "windows")):
            intra_chunk.launch = window_chunks.launch = launched  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        for table, key, before, _ in self.saved:
            table[key] = before
        intra_chunk.launch = window_chunks.launch = _common.launch  # type: ignore[assignment]


def compile_trial(trial: Trial) -> str:
    """In a process of its own: the compiled kernels stay on disk."""
    try:
        with _Chosen(trial):
            call_of(trial)()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:120]
    return ""


def milliseconds(call: Callable[[], object]) -> float:
    """The median of several calls."""
    times = []
    for _ in range(2):
        call()
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def main(out: Annotated[Path, typer.Option()], seconds: Annotated[float, typer.Option()] = 120.0) -> None:
    """Time all trials, as far as the time goes, and print the fastest of each case."""
    start = time.monotonic()
    chosen = list(trials())
    compiled: list[tuple[Trial, str]] = []
    # All of it before anything is timed: the workers use the GPU too.
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        results = [(trial, pool.apply_async(compile_trial, (trial,))) for trial in chosen]
        for trial, result in results:
            try:
                compiled.append((trial, result.get(max(0.0, COMPILING * seconds - (time.monotonic() - start)))))
            except multiprocessing.TimeoutError:
                continue
        pool.terminate()
    found: list[dict[str, Any]] = []
    for trial, reason in compiled:
        if time.monotonic() - start > seconds:
            break
        entry: dict[str, Any] = trial._asdict()
        if reason:
            entry["reason"] = reason
        else:
            with _Chosen(trial):
                entry["ms"] = milliseconds(call_of(trial))
        found.append(entry)
    out.write_text(json.dumps(found))
    best: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for entry in found:
        if "ms" in entry:
            best.setdefault((entry["case"], entry["dim"], entry["dtype"]), []).append(entry)
    for key, entries in best.items():
        entries.sort(key=lambda entry: entry["ms"])
        shown = [(e["blocks"], e["num_warps"], e["num_stages"], round(e["ms"], 3)) for e in entries[:4]]
        print(key, "slowest", round(entries[-1]["ms"], 3), "fastest", shown)
    print(f"{len(found)} of {len(chosen)} trials, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    typer.run(main)
