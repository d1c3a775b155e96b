"""The attention functions beside each other: the time of a forward pass and of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from .plan import Plan, Report, new_row, race
from .results import Row
from .workload import Contender, Inputs, Workload, make_inputs, make_step


def run_attention(plan: Plan, report: Report = lambda _: None) -> Iterator[list[Row]]:
    """Time all contenders at all workloads. Yields the rows of one workload at a time."""
    for work in plan.workloads():
        report(f"{work.tokens} tokens, {work.direction}, {work.dtype}, {work.mode}")
        inputs = make_inputs(work)
        rows = [(new_row("attention", contender, work), contender) for contender in plan.contenders()]
        yield race([(row, partial(_step, contender, inputs, work)) for row, contender in rows], plan.seconds)


def _step(contender: Contender, inputs: Inputs, work: Workload) -> Callable[[], object]:
    return make_step(contender.build(work), inputs, work)
