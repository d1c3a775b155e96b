"""Writes the checkpoints of this folder: run it with the version of the library that they are to be of.

PYTHONPATH=<checkout of that version> python tests/checkpoints/write_checkpoints.py <folder>
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

import hf_linattn

VOCAB, TOKENS = 40, 20
COMMON: dict[str, Any] = {
    "initializer_range": 0.3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
GPT2 = {"initializer_range": 0.3, "n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 2, "bos_token_id": 1}
SETTINGS: dict[str, Any] = {
    "favor_plus": lambda window: hf_linattn.FavorPlusConfig(num_features=16, window_size=window),
    "favor_sharp": lambda window: hf_linattn.FavorSharpConfig(num_features=16, window_size=window, variant="dense"),
    "lara": lambda window: hf_linattn.LaraConfig(num_landmarks=4, window_size=window),
    "eva": lambda window: hf_linattn.EvaConfig(num_chunks=4, window_size=window, relative_position="t5"),
}


def stock(family: str) -> Any:
    torch.manual_seed(0)
    if family == "bert":
        return BertForMaskedLM(BertConfig(**COMMON, vocab_size=VOCAB, max_position_embeddings=TOKENS)).eval()
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**GPT2, vocab_size=VOCAB, n_positions=TOKENS, eos_token_id=2)).eval()
    return ViTForImageClassification(ViTConfig(**COMMON, image_size=16, patch_size=4, num_labels=3)).eval()


def inputs(family: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, VOCAB, (2, TOKENS), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def write(folder: Path, kind: str, family: str) -> None:
    model = hf_linattn.convert(stock(family), SETTINGS[kind](2 if family == "vit" else 4))
    if hf_linattn.needs_calibration(model):
        hf_linattn.calibrate(model, [inputs(family, seed) for seed in range(4)])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # what is learned and starts at zero has to do something
        for name, parameter in sorted(model.named_parameters()):
            if "linattn" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    given = inputs(family, 9)
    if family != "vit":  # the second row has padding at the side where its family has it
        given["attention_mask"][1, slice(0, 7) if family == "gpt2" else slice(-7, None)] = 0
    with torch.no_grad():
        logits = model(**given).logits
    model.save_pretrained(folder)
    save_file({**given, "logits": logits}, folder / "expected.safetensors")


if __name__ == "__main__":
    for kind in SETTINGS:
        for family in ("bert", "gpt2", "vit"):
            write(Path(sys.argv[1]) / f"{kind}_{family}", kind, family)
