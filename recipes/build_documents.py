"""Build long documents with a known label out of labelled sentences.

Each document has `--sentences` sentences, of which `--majority` carry one label and the rest the other label, in
random order. Its label is that of the majority, so a model has to weigh the whole document.

    python recipes/build_documents.py --input sst2/train.parquet --output documents/train.parquet --documents 4000
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TEXT_NAMES = ("sentence", "text", "content")
LABEL_NAMES = ("label", "labels", "target")


class BuildError(ValueError):
    """The request cannot be met from this file."""


def build_documents(
    sentences: Sequence[str],
    labels: Sequence[int],
    *,
    documents: int,
    sentences_per_document: int = 16,
    majority: int = 10,
    seed: int = 0,
) -> tuple[list[str], list[int]]:
    """Texts and labels of `documents` documents; a fixed function of the arguments.

    Labels alternate, so that the classes are balanced, and are then shuffled. No sentence occurs twice in a document
    (equal sentences of the source count as one); the same sentence may occur in several documents.

    Raises: BuildError if the labels are not binary or there are too few distinct sentences.
    """
    if not sentences_per_document / 2 < majority <= sentences_per_document:
        raise BuildError(
            f"majority must be more than half of the {sentences_per_document} sentences of a document and at most all "
            f"of them; got {majority}."
        )
    values = sorted(set(labels))
    if len(values) != 2:
        raise BuildError(f"The sentences must have exactly two labels; got {values}.")
    # A sentence with both labels in the source would count for both sides: it is left out.
    seen: dict[str, int | None] = {}
    for text, label in zip(sentences, labels, strict=True):
        text = text.strip()
        seen[text] = label if seen.get(text, label) == label else None
    pools = {value: [text for text, label in seen.items() if label == value] for value in values}
    for value, pool in pools.items():
        if len(pool) < majority:
            raise BuildError(f"Label {value!r} has {len(pool)} distinct sentences; a document needs {majority}.")

    rng = random.Random(seed)
    targets = [values[i % 2] for i in range(documents)]
    rng.shuffle(targets)
    texts = []
    for target in targets:
        other = values[1 - values.index(target)]
        parts = rng.sample(pools[target], majority) + rng.sample(pools[other], sentences_per_document - majority)
        rng.shuffle(parts)
        texts.append(" ".join(parts))
    return texts, targets


def read_column(table: pa.Table, wanted: str | None, usual: Sequence[str], what: str) -> list:
    name = wanted or next((n for n in usual if n in table.column_names), None)
    if name not in table.column_names:
        raise BuildError(
            f"The file has no {what} column {wanted or ' or '.join(usual)!r}; columns: {table.column_names}. "
            f"Name it with --{what}_column."
        )
    return table[name].to_pylist()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="parquet file of labelled sentences")
    parser.add_argument("--output", type=Path, required=True, help="parquet file to write (columns text, label)")
    parser.add_argument("--documents", type=int, required=True, help="how many documents to build")
    parser.add_argument("--sentences", type=int, default=16, help="sentences in a document (default: %(default)s)")
    parser.add_argument("--majority", type=int, default=10, help="of these, with the label (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--text_column", help=f"default: the first of {', '.join(TEXT_NAMES)} that exists")
    parser.add_argument("--label_column", help=f"default: the first of {', '.join(LABEL_NAMES)} that exists")
    args = parser.parse_args(argv)

    try:
        table = pq.read_table(args.input)
        texts, labels = build_documents(
            read_column(table, args.text_column, TEXT_NAMES, "text"),
            read_column(table, args.label_column, LABEL_NAMES, "label"),
            documents=args.documents,
            sentences_per_document=args.sentences,
            majority=args.majority,
            seed=args.seed,
        )
    except (BuildError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, "label": labels}), args.output, compression="zstd")
    words = sum(len(text.split()) for text in texts) / max(1, len(texts))
    print(f"{args.output}: {len(texts)} documents, {words:.0f} words on average, labels {sorted(set(labels))}")


if __name__ == "__main__":
    main()
