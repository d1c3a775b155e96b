"""What the scripts about generation share: GPT-2 checkpoints, text, and the kinds with their settings."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import hf_linattn
from hf_linattn.modules.registry import get_kind, list_kinds

SOFTMAX, BOUNDED = "softmax", "eva-bounded"
KINDS = (*list_kinds(), BOUNDED)
CONSTANT = tuple(kind for kind in KINDS if kind != "eva")  # whose state does not grow with the text


def settings(kind: str, max_chunks: int = 64) -> Any:
    """The settings of a row: those of the model family, EVA also with a bounded number of summaries."""
    return hf_linattn.EvaConfig(max_chunks=max_chunks) if kind == BOUNDED else get_kind(kind).config_cls()


def load(path: Path | None, layers: int = 4, positions: int = 1024) -> Any:
    """A stock GPT-2 in float32 with at least so many positions: a checkpoint, or a small one with random weights.

    From now on nothing is said about every conversion, and there are no bars.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("hf_linattn").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if path is None:
        torch.manual_seed(0)
        sizes = {"n_layer": layers, "n_embd": 256, "n_head": 4, "n_positions": positions, "vocab_size": 4096}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if model.config.n_positions < positions:
        hf_linattn.extend_positions(model, positions)
    return model.eval()


def converted(model: Any, kind: str, rows: Tensor, max_chunks: int = 64) -> Any:
    """A converted copy, calibrated on rows of tokens if it has to be."""
    made = hf_linattn.convert(model, settings(kind, max_chunks), copy=True)
    if hf_linattn.needs_calibration(made):
        hf_linattn.calibrate(made, [{"input_ids": row[None]} for row in rows])
    return made.eval()


def tokens(tokenizer: Any, paths: Iterable[Path]) -> Tensor:
    """Texts one after the other as tokens `[count]`: text files, or the column `text` of parquet files."""
    found: list[int] = []
    for path in paths:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            text = "".join(pyarrow.parquet.read_table(path)["text"].to_pylist())
        else:
            text = path.read_text(encoding="utf-8")
        found += tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(found)


def windows(ids: Tensor, length: int, most: int | None = None) -> Tensor:
    """Consecutive full rows `[rows, length]`. Ends the script if there is none."""
    count = len(ids) // length
    if not count:
        sys.exit(f"error: the text has {len(ids)} tokens; at least {length} are needed.")
    return ids[: count * length].view(count, length)[:most]
