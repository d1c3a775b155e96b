"""Sweep every form of the kinds over hostile numbers, and write the tables of docs/hostile_numbers.md.

    python scripts/hostile_numbers.py              # everything: about five minutes of one core
    python scripts/hostile_numbers.py --only EVA   # forms whose name holds this; writes nothing
    python scripts/hostile_numbers.py --check      # measures nothing; is the page what the results say?

Exits with 1 if something is not finite, or off without being listed as an exception (hostile_parts/exceptions.py).
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "scripts")) if path not in sys.path]

import torch

from hostile_parts.measure import DTYPES, cases
from hostile_parts.page import render, summarised, unexplained
from hostile_parts.settings import SETTINGS

RESULTS = ROOT / "benchmarks" / "results" / "hostile_numbers.json"
PAGE = ROOT / "docs" / "hostile_numbers.md"
BEGIN, END = "<!-- hostile:begin -->", "<!-- hostile:end -->"


def inserted(page: str, tables: str) -> str:
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"error: the page needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="forms whose name holds this")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="names, separated by commas")
    parser.add_argument("--check", action="store_true", help="measure and change nothing")
    options = parser.parse_args(arguments)
    if options.check:
        record = json.loads(RESULTS.read_text())
    else:
        torch.set_num_threads(1)
        dtypes, chosen = options.dtypes.split(","), [s for s in SETTINGS if not options.only or options.only in s.name]
        record = {
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "dtypes": dtypes,
            "entries": summarised(cases(chosen, dtypes)),
        }
    entries = record["entries"]
    if not options.check and not options.only:
        RESULTS.write_text(
            json.dumps(record, indent=None, separators=(",", ":")).replace('{"setting"', '\n{"setting"')
        )
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
