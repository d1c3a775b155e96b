"""Every recipe that trains, on tiny models and data: what is built for it, and its command line."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

from .inputs import SETTINGS

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(40))]
ROWS = 24
STEPS_PER_EPOCH = 3  # of two processes with batches of four rows

SHARED = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
    "save_steps": 2,  # within epochs and across their border
    "save_total_limit": 2,
    "enable_jit_checkpoint": "true",  # SIGTERM, which a launcher sends when a process has ended
    "disable_tqdm": "true",
    "report_to": "none",
}
FAVOR = {
    "attention": "favor_sharp",
    "attention_config": {**SETTINGS["favor_sharp"], "statistics": "calibrated"},
    "calibration_samples": 8,
}
LARA = {"attention": "lara", "attention_config": SETTINGS["lara"]}
EVA = {"attention": "eva", "attention_config": SETTINGS["eva"]}
TRANSFER = {"transfer_steps": 4}
EVALUATION = {"eval_strategy": "epoch"}

# Flags whose values are files of the folder that `build` writes begin with "@".
RECIPES: dict[str, dict[str, Any]] = {
    "text_classification": {"data": "@data.jsonl", "model": "@bert", **FAVOR, **EVALUATION},
    "language_modeling": {"data": "@data.jsonl", "model": "@gpt2", "max_length": 24, **LARA, **EVALUATION},
    "token_classification": {"data": "@tagged.jsonl", "model": "@bert", "max_length": 32, **EVA, **EVALUATION},
    "question_answering": {"data": "@questions.jsonl", "model": "@bert", "no_stride": None, **FAVOR, **EVALUATION},
    "image_classification": {
        "data": "@images.parquet",
        "model": "@vit",
        "attention": "favor_plus",
        "attention_config": {"num_features": 16, "window_size": 2},
        **TRANSFER,
        **EVALUATION,
    },
    "long_range_arena": {
        "data": "@data.parquet",
        "task": "text",
        "max_length": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        **EVA,
        **EVALUATION,
    },
    "attention_transfer": {
        "data": "@data.jsonl",
        "model": "@gpt2",
        "max_length": 24,
        "attention": "favor_sharp",
        "attention_config": {"window_size": 4},
        "second_stage_steps": 2,
        "max_eval_samples": 2,
    },
}


def build(folder: Path, rows: int = ROWS) -> None:
    """Write the models and the data of all recipes into a folder."""
    set_seed(0)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    bert = BertConfig(**sizes, num_hidden_layers=2, max_position_embeddings=64, type_vocab_size=2)
    BertForMaskedLM(bert).save_pretrained(folder / "bert")
    gpt2 = GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    vit = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    ViTForImageClassification(ViTConfig(**vit, image_size=24, patch_size=4, num_labels=2)).save_pretrained(
        folder / "vit"
    )
    ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(folder / "vit")
    for name in ("bert", "gpt2"):
        _tokenizer(name == "bert").save_pretrained(folder / name)
    draw = random.Random(0)
    texts = [draw.choices(WORDS[5:], k=12 + i) for i in range(rows)]
    labelled = [{"text": " ".join(words), "label": i % 2} for i, words in enumerate(texts)]
    _write(folder / "data.jsonl", labelled)
    pq.write_table(pa.Table.from_pylist(labelled), folder / "data.parquet")
    tags = ("B-a", "I-a", "O")
    _write(
        folder / "tagged.jsonl", [{"tokens": words, "ner_tags": [tags[len(w) % 3] for w in words]} for words in texts]
    )
    _write(folder / "questions.jsonl", [_question(i, words) for i, words in enumerate(texts)])
    numbers = np.random.default_rng(0)
    pictures = [_encoded(numbers.integers(0, 256, (24, 24, 3), dtype=np.uint8)) for _ in range(rows)]
    pq.write_table(pa.table({"img": pictures, "label": [i % 2 for i in range(rows)]}), folder / "images.parquet")


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _question(number: int, words: list[str]) -> dict[str, Any]:
    start = len(" ".join(words[:4])) + 1
    answers = {"text": [" ".join(words[4:6])], "answer_start": [start]}
    return {"id": str(number), "context": " ".join(words), "question": " ".join(words[2:4]), "answers": answers}


def _encoded(values: np.ndarray) -> dict[str, Any]:
    content = io.BytesIO()
    Image.fromarray(values).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def _tokenizer(with_special: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if with_special:
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", WORDS.index("[CLS]")), ("[SEP]", WORDS.index("[SEP]"))],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def command_line(recipe: str, folder: Path, output: Path, *changes: str) -> list[str]:
    """Arguments of a recipe, with the files that `build` wrote into a folder."""
    values: dict[str, Any] = {"output_dir": output, **SHARED, **RECIPES[recipe]}
    data = values.pop("data")
    values["train_file"] = data
    if "model" in values:
        values["model_name_or_path"] = values.pop("model")
    if recipe != "attention_transfer":
        values["validation_file"] = data
    flags: list[str] = []
    for name, value in values.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        text = str(folder / text.removeprefix("@")) if text.startswith("@") else text
        flags += [f"--{name}"] if value is None else [f"--{name}", text]
    return [*flags, "--do_train", *([] if recipe == "attention_transfer" else ["--do_eval"]), *changes]
