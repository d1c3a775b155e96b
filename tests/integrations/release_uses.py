"""Uses of the library that meet a changed release of Transformers: made ready before the change, called after it."""

from __future__ import annotations

import functools
import json
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


# Names of Transformers without which the package cannot be imported.
IMPORTED = [
    ("transformers.masking_utils", "causal_mask_function"),
    ("transformers.cache_utils", "CacheLayerMixin"),
    ("transformers.models.gpt2.modeling_gpt2", "GPT2DoubleHeadsModel"),
]
# One process imports Transformers, and forks one for each name.
IMPORT = """
import importlib, json, os
modules = [importlib.import_module(module) for module, _ in NAMES]
for module, (_, name) in zip(modules, NAMES):
    if os.fork() == 0:
        delattr(module, name)
        try:
            import hf_linattn
        except Exception as error:
            print(json.dumps([name, type(error).__name__, str(error)]), flush=True)
        os._exit(0)
    os.wait()
"""


@functools.cache
def _import_errors() -> dict[str, tuple[str, str]]:
    code = f"NAMES = {IMPORTED!r}{IMPORT}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    return {name: (kind, message) for name, kind, message in map(json.loads, run.stdout.splitlines())}


def importing_without(name: str) -> Callable[[], Any]:
    """Raise what importing the package without one of `IMPORTED` raises, in a process of its own."""
    kind, message = _import_errors()[name]
    assert kind == UnsupportedTransformersError.__name__, message

    def use() -> None:
        raise UnsupportedTransformersError(message)

    return use
