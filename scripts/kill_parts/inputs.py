"""What the killed runs train: a BERT of two layers on generated texts, for two epochs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, set_seed

WORDS = ["[PAD]", "[UNK]", *"a bad good film not very plot the dull fine".split()]
ROWS, EPOCHS = 64, 2
STEPS_PER_EPOCH = 8  # of two batches of four rows

# Every kind with what is random in it while it trains, beside the model's own dropout.
SETTINGS: dict[str, dict[str, Any]] = {
    "favor_plus": {"num_features": 16, "window_size": 4, "slot_dropout": 0.1, "redraw_interval": 5},
    "favor_sharp": {"num_features": 16, "window_size": 4, "slot_dropout": 0.1, "redraw_interval": 5},
    "lara": {"num_landmarks": 4, "window_size": 4, "sample_noise": True},
    "eva": {"window_size": 4, "chunk_size": 2, "sample_noise": True},
}
ARGUMENTS = {
    "num_train_epochs": EPOCHS,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-3,
    "warmup_steps": 3,
    "eval_strategy": "epoch",
    "save_steps": 3,  # within epochs and across their border; and after the last step
    "save_total_limit": 2,
    "disable_tqdm": "true",
    "report_to": "none",
}


def build(folder: Path, rows: int = ROWS) -> None:
    """Write `model/` (dropout of 0.1, with a tokenizer) and `data.jsonl` into a folder."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special).save_pretrained(
        folder / "model"
    )
    set_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    draw = random.Random(0)
    data = [{"text": " ".join(draw.choices(WORDS[2:], k=6 + i % 40)), "label": i % 2} for i in range(rows)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))


def command_line(folder: Path, output: Path, kind: str) -> list[str]:
    """Arguments of recipes/text_classification.py."""
    values = {
        "model_name_or_path": folder / "model",
        "train_file": folder / "data.jsonl",
        "validation_file": folder / "data.jsonl",
        "output_dir": output,
        "attention": kind,
        "attention_config": json.dumps(SETTINGS[kind]),
        **ARGUMENTS,
    }
    return ["--do_train", "--do_eval", *(text for name, value in values.items() for text in (f"--{name}", str(value)))]
