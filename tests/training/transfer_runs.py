"""Small models and batches for the tests of attention transfer, and runs of its Trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, GPT2, VIT, VOCAB, ModelCase
from torch import Tensor, nn
from transformers import TrainingArguments

import hf_linattn
from hf_linattn import EvaConfig, FavorPlusConfig, LaraConfig
from hf_linattn.conversion.calibrate import needs_calibration
from hf_linattn.integrations.call import Call
from hf_linattn.integrations.interface import softmax_output
from hf_linattn.integrations.observe import observed_attention
from hf_linattn.training import AttentionTransferTrainer

CASES = [BERT, GPT2, VIT]
SETTINGS = FavorPlusConfig(learned=True, num_features=8, window_size=4)
LARA = LaraConfig(learned=True, num_landmarks=8, window_size=4)
EVA = EvaConfig(learned=True, num_chunks=8, chunk_size=2, window_size=4)
every_kind = pytest.mark.parametrize("settings", [SETTINGS, LARA, EVA], ids=lambda settings: settings.kind)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_target = pytest.mark.parametrize("target", ["attention", "hidden_states"])


def converted(case: ModelCase, settings: Any = SETTINGS, **options: Any) -> Any:
    model = case.build(attention_probs_dropout_prob=0.0) if case is not GPT2 else case.build()
    if case is VIT:
        settings = settings.replace(window_size=2)
    model = hf_linattn.convert(model, settings, **options)
    return hf_linattn.calibrate(model, batches(case)) if needs_calibration(model) else model


def batches(case: ModelCase, number: int = 2, rows: int = 3, tokens: int = 24) -> list[dict[str, Tensor]]:
    """In texts the first row ends with padding."""
    generator = torch.Generator().manual_seed(0)
    if case is VIT:
        return [{"pixel_values": torch.randn(rows, 3, 24, 24, generator=generator)} for _ in range(number)]
    found = []
    for _ in range(number):
        mask = torch.ones(rows, tokens, dtype=torch.long)
        mask[0, tokens - 5 :] = 0
        found.append(
            {"input_ids": torch.randint(3, VOCAB, (rows, tokens), generator=generator), "attention_mask": mask}
        )
    return found


def short(case: ModelCase) -> dict[str, Tensor]:
    """A batch whose rows fit into the window."""
    return {"input_ids": batches(case)[0]["input_ids"][:, :4]}


def tensors(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def own(model: Any, layer: int | None = None) -> dict[str, Tensor]:
    """What the layers, or one of them, have learned."""
    place = ".linattn." if layer is None else f".{layer}."
    return {name: value for name, value in tensors(model).items() if ".linattn." in name and place in name}


def close(one: Any, other: Any) -> bool:
    pairs = zip(own(one).values(), own(other).values(), strict=True)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs)


@contextlib.contextmanager
def seen_calls(model: Any) -> Iterator[list[tuple[nn.Module, Call]]]:
    """What the attention modules are called with, on softmax."""
    found: list[tuple[nn.Module, Call]] = []

    def on_call(module: nn.Module, call: Call) -> Tensor:
        found.append((module, call))
        return softmax_output(module, call)

    with observed_attention(model, on_call):
        yield found


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(3, VOCAB, (24,), generator=generator)}


class EqualRows(Rows):
    """So that parts of a batch have the variance of the whole."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(0)
        return {**row, "labels": row["input_ids"]}


def trainer_of(
    folder: Path,
    case: ModelCase = BERT,
    settings: Any = SETTINGS,
    rows: Any = None,
    dropout: float = 0.0,
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> AttentionTransferTrainer:
    """A trainer of six steps.

    Args:
        dropout: Of the hidden states.
        options: Those of attention transfer.
        changes: Of the `TrainingArguments`.
    """
    arguments = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    rows = rows or Rows()
    names = ("resid_pdrop", "embd_pdrop") if case is GPT2 else ("hidden_dropout_prob",)
    model = hf_linattn.convert(case.build(**dict.fromkeys(names, dropout)), settings)
    return AttentionTransferTrainer(
        model, TrainingArguments(str(folder), **arguments), train_dataset=rows, eval_dataset=rows, **(options or {})
    )


def train(folder: Path, resume: bool = False, **options: Any) -> AttentionTransferTrainer:
    """`trainer_of`, trained; `resume`: from its checkpoint after three steps."""
    trainer = trainer_of(folder, **options)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return trainer


def logged(trainer: AttentionTransferTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
