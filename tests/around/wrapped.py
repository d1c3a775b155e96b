"""Models within what other libraries put round them, built in code: no network, no files but a tokenizer's."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import VOCAB
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline


def tokenizer(folder: Path) -> Any:
    """Words `w3`, `w4`, ... with BERT's special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[SEP]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **names)
    made.save_pretrained(folder)
    return made


def lora(model: Any, targets: tuple[str, ...] = ("query", "value", "c_attn"), **changes: Any) -> Any:
    """A model with LoRA, of values as if trained."""
    peft = pytest.importorskip("peft")
    with_values = {"r": 4, "target_modules": list(targets), "init_lora_weights": False, **changes}
    return peft.get_peft_model(model, peft.LoraConfig(**with_values)).eval()


def sentences(model: Any, folder: Path) -> Any:
    """A SentenceTransformer round a converted or stock base model."""
    library = pytest.importorskip("sentence_transformers")
    inner = folder / "inner"
    model.save_pretrained(inner)
    tokenizer(inner)
    made = library.SentenceTransformer(str(inner), device="cpu")
    made[0].model = model  # the very object: what a test changes, it sees
    return made.eval()


class Own(nn.Module):
    """A module of a user's, with a model and a head."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(32, 2)


def _trainer(model: Any, folder: Path) -> Any:
    arguments = TrainingArguments(str(folder / "run"), report_to="none", use_cpu=True)
    return Trainer(model=model, args=arguments)


def _prepared(model: Any) -> Any:
    """As `Accelerator.prepare` leaves it in a run of several processes, with the forward that it sets."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    return nn.parallel.DistributedDataParallel(accelerator.prepare(model))


# Name -> (how it is put round a model, the expression that leads to the model).
WRAPPERS: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "data parallel": (lambda model, _: nn.DataParallel(model), "model.module"),
    "distributed": (lambda model, _: nn.parallel.DistributedDataParallel(model), "model.module"),
    "compiled": (lambda model, _: torch.compile(model, backend="eager"), "model._orig_mod"),
    "accelerator": (lambda model, _: _prepared(model), "model.module"),
    "lora": (lambda model, _: lora(model), "model.get_base_model()"),
    "lora in parallel": (lambda model, _: nn.DataParallel(lora(model)), "model.module.get_base_model()"),
    "sentence transformer": (sentences, "model[0].model"),
    "own module": (lambda model, _: Own(model), "model.encoder"),
    "pipeline": (
        lambda model, folder: pipeline("feature-extraction", model=model, tokenizer=tokenizer(folder)),
        "model.model",
    ),
    "trainer": (_trainer, "model.model"),
}


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of one, which DistributedDataParallel needs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
