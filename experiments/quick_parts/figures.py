"""The quick set: what is timed, under which names. Runs in a worker, with the package of the checkout it measures.

Building a figure imports the package; listing the names does not, so that the driver can do it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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

Sample = Callable[[int], float]  # number of calls -> seconds of the fastest


@dataclass(frozen=True)
class Figure:
    """One number of the set.

    Args:
        name: Unique; what tables and results show.
        group: "attention", "model", "generation" or "life" (import, conversion, saving, loading).
        threads: Threads of torch meanwhile.
        build: Everything that is not timed; returns what takes one sample.
    """

    name: str
    group: str
    threads: int
    build: Callable[[], Sample]


def timed(call: Callable[[], object], threads: int) -> Sample:
    """The fastest of a number of calls: what else a machine does only ever adds.

    With one thread the processor time of this process counts, which other processes lengthen little; with more threads
    that would count those which wait, so it is the time of the clock.
    """
    clock = time.process_time if threads == 1 else time.perf_counter

    def once() -> float:
        start = clock()
        call()
        return clock() - start

    return lambda calls: min(once() for _ in range(calls))


def all_figures() -> list[Figure]:
    """The whole set: everything with one thread, and with two what has enough to do for them."""
    return [
        *(figure for threads in (1, 2) for figure in _figures(threads)),
        *(Figure(f"gpt2 {kind} generation, 1 thread", "generation", 1, partial(_generation, kind)) for kind in KINDS),
        Figure("import", "life", 1, _import),
        Figure("convert, save and load", "life", 1, _life),
    ]


def _figures(threads: int) -> Iterator[Figure]:
    end = f"{threads} thread{'s' if threads > 1 else ''}"
    directions = {"bidirectional": False, "causal": True}
    lengths, steps = (LENGTHS, STEPS) if threads == 1 else (LENGTHS[-1:], STEPS[-1:])
    for kind, direction, tokens, mode in product(KINDS, directions, lengths, MODES):
        build = partial(_attention, kind, directions[direction], tokens, mode, threads)
        yield Figure(f"{kind} {direction} {mode} {tokens}, {end}", "attention", threads, build)
    for family, kind, step in product(FAMILIES, KINDS, steps):
        build = partial(_model, kind, family, step, threads)
        yield Figure(f"{family} {kind} {step}, {end}", "model", threads, build)


def _attention(kind: str, causal: bool, tokens: int, mode: str, threads: int) -> Sample:
    """The registered function, with the family's default window."""
    from hf_linattn.bench.cases import Workload, make_inputs, make_step
    from hf_linattn.bench.ours import KindOptions, kind_implementation

    work = Workload(tokens, is_causal=causal, mode=mode)
    attention = kind_implementation(kind, KindOptions(window_size=None)).build(work)
    return timed(make_step(attention, make_inputs(work), work), threads)


def converted(kind: str, family: str) -> Any:
    """A converted model of two layers with random weights, ready to run."""
    import torch
    import transformers

    import hf_linattn

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
    text = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    if family == "bert":
        config = transformers.BertConfig(**sizes, **text, intermediate_size=WIDTH, hidden_dropout_prob=0.0)
        model = transformers.BertForSequenceClassification(config)
    elif family == "gpt2":
        config = transformers.GPT2Config(
            n_embd=WIDTH, n_head=HEADS, n_layer=LAYERS, resid_pdrop=0.0, embd_pdrop=0.0, **text
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        model = transformers.ViTForImageClassification(
            transformers.ViTConfig(**sizes, intermediate_size=WIDTH, hidden_dropout_prob=0.0)
        )
    model = hf_linattn.convert(model, kind)
    if hf_linattn.needs_calibration(model):
        hf_linattn.calibrate(model, [_inputs(family)])
    return model.eval()


def _inputs(family: str) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    if family == "vit":
        return {"pixel_values": torch.randn(BATCH, 3, 224, 224, generator=generator)}
    return {"input_ids": torch.randint(3, VOCABULARY, (BATCH, TOKENS), generator=generator)}


def _model(kind: str, family: str, step: str, threads: int) -> Sample:
    import torch

    model, inputs = converted(kind, family), _inputs(family)

    def forward() -> None:
        with torch.no_grad():
            model(**inputs)

    if step == "forward":
        return timed(forward, threads)
    model.train()
    labels = inputs["input_ids"] if family == "gpt2" else torch.zeros(BATCH, dtype=torch.long)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        model(**inputs, labels=labels).loss.backward()

    return timed(train, threads)


def _generation(kind: str) -> Sample:
    """Seconds for a prompt and the tokens after it, through the cache."""
    import torch

    model, ids = converted(kind, "gpt2"), _inputs("gpt2")["input_ids"][:, :PROMPT]
    mask = torch.ones_like(ids)
    return timed(
        lambda: model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True),
        1,
    )


def _import() -> Sample:
    """Processor time of `import hf_linattn` in a new process, on top of the stock model classes."""

    def sample(calls: int) -> float:
        command = [sys.executable, "-c", IMPORT]
        return min(
            float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(calls)
        )

    return sample


def _life() -> Sample:
    """A BERT converted to FAVOR+, saved and loaded, in memory where the system has such a folder."""
    import transformers

    import hf_linattn

    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": WIDTH, "vocab_size": VOCABULARY}
    stock = transformers.BertModel(transformers.BertConfig(**sizes, num_hidden_layers=4))
    shared = "/dev/shm"
    parent = shared if Path(shared).is_dir() else None

    def life() -> None:
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            hf_linattn.convert(stock, "favor_plus", copy=True).save_pretrained(folder)
            transformers.AutoModel.from_pretrained(folder)

    return timed(life, 1)
