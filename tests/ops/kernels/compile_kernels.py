"""Compile every launch of the kernels' `COMPILE_CASES` for GPUs that are not there; print one JSON line per launch.

A script, because Triton must not be in its interpreter: `python compile_kernels.py MODULE ...` with modules of
`hf_linattn.ops.kernels.triton` and architectures in `ARCHITECTURES` (80 and 90 by default).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import sys
import tempfile
import time

os.environ["TRITON_INTERPRET"] = "0"
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hf_linattn.ops.kernels.triton import _common

ARCHITECTURES = [int(arch) for arch in os.environ.get("ARCHITECTURES", "80,90").split(",")]


class AbsentGpu:
    """As much of a driver as compiling needs."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launch(launch: _common.Launch) -> dict[str, object]:
    log, start = io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(log):
        compiled = launch.kernel.run(
            *launch.arguments,
            grid=(1,),
            warmup=True,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            enable_fp_fusion=True,
            **launch.constants,
        )
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log.getvalue())]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log.getvalue())]
    return {
        "kernel": launch.kernel.fn.__name__,
        "shared": compiled.metadata.shared,
        "spilled": sum(spills),
        "registers": max(registers, default=0),
        "wgmma": "wgmma" in compiled.asm["ptx"],
        "seconds": round(time.perf_counter() - start, 2),
    }


def main(modules: list[str]) -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # nothing comes from an earlier run, whose log would be missing
        for name in modules:
            module = importlib.import_module(f"hf_linattn.ops.kernels.triton.{name}")
            for case, call in module.COMPILE_CASES.items():
                with _common.recording() as launches:
                    call()
                for arch in ARCHITECTURES:
                    driver.set_active(AbsentGpu(arch))
                    for launch in launches:
                        found = {"module": name, "case": case, "arch": arch, **compile_launch(launch)}
                        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
