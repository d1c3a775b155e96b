"""Generate small files in the formats of data sets that are not at hand, to try out settings before they run for days.

Random content: what is trained on it says nothing.

    python recipes/build_stand_ins.py imagenet --output_dir imagenet
    python recipes/build_stand_ins.py proteins --output_dir fasta
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from build_proteins import STANDARD
from parts.common import RecipeError, run


def imagenet(folder: Path, rows: int, random: np.random.Generator) -> None:
    """Photographs of various sizes, in a folder for each of 10 labels, as `train` and `val`."""
    for split in ("train", "val"):
        for row in range(rows):
            label = folder / split / f"n{row % 10:08d}"
            label.mkdir(parents=True, exist_ok=True)
            height, width = random.integers(200, 500, 2)
            levels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(levels).resize((int(width), int(height))).save(label / f"{row}.JPEG", "JPEG")


def proteins(folder: Path, rows: int, random: np.random.Generator) -> None:
    """Sequences with the lengths of TrEMBL, about 350 on average, as `proteins.fasta`."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = np.array(list(STANDARD))
    with (folder / "proteins.fasta").open("w") as file:
        for row in range(rows):
            sequence = "".join(random.choice(letters, int(random.gamma(1.5, 230)) + 2))
            file.write(f">tr|S{row:05d}|S{row:05d}_NONE Random sequence\n{textwrap.fill(sequence, 60)}\n")


FORMATS = {"imagenet": imagenet, "proteins": proteins}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=FORMATS, help="whose format")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--rows", type=int, default=200, help="images of a split, or sequences (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.rows < 10:
        raise RecipeError(f"--rows must be at least 10; got {args.rows}.")
    FORMATS[args.format](args.output_dir, args.rows, np.random.default_rng(args.seed))
    print(f"{args.output_dir}: {args.rows} random rows in the format of {args.format}")


if __name__ == "__main__":
    run(main)
