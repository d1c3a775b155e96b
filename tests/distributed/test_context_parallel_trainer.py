"""Trainer on processes that share sequences: step by step the losses of one process, and its weights."""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from sequence_processes import run_processes
from sharing import MASKS, assert_close, ids, model
from torch.utils.data import Dataset, IterableDataset
from transformers import BertForMaskedLM, BertForSequenceClassification, GPT2LMHeadModel, TrainingArguments

from hf_linattn import LinAttnError
from hf_linattn.distributed.collectives import SequenceGroup
from hf_linattn.training import ContextParallelTrainer

ROWS = 16


class Rows(Dataset[Any]):
    """Rows of 29 tokens, padded in all ways, with labels for some of their tokens or for the row."""

    def __init__(self, of_rows: bool) -> None:
        self.of_rows = of_rows

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, number: int) -> dict[str, Any]:
        mask = [each for each in MASKS.values() if each is not None][number % 4][number // 4 % 2]
        tokens = ids(1, 29, seed=number)[0]
        labels = torch.where((mask == 1) & (torch.arange(29) % (2 + number % 3) > 0), tokens, -100)
        return {"input_ids": tokens, "attention_mask": mask, "labels": number % 2 if self.of_rows else labels}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        rows = Rows(of_rows=False)
        return (rows[i] for i in range(ROWS))


def train(
    stock: Any,
    made: Any,
    folder: Path,
    size: int,
    accumulated: int,
    stream: bool = False,
    steps: int = 4,
    resume: bool = False,
) -> dict[str, Any]:
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulated,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no" if steps == 4 and not resume else "steps",
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    data = Stream() if stream else Rows(stock is BertForSequenceClassification)
    trainer = ContextParallelTrainer(made, args, context_parallel_size=size, train_dataset=data)
    trainer.model_accepts_loss_kwargs = stock is GPT2LMHeadModel  # the other heads ignore the number of labels
    trainer.train(resume_from_checkpoint=resume)
    log = trainer.state.log_history
    found = {name: torch.tensor([each[name] for each in log if name in each]) for name in ("loss", "grad_norm")}
    found["flos"] = torch.tensor(trainer.state.total_flos)
    found["rows"] = torch.tensor(trainer.get_total_train_batch_size(args))
    return {**found, **{name: p.detach().clone() for name, p in made.named_parameters()}}


def launched(group: SequenceGroup) -> dict[str, str]:
    """What a launcher tells a process."""
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), str(group.rank))
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(group.size))
    return {**ranks, **sizes, "MASTER_ADDR": "localhost", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}


@pytest.mark.parametrize(
    ("stock", "stream"),
    [
        (GPT2LMHeadModel, False),
        (GPT2LMHeadModel, True),
        pytest.param(BertForMaskedLM, False, marks=pytest.mark.slow),
        pytest.param(BertForSequenceClassification, False, marks=pytest.mark.slow),
    ],
)
def test_two_by_two_processes(stock: Any, stream: bool, tmp_path: Path) -> None:
    made = model(stock)

    def work(group: SequenceGroup) -> dict[str, Any]:
        os.environ.update(launched(group))
        return train(stock, made, tmp_path, size=2, accumulated=2, stream=stream)

    found = run_processes(4, work, tmp_path)
    expected = train(stock, made, tmp_path, size=1, accumulated=4, stream=stream)
    assert len(expected["loss"]) == 4
    for each in found:
        assert_close(each, expected, atol=1e-5)


@pytest.mark.slow
def test_resumed(tmp_path: Path) -> None:
    """In the middle of an epoch, the processes of a group go on with the same rows."""
    made = model(GPT2LMHeadModel)

    def work(group: SequenceGroup) -> list[dict[str, Any]]:
        os.environ.update(launched(group))
        whole = train(GPT2LMHeadModel, deepcopy(made), tmp_path / "whole", 2, 1)
        train(GPT2LMHeadModel, deepcopy(made), tmp_path / "cut", 2, 1, steps=2)
        return [whole, train(GPT2LMHeadModel, deepcopy(made), tmp_path / "cut", 2, 1, resume=True)]

    for whole, resumed in run_processes(4, work, tmp_path):
        assert_close(resumed, whole, atol=0)


# Flags, arguments of the Trainer, and a part of the message.
MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "number": ({}, {"context_parallel_size": 3}, "must divide the number of processes, 2; got 3"),
    "smoothing": ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor=0.1 does not work"),
    "tokens": ({"include_num_input_tokens_seen": "all"}, {}, "include_num_input_tokens_seen='all' does not work"),
    "compiled": ({"torch_compile": True}, {}, "torch_compile=True does not work"),
    "dispatch": ({"accelerator_config": {"dispatch_batches": True}}, {}, "dispatch_batches=True does not work"),
    "loss": ({}, {"compute_loss_func": lambda *_: None}, "compute_loss_func would get the logits of a part"),
    "layers": ({}, {"model": model(GPT2LMHeadModel, slot_dropout=0.1)}, "cannot share a sequence: slot_dropout=0.1"),
    "no model": ({}, {"model": None, "model_init": lambda: None}, "give Trainer a model and args"),
}


def test_mistakes(tmp_path: Path) -> None:
    made = model(GPT2LMHeadModel)

    def work(group: SequenceGroup) -> dict[str, str]:
        os.environ.update(launched(group))
        found = {}
        for name, (flags, arguments, _) in MISTAKES.items():
            args = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **flags)
            try:
                ContextParallelTrainer(**{"model": made, "args": args, "context_parallel_size": 2, **arguments})
            except LinAttnError as error:
                found[name] = str(error)
        return found

    for found in run_processes(2, work, tmp_path):
        assert found.keys() == MISTAKES.keys()
        wrong = {name: found[name] for name, (_, _, text) in MISTAKES.items() if text not in found[name]}
        assert not wrong
