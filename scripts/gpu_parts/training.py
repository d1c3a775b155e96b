"""A short run of Transformers' Trainer in bfloat16: a converted model learns, is saved, loaded back and resumed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, BertConfig, Trainer, TrainingArguments

import hf_linattn
from hf_linattn.bench.timing import explain
from hf_linattn.modules.registry import config_from_dict
from isolated import Finding, PartFailed

from .compiled import SETTINGS
from .context import Context

FIRST, SECOND = 5, 6  # the two tokens that are counted


class CountedTokens(Dataset[dict[str, Any]]):
    """Texts of several lengths out of few tokens; the label says which of two tokens is the more frequent one.

    What a model has to do for it, an average over all tokens, is what attention is for.
    """

    def __init__(self, number: int, tokens: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for index in range(number):
            length = int(torch.randint(tokens // 2, tokens + 1, (), generator=generator))
            ids = torch.randint(10, 40, (length,), generator=generator)
            chosen = torch.rand(length, generator=generator) < 0.3
            more, fewer = (FIRST, SECOND) if index % 2 else (SECOND, FIRST)
            ids[chosen] = torch.where(torch.rand(int(chosen.sum()), generator=generator) < 0.7, more, fewer)
            mask = torch.zeros(tokens, dtype=torch.long)
            mask[:length] = 1
            ids = torch.cat([ids, ids.new_zeros(tokens - length)])
            self.rows.append({"input_ids": ids, "attention_mask": mask, "labels": index % 2})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def training(context: Context) -> Iterator[Finding]:
    """Softmax and every kind: loss, accuracy, steps per second; reload and resume for the first kind."""
    tokens, steps, batch = (24, 4, 4) if context.is_rehearsal else (512, 80, 32)
    train = CountedTokens(batch * steps // 2, tokens, 0)
    test = CountedTokens(8 if context.is_rehearsal else 256, tokens, 1)
    for kind in ("favor_plus", "eva", None, "favor_sharp", "lara"):
        finding: Finding = {"trained": kind or "sdpa", "tokens": tokens, "steps": steps, "batch": batch}
        with tempfile.TemporaryDirectory() as folder:
            try:
                yield finding | _train(context, kind, train, test, steps, batch, tokens, Path(folder))
            except Exception as error:
                yield finding | {"failed": True, "reason": explain(error)}


def _model(context: Context, kind: str | None, tokens: int) -> Any:
    torch.manual_seed(0)
    hidden = 32 if context.is_rehearsal else 256
    config = BertConfig(
        hidden_size=hidden,
        num_attention_heads=4,
        intermediate_size=4 * hidden,
        num_hidden_layers=2,
        vocab_size=64,
        max_position_embeddings=tokens,
        attention_probs_dropout_prob=0.0,
    )
    model = AutoModelForSequenceClassification.from_config(config)
    return model if kind is None else hf_linattn.convert(model, config_from_dict({"kind": kind, **SETTINGS[kind]}))


def _train(
    context: Context,
    kind: str | None,
    train: CountedTokens,
    test: CountedTokens,
    steps: int,
    batch: int,
    tokens: int,
    folder: Path,
) -> Finding:
    options: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": 1e-3,
        "warmup_steps": 5,
        "bf16": True,
        "use_cpu": context.is_rehearsal,
        "logging_steps": max(1, steps // 8),
        "save_steps": steps // 2,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
        "data_seed": 0,
        "dataloader_pin_memory": not context.is_rehearsal,
    }

    def trainer(place: str, model: Any) -> Trainer:
        return Trainer(
            model,
            TrainingArguments(str(folder / place), **options),
            train_dataset=train,
            eval_dataset=test,
            compute_metrics=lambda found: {"accuracy": float((found[0].argmax(-1) == found[1]).mean())},
        )

    model = _model(context, kind, tokens)
    first = trainer("first", model)
    start = time.perf_counter()
    first.train()
    context.synchronize()
    seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    accuracy = first.evaluate()["eval_accuracy"]
    found: Finding = {"losses": losses, "accuracy": accuracy, "train_seconds": seconds}
    if not all(loss == loss and abs(loss) < float("inf") for loss in losses):
        raise PartFailed(f"losses are not finite: {losses}")
    if not context.is_rehearsal and accuracy < 0.8:
        found |= {"failed": True, "reason": f"accuracy is {accuracy:.2f} after {steps} steps"}
    if kind == "favor_plus":
        plain = first.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # without the Trainer's autocast
        found |= _reloaded(context, plain, test, folder) | _resumed(trainer, context, kind, tokens, folder, model)
    return found


def _reloaded(context: Context, model: Any, test: CountedTokens, folder: Path) -> Finding:
    model.save_pretrained(folder / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / "saved").to(context.device).eval()
    rows = [test[index] for index in range(4)]
    names = ("input_ids", "attention_mask")
    inputs = {name: torch.stack([row[name] for row in rows]).to(context.device) for name in names}
    with torch.no_grad():
        off = float((model.eval()(**inputs).logits - loaded(**inputs).logits).abs().max())
    return {"reloaded_difference": off} | ({} if off < 1e-4 else {"failed": True, "reason": "the saved model differs"})


def _resumed(trainer: Any, context: Context, kind: str, tokens: int, folder: Path, finished: Any) -> Finding:
    """A run that goes on from the middle ends as the whole run did."""
    middle = sorted((folder / "first").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    second = trainer("second", _model(context, kind, tokens))
    second.train(resume_from_checkpoint=str(middle))
    pairs = zip(finished.parameters(), second.model.parameters(), strict=True)
    off = max(float((a - b).detach().abs().max()) for a, b in pairs)
    return {"resumed_difference": off} | ({} if off < 1e-2 else {"failed": True, "reason": "the resumed run differs"})
