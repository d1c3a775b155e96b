"""Generate data for tasks of Long Range Arena: ListOps, Pathfinder, and pairs of passages for document matching.

The same seed gives the same rows, on any number of processes; other splits need other seeds (or other texts):

    python recipes/build_long_range_arena.py listops --rows 96000 --seed 0 --output listops/train.parquet
    python recipes/build_long_range_arena.py pathfinder --rows 160000 --seed 0 --processes 16 --output train.parquet
    python recipes/build_long_range_arena.py matching --rows 4000 --seed 0 --output matching/train.parquet \\
        --sources reviews.parquet encyclopedia.parquet plays.parquet
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from itertools import islice
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import datasets

from hf_linattn.data.files import find_column
from lra.listops import ListOps
from lra.matching import pairs, passages
from lra.pathfinder import Pathfinder
from parts.common import RecipeError, load_splits, run
from parts.text import TEXT_NAMES


def listops(args: argparse.Namespace) -> datasets.Dataset:
    rows = islice(
        ListOps(args.min_length, args.max_length, args.max_depth, args.max_arguments).rows(args.seed), args.rows
    )
    if args.short_first:
        rows = iter(sorted(rows, key=lambda row: row[0].count(" ")))
    sources, targets = zip(*rows, strict=True)
    return datasets.Dataset.from_dict({"source": sources, "target": targets})


def pathfinder(args: argparse.Namespace) -> datasets.Dataset:
    task = Pathfinder(args.size, args.contour_length, args.distractors)
    with Pool(args.processes) as pool:
        rows = pool.map(partial(_png_row, task, args.seed), range(args.rows), chunksize=100)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    images = [{"bytes": image, "path": None} for image, _ in rows]
    return datasets.Dataset.from_dict({"image": images, "label": [label for _, label in rows]}, features=features)


def _png_row(task: Pathfinder, seed: int, index: int) -> tuple[bytes, int]:
    image, label = task.row(seed, index)
    file = BytesIO()
    image.save(file, format="PNG")
    return file.getvalue(), label


def matching(args: argparse.Namespace) -> datasets.Dataset:
    sources = {}
    for path in args.sources:
        rows = load_splits({"sources": path})["sources"]
        column = find_column(rows.column_names, args.text_column, TEXT_NAMES, "text_column")
        sources[path] = passages(" ".join(text for text in rows[column] if text), args.length)
    first, second, labels = zip(*islice(pairs(sources, args.seed), args.rows), strict=True)
    return datasets.Dataset.from_dict({"text1": first, "text2": second, "label": labels})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(required=True, metavar="TASK")

    def add(build: Any, text: str, **flags: tuple[int, str]) -> argparse.ArgumentParser:
        task = tasks.add_parser(build.__name__, help=text, description=text)
        task.add_argument("--output", type=Path, required=True, help="parquet file to write")
        task.add_argument("--rows", type=int, required=True, help="how many")
        task.add_argument("--seed", type=int, default=0, help="default: %(default)s")
        for name, (default, meaning) in flags.items():
            task.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
        task.set_defaults(build=build)
        return task

    expressions = add(
        listops,
        "expressions and their values",
        min_length=(500, "more words than this"),
        max_length=(2000, "fewer words than this"),
        max_depth=(10, "levels of nesting, digits included"),
        max_arguments=(10, "of an operator, from 2"),
    )
    expressions.add_argument(
        "--short_first", action="store_true", help="sort by length, to train in this order (sampling 'sequential')"
    )
    add(
        pathfinder,
        "images of dashed curves, with dots at the ends of one or of two of them",
        size=(32, "pixels of a side"),
        contour_length=(14, "dashes of a long curve; 6, 9 and 14 are published"),
        distractors=(5, "short curves, at most"),
        processes=(1, "that draw"),
    )
    texts = add(matching, "pairs of passages of the same or of two sources", length=(1000, "bytes of a passage"))
    texts.add_argument("--sources", nargs="+", required=True, help="files of texts, each a source: parquet, csv, ...")
    texts.add_argument("--text_column", help=f"default: the first of {', '.join(TEXT_NAMES)} that exists")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    for name in ("rows", "length", "processes"):
        if getattr(args, name, 1) < 1:
            raise RecipeError(f"--{name} must be at least 1; got {getattr(args, name)}.")
    if args.output.suffix != ".parquet":
        raise RecipeError(f"--output must be a .parquet file; got {str(args.output)!r}.")
    rows = args.build(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(args.output)
    print(f"{args.output}: {len(rows)} rows, columns {', '.join(rows.column_names)}")


if __name__ == "__main__":
    run(main)
