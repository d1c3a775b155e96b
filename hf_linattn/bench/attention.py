"""The attention functions beside each other: time, and peak memory of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..errors import ConfigError
from ..modules.registry import list_kinds
from .cases import DTYPES, MODES, Implementation, Workload, check_output, choose, make_inputs, make_step
from .measure import explain, time_interleaved
from .memory import measure_peaks
from .ours import KindOptions, kind_implementation
from .peers import peer_implementations
from .results import Row, timed, with_ratios

Report = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """Everything that a run of `attention` or `memory` covers.

    Args:
        windows: Window sizes for every kind; 0 is none (EVA, which needs one, then takes `options.eva_window`).
        causal: Directions to run: False, True or both.
        peers: Names of `peers.PEERS`.
        seconds: Time for each implementation at each workload.
        max_softmax_length: Longest input for quadratic implementations; `None` for no limit.
    """

    lengths: tuple[int, ...]
    kinds: tuple[str, ...]
    windows: tuple[int, ...] = (0,)
    causal: tuple[bool, ...] = (False, True)
    dtypes: tuple[str, ...] = ("float32",)
    modes: tuple[str, ...] = MODES
    peers: tuple[str, ...] = ("sdpa",)
    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    options: KindOptions = field(default_factory=KindOptions)
    device: str = "cpu"
    threads: int = 1
    seconds: float = 2.0
    max_softmax_length: int | None = 16384

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError(f"lengths must be integers >= 1, at least one of them; got {list(self.lengths)}.")
        for kind in self.kinds:
            choose("kinds", kind, list_kinds())
        for dtype in self.dtypes:
            choose("dtype", dtype, DTYPES)
        for mode in self.modes:
            choose("mode", mode, MODES)
        if self.seconds <= 0 or self.threads < 1:
            raise ConfigError(f"seconds must be > 0 and threads >= 1; got {self.seconds} and {self.threads}.")
        self.contenders()  # raises for impossible settings and unknown peers
        self.workloads(MODES[0])

    def contenders(self) -> list[tuple[Implementation, str, KindOptions | None]]:
        """(implementation, its kind, the kind's options); of a peer ("", `None`)."""
        peers = peer_implementations(self.peers, self.device, self.options.num_features)
        found: dict[str, tuple[Implementation, str, KindOptions | None]] = {p.name: (p, "", None) for p in peers}
        for kind in self.kinds:
            for window in self.windows:
                options = replace(self.options, window_size=window)
                implementation = kind_implementation(kind, options)
                found[implementation.name] = (implementation, kind, options)
        return list(found.values())

    def workloads(self, *modes: str) -> list[Workload]:
        """All workloads, short ones first within a direction, dtype and mode."""
        return [
            Workload(tokens, self.batch, self.heads, self.head_dim, causal, dtype, mode, self.device)
            for causal in self.causal
            for dtype in self.dtypes
            for mode in modes or self.modes
            for tokens in sorted(set(self.lengths))
        ]

    def too_long(self, implementation: Implementation, work: Workload) -> str:
        """The reason not to run a quadratic implementation on a long input, or an empty string."""
        limit = self.max_softmax_length
        is_over = implementation.is_quadratic and limit is not None and work.tokens > limit
        return f"longer than the {limit} tokens set for softmax" if is_over else ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def settings_of(kind: str, options: KindOptions | None) -> dict[str, Any] | None:
    return options.config(kind).to_dict() if options is not None else None


def run_attention(plan: Plan, report: Report = lambda _: None) -> Iterator[list[Row]]:
    """Time all implementations at all workloads. Yields the rows of one workload at a time."""
    for work in plan.workloads():
        report(f"{work.tokens} tokens, {'causal' if work.is_causal else 'bidirectional'}, {work.dtype}, {work.mode}")
        inputs = make_inputs(work)
        steps: dict[str, Callable[[], object]] = {}
        rows: dict[str, Row] = {}
        for implementation, kind, options in plan.contenders():
            name = implementation.name
            row = Row("attention", name, implementation.group, work, settings=settings_of(kind, options))
            reason = plan.too_long(implementation, work)
            if not reason:
                try:
                    attention = implementation.build(work)
                    if work.tokens == min(plan.lengths):  # a fast wrong answer is worth nothing
                        with torch.no_grad():
                            check_output(attention(*inputs[:3]), work)
                    steps[name] = make_step(attention, inputs, work)
                except Exception as error:
                    reason = explain(error)
            rows[name] = replace(row, reason=reason)
        found = time_interleaved(steps, device=plan.device, seconds=plan.seconds)
        for name, result in found.items():
            rows[name] = timed(rows[name], result)
        yield with_ratios(list(rows.values()))


def run_memory(plan: Plan, report: Report = lambda _: None) -> Iterator[list[Row]]:
    """Peak memory of a training step. Yields the rows of one implementation at a time."""
    works = plan.workloads("forward+backward")
    groups: dict[tuple[bool, str], list[Workload]] = {}
    for work in works:
        groups.setdefault((work.is_causal, work.dtype), []).append(work)
    for members in groups.values():
        for implementation, kind, options in plan.contenders():
            direction = "causal" if members[0].is_causal else "bidirectional"
            report(f"memory of {implementation.name}, {direction}, {members[0].dtype}")
            row = Row(
                "memory", implementation.name, implementation.group, members[0], settings=settings_of(kind, options)
            )
            try:
                implementation.build(members[0])  # where there is nothing to run, no process has to find out
            except Exception as error:
                yield [replace(row, work=work, reason=explain(error)) for work in members]
                continue
            short = [work for work in members if not plan.too_long(implementation, work)]
            peaks = measure_peaks(
                kind or implementation.name,
                options,
                short,
                threads=plan.threads,
                num_features=plan.options.num_features,
            )
            found = [replace(row, work=work, peak=peak, reason=reason) for work, peak, reason in peaks]
            found += [
                replace(row, work=work, reason=plan.too_long(implementation, work))
                for work in members
                if work not in short
            ]
            yield found
