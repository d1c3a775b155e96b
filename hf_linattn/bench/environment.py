"""What a result depends on besides the code, and how it is written down."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from .._version import __version__

LIBRARIES = ("torch", "transformers", "numpy", "triton", "performer-pytorch", "flash-linear-attention")


def describe(device: str = "cpu") -> dict[str, Any]:
    """Hardware and versions as plain JSON values."""
    is_cuda = torch.device(device).type == "cuda"
    return {
        "hardware": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpu": torch.cuda.get_device_name(device) if is_cuda else None,
            "platform": f"{platform.system()} {platform.machine()}",
        },
        "versions": {
            "python": platform.python_version(),
            "hf_linattn": __version__,
            **{name: _version(name) for name in LIBRARIES},
            "cuda": torch.version.cuda if is_cuda else None,
        },
        # How PyTorch computes on this processor: the widest instructions it uses.
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def cpu_model() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return found[1] if found else platform.processor() or platform.machine()


def write_experiment(path: Path, content: dict[str, Any]) -> None:
    """Write the result of an experiment with the command, the hardware and the versions that made it."""
    head = {"schema": 1, "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, **describe(), **content}, indent=1) + "\n", encoding="utf-8")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
