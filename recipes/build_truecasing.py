"""Build words with known tags out of any text: which of them are capitalised, and which mark follows.

Words are lower-cased. A tag is "lower", "Title" or "UPPER" and the mark behind the word, if there is one: "Title,".
A model that reads a transcript without case and punctuation has to put them back.

    python recipes/build_truecasing.py --input wikitext2/validation.parquet --output truecasing/train.parquet
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from build_documents import TEXT_NAMES, BuildError, read_column

UNKNOWN = "<unk>"  # of a word that the text does not say
PIECES = re.compile(r"\w+(?:[-'’.,]\w+)*|[,.;:?!]")


def build_rows(texts: Iterable[str], words_per_row: int = 100) -> list[tuple[list[str], list[str]]]:
    """Words and tags of rows of whole sentences, at least so many words each; a fixed function of the arguments.

    Sentences end with one of .?! and a blank, and those with unknown words are left out, as are headings and what is
    left at the end.
    """
    rows: list[tuple[list[str], list[str]]] = []
    words: list[str] = []
    tags: list[str] = []
    for text in texts:
        text = re.sub(r" ?@(.)@ ?", r"\1", text).strip()  # WikiText writes "well @-@ known"
        if text.startswith("="):
            continue
        for sentence in re.split(r"(?<=[.?!])\s+", text):
            pieces = PIECES.findall(sentence)
            if UNKNOWN in sentence or len(pieces) < 2:
                continue
            for piece in pieces:
                if piece[0].isalnum() or piece[0] == "_":
                    words.append(piece.lower())
                    tags.append(case_of(piece))
                elif words and tags[-1][-1].isalpha():
                    tags[-1] += piece
            if len(words) >= words_per_row:
                rows.append((words, tags))
                words, tags = [], []
    if not rows:
        raise BuildError(f"The texts give no row of {words_per_row} words.")
    return rows


def case_of(word: str) -> str:
    """A word of one capital letter is "Title"."""
    if word.isupper() and len(word) > 1:
        return "UPPER"
    return "lower" if word == word.lower() else "Title"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="parquet file of texts")
    parser.add_argument("--output", type=Path, required=True, help="parquet file to write (columns tokens, tags)")
    parser.add_argument("--words", type=int, default=100, help="words of a row, at least (default: %(default)s)")
    parser.add_argument("--text_column", help=f"default: the first of {', '.join(TEXT_NAMES)} that exists")
    args = parser.parse_args()

    try:
        rows = build_rows(read_column(pq.read_table(args.input), args.text_column, TEXT_NAMES, "text"), args.words)
    except (BuildError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    columns = {"tokens": [words for words, _ in rows], "tags": [tags for _, tags in rows]}
    pq.write_table(pa.table(columns), args.output, compression="zstd")
    kinds = {tag for _, tags in rows for tag in tags}
    print(f"{args.output}: {len(rows)} rows, {sum(len(words) for words, _ in rows)} words, {len(kinds)} tags")


if __name__ == "__main__":
    main()
