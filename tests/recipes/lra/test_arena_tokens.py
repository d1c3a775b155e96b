"""From texts, images and expressions to token ids and batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hf_linattn.errors import InputError
from lra.data import ArenaDataArguments
from lra.listops import WORDS
from lra.tasks import TASKS, collate, encoder_of
from lra.tokens import byte_tokenizer, grey_ids, listops_tokenizer
from parts.common import RecipeError


@pytest.mark.parametrize("text", ["a film", " naïve\n\t“quotes” \x00\x7f 映画", "(a)"])
def test_a_token_is_a_byte(text: str) -> None:
    assert byte_tokenizer(100)(text)["input_ids"] == [byte + 1 for byte in text.encode()]


def test_a_pixel_is_a_byte() -> None:
    levels = np.array([[0, 1, 255], [7, 8, 9]], dtype=np.uint8)
    image = Image.fromarray(levels)
    assert grey_ids(image) == [1, 2, 256, 8, 9, 10]
    assert grey_ids(image.convert("RGBA")) == grey_ids(image.convert("RGB")) == grey_ids(image)
    assert len(byte_tokenizer(6)) == 257


def test_the_published_notation_of_listops() -> None:
    tokenizer = listops_tokenizer(100)
    published, ours = "( ( ( [MAX 2 ) ( ( ( [MIN 4 ) 7 ) ] ) ) ] )", "[MAX 2 [MIN 4 7 ] ]"
    assert tokenizer(published)["input_ids"] == tokenizer(ours)["input_ids"]
    assert tokenizer(" ".join(WORDS))["input_ids"] == list(range(2, 17))


def test_tokenizers_are_saved(tmp_path) -> None:
    for tokenizer, text in ((byte_tokenizer(9), "né"), (listops_tokenizer(9), "[SM 1 2 ]")):
        tokenizer.save_pretrained(tmp_path)
        again = type(tokenizer).from_pretrained(tmp_path)
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert (again.pad_token_id, again.model_max_length) == (0, 9)


def encoded(name: str, rows: dict[str, list], max_length: int = 6) -> dict[str, list]:
    task = TASKS[name]
    inputs, label = task.columns(list(rows), ArenaDataArguments())
    return encoder_of(task, task.tokenizer(max_length), max_length, inputs, label)(rows)


def test_two_texts_are_cut_and_padded_together() -> None:
    rows = encoded(
        "matching", {"label": [1.0, "0"], "id1": [0, 0], "text1": ["abcdefgh", "ab"], "text2": ["a", "abc"]}
    )
    assert rows["label"] == [1, 0]
    assert rows["length"] == [6, 3]
    batch = collate([dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)])
    assert batch["input_ids"].tolist() == [
        [[98, 99, 100, 101, 102, 103], [98, 0, 0, 0, 0, 0]],
        [[98, 99, 0, 0, 0, 0], [98, 99, 100, 0, 0, 0]],
    ]
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] > 0).long())
    assert batch["labels"].tolist() == [1, 0]


def test_one_text_has_no_dimension_for_others() -> None:
    rows = encoded("listops", {"Source": ["[SM 1 2 ]", "3"], "Target": [3, 3]})
    batch = collate([dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)])
    assert batch["input_ids"].shape == (2, 4)
    assert batch["attention_mask"].sum(-1).tolist() == [4, 1]


IMAGE = Image.new("L", (3, 2))


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("listops", {"source": ["[AVG 1 2 ]"], "target": [1]}, "a word that is none of ListOps: '[AVG' in"),
        ("listops", {"source": ["[SM 1 2 ]"], "target": [10]}, "'target' must hold labels from 0 to 9; got 10"),
        ("listops", {"source": ["[SM 1 2 ]"], "target": [1.5]}, "labels from 0 to 9; got 1.5"),
        ("listops", {"source": ["[SM 1 2 ]"], "target": [None]}, "labels from 0 to 9; got None"),
        ("text", {"text": [""], "label": [0]}, "'text' must hold texts, and none that is empty; got ''"),
        ("text", {"text": [3], "label": [0]}, "'text' must hold texts, and none that is empty; got 3"),
        ("text", {"image": [IMAGE], "label": [0]}, "No column is called 'text' or"),
        ("matching", {"text1": ["a"], "label": [0]}, "No column is called 'text2'"),
        ("image", {"image": ["a"], "label": [0]}, "'image' has a row that is no image"),
        ("image", {"image": [{"bytes": b"a", "path": None}], "label": [0]}, "'image' has a row that is no image"),
        ("image", {"image": [IMAGE.resize((4, 4))], "label": [0]}, "an image of 4 x 4 pixels; --max_length allows 6"),
        ("pathfinder", {"image": [IMAGE], "label": [2]}, "labels from 0 to 1; got 2"),
    ],
)
def test_rows_that_are_not_of_the_task(name: str, rows: dict[str, list], message: str) -> None:
    with pytest.raises((RecipeError, InputError)) as raised:
        encoded(name, rows)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
