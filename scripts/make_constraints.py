"""Write constraints.txt: one tested version of every package that `.[dev]` brings (`make constraints`).

uv resolves for all Python versions and systems at once, so that a version which needs a newer Python gets a marker.
torch stays at the version of scripts/install_torch.sh. Run the tests before the new file is committed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = """\
# The versions that `make test` and `make quickstart` install, so that both give tomorrow what they give today.
# The tests have passed with them on Python 3.11, Linux, CPU; for other Pythons and systems they are resolved only.
#
# Made by `make constraints`, from the newest releases of everything but torch (scripts/install_torch.sh). To renew:
#   make test-newest     # do the tests pass with what is newest?
#   make constraints && make quickstart test compat
#
# With another torch, or to take whatever is newest: `make test CONSTRAINTS=`.
"""


def torch_version() -> str:
    found = re.search(r"^tested=(\S+)$", (ROOT / "scripts" / "install_torch.sh").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        torch = Path(folder) / "torch.txt"
        torch.write_text(f"torch=={torch_version()}\n")
        done = subprocess.run(
            [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.10"]
            + ["--no-header", "--no-annotate", "--constraint", str(torch), "--extra", "dev", "pyproject.toml"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
    if done.returncode:
        return done.returncode
    (ROOT / "constraints.txt").write_text(HEADER + done.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
