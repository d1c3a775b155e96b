"""TRL's supervised trainer packs texts; needs trl, which is no dependency of the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import GPT2, VOCAB
from tiny_checkpoints import build

import hf_linattn

pytestmark = pytest.mark.slow
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

LENGTHS = [20, 7, 33, 12, 5, 28, 16, 9]


@pytest.mark.parametrize("kind", ["favor_plus", "eva"])
@pytest.mark.parametrize(
    "how",
    [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}],
    ids=lambda how: next(iter(how)),
)
def test_packed_training(kind: str, how: dict[str, Any], tmp_path: Path) -> None:
    """The loss of the first step is that of the texts one by one, and it falls."""
    build(tmp_path)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
    model = hf_linattn.convert(GPT2.build(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), GPT2.settings(kind))
    expected = _mean_loss(model, rows)
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **how,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "gpt2"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected, rel=1e-3)
    assert losses[-1] < losses[0]


def _mean_loss(model: Any, rows: list[list[int]]) -> float:
    """Of all predicted tokens, each text alone."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (len(row) - 1)
        count += len(row) - 1
    return total / count
