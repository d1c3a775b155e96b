"""The quick set: what is timed, under which names. Runs in a worker, with the package of the checkout it measures.

It uses only what every version has: the public functions and the names registered with Transformers. Building a figure
imports the package; listing the names does not.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

KINDS = ("favor_plus", "favor_sharp", "lara", "eva")
LENGTHS = (256, 1024, 4096)
MODES = ("forward", "forward+backward")
FAMILIES = ("bert", "gpt2", "vit")
STEPS = ("forward", "training step")
# Batch and tokens of whole models; an image of 224 x 224 in patches of 16 has 197 tokens.
BATCH, TOKENS, WIDTH, HEADS, LAYERS, VOCABULARY = 2, 512, 256, 4, 2, 1000
PROMPT, NEW_TOKENS = 128, 32
IMPORT = """
import time
from transformers import AutoModel, BertModel, GPT2LMHeadModel, ViTModel
start = time.process_time()
import hf_linattn
print(time.process_time() - start)
"""


@dataclass(frozen=True)
class Figure:
    """One number of the set. `build` does what is not timed, and returns the call that is."""

    name: str
    threads: int
    build: Callable[[], Callable[[], object]]


def all_figures() -> list[Figure]:
    """The whole set: everything with one thread, and with two what has enough to do for them."""
    found = []
    for threads, end in ((1, "1 thread"), (2, "2 threads")):
        lengths, steps = (LENGTHS, STEPS) if threads == 1 else (LENGTHS[-1:], STEPS[-1:])
        for kind, direction, tokens, mode in product(KINDS, ("bidirectional", "causal"), lengths, MODES):
            build = partial(attention, kind, direction == "causal", tokens, mode)
            found.append(Figure(f"{kind} {direction} {mode} {tokens}, {end}", threads, build))
        for family, kind, step in product(FAMILIES, KINDS, steps):
            found.append(Figure(f"{family} {kind} {step}, {end}", threads, partial(model, kind, family, step)))
    found += [Figure(f"gpt2 {kind} generation, 1 thread", 1, partial(generation, kind)) for kind in KINDS]
    return [*found, Figure("import", 1, lambda: import_seconds), Figure("convert, save and load", 1, life)]


def converted(kind: str, family: str) -> Any:
    """A converted model of two layers with random weights, ready to run."""
    import torch
    import transformers

    import hf_linattn

    torch.manual_seed(0)
    config_class, model_class = {
        "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
        "vit": (transformers.ViTConfig, transformers.ViTForImageClassification),
    }[family]
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
    text = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    own = {"resid_pdrop": 0.0, "embd_pdrop": 0.0} if family == "gpt2" else {"intermediate_size": WIDTH}
    config = config_class(**sizes, **own, hidden_dropout_prob=0.0, **({} if family == "vit" else text))
    made = hf_linattn.convert(model_class(config), kind)
    if hf_linattn.needs_calibration(made):
        hf_linattn.calibrate(made, [inputs(family)])
    return made.eval()


def inputs(family: str) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    if family == "vit":
        return {"pixel_values": torch.randn(BATCH, 3, 224, 224, generator=generator)}
    return {"input_ids": torch.randint(3, VOCABULARY, (BATCH, TOKENS), generator=generator)}


def attention(kind: str, is_causal: bool, tokens: int, mode: str) -> Callable[[], object]:
    """The registered function with a converted layer of BERT or GPT-2: 4 heads of 64, the family's default window."""
    import torch
    import transformers

    whole = converted(kind, "gpt2" if is_causal else "bert")
    layer = next(module for module in whole.modules() if hasattr(module, "linattn"))
    function = transformers.AttentionInterface()[kind]
    is_training = mode == "forward+backward"
    layer.train(is_training)
    size, generator = (1, tokens, HEADS, WIDTH // HEADS), torch.Generator().manual_seed(0)
    query, key, value, grad = (torch.randn(size, generator=generator).transpose(1, 2) for _ in range(4))
    given = {"scaling": size[-1] ** -0.5, "dropout": 0.0, "is_causal": is_causal}

    def call() -> object:
        with torch.set_grad_enabled(is_training):
            output = function(layer, query, key, value, None, **given)[0]
        return torch.autograd.grad(output, (query, key, value), grad.transpose(1, 2)) if is_training else output

    for tensor in (query, key, value):
        tensor.requires_grad_(is_training)
    return call


def model(kind: str, family: str, step: str) -> Callable[[], object]:
    import torch

    network, batch = converted(kind, family), inputs(family)
    if step == "training step":
        network.train()
        batch["labels"] = batch["input_ids"] if family == "gpt2" else torch.zeros(BATCH, dtype=torch.long)

    def call() -> None:
        with torch.set_grad_enabled(network.training):
            loss = network(**batch)["loss" if network.training else "logits"]
        if network.training:
            network.zero_grad(set_to_none=True)
            loss.backward()

    return call


def generation(kind: str) -> Callable[[], object]:
    """A prompt and the tokens after it, through the cache."""
    import torch

    network, ids = converted(kind, "gpt2"), inputs("gpt2")["input_ids"][:, :PROMPT]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW_TOKENS, "do_sample": False}
    return lambda: network.generate(ids, **options, use_cache=True)


def import_seconds() -> float:
    """Processor time of `import hf_linattn` in a new process, on top of the stock model classes."""
    return float(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout)


def life() -> Callable[[], object]:
    """A BERT converted to FAVOR+, saved and loaded, in memory where the system has such a folder."""
    import transformers

    import hf_linattn

    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": WIDTH, "vocab_size": VOCABULARY}
    stock = transformers.BertModel(transformers.BertConfig(**sizes, num_hidden_layers=4))
    parent = "/dev/shm" if Path("/dev/shm").is_dir() else None

    def call() -> None:
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            hf_linattn.convert(stock, "favor_plus", copy=True).save_pretrained(folder)
            transformers.AutoModel.from_pretrained(folder)

    return call
