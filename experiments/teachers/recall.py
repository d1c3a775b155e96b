"""Train a small causal softmax model that recalls pairs named once, further back than any window.

    python experiments/teachers/recall.py --out recall-teacher      # under 5 minutes on one core

A row names 32 pairs of a random key and a random value, says 64 tokens of noise, and then asks for 8 of the keys:

    k v k v ... (64 tokens)   noise ... (64 tokens)   k v k v ... (16 tokens)

so that a key is asked for 66 to 142 tokens after it was named. What is learned and scored are the values of the last
16 tokens. The model is a stock GPT-2 of two layers with 4 heads of 32. With every token it is given the one before, as
GPT-2's `token_type_ids` (words of their own in its table), so that no layer has to be spent on looking one token back.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

KEYS, VALUES, NOISE = 128, 64, 8  # words: more keys than slots
WORDS = KEYS + VALUES + NOISE  # then the same once more, as words before others
PAIRS, ASKED = 32, 8
FACTS, GAP, QUESTIONS = 2 * PAIRS, 64, 2 * ASKED  # tokens
LENGTH = FACTS + GAP + QUESTIONS
IGNORED = -100


def sample(rows: int, generator: torch.Generator, *, ask_in_gap: bool = False) -> dict[str, Tensor]:
    """Rows of facts and questions.

    Args:
        ask_in_gap: Instead of noise all pairs are asked for once: four times as many answers to learn from.
    Returns: "input_ids", "token_type_ids" and "labels" `[rows, 144]`; labels are the answers, -100 elsewhere.
    """

    def shuffled(count: int) -> Tensor:
        return torch.rand(rows, count, generator=generator).argsort(1)

    def words(pairs: Tensor) -> Tensor:
        return torch.stack([keys.gather(1, pairs), values.gather(1, pairs)], -1).flatten(1)

    keys = shuffled(KEYS)[:, :PAIRS]
    values = KEYS + torch.randint(VALUES, (rows, PAIRS), generator=generator)
    noise = KEYS + VALUES + torch.randint(NOISE, (rows, GAP), generator=generator)
    facts, questions = words(torch.arange(PAIRS).expand(rows, -1)), words(shuffled(PAIRS)[:, :ASKED])
    gap = words(shuffled(PAIRS)) if ask_in_gap else noise
    ids = torch.cat([facts, gap, questions], 1)
    labels = torch.full_like(ids, IGNORED)
    first = FACTS if ask_in_gap else FACTS + GAP
    labels[:, first + 1 :: 2] = ids[:, first + 1 :: 2]
    return {**inputs(ids), "labels": labels}


def inputs(ids: Tensor) -> dict[str, Tensor]:
    """What a model reads for words `[rows, tokens]`: the words, and the word before each, of the first a noise."""
    return {"input_ids": ids, "token_type_ids": WORDS + torch.nn.functional.pad(ids[:, :-1], (1, 0), value=WORDS - 1)}


def answers(logits: Tensor, ids: Tensor) -> Tensor:
    """`[rows, 8]`, True where the most likely token behind a question is its answer.

    Args:
        logits: `[rows, 144, vocabulary]`.
    """
    return logits[:, FACTS + GAP : -1 : 2].argmax(-1) == ids[:, FACTS + GAP + 1 :: 2]


def test_rows(count: int) -> Tensor:
    """`[count, 144]`: rows that no seed of training draws."""
    return sample(count, torch.Generator().manual_seed(2**40))["input_ids"]


@torch.inference_mode()
def recall(model: GPT2LMHeadModel, rows: Tensor) -> float:
    """The share of questions that a model answers right."""
    return float(torch.cat([answers(model(**inputs(part)).logits, part) for part in rows.split(64)]).float().mean())


def untrained(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=2 * WORDS,
        n_positions=LENGTH,
        n_embd=128,
        n_layer=2,
        n_head=4,
        initializer_range=128**-0.5,  # a smaller one hides the keys from each other for hundreds of steps
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


def batches(rows: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """What a model is trained on, without end: every other batch asks in the gap too."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield sample(rows, generator, ask_in_gap=True)
        yield sample(rows, generator)


def train(model: GPT2LMHeadModel, steps: int, learning_rate: float, rows: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    held_out = test_rows(64)
    model.train()
    for step, batch in enumerate(islice(batches(rows, seed), steps), 1):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss:.3f}, recall {recall(model.eval(), held_out):.3f}", flush=True)
            model.train()
    model.eval()


def main(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    steps: Annotated[int, typer.Option(min=1)] = 300,
    learning_rate: float = 2e-3,
    rows: Annotated[int, typer.Option(min=1, help="Of a batch.")] = 32,
    seed: int = 0,
) -> None:
    """Train and save the model. The exit status is 1 if it recalls at most 99 %."""
    torch.set_num_threads(1)
    model = untrained(seed)
    clocks = time.perf_counter(), time.process_time()
    train(model, steps, learning_rate, rows, seed)
    seconds, cpu_seconds = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
    found = recall(model, test_rows(1024))
    model.save_pretrained(out)
    print(f"recall {found:.4f} after {seconds:.0f} s ({cpu_seconds:.0f} s of a CPU); saved in {out}")
    sys.exit(found <= 0.99)


if __name__ == "__main__":
    typer.run(main)
