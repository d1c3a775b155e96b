"""Write the table of docs/compatibility.md from the files that runs of the tests marked `compat` have left.

    python scripts/compatibility_table.py            # --check: change nothing, fail if the page is not up to date

Any run of `pytest -m compat --compat-json PATH` may add a file to experiments/results/compatibility, from any machine.
Exits with 1 if a run in the table has failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results" / "compatibility"
BEGIN, END = "<!-- compatibility:begin -->", "<!-- compatibility:end -->"
Run = dict[str, Any]


def load(folder: Path) -> list[Run]:
    """Runs in the order of their releases."""
    runs = [{"name": path.stem, **json.loads(path.read_text())} for path in sorted(folder.glob("*.json"))]
    return sorted(runs, key=lambda run: (release(run), run["name"]))


def asked(run: Run) -> str:
    """The release that the run was for, from the name of its file: transformers-5.14-python-3.11."""
    return run["name"].removeprefix("transformers-").partition("-")[0]


def release(run: Run) -> Version:
    try:
        return Version(run.get("versions", {}).get("transformers") or asked(run))
    except InvalidVersion:  # "newest", and it could not be installed
        return Version("9999")


def verdict(run: Run) -> str:
    """'passes', or what went wrong: a topic without a test that passed counts as much as a failure."""
    if run.get("error"):
        return f"**{run['error']}**"
    failed = sorted(topic for topic, counts in run["topics"].items() if counts["failed"] or not counts["passed"])
    if failed:
        return f"**fails: {', '.join(failed)}**"
    return "passes" if run["exit"] == 0 else f"**fails: pytest ended with {run['exit']}**"


def cell(counts: dict[str, int]) -> str:
    ran, skipped = counts["passed"] + counts["failed"], counts.get("skipped", 0)
    if not ran:
        return "**none**"
    text = f"**{counts['failed']} of {ran} fail**" if counts["failed"] else str(counts["passed"])
    return f"{text}, {skipped} skipped" if skipped else text


def lines_of(header: list[str], rows: list[list[str]], right_from: int) -> list[str]:
    rule = ["---" if index < right_from else "---:" for index in range(len(header))]
    return ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]


def label(run: Run) -> str:
    found = run.get("versions", {}).get("transformers")
    return f"newest: {found or 'none'}" if asked(run) == "newest" else found or asked(run)


def runs_table(runs: list[Run]) -> list[str]:
    rows = []
    for run in runs:
        versions = run.get("versions", {})
        machine = f"{run.get('system', '')}, {run.get('gpu') or 'no GPU'}" if "system" in run else ""
        others = [versions.get(name, "") for name in ("torch", "huggingface_hub")]
        seconds = f"{run['seconds']:.0f} s" if "seconds" in run else ""
        rows.append([label(run), *others, run["python"], machine, run["date"], seconds, verdict(run)])
    header = ["transformers", "torch", "huggingface_hub", "Python", "machine", "date", "time", "result"]
    return lines_of(header, rows, len(header))


def topics_table(runs: list[Run]) -> list[str]:
    runs = [run for run in runs if "topics" in run]
    topics = list(dict.fromkeys(topic for run in runs for topic in run["topics"]))
    none = {"passed": 0, "failed": 0}
    rows = [
        [label(run), f"{run['versions']['torch']}", *(cell(run["topics"].get(topic, none)) for topic in topics)]
        for run in runs
    ]
    return lines_of(["transformers", "torch", *topics], rows, 2)


def bounds_table(runs: list[Run], project: dict[str, Any]) -> list[str]:
    """What pyproject.toml allows, beside what has passed."""
    passed = [run for run in runs if verdict(run) == "passes"]
    tested: dict[str, list[Version]] = {"Python": [Version(run["python"]) for run in passed]}
    allowed = {"Python": project["requires-python"]}
    for requirement in map(Requirement, project["dependencies"]):
        found = [run["versions"][requirement.name] for run in passed if requirement.name in run["versions"]]
        if found:
            tested[requirement.name] = [Version(Version(version).public) for version in found]
            allowed[requirement.name] = ",".join(sorted(map(str, requirement.specifier), reverse=True))
    rows = []
    for name, versions in tested.items():
        seen = sorted(set(versions))
        lowest = min(Version(part.removeprefix(">=")) for part in allowed[name].split(",") if part.startswith(">="))
        reached = bool(seen) and seen[0].release[: len(lowest.release)] <= lowest.release
        untested = [] if reached or not seen else [f"below {seen[0]}"]
        untested += [f"above {seen[-1]}"] if seen else ["all"]
        rows.append(
            [
                name,
                f"`{allowed[name]}`",
                ", ".join(map(str, seen)) or "none",
                ", ".join(untested),
            ]
        )
    return lines_of(["", "allowed", "passed with", "untested"], rows, 4)


def failures(runs: list[Run]) -> list[str]:
    lines = []
    for run in runs:
        found = run.get("failures", [])
        if found:
            more = f" and {len(found) - 10} more" if len(found) > 10 else ""
            lines += ["", f"Failed on {label(run)}: " + ", ".join(f"`{test}`" for test in found[:10]) + more]
    return lines


def render(runs: list[Run], project: dict[str, Any]) -> str:
    parts = [
        "### Runs",
        "",
        *runs_table(runs),
        *failures(runs),
        "",
        "### Tests that passed, by topic",
        "",
        *topics_table(runs),
        "",
        "### Bounds",
        "",
        *bounds_table(runs, project),
    ]
    return "\n".join(parts)


def insert(page: str, table: str) -> str:
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"error: the page needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "compatibility.md")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if the page is not up to date"
    )
    options = parser.parse_args(arguments)
    runs = load(options.results)
    if not runs:
        print(f"error: no results in {options.results}", file=sys.stderr)
        return 1
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = options.page.read_text()
    made = insert(page, render(runs, project))
    if not options.check:
        options.page.write_text(made)
    elif made != page:
        print(f"error: {options.page} is not what the results say: run {Path(__file__).name}", file=sys.stderr)
        return 1
    red = [run for run in runs if verdict(run) != "passes"]
    for run in red:
        print(f"{label(run)}: {verdict(run)}", file=sys.stderr)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
