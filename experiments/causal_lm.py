"""What the scripts about generation share: GPT-2 checkpoints, text, and the kinds with their settings."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import hf_linattn
from hf_linattn import EvaConfig, FavorPlusConfig, FavorSharpConfig, LaraConfig

BOUNDED = "eva-bounded"
KINDS = ("favor_plus", "favor_sharp", "lara", "eva", BOUNDED)
CONSTANT = tuple(kind for kind in KINDS if kind != "eva")  # whose state does not grow with the text


def settings(kind: str, max_chunks: int = 64) -> Any:
    """The settings of a row: those of the model family, EVA also with a bounded number of summaries."""
    made = {
        "favor_plus": FavorPlusConfig,
        "favor_sharp": FavorSharpConfig,
        "lara": LaraConfig,
        "eva": EvaConfig,
    }
    return EvaConfig(max_chunks=max_chunks) if kind == BOUNDED else made[kind]()


def quiet() -> None:
    """Without what conversion says about every model, and without bars."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("hf_linattn").setLevel(logging.ERROR)


def load(path: Path | None, layers: int = 4, positions: int = 1024) -> Any:
    """A stock GPT-2 in float32 with at least so many positions: a checkpoint, or a small one with random weights."""
    if path is None:
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            n_layer=layers,
            n_embd=256,
            n_head=4,
            n_positions=positions,
            vocab_size=4096,
            bos_token_id=0,
            eos_token_id=0,
        )
        return transformers.GPT2LMHeadModel(config).eval()
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if model.config.n_positions < positions:
        hf_linattn.extend_positions(model, positions)
    return model.eval()


def read(path: Path) -> str:
    """A text file, or the column `text` of a parquet file, its rows joined."""
    if path.suffix != ".parquet":
        return path.read_text(encoding="utf-8")
    import pyarrow.parquet

    return "".join(pyarrow.parquet.read_table(path)["text"].to_pylist())


def tokens(tokenizer: Any, paths: Iterable[Path]) -> Tensor:
    """The texts one after the other as tokens `[count]`."""
    found: list[int] = []
    for path in paths:
        found += tokenizer(read(path), add_special_tokens=False)["input_ids"]
    return torch.tensor(found)


def windows(ids: Tensor, length: int, most: int | None = None) -> Tensor:
    """Consecutive full rows `[rows, length]`. Ends the script if there is none."""
    count = len(ids) // length
    if not count:
        sys.exit(f"error: the text has {len(ids)} tokens; at least {length} are needed.")
    return ids[: count * length].view(count, length)[:most]


def ready(model: Any, rows: Tensor) -> Any:
    """A converted model that can run: calibrated on rows of tokens if it has to be."""
    if hf_linattn.needs_calibration(model):
        hf_linattn.calibrate(model, [{"input_ids": row[None]} for row in rows])
    return model.eval()


@contextmanager
def without_end(model: Any) -> Iterator[None]:
    """No token ends what is generated."""
    config = model.generation_config
    before, config.eos_token_id = config.eos_token_id, None
    try:
        yield
    finally:
        config.eos_token_id = before
