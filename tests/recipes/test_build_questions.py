"""Questions whose answers are known, built out of any text."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import build_questions
from build_documents import BuildError

# -- built questions --------------------------------------------------------------------------------------------------
SENTENCES = [f"Number {i} is said to be the {i + 3}rd of all {2 * i} things ." for i in range(40)]


def test_built_questions_are_true() -> None:
    rows = build_questions.build_questions(SENTENCES, documents=30, question_words=2, unanswerable=0.3, seed=3)
    assert rows == build_questions.build_questions(SENTENCES, documents=30, question_words=2, unanswerable=0.3, seed=3)
    places = set()
    for row in rows:
        start = row["question"].removeprefix('What follows "').removesuffix('"?')
        (sentence,) = [each for each in SENTENCES if each.startswith(start + " ")]
        if not row["answers"]["text"]:
            assert sentence not in row["context"]
            continue
        (answer,), (place,) = row["answers"].values()
        assert f"{start} {answer} ." == sentence
        assert row["context"][place - len(start) - 1 :].startswith(sentence)
        assert row["context"].count(f"{start} ") == 1
        places.add(place)
    assert 4 < sum(not row["answers"]["text"] for row in rows) < 16
    assert len(places) > 10


def test_sentences_of_texts() -> None:
    texts = [
        " = A heading of seven words or so . = \n",
        "Some words of one sentence . More words of one sentence ! too short . Words with <unk> in one sentence . And",
        "Some words of one sentence .",
    ]
    assert build_questions.find_sentences(texts, 5, 8) == [
        "Some words of one sentence .",
        "More words of one sentence !",
    ]


def test_questions_that_cannot_be_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BuildError, match="40 sentences that begin like no other; documents of 40"):
        build_questions.build_questions(SENTENCES, documents=1, sentences_per_document=40, question_words=2)
    with pytest.raises(BuildError, match="must be a share"):
        build_questions.build_questions(SENTENCES, documents=1, unanswerable=2)
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "in.parquet")
    argv = ["--input", str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out.parquet"), "--documents", "1"]
    with pytest.raises(SystemExit) as stop:
        build_questions.main(argv)
    assert stop.value.code == 2
    assert "error: The file has no column 'text'" in capsys.readouterr().err
    assert not (tmp_path / "out.parquet").exists()
