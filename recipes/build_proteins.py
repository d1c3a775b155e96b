"""Build texts out of protein sequences in FASTA files, such as TrEMBL's and UniRef's, and a tokenizer for them.

    python recipes/build_proteins.py --input uniprot_trembl.fasta.gz --output_dir proteins

writes `proteins/train.parquet`, `validation.parquet` and `test.parquet`, each with a column `text` of sequences, and
`proteins/tokenizer`: a token for each of the 20 standard amino acids and the 5 others that UniProt writes, and an end
token between proteins. Which split a sequence belongs to follows from its letters alone, so equal ones are together.
Files are read as a stream, compressed ones (.gz) too:

    python recipes/language_modeling.py --config recipes/configs/papers/performer/proteins_masked.yaml \\
        --output_dir runs/proteins
"""

from __future__ import annotations

import argparse
import gzip
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from parts.characters import character_tokenizer
from parts.common import RecipeError, run

STANDARD = "ACDEFGHIKLMNPQRSTVWY"
OTHERS = "BOUXZ"  # B: D or N, Z: E or Q, X: any, O: pyrrolysine, U: selenocysteine
AMINO_ACIDS = STANDARD + OTHERS
# As in google-research/protein_lm.
SPECIAL = {"bos_token": "<", "eos_token": ">", "pad_token": "_", "mask_token": "*"}
SUFFIXES = (".fasta", ".fa", ".faa", ".fasta.gz", ".fa.gz", ".faa.gz")
ROWS_AT_A_TIME = 10_000
LONGEST = 2**20  # tokens of a row: no limit of the tokenizer's own


def read_fasta(path: Path) -> Iterator[tuple[str, str]]:
    """Names and sequences, in upper case, without the stop that some files write at the end (*).

    Raises: RecipeError for a file that cannot be read, and for letters that are no amino acid.
    """
    if not path.name.endswith(SUFFIXES):
        raise RecipeError(f"--input must be one of {', '.join(SUFFIXES)}; got {str(path)!r}.")
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            yield from _records(lines, path)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise RecipeError(f"--input {str(path)!r} cannot be read: {error}") from error


def _records(lines: Iterator[str], path: Path) -> Iterator[tuple[str, str]]:
    name: str | None = None
    parts: list[str] = []
    for line in lines:
        if line.startswith((">", ";")):
            if name is not None:
                yield name, _checked("".join(parts), name, path)
            name, parts = line[1:].split(maxsplit=1)[0] if line[1:].split() else "?", []
        elif line.strip():
            if name is None:
                raise RecipeError(f"{str(path)!r} is not FASTA: it must begin with a line '>name'; got {line[:40]!r}.")
            parts.append(line.strip())
    if name is not None:
        yield name, _checked("".join(parts), name, path)


def _checked(letters: str, name: str, path: Path) -> str:
    sequence = letters.upper().rstrip("*")
    wrong = sorted(set(sequence) - set(AMINO_ACIDS))
    if wrong or not sequence:
        found = f"has {wrong[0]!r}" if wrong else "is empty"
        raise RecipeError(f"{name!r} in {str(path)!r} {found}; sequences must be of the letters {AMINO_ACIDS}.")
    return sequence


def split_of(sequence: str, validation: float, test: float) -> str:
    """Train, validation or test; the two shares are from 0 to 1."""
    place = zlib.crc32(sequence.encode()) / 2**32
    return "validation" if place < validation else "test" if place < validation + test else "train"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help=f"files: {', '.join(SUFFIXES)}")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--validation_share", type=float, default=0.001, help="default: %(default)s")
    parser.add_argument("--test_share", type=float, default=0.01, help="default: %(default)s")
    parser.add_argument("--max_sequences", type=int, help="read the first so many")
    parser.add_argument("--clip", type=int, help="letters of a sequence, at most (Performers: 1024)")
    args = parser.parse_args(argv)
    for name in ("max_sequences", "clip"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise RecipeError(f"--{name} must be at least 1; got {value}.")
    if args.validation_share < 0 or args.test_share < 0 or args.validation_share + args.test_share >= 1:
        raise RecipeError(
            f"--validation_share and --test_share must be at least 0 and together below 1; got "
            f"{args.validation_share} and {args.test_share}."
        )

    sequences = (sequence for path in args.input for _, sequence in read_fasta(path))
    counts = write_splits(islice(sequences, args.max_sequences), args)
    if not sum(counts.values()):
        raise RecipeError(f"--input {' '.join(map(str, args.input))} has no sequence.")
    tokenizer = character_tokenizer(AMINO_ACIDS, LONGEST, line_break=SPECIAL["eos_token"], **SPECIAL)
    tokenizer.save_pretrained(args.output_dir / "tokenizer")
    print(f"{args.output_dir}: " + ", ".join(f"{count} sequences for {split}" for split, count in counts.items()))


def write_splits(sequences: Iterator[str], args: argparse.Namespace) -> dict[str, int]:
    """A parquet file for every split that has rows. Returns how many."""
    schema = pa.schema({"text": pa.string()})
    writers: dict[str, pq.ParquetWriter] = {}
    counts = dict.fromkeys(("train", "validation", "test"), 0)
    try:
        while rows := list(islice(sequences, ROWS_AT_A_TIME)):
            splits: dict[str, list[str]] = {}
            for row in rows:
                splits.setdefault(split_of(row, args.validation_share, args.test_share), []).append(row[: args.clip])
            for split, texts in splits.items():
                if split not in writers:
                    args.output_dir.mkdir(parents=True, exist_ok=True)
                    path = args.output_dir / f"{split}.parquet"
                    writers[split] = pq.ParquetWriter(path, schema, compression="zstd")
                writers[split].write_table(pa.table({"text": texts}, schema=schema))
                counts[split] += len(texts)
    finally:
        for writer in writers.values():
            writer.close()
    return counts


if __name__ == "__main__":
    run(main)
