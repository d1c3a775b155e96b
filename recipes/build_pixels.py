"""Build sequences of pixels out of images: texts with a character for every channel of every pixel, and a tokenizer.

    python recipes/build_pixels.py --input train_64x64 --output imagenet64/train.parquet \\
        --tokenizer imagenet64/tokenizer

Images are read row by row, each pixel as red, green, blue: 64 x 64 pixels are 12,288 tokens. With the start token that
the tokenizer puts in front, a row of `--max_length 12289` is one image, and a causal model predicts all of it: its
`nll`, divided by ln 2, are the bits per dimension of the papers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_linattn.cli.inputs import IMAGE_FORMATS, load_files, load_images, only_images
from parts.characters import character_tokenizer
from parts.common import RecipeError, run

LETTERS = [bytes_to_unicode()[level] for level in range(256)]  # a printable character for each level
SPECIAL = {"bos_token": "⟨bos⟩", "pad_token": "⟨pad⟩"}  # no characters of a text
CHANNELS = 3
ROWS_AT_A_TIME = 1000


def text_of(image: Image.Image, size: int | None = None) -> str:
    """The levels of an image as characters, row by row; `size` is the side that it is resized to."""
    image = image.convert("RGB")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BOX)
    return "".join(LETTERS[level] for level in np.asarray(image).reshape(-1))


def read_images(path: str, column: str | None) -> Iterator[Image.Image]:
    """Of a folder, or of a parquet file."""
    if Path(path).is_dir():
        rows = load_images(path, "--input", streaming=True)
    else:
        rows = load_files([path], "--input", IMAGE_FORMATS, streaming=True)
    yield from (row["image"] for row in only_images(rows, column, "image_column"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="folder of images, or parquet file (or pattern of such)")
    parser.add_argument("--output", type=Path, required=True, help="parquet file to write")
    parser.add_argument("--tokenizer", type=Path, help="folder to write, for --tokenizer_name")
    parser.add_argument("--image_column", help="default: image or img")
    parser.add_argument("--size", type=int, help="pixels of a side to resize to, by the means of areas")
    parser.add_argument("--rows", type=int, help="the first so many images")
    args = parser.parse_args(argv)
    for name in ("size", "rows"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise RecipeError(f"--{name} must be at least 1; got {value}.")
    if args.output.suffix != ".parquet":
        raise RecipeError(f"--output must be a .parquet file; got {str(args.output)!r}.")

    images = islice(read_images(args.input, args.image_column), args.rows)
    count, length = write((text_of(image, args.size) for image in images), args)
    if args.tokenizer is not None:
        tokenizer = character_tokenizer(LETTERS, length + 1, begin=True, **SPECIAL)
        tokenizer.save_pretrained(args.tokenizer)
    print(f"{args.output}: {count} images of {length} tokens; --max_length {length + 1}")


def write(texts: Iterator[str], args: argparse.Namespace) -> tuple[int, int]:
    """How many texts there were, and how long each is. Raises: RecipeError for images of different sizes."""
    schema: Any = pa.schema({"text": pa.string()})
    rows = list(islice(texts, ROWS_AT_A_TIME))
    if not rows:
        raise RecipeError(f"--input {args.input!r} has no images.")
    count, length = 0, len(rows[0])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(args.output, schema, compression="zstd") as writer:
        while rows:
            for number, row in enumerate(rows):
                if len(row) != length:
                    raise RecipeError(
                        f"Images must have one size: image {count + number} has {len(row) // CHANNELS} pixels, the "
                        f"first one {length // CHANNELS}. Give --size."
                    )
            writer.write_table(pa.table({"text": rows}, schema=schema))
            count += len(rows)
            rows = list(islice(texts, ROWS_AT_A_TIME))
    return count, length


if __name__ == "__main__":
    run(main)
