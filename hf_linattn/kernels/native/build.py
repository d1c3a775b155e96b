"""C kernels, compiled on first use by the compiler of the machine and kept for later processes.

Without a C compiler, and where one fails, the same kernels run in plain torch. `HF_LINATTN_COMPILE=0` asks for that;
`HF_LINATTN_CACHE` names another folder than `~/.cache/hf_linattn`; `CC` another compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

logger = logging.getLogger("hf_linattn")

_HEADERS = Path(__file__).parent
_SECONDS = 120  # after which a compiler counts as hanging
# Instructions by what torch itself uses on this processor.
_INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """The compiled C file `source`, `None` where that is not possible."""
    command = _compiler()
    if command is None:
        return None
    command += ["-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        command += _INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])
    name = f"{source.parent.name}-{_fingerprint(source, command)}"
    for folder_of in (_user_folder, _own_folder):
        try:
            with folder_of() as folder:
                found = _whole(folder, name) or _compile(source, command, folder, name)
                return ctypes.CDLL(str(found))
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            told = getattr(error, "stderr", None) or error
            logger.info("%s could not be compiled into the %s: %s", source.name, folder_of.__doc__, told)
            if isinstance(error, subprocess.TimeoutExpired):  # which it would be again
                break
    return None


def _compiler() -> list[str] | None:
    """The command, `None` if there is none or nothing is to be compiled."""
    if os.environ.get("HF_LINATTN_COMPILE", "1") == "0" or sys.platform == "win32":
        return None
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        try:
            command = shlex.split(name or "")
        except ValueError:  # a quote that does not end
            continue
        if command and shutil.which(command[0]):
            return command
    logger.info(
        "No C compiler was found: attention of short inputs runs in torch, which takes up to three times as long"
    )
    return None


def _fingerprint(source: Path, command: list[str]) -> str:
    """Of everything that a result depends on, but for the compiler's release."""
    found = hashlib.sha256(" ".join([*command, platform.machine(), sys.platform]).encode())
    for path in (*sorted(source.parent.glob("*.[ch]")), *sorted(_HEADERS.glob("*.h"))):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


@contextlib.contextmanager
def _user_folder() -> Iterator[Path]:
    """folder of the user"""
    own = os.environ.get("HF_LINATTN_CACHE")
    yield Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_linattn"


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """folder of this process"""
    with tempfile.TemporaryDirectory(prefix="hf_linattn-") as folder:  # what is loaded needs no file
        yield Path(folder)


def _digest(compiled: Path) -> str:
    return hashlib.sha256(compiled.read_bytes()).hexdigest()[:16]


def _whole(folder: Path, name: str) -> Path | None:
    """What was compiled before; loading a file that was cut off (by a power failure, say) would end the process."""
    for found in folder.glob(f"{name}-*.so"):
        if found.stem == f"{name}-{_digest(found)}":
            return found
    return None


def _compile(source: Path, command: list[str], target: Path, name: str) -> Path:
    """Into the folder `target`. Other processes may do the same: a file gets its name when it is whole."""
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=target) as folder:
        part = Path(folder) / "part.so"
        whole = [*command, f"-I{_HEADERS}", str(source), "-o", str(part), "-lm"]
        subprocess.run(whole, check=True, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
        found = part.replace(target / f"{name}-{_digest(part)}.so")
    logger.info("Compiled %s in %.1f s: %s", source.name, time.perf_counter() - begun, found)
    return found
