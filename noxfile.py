"""Runs the selection of tests marked `compat` on several releases of Transformers: `make compat`, or

    nox                        all of them, then docs/compatibility.md
    nox -s "compat(5.23)"      one
    nox -l                     which there are

Environments are kept in .nox and brought up to date by the next run.
"""

from __future__ import annotations

import json
import re
import sys
from datetime import datetime, timezone
from pathlib import Path

import nox
import nox.command

# The oldest supported release, those in which something changed that we rely on, and the latest three.
# "5.14" is the newest release 5.14.x; "newest" is what pip finds, of the other packages too.
RELEASES = ["5.10.4", "5.14", "5.17", "5.18", "5.22", "5.23", "5.24", "newest"]
RESULTS = Path("experiments/results/compatibility")
SELECTION = "compat and not slow and not gpu"
# What a release of Transformers chooses for itself, and what is installed before.
FREE = {"transformers", "huggingface-hub", "tokenizers", "hf-xet", "torch", "triton"}

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["compat"]
nox.options.reuse_venv = "yes"
nox.options.default_venv_backend = "virtualenv"


def requirement(release: str) -> str:
    if release == "newest":
        return "transformers"
    return f"transformers=={release}" if release.count(".") == 2 else f"transformers=={release}.*"


def test_files() -> list[str]:
    """The others may import packages that are not installed here."""
    paths = sorted(Path("tests").rglob("test_*.py"))
    return [str(path) for path in paths if "\n@pytest.mark.compat(" in path.read_text()]


def ask(session: nox.Session, code: str) -> str:
    return str(session.run_install("python", "-c", code, silent=True)).strip()


def python_version(session: nox.Session) -> str:
    return ask(session, "import platform; print(platform.python_version())")


def constraints(session: nox.Session, release: str) -> Path:
    """The tested versions but for what the release decides, with the torch that is installed."""
    lines = [] if release == "newest" else Path("constraints.txt").read_text().splitlines()
    lines = [line for line in lines if re.split(r"[=\s]", line)[0].lower().replace("_", "-") not in FREE]
    lines.append("torch==" + ask(session, "from importlib.metadata import version; print(version('torch'))"))
    path = Path(session.create_tmp()) / "constraints.txt"
    path.write_text("\n".join(lines) + "\n")
    return path.resolve()


def failed_before_the_tests(python: str, why: str) -> str:
    values = {"format": 1, "error": why, "python": python, "date": datetime.now(timezone.utc).date().isoformat()}
    return json.dumps(values, indent=2) + "\n"


@nox.session
@nox.parametrize("release", [nox.param(release, id=release) for release in RELEASES])
def compat(session: nox.Session, release: str) -> None:
    """The tests marked compat, on one release of Transformers."""
    session.notify("compat_table")
    python = python_version(session)
    path = RESULTS / f"transformers-{release}-python-{python.rpartition('.')[0]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = requirement(release)
    try:
        session.run_install("sh", "scripts/install_torch.sh", f"{session.bin}/python", external=True)
        session.install(
            *("--quiet", "--upgrade", "--upgrade-strategy", "eager"),
            *("--constraint", str(constraints(session, release))),
            *("--editable", ".[compat]", wanted),
        )
    except nox.command.CommandFailed:
        path.write_text(failed_before_the_tests(python, f"{wanted} could not be installed"))
        raise
    made = Path(session.create_tmp()) / "run.json"
    made.unlink(missing_ok=True)
    try:
        ran = session.run(
            *("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "-m", SELECTION),
            *("--compat-json", str(made.resolve()), *test_files(), *session.posargs),
            env={"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
    except nox.command.CommandFailed:
        ran = False
    if ran is None:  # nox --install-only
        return
    found = made.read_text() if made.exists() else failed_before_the_tests(python, f"no test started with {wanted}")
    path.write_text(found)
    if not ran:
        session.error(f"{wanted}: see {path}")


@nox.session(venv_backend="none")
def compat_table(session: nox.Session) -> None:
    """docs/compatibility.md, from the files that the runs have left."""
    session.run(sys.executable, "scripts/compatibility_table.py", external=True)
