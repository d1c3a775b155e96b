"""How fast the kinds have to be on one CPU core, and how fast they are.

    python experiments/targets.py                       # everything; writes experiments/results/targets_cpu.json
    python experiments/targets.py --quick --only window # fewer repeats, only claims whose name contains "window"

Each claim is a ratio of times, softmax (or another library) over ours, both in this process and taking turns; or the
growth of a training step's memory with the number of tokens. The functions called are those registered with
Transformers, on given queries, keys and values: batch 1, 4 heads of 64, 256 features.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import hf_linattn
from hf_linattn.bench.cases import Implementation, Workload, make_inputs, make_step
from hf_linattn.bench.environment import describe
from hf_linattn.bench.measure import Failure, Timing, explain, slope, time_interleaved
from hf_linattn.bench.memory import measure_peaks
from hf_linattn.bench.ours import KindOptions, kind_implementation
from hf_linattn.bench.peers import peer_implementations

RESULTS = Path(__file__).resolve().parent / "results" / "targets_cpu.json"
NUM_FEATURES = 256
MATH_TOKENS = 4096  # longer, its matrices of weights take gigabytes
LENGTHS = (4096, 8192, 16384, 32768, 65536)
MEMORY_SLOPE = 1.05
PLAIN = KindOptions(num_features=NUM_FEATURES, num_landmarks=64, num_chunks=64)
WINDOW = replace(PLAIN, window_size=64)
CAUSAL_EVA = replace(PLAIN, eva_window=128, eva_chunk_size=16)
SOFTMAX, PERFORMER = "sdpa", "performer-pytorch"
console = Console()


@dataclass(frozen=True)
class Claim:
    """`kind` is at least `target` times faster than `against`."""

    kind: str
    options: KindOptions
    work: Workload
    target: float
    stretch: float | None = None
    against: str = SOFTMAX

    @property
    def ours(self) -> Implementation:
        return kind_implementation(self.kind, self.options)

    @property
    def name(self) -> str:
        work = self.work
        direction = "causal" if work.is_causal else "bidirectional"
        return f"{self.ours.name} {direction} {work.mode} {work.dtype} {work.tokens} vs {self.against}"


def speed_claims() -> list[Claim]:
    """Every claim about time. Those with a window have to keep half of the speed without."""
    train = "forward+backward"
    favor = [
        (Workload(8192, dtype="bfloat16"), 8.0, 12.0),
        (Workload(1024, dtype="bfloat16"), 1.0, None),
        (Workload(4096), 4.5, None),
        (Workload(4096, mode=train), 4.0, None),
        (Workload(8192, mode=train), 7.0, None),
    ]
    causal = Workload(8192, mode=train, is_causal=True)
    performer = [Workload(4096, mode=mode, is_causal=c) for c in (False, True) for mode in ("forward", train)]
    return [
        *(Claim("favor_plus", PLAIN, work, target, stretch) for work, target, stretch in favor),
        *(Claim("favor_plus", WINDOW, work, target / 2) for work, target, _ in favor),
        Claim("eva", PLAIN, Workload(4096), 8.0),
        Claim("lara", PLAIN, Workload(4096), 8.0),
        Claim("favor_plus", PLAIN, causal, 4.0),
        Claim("eva", CAUSAL_EVA, causal, 6.0),
        *(Claim("favor_plus", PLAIN, work, 3.0, against=PERFORMER) for work in performer),
    ]


def memory_claims() -> list[tuple[str, Workload, KindOptions]]:
    """Kinds whose memory must grow in proportion to the tokens; causal EVA has a summary per chunk, so it need not."""
    train = Workload(LENGTHS[0], mode="forward+backward")
    kinds = ("favor_plus", "favor_sharp", "lara", "eva")
    both = [(kind, work) for work in (train, replace(train, is_causal=True)) for kind in kinds]
    chosen = [(kind, work, PLAIN) for kind, work in both if kind != "eva" or not work.is_causal]
    return [*chosen, ("favor_plus", train, WINDOW)]


def build(implementation: Implementation, inputs: Any, work: Workload) -> Any:
    try:
        return make_step(implementation.build(work), inputs, work)
    except Exception as error:
        return Failure(explain(error))


def race(work: Workload, claims: list[Claim], seconds: float, rounds: int) -> dict[str, Timing | Failure]:
    """All implementations that the claims about one workload name, timed in turns."""
    peers = peer_implementations(["sdpa", PERFORMER], "cpu", NUM_FEATURES)
    wanted = {claim.against for claim in claims} | ({"sdpa:math"} if work.tokens <= MATH_TOKENS else set())
    racers = {peer.name: peer for peer in peers if peer.name in wanted}
    racers |= {claim.ours.name: claim.ours for claim in claims}
    inputs = make_inputs(work)
    built = {name: build(racer, inputs, work) for name, racer in racers.items()}
    runnable = {name: step for name, step in built.items() if not isinstance(step, Failure)}
    failed = {name: step for name, step in built.items() if isinstance(step, Failure)}
    return {**failed, **time_interleaved(runnable, seconds=seconds, min_rounds=rounds)}


def judge(claim: Claim, found: dict[str, Timing | Failure]) -> dict[str, Any]:
    """One row: the ratio of medians, and what it is against the fastest softmax backend."""
    ours, other = found[claim.ours.name], found[claim.against]
    row: dict[str, Any] = {"name": claim.name, "target": claim.target, "stretch": claim.stretch, "ratio": None}
    row |= {"workload": claim.work.to_dict(), "kind": claim.kind, "settings": asdict(claim.options)}
    failures = [f"{name}: {result.reason}" for name, result in found.items() if isinstance(result, Failure)]
    if isinstance(ours, Failure) or isinstance(other, Failure):
        return {**row, "verdict": "not measured", "reason": "; ".join(failures)}
    plain = found.get(replace(claim, options=PLAIN).ours.name)
    if claim.options.window_size and isinstance(plain, Timing):
        row["window_cost"] = ours.median / plain.median  # times as long as without a window
    softmax = [r.median for n, r in found.items() if n.startswith(SOFTMAX) and isinstance(r, Timing)]
    ratio = other.median / ours.median
    return {
        **row,
        "ratio": ratio,
        "ratio_of_minima": other.minimum / ours.minimum,
        "ratio_to_best_softmax": min(softmax) / ours.median if softmax else None,
        "seconds": ours.median,
        "reference_seconds": other.median,
        "samples": [len(ours.samples), len(other.samples)],
        "verdict": "pass" if ratio >= claim.target else "miss",
    }


def speed_rows(claims: list[Claim], dtypes: list[str], seconds: float, rounds: int) -> Iterator[dict[str, Any]]:
    """Measured rows, workload by workload; every claim also in the other precision, for information."""
    for base in dict.fromkeys(replace(claim.work, dtype="float32") for claim in claims):
        about = [claim for claim in claims if replace(claim.work, dtype="float32") == base]
        for dtype in ("float32", "bfloat16"):
            work = replace(base, dtype=dtype)
            members = [replace(claim, work=work) for claim in about if dtype in dtypes or claim.work == work]
            if not members:
                continue
            found = race(work, members, seconds, rounds)
            for claim in members:
                row = judge(claim, found)
                if all(claim.work != other.work for other in about if other.ours.name == claim.ours.name):
                    row |= {"verdict": "for information" if row["ratio"] else "not measured", "target": None}
                yield row


def memory_rows(lengths: tuple[int, ...], only: str) -> Iterator[dict[str, Any]]:
    """Growth of a training step's peak memory."""
    for kind, base, options in memory_claims():
        implementation = kind_implementation(kind, options)
        direction = "causal" if base.is_causal else "bidirectional"
        name = f"memory {implementation.name} {direction} {lengths[0]}..{lengths[-1]}"
        if only not in name:
            continue
        works = [replace(base, tokens=tokens) for tokens in lengths]
        peaks = list(measure_peaks(kind, options, works))
        known = [(work.tokens, peak) for work, peak, _ in peaks if peak]
        found = slope(known)
        reasons = [f"{work.tokens}: {reason}" for work, _, reason in peaks if reason]
        complete = found is not None and len(known) == len(lengths)
        yield {
            "name": name,
            "target": MEMORY_SLOPE,
            "slope": found,
            "mebibytes": {str(tokens): round(peak / 2**20, 1) for tokens, peak in known},
            "reason": "; ".join(reasons),
            "verdict": ("pass" if found <= MEMORY_SLOPE else "miss") if complete and found else "not measured",
        }


def show(row: dict[str, Any]) -> str:
    """One line about a row."""
    if row.get("ratio") is not None:
        best = f"   best backend {row['ratio_to_best_softmax']:.2f}x" if row["ratio_to_best_softmax"] else ""
        times = f"{row['reference_seconds'] * 1e3:.1f} / {row['seconds'] * 1e3:.1f} ms"
        if "window_cost" in row:
            best += f"   the window takes {row['window_cost']:.2f} times the time without"
        target = "" if row["target"] is None else f" (target {row['target']:g}x)"
        return f"{row['verdict']:>15}  {row['ratio']:6.2f}x{target:<15} {row['name']}   {times}{best}"
    if row.get("slope") is not None:
        sizes = " ".join(f"{mib:.0f}" for mib in row["mebibytes"].values())
        return f"{row['verdict']:>15}  {row['slope']:6.3f} (at most {row['target']}) {row['name']}   {sizes} MiB"
    return f"{row['verdict']:>15}  {row['name']}   {row['reason']}"


def summary(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Targets, one CPU core")
    for column in ("claim", "target", "measured", "verdict"):
        table.add_column(column, justify="left" if column == "claim" else "right")
    for row in rows:
        if row["verdict"] == "for information":
            continue
        is_ratio = "ratio" in row
        value = row["ratio"] if is_ratio else row["slope"]
        measured = "-" if value is None else f"{value:.2f}x" if is_ratio else f"slope {value:.3f}"
        target = "" if row["target"] is None else f">= {row['target']:g}x" if is_ratio else f"<= {row['target']}"
        colour = {"pass": "green", "miss": "red"}.get(row["verdict"], "yellow")
        table.add_row(row["name"], target, measured, f"[{colour}]{row['verdict']}[/]")
    return table


def main(
    quick: Annotated[bool, typer.Option(help="Fewer repeats, one precision, memory only to 16384 tokens.")] = False,
    only: Annotated[str, typer.Option(help="Only claims whose name contains this, e.g. 'memory' or 'causal'.")] = "",
    seconds: Annotated[float, typer.Option(help="Time for each implementation in each case.")] = 2.0,
    out: Annotated[
        Path | None, typer.Option(help="JSON file; the committed one by default, if everything was run.")
    ] = None,
) -> None:
    """Print every claim with what was measured. The exit status is 0 also where a target is missed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    claims = [claim for claim in speed_claims() if only in claim.name]
    console.print(f"{json.dumps(describe()['hardware'])}\n", soft_wrap=True, highlight=False)
    rows = []
    dtypes = [] if quick else ["float32", "bfloat16"]
    for row in speed_rows(claims, dtypes, seconds / 4 if quick else seconds, 3 if quick else 5):
        rows.append(row)
        console.print(show(row), soft_wrap=True, highlight=False)
    for row in memory_rows(LENGTHS[:3] if quick else LENGTHS, only):
        rows.append(row)
        console.print(show(row), soft_wrap=True, highlight=False)
    if not rows:
        raise typer.BadParameter(f"No claim has {only!r} in its name: {[claim.name for claim in speed_claims()]}")
    console.print(summary(rows))
    target = out or (None if quick or only else RESULTS)
    if target is not None:
        content = {"schema": 1, "command": " ".join(sys.argv), "hf_linattn": hf_linattn.__version__, **describe()}
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({**content, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {target}")


if __name__ == "__main__":
    typer.run(main)
