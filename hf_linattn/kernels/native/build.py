"""C kernels, compiled on first use by the compiler of the machine and kept for later processes.

Without a C compiler, and where one fails, the same kernels run in plain torch. `HF_LINATTN_COMPILE=0` asks for that;
`HF_LINATTN_CACHE` names another folder than `~/.cache/hf_linattn`; `CC` another compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
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
_lock = threading.Lock()
_loaded: dict[Path, ctypes.CDLL | None] = {}


def library(source: Path) -> ctypes.CDLL | None:
    """The compiled C file `source`, `None` where that is not possible."""
    if source not in _loaded:
        with _lock:
            if source not in _loaded:
                _loaded[source] = _load(source)
    return _loaded[source]


def _load(source: Path) -> ctypes.CDLL | None:
    command = _compiler()
    if command is None:
        return None
    command += ["-std=gnu11", "-O3", "-fPIC", "-shared"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        command += _INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])
    name = f"{source.parent.name}-{_fingerprint(source, command)}.so"
    for folder in _folders():
        try:
            found = folder / name
            if not found.exists():
                _compile(source, command, found)
            return ctypes.CDLL(str(found))
        except (OSError, subprocess.SubprocessError) as error:
            told = getattr(error, "stderr", None) or error
            logger.info("%s could not be compiled into %s: %s", source.name, folder, told)
    return None


def _compiler() -> list[str] | None:
    """The command, `None` if there is none or nothing is to be compiled."""
    if os.environ.get("HF_LINATTN_COMPILE", "1") == "0" or sys.platform == "win32":
        return None
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        command = shlex.split(name or "")
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


def _folders() -> Iterator[Path]:
    """Where compiled files may be kept: that of the user, and one of this process if it cannot be written."""
    own = os.environ.get("HF_LINATTN_CACHE")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    yield Path(own) if own else cache / "hf_linattn"
    yield Path(tempfile.mkdtemp(prefix="hf_linattn-"))


def _compile(source: Path, command: list[str], target: Path) -> None:
    """Other processes may do the same: a file gets its name when it is whole."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        part = Path(folder) / target.name
        whole = [*command, f"-I{_HEADERS}", str(source), "-o", str(part), "-lm"]
        subprocess.run(whole, check=True, capture_output=True, text=True, timeout=_SECONDS)
        part.replace(target)
    logger.info("Compiled %s in %.1f s: %s", source.name, time.perf_counter() - begun, target)
