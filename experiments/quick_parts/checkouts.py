"""Where the code to be compared comes from: a folder, or a revision of this repository."""

from __future__ import annotations

import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def checkout(source: str, repository: Path = ROOT) -> Iterator[Path]:
    """A folder that holds the package: the one named, or a temporary one with a revision's files.

    Raises: ValueError if `source` is neither.
    """
    folder = Path(source).resolve()
    if folder.is_dir():
        if not (folder / "hf_linattn" / "__init__.py").is_file():
            raise ValueError(f"{source!r} is a folder without the package hf_linattn. Give a checkout's root.")
        yield folder
        return
    git = ["git", "-C", str(repository), "archive", "--format=tar", source, "hf_linattn"]
    archive = subprocess.run(git, capture_output=True)
    if archive.returncode:
        message = archive.stderr.decode(errors="replace").strip()
        raise ValueError(f"{source!r} is neither a folder nor a revision of this repository: {message}")
    with tempfile.TemporaryDirectory() as target:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(target, filter="data")
        yield Path(target).resolve()


def revision(source: str, repository: Path = ROOT) -> str:
    """What a result says about a checkout: its commit, marked if files differ from it; "unknown" outside git."""
    folder = Path(source).resolve()
    if folder.is_dir():
        found = _git(folder, "rev-parse", "--short", "HEAD") or "unknown"
        return f"{found}, edited" if _git(folder, "status", "--porcelain", "hf_linattn") else found
    return _git(repository, "rev-parse", "--short", source) or "unknown"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
