"""The tasks of the experiment on attention transfer measure what they say."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit import ViTImageProcessorPil

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))


@pytest.fixture
def minilm(monkeypatch: pytest.MonkeyPatch) -> Any:
    from transfer_tasks import Files, minilm

    for name, value in {"length": 24, "passages": 24, "few_passages": 12}.items():
        monkeypatch.setattr(minilm.Task, name, value)
    return minilm.Task(Files(train=(ROOT / "LICENSE",), test=(ROOT / "README.md", ROOT / "CONTRIBUTING.md")))


def test_texts_are_read_as_a_bert_reads_them(minilm: Any) -> None:
    batches = [batch["input_ids"] for batch in islice(minilm.batches(0), 2)]
    assert not torch.equal(*batches)
    assert torch.equal(next(minilm.batches(0))["input_ids"], batches[0])
    for rows in (*batches, minilm.rows):
        assert rows.shape[1] == 24
        assert set(rows[:, 0].tolist()) == {minilm.tokenizer.cls_token_id}
        assert set(rows[:, -1].tolist()) == {minilm.tokenizer.sep_token_id}
    assert len(minilm.rows) == 24


def test_embeddings_are_compared_with_those_of_softmax(minilm: Any) -> None:
    assert minilm.score(minilm.model) == {"cosine": pytest.approx(1), "nearest kept": 10}

    def other(ids: torch.Tensor) -> Any:
        output = minilm.model(ids)
        output.last_hidden_state = output.last_hidden_state.flip(0)
        return output

    for few in (False, True):
        score = minilm.score(other, few=few)
        assert 0 < score["cosine"] < 0.9
        assert score["nearest kept"] < 10


def test_the_accuracy_is_that_of_the_predictions(tmp_path: Path) -> None:
    from transfer_tasks import Files, load_task

    config = ViTConfig(
        image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    stock = ViTForImageClassification(config).eval()
    stock.save_pretrained(tmp_path / "model")
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    processor.save_pretrained(tmp_path / "model")
    pixels = torch.randint(256, (20, 8, 8, 3), dtype=torch.uint8)
    pictures = [Image.fromarray(image.numpy()) for image in pixels]
    with torch.no_grad():
        labels = stock(**processor(pictures, return_tensors="pt")).logits.argmax(-1)
    labels[:5] = 1 - labels[:5].clamp(0, 1)  # five of twenty are wrong
    files = [io.BytesIO() for _ in pictures]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file, "PNG")
    cells = [{"bytes": file.getvalue(), "path": None} for file in files]
    path = tmp_path / "images.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": labels.tolist()}), path)

    task = load_task("vit", Files(tmp_path / "model", (path,), (path,)))
    assert task.score(task.model) == {"accuracy": 75}
    assert next(task.batches(0))["pixel_values"].shape == (16, 3, 8, 8)
