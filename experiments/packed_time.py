"""What do a padded and a packed batch of texts of many lengths cost? MiniLM's sizes, forward and training step.

    OMP_NUM_THREADS=1 python experiments/packed_time.py --output experiments/results/packed_time.json

16 texts of 64 to 512 tokens. "padded": the batch as it was computed before, every layer moving and masking its
padding; "grouped": the same batch, which the layers take apart into rows of similar length; "packed": the texts in
one row without padding; "sdpa": softmax, padded. Interleaved runs on one thread; the least
processor time of each counts, which other work on the machine changes least.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModel, BertConfig, DataCollatorWithFlattening, GPT2Config

import hf_linattn
from hf_linattn.bench.environment import write_experiment
from hf_linattn.bench.models import MINILM, NO_DROPOUT
from hf_linattn.integrations import interface
from hf_linattn.modules.registry import get_kind

LENGTHS = [64 + round(448 * n / 15) for n in range(16)]


def batches(lengths: list[int], vocabulary: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The texts padded, and packed."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    texts = [torch.randint(5, vocabulary, (lengths[n],), generator=generator) for n in order]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": text} for text in texts])
    del packed["labels"]
    return {"input_ids": ids, "attention_mask": mask}, packed


def runs(model: Any, softmax: Any, training: bool) -> dict[str, Callable[[], None]]:
    padded, packed = batches(LENGTHS, model.config.vocab_size)

    def step(model: Any, batch: dict[str, Any]) -> None:
        with torch.set_grad_enabled(training):
            output = model(**batch, use_cache=False)[0]
            if training:
                output.square().mean().backward()
                model.zero_grad()

    def as_before() -> None:
        with mock.patch.object(interface, "padded_sequences", return_value=None):
            step(model, padded)

    return {
        "sdpa": lambda: step(softmax, padded),
        "padded": as_before,
        "grouped": lambda: step(model, padded),
        "packed": lambda: step(model, packed),
    }


def least(run: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """The least time of each, in seconds, of interleaved runs."""
    times: dict[str, list[float]] = {name: [] for name in run}
    for call in run.values():
        call()
    begun = time.process_time()
    while time.process_time() - begun < seconds or len(times["sdpa"]) < 2:
        for name, call in run.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {name: min(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default="favor_plus,eva,lara")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--models", default="bert,gpt2")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for name in given.models.split(","):
        sizes = {**MINILM, "num_hidden_layers": given.layers, "vocab_size": 2000, **NO_DROPOUT}
        config: Any = (GPT2Config if name == "gpt2" else BertConfig)(**sizes, max_position_embeddings=512)
        for kind in given.kinds.split(","):
            if name == "gpt2" and not get_kind(kind).native_causal:
                continue
            torch.manual_seed(0)
            softmax = AutoModel.from_config(config, attn_implementation="sdpa")
            size = {get_kind(kind).size_field: 64, "window_size": 32}
            model = hf_linattn.convert(AutoModel.from_config(config), get_kind(kind).config_cls(**size))
            if hf_linattn.needs_calibration(model):
                continue
            for training in (False, True):
                softmax.train(training), model.train(training)
                found = least(runs(model, softmax, training), given.seconds)
                row = {"model": name, "kind": kind, "mode": "training step" if training else "forward", **found}
                rows.append(row)
                over = {key: round(found[key] / found["padded"], 3) for key in ("grouped", "packed", "sdpa")}
                print(name, kind, row["mode"], f"padded {found['padded']:.3f} s; of that", over, flush=True)
    if given.output:
        write_experiment(given.output, {"lengths": LENGTHS, "rows": rows})


if __name__ == "__main__":
    main()
