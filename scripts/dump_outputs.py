"""What the library computes, in a file; and whether two states of the code compute the same.

    python scripts/dump_outputs.py --out before.safetensors       # with the code before on PYTHONPATH
    python scripts/dump_outputs.py --compare before.safetensors   # with the code after

The dump has outputs, gradients of inputs and parameters, states of caches, generated tokens, tensors and settings that
`convert`, `calibrate` and redraws make, and the messages of what is refused. It asks for them by public names only, so
that it runs on any version. A comparison prints the worst difference of every group, relative to the largest entry of
its tensor, and exits with 1 if one is beyond the limits (`dump_parts/compare.py`) or missing. One thread, fixed seeds.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers

import hf_linattn
from dump_parts import functions, generation, models
from dump_parts.compare import compare
from dump_parts.record import Record, read_record


def make_record(only: str = "") -> Record:
    """Run every case whose `group/case` matches the pattern."""
    record = Record(only)
    for part in (functions, models, generation):
        for group in part.GROUPS:
            group(record)
    return record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to write the dump to")
    parser.add_argument("--compare", type=Path, metavar="BEFORE", help="dump to compare with")
    parser.add_argument("--after", type=Path, help="compare this dump instead of one made now")
    parser.add_argument("--only", default="", help="pattern: cases (group/case) to run and compare")
    options = parser.parse_args(arguments)
    if not (options.out or options.compare):
        parser.error("say --out, --compare, or both")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("hf_linattn").setLevel(logging.ERROR)
    if options.after:
        record = read_record(options.after)
    else:
        start = time.perf_counter()
        print(f"hf_linattn from {Path(hf_linattn.__file__).parent}", flush=True)
        record = make_record(options.only)
        print(f"{len(record.tensors)} tensors, {len(record.texts)} texts in {time.perf_counter() - start:.0f} s")
        print(", ".join(f"{group} {seconds:.1f} s" for group, seconds in record.seconds.items()))
    if options.out:
        record.save(options.out)
    if options.compare:
        before = read_record(options.compare)
        before.keep(options.only)
        record.keep(options.only)
        return 0 if compare(before, record) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
