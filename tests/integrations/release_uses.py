"""Uses of the library that meet a changed release of Transformers: made ready before the change, called after it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import BERT, GPT2, VOCAB, ModelCase
from release_changes import KIND

import hf_linattn
from hf_linattn.errors import UnsupportedTransformersError

PACKAGE = Path(hf_linattn.__file__).parent
# Makes what is needed before the change; the result is called after it.
Use = Callable[[], Callable[[], Any]]


def token_ids(tokens: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, tokens), generator=torch.Generator().manual_seed(1))


def converting(case: ModelCase = GPT2) -> Use:
    def prepare() -> Callable[[], Any]:
        model = case.build()
        return lambda: hf_linattn.convert(model, KIND)

    return prepare


def generating(**config: Any) -> Use:
    def prepare() -> Callable[[], Any]:
        model = hf_linattn.convert(GPT2.build(**config), KIND)
        return lambda: model.generate(token_ids(), max_new_tokens=3, do_sample=False)

    return prepare


def loading_stock(case: ModelCase = BERT) -> Use:
    def prepare() -> Callable[[], Any]:
        import tempfile

        folder = tempfile.TemporaryDirectory()
        model = case.build()
        model.save_pretrained(folder.name)
        cls = type(hf_linattn.convert(model, KIND))
        return lambda: (folder, cls.from_pretrained(folder.name, linear_attention=KIND))

    return prepare


def native_call(**config: Any) -> Use:
    def prepare() -> Callable[[], Any]:
        model = GPT2.build(**config)
        model.set_attn_implementation(KIND)
        return lambda: model(token_ids(), use_cache=False)

    return prepare


def renamed_blocks() -> Callable[[], Any]:
    model = GPT2.build()
    model.transformer.blocks = model.transformer.h
    del model.transformer.h
    return lambda: hf_linattn.convert(model, KIND)


def other_buffers() -> Callable[[], Any]:
    model = BERT.build()
    model.bert.embeddings.register_buffer("default_positions", torch.arange(64)[None], persistent=False)
    return lambda: hf_linattn.extend_positions(model, 128)


def importing_without(module: str, name: str) -> Callable[[], Any]:
    code = f"import {module} as m; del m.{name}; import hf_linattn"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    kind, _, message = run.stderr.strip().splitlines()[-1].partition(": ")
    assert kind == "hf_linattn.errors.UnsupportedTransformersError", run.stderr

    def use() -> None:
        raise UnsupportedTransformersError(message)

    return use
