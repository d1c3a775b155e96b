"""Tiny checkpoints of every family with tokenizer or image processor, and files of texts and images for them."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cases import BY_NAME, bert_config
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertModel, PreTrainedTokenizerFast, ViTImageProcessor

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(50)), "[MASK]"]
IMAGE_LABELS = 6
FAMILIES = ("bert-mlm", "bert-classifier", "bert", "gpt2", "vit")


def build(folder: Path) -> None:
    """A folder for each model, `text.jsonl`, `text.txt`, `images.parquet`, and `images/` with PNG files."""
    for name in FAMILIES:
        model = BertModel(bert_config()) if name == "bert" else BY_NAME[name].build()
        model.save_pretrained(folder / name)
        if name == "vit":
            ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(folder / name)
        else:
            _tokenizer(with_special=name != "gpt2").save_pretrained(folder / name)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS[4:-1], k=5 + i % 60)) for i in range(150)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text, "label": 1}) + "\n" for text in texts))
    (folder / "text.txt").write_text("\n".join(texts))
    (folder / "images").mkdir()
    numbers = np.random.default_rng(0)
    images = []
    for i in range(40):
        picture = Image.fromarray(numbers.integers(0, 256, (30, 26, 3), dtype=np.uint8))
        picture.save(folder / "images" / f"{i}.png")
        images.append(encoded(picture))
    labels = [i % IMAGE_LABELS for i in range(len(images))]
    pq.write_table(pa.table({"img": images, "label": labels}), folder / "images.parquet")


def encoded(picture: Image.Image, form: str = "PNG") -> dict[str, Any]:
    """A picture as a column of images stores it."""
    content = io.BytesIO()
    picture.save(content, form)
    return {"bytes": content.getvalue(), "path": None}


def _tokenizer(with_special: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if with_special:
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        special = [("[CLS]", 2), ("[SEP]", 3)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)
