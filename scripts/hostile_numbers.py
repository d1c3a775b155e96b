"""Sweep every form of the kinds over hostile numbers, and write the tables of docs/hostile_numbers.md.

    python scripts/hostile_numbers.py --jobs 4     # everything: about five minutes of one core
    python scripts/hostile_numbers.py --only EVA   # forms whose name holds this; writes nothing
    python scripts/hostile_numbers.py --render     # measures nothing: the page from the results there are
    python scripts/hostile_numbers.py --check      # writes nothing either: is the page what the results say?

Exits with 1 if something is not finite, or off without being listed as an exception (hostile_parts/exceptions.py).
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "scripts")) if path not in sys.path]

import torch

from hostile_parts.measure import DTYPES, cases
from hostile_parts.page import render, summarised, unexplained
from hostile_parts.settings import SETTINGS, Setting

RESULTS = ROOT / "experiments" / "results" / "hostile_numbers.json"
PAGE = ROOT / "docs" / "hostile_numbers.md"
BEGIN, END = "<!-- hostile:begin -->", "<!-- hostile:end -->"


def inserted(page: str, tables: str) -> str:
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"error: the page needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def measured(settings: list[Setting], dtypes: list[str], jobs: int) -> list[dict[str, Any]]:
    """The entries of all settings, in their order."""
    work = [(setting.name, dtypes) for setting in settings]
    with multiprocessing.get_context("spawn").Pool(jobs, torch.set_num_threads, (1,)) as pool:
        return [entry for entries in pool.imap(_measured, work) for entry in entries]


def _measured(work: tuple[str, list[str]]) -> list[dict[str, Any]]:
    name, dtypes = work
    return summarised(cases([setting for setting in SETTINGS if setting.name == name], dtypes))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="forms whose name holds this")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="names, separated by commas")
    parser.add_argument("--check", action="store_true", help="measure and change nothing")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args(arguments)
    if options.check or options.render:
        record = json.loads(RESULTS.read_text())
    else:
        dtypes, chosen = options.dtypes.split(","), [s for s in SETTINGS if not options.only or options.only in s.name]
        record = {
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "dtypes": dtypes,
            "entries": measured(chosen, dtypes, options.jobs),
        }
    entries = record["entries"]
    if not (options.check or options.render or options.only):
        lines = json.dumps(record, separators=(",", ":")).replace('{"setting"', '\n{"setting"')
        RESULTS.write_text(f"{lines}\n")
    if not (options.check or options.only):
        PAGE.write_text(inserted(PAGE.read_text(), render(entries, record["dtypes"])))
    elif options.check and inserted(PAGE.read_text(), render(entries, record["dtypes"])) != PAGE.read_text():
        print(f"error: {PAGE} is not what the results say: run {Path(__file__).name}", file=sys.stderr)
        return 1
    wrong = unexplained(entries)
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{len(entries)} entries, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
