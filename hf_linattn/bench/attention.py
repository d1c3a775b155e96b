"""The attention functions beside each other: time, and peak memory of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch

from .memory import measure_peaks
from .plan import Plan, Report, new_row, race
from .results import Row
from .timing import explain
from .workload import Contender, Inputs, Workload, check_output, make_inputs, make_step


def run_attention(plan: Plan, report: Report = lambda _: None) -> Iterator[list[Row]]:
    """Time all contenders at all workloads. Yields the rows of one workload at a time."""
    for work in plan.workloads():
        report(f"{work.tokens} tokens, {work.direction}, {work.dtype}, {work.mode}")
        inputs = make_inputs(work)
        entries = [
            (new_row("attention", contender, work), partial(_step, plan, contender, inputs, work))
            for contender in plan.contenders()
        ]
        yield race(entries, plan.seconds)


def _step(plan: Plan, contender: Contender, inputs: Inputs, work: Workload) -> Callable[[], object]:
    plan.check_length(contender.group, work)
    attention = contender.build(work)
    if work.tokens == min(plan.lengths):
        with torch.no_grad():
            check_output(attention(*inputs[:3]), work)
    return make_step(attention, inputs, work)


def run_memory(plan: Plan, report: Report = lambda _: None) -> Iterator[list[Row]]:
    """Peak memory of a training step. Yields the rows of one contender at a time."""
    works = plan.workloads("forward+backward")
    for _, members in groupby(works, key=lambda work: (work.is_causal, work.dtype)):
        group = list(members)
        for contender in plan.contenders():
            report(f"memory of {contender.name}, {group[0].direction}, {group[0].dtype}")
            rows: dict[Workload, Row] = {}
            runnable: list[Workload] = []
            for work in group:
                rows[work] = new_row("memory", contender, work)
                try:
                    plan.check_length(contender.group, work)
                    if not runnable:
                        contender.build(work)  # where there is nothing to run, no process has to find out
                    runnable.append(work)
                except Exception as error:
                    rows[work] = replace(rows[work], reason=explain(error))
            for work, peak, reason in measure_peaks(contender, runnable, threads=plan.threads):
                rows[work] = replace(rows[work], peak=peak, reason=reason)
            yield list(rows.values())
