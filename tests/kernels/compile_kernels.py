"""Compile every launch of the kernels' `COMPILE_CASES` for GPUs that are not there; print one JSON line per launch.

A script, because Triton must not be in its interpreter: `python compile_kernels.py attend --arch 90`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import tempfile
import time
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import hf_linattn.kernels as kernels
from hf_linattn.kernels import triton_common as _common


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


def modules() -> list[str]:
    """The modules that launch kernels, in order; each must say what to compile."""
    root = Path(kernels.__path__[0])
    files = [file for file in root.glob("*/triton_*.py") if " launch(" in file.read_text(encoding="utf-8")]
    return sorted(f"{file.parent.name}.{file.stem}" for file in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", help="all, unless named")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--first", action="store_true", help="only the first case of each module")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # nothing comes from an earlier run, whose log would be missing
        for name in options.modules or modules():
            cases = importlib.import_module(f"{kernels.__name__}.{name}").COMPILE_CASES
            for case in list(cases)[: 1 if options.first else None]:
                with _common.recording() as launches:
                    cases[case]()
                for arch in options.arch:
                    driver.set_active(AbsentGpu(arch))
                    for launch in launches:
                        found = {"module": name, "case": case, "arch": arch, **compile_launch(launch)}
                        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
