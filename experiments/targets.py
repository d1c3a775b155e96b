"""How fast the kinds have to be on one CPU core, and how fast they are.

    python experiments/targets.py                       # everything; writes experiments/results/targets_cpu.json
    python experiments/targets.py --quick --only window # fewer repeats, only claims whose name contains "window"

A claim is a ratio of times, softmax (or another library) over a kind, in this process and taking turns; or the growth
of a training step's memory with the number of tokens. Batch 1, 4 heads of 64, 256 features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from hf_linattn.bench.environment import write_experiment
from hf_linattn.bench.kinds import KindOptions, kind_contender
from hf_linattn.bench.memory import measure_peaks
from hf_linattn.bench.peers import peer_contenders
from hf_linattn.bench.plan import new_row, race
from hf_linattn.bench.report import rich_table
from hf_linattn.bench.results import Row, slope
from hf_linattn.bench.workload import Contender, Workload, make_inputs, make_step
from hf_linattn.modules.registry import list_kinds

RESULTS = Path(__file__).resolve().parent / "results" / "targets_cpu.json"
MATH_TOKENS = 4096  # longer, the weights of softmax without a fused kernel take gigabytes
LENGTHS = (4096, 8192, 16384, 32768, 65536)
MEMORY_SLOPE = 1.05
TRAIN = "forward+backward"
PLAIN = KindOptions()
WINDOW = KindOptions(window_size=64)
CAUSAL_EVA = KindOptions(eva_window=128)
SOFTMAX, PERFORMER = "sdpa", "performer-pytorch"


@dataclass(frozen=True)
class Claim:
    """`contender` is at least `target` times faster than `against`."""

    contender: Contender
    work: Workload
    target: float
    against: str = SOFTMAX

    @property
    def name(self) -> str:
        work = self.work
        return f"{self.contender.name} {work.direction} {work.mode} {work.dtype} {work.tokens} vs {self.against}"


def speed_claims() -> list[Claim]:
    """Every claim about time. Those with a window have to keep half of the speed without."""
    favor_plus, window = (kind_contender("favor_plus", options) for options in (PLAIN, WINDOW))
    favor = [
        (Workload(8192, dtype="bfloat16"), 8.0),
        (Workload(1024, dtype="bfloat16"), 1.0),
        (Workload(4096), 4.5),
        (Workload(4096, mode=TRAIN), 4.0),
        (Workload(8192, mode=TRAIN), 7.0),
    ]
    causal = Workload(8192, mode=TRAIN, is_causal=True)
    performer = [Workload(4096, mode=mode, is_causal=c) for c in (False, True) for mode in ("forward", TRAIN)]
    return [
        *(Claim(favor_plus, work, target) for work, target in favor),
        *(Claim(window, work, target / 2) for work, target in favor),
        Claim(kind_contender("eva", PLAIN), Workload(4096), 8.0),
        Claim(kind_contender("lara", PLAIN), Workload(4096), 8.0),
        Claim(favor_plus, causal, 4.0),
        Claim(kind_contender("eva", CAUSAL_EVA), causal, 6.0),
        *(Claim(favor_plus, work, 3.0, PERFORMER) for work in performer),
    ]


def speed_rows(claims: list[Claim], seconds: float, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each claim, measured workload by workload."""
    for work in dict.fromkeys(claim.work for claim in claims):
        members = [claim for claim in claims if claim.work == work]
        wanted = {claim.against for claim in members} | ({"sdpa:math"} if work.tokens <= MATH_TOKENS else set())
        racers = [peer for peer in peer_contenders([SOFTMAX, PERFORMER], "cpu", 256) if peer.name in wanted]
        racers += [claim.contender for claim in members]
        step = partial(_step, make_inputs(work), work)
        found = race([(new_row("attention", racer, work), partial(step, racer)) for racer in racers], seconds, rounds)
        yield from (judge(claim, {row.name: row for row in found}) for claim in members)


def _step(inputs: Any, work: Workload, contender: Contender) -> Any:
    return make_step(contender.build(work), inputs, work)


def judge(claim: Claim, found: dict[str, Row]) -> dict[str, Any]:
    """The ratio of medians; beside it what it is against the fastest softmax backend."""
    ours, other = found[claim.contender.name], found[claim.against]
    row = {"name": claim.name, "target": claim.target, "workload": vars(claim.work), "settings": ours.settings}
    if not ours.median or not other.median:
        return {**row, "verdict": "not measured", "reason": "; ".join(filter(None, (ours.reason, other.reason)))}
    ratio = other.median / ours.median
    times = {"seconds": ours.median, "reference_seconds": other.median, "ratio_to_best_softmax": ours.ratio}
    return {**row, "ratio": ratio, **times, "verdict": "pass" if ratio >= claim.target else "miss"}


def memory_rows(lengths: tuple[int, ...], only: str) -> Iterator[dict[str, Any]]:
    """Growth of a training step's peak memory; not of causal EVA, which has a summary per chunk."""
    train = Workload(lengths[0], mode=TRAIN)
    works = (train, replace(train, is_causal=True))
    claims = [(kind_contender(kind, PLAIN), work) for work in works for kind in list_kinds()]
    for contender, base in [*claims, (kind_contender("favor_plus", WINDOW), train)]:
        name = f"memory {contender.name} {base.direction} {lengths[0]}..{lengths[-1]}"
        if only not in name or name.startswith("memory eva, window 64 causal"):
            continue
        peaks = list(measure_peaks(contender, [replace(base, tokens=tokens) for tokens in lengths]))
        known = [(work.tokens, peak) for work, peak, _ in peaks if peak]
        row = {"name": name, "target": MEMORY_SLOPE, "mebibytes": {n: round(peak / 2**20, 1) for n, peak in known}}
        found = slope(known)
        if found is None or len(known) < len(lengths):
            reason = "; ".join(f"{work.tokens}: {reason}" for work, _, reason in peaks if reason)
            yield {**row, "verdict": "not measured", "reason": reason}
        else:
            yield {**row, "slope": found, "verdict": "pass" if found <= MEMORY_SLOPE else "miss"}


def line(row: dict[str, Any]) -> list[str]:
    """A line of the table: claim, target, measured, verdict."""
    if row["verdict"] == "not measured":
        shown = row["reason"]
    elif "slope" in row:
        shown = f"slope {row['slope']:.3f}"
    else:
        best = row["ratio_to_best_softmax"]
        shown = f"{row['ratio']:.2f}x" + (f" (best backend {best:.2f}x)" if best else "")
    return [row["name"], str(row["target"]), shown, row["verdict"]]


def main(
    quick: Annotated[bool, typer.Option(help="Fewer repeats, memory only to 16384 tokens.")] = False,
    only: Annotated[str, typer.Option(help="Only claims whose name contains this, e.g. 'memory' or 'causal'.")] = "",
    seconds: Annotated[float, typer.Option(help="Time for each contender in each case.")] = 2.0,
    out: Annotated[Path | None, typer.Option(help="JSON file; if everything was run, the committed one.")] = None,
) -> None:
    """Print every claim with what was measured. The exit status is 0 also where a target is missed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    claims = [claim for claim in speed_claims() if only in claim.name]
    console, rows = Console(), []
    speed = speed_rows(claims, seconds / 4 if quick else seconds, 3 if quick else 5)
    for found in (speed, memory_rows(LENGTHS[:3] if quick else LENGTHS, only)):
        for row in found:
            rows.append(row)
            console.print(*line(row), sep="   ", soft_wrap=True, highlight=False)
    if not rows:
        raise typer.BadParameter(f"No claim has {only!r} in its name: {[claim.name for claim in speed_claims()]}")
    console.print(rich_table("Targets, one CPU core", ("claim", "target", "measured", "verdict"), map(line, rows)))
    target = out or (None if quick or only else RESULTS)
    if target is not None:
        write_experiment(target, {"rows": rows})


if __name__ == "__main__":
    typer.run(main)
