"""Words with tags as CoNLL has them: columns, sentences, and what is no such file."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_linattn.data.files import TAGGED_FORMATS, load_files
from hf_linattn.errors import InputError

SENTENCES = [
    {"tokens": ["EU", "rejects", "#call"], "tags": ["B-ORG", "O", "O"]},
    {"tokens": ["Peter"], "tags": ["B-PER"]},
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.conll", "a.txt"])
@pytest.mark.parametrize(
    "content",
    [
        "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n#call NN O\n\n\nPeter NNP B-PER\n\n",
        "EU\tB-ORG\r\nrejects\tO\r\n#call\tO\r\n \r\nPeter\tB-PER",
        "\ufeffEU   B-ORG\nrejects O \n#call O\n-DOCSTART- O\nPeter B-PER\n",
    ],
)
def test_sentences(content: str, name: str, streaming: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode())
    found = load_files([str(tmp_path / name)], "--train_file", TAGGED_FORMATS, streaming=streaming)
    assert list(found) == SENTENCES


def test_words_without_tags_and_several_files(tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / f"{name}.conll").write_text(f"one\u00a0word\n{name}")  # a file ends a sentence
    found = load_files([str(tmp_path / "*.conll")], "--test_file", TAGGED_FORMATS)
    assert list(found) == [{"tokens": ["one\u00a0word", name]} for name in ("1", "2")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"EU O\n\nPeter NNP O\n",
            r"a\.conll', line 3: every line must have 2 columns, as the first one; got",
        ),
        (b"EU\tO\n\tO\n", r"line 2: the first column must be a word; got '\\tO'"),
        (b"\n\n", "has no rows"),
        (b"-DOCSTART- O\n", "has no rows"),
        (b"caf\xe9 O\n", "is not UTF-8 text"),
    ],
)
def test_what_is_none(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_bytes(content)
    for streaming in (False, True):
        with pytest.raises(InputError, match=message):
            list(load_files([str(tmp_path / "a.conll")], "--train_file", TAGGED_FORMATS, streaming=streaming))
