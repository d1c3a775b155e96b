"""What a result depends on besides the code: hardware and versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from .peers import peer_versions


def describe(device: str = "cpu") -> dict[str, Any]:
    """Hardware and versions as plain JSON values."""
    is_cuda = torch.device(device).type == "cuda"
    return {
        "hardware": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(_memory() / 2**30, 1),
            "gpu": torch.cuda.get_device_name(device) if is_cuda else None,
            "platform": f"{platform.system()} {platform.machine()}",
        },
        "versions": {
            "python": platform.python_version(),
            "hf_linattn": __version__,
            **{name: _version(name) for name in ("torch", "transformers", "numpy", "triton")},
            **peer_versions(),
            "cuda": torch.version.cuda if is_cuda else None,
        },
        # How PyTorch computes on this processor: the widest instructions it uses.
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int:
    import psutil

    return int(psutil.virtual_memory().total)
