"""Attention transfer: the error falls, nothing else changes, runs resume and divide, mistakes are told."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, GPT2, VIT, VOCAB, ModelCase
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, TrainingArguments

import hf_linattn
from hf_linattn import EvaConfig, FavorPlusConfig, LaraConfig
from hf_linattn.conversion.calibrate import needs_calibration
from hf_linattn.errors import ConfigError, InputError
from hf_linattn.training import AttentionTransferTrainer, transfer_attention
from hf_linattn.training.trained_layers import start, trained_layers

CASES = [BERT, GPT2, VIT]
SETTINGS = FavorPlusConfig(learned=True, num_features=8, window_size=4)
LARA = LaraConfig(learned=True, num_landmarks=8, window_size=4)
EVA = EvaConfig(learned=True, num_chunks=8, chunk_size=2, window_size=4)
every_kind = pytest.mark.parametrize("settings", [SETTINGS, LARA, EVA], ids=lambda settings: settings.kind)


def converted(case: ModelCase, settings: Any = SETTINGS) -> Any:
    model = case.build(attention_probs_dropout_prob=0.0) if case is not GPT2 else case.build()
    if case is VIT:
        settings = settings.replace(window_size=2)
    model = hf_linattn.convert(model, settings)
    return hf_linattn.calibrate(model, batches(case)) if needs_calibration(model) else model


def batches(case: ModelCase, number: int = 2, rows: int = 3, tokens: int = 24) -> list[dict[str, Tensor]]:
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


def tensors(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@every_kind
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_error_falls_and_nothing_else_changes(case: ModelCase, settings: Any) -> None:
    model = converted(case, settings)
    before, required = tensors(model), [parameter.requires_grad for parameter in model.parameters()]
    steps = transfer_attention(model, batches(case), steps=31)  # the last on the first batch again
    assert [step.step for step in steps] == list(range(31))
    assert all(last < 0.95 * first for first, last in zip(steps[0].errors, steps[-1].errors, strict=True))
    after = tensors(model)
    learned = {name for name, _ in model.named_parameters() if ".linattn." in name}
    assert {name for name in before if not torch.equal(before[name], after[name])} == learned
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert all(parameter.grad is None or ".linattn." in name for name, parameter in model.named_parameters())


def test_the_first_batch_sets_what_has_a_closed_form() -> None:
    model, batch = converted(BERT), batches(BERT)[0]
    start(model, batch, trained_layers(model, None))
    first = own(model)
    for name, value in first.items():
        assert bool(value.abs().sum() > 0) == name.endswith(("directions", "shift", "far_offset")), name
    start(model, batch, trained_layers(model, None))  # from where it has been put, nothing is left to do
    torch.testing.assert_close(own(model), first)


@every_kind
def test_what_was_learned_is_saved_and_loaded(tmp_path: Path, settings: Any) -> None:
    model = converted(BERT, settings)
    transfer_attention(model, batches(BERT), steps=2)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    batch = batches(BERT)[0]
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, loaded(**batch).logits)
    assert loaded.config.linear_attention["learned"] is True


@every_kind
def test_padding_does_not_count(settings: Any) -> None:
    """Rows with padding give the errors of the rows without."""
    short = [{"input_ids": batch["input_ids"][:, :19]} for batch in batches(BERT)]
    padded = []
    for batch in short:
        ids = torch.cat([batch["input_ids"], torch.full((3, 6), 7)], 1)
        padded.append({"input_ids": ids, "attention_mask": torch.tensor([[1] * 19 + [0] * 6] * 3)})
    found = [transfer_attention(converted(BERT, settings), given, steps=4)[-1].errors for given in (short, padded)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(3, VOCAB, (24,), generator=generator)}


def train(
    folder: Path, resume: bool = False, case: ModelCase = BERT, rows: Any = None, dropout: float = 0.0, **changes: Any
) -> Any:
    """A trained `AttentionTransferTrainer`; `dropout` is that of the hidden states."""
    options = {
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
    model = hf_linattn.convert(case.build(**dict.fromkeys(names, dropout)), SETTINGS)
    trainer = AttentionTransferTrainer(
        model, TrainingArguments(str(folder), **options), train_dataset=rows, eval_dataset=rows
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return trainer


def own(model: Any) -> dict[str, Tensor]:
    """What the layers have learned."""
    return {name: value for name, value in tensors(model).items() if ".linattn." in name}


def close(one: Any, other: Any) -> bool:
    pairs = zip(own(one).values(), own(other).values(), strict=True)
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs)


def test_the_trainer_learns_and_resumes_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", dropout=0.1)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert whole.evaluate()["eval_loss"] < sum(losses) / len(losses)
    (tmp_path / "again").mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "again" / "checkpoint-3")
    again = train(tmp_path / "again", resume=True, dropout=0.1)
    expected, found = tensors(whole.model), tensors(again.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


class EqualRows(Rows):
    """So that parts of a batch have the variance of the whole."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(0)
        return {**row, "labels": row["input_ids"]}


@pytest.mark.parametrize("case", [BERT, GPT2], ids=lambda case: case.name)  # GPT-2 scales a loss of labels by itself
def test_accumulated_batches_are_one_batch(case: ModelCase, tmp_path: Path) -> None:
    fields = {"case": case, "rows": EqualRows(), "max_steps": 3}
    one = train(tmp_path / "one", **fields)
    two = train(tmp_path / "two", per_device_train_batch_size=2, gradient_accumulation_steps=2, **fields)
    assert one.state.log_history[0]["loss"] == pytest.approx(two.state.log_history[0]["loss"], rel=1e-5)
    assert one.state.log_history[0]["grad_norm"] == pytest.approx(two.state.log_history[0]["grad_norm"], rel=1e-4)
    assert close(one.model, two.model)


def test_in_bfloat16(tmp_path: Path) -> None:
    trained = train(tmp_path, bf16=True, max_steps=12, rows=EqualRows())
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in trained.model.parameters())


ON_TWO = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from test_transfer import own, train
trainer = train(Path(sys.argv[1]), per_device_train_batch_size=2, save_strategy="no")
if trainer.is_world_process_zero():
    save_file(own(trainer.accelerator.unwrap_model(trainer.model)), sys.argv[1] + "/two.safetensors")
"""


def test_two_processes_are_one_with_the_same_batches(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    script = tmp_path / "on_two.py"
    script.write_text(ON_TWO)
    places = map(str, (root, root / "tests", root / "tests" / "training"))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    done = subprocess.run([*launch, str(script), str(tmp_path)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    two = load_file(tmp_path / "two.safetensors")
    one = own(train(tmp_path / "one", save_strategy="no").model)
    assert one.keys() == two.keys()
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-5, atol=1e-5)


def test_mistakes_are_told() -> None:
    stock = BERT.build()
    with pytest.raises(ConfigError, match="converted"):
        transfer_attention(stock, batches(BERT))
    plain = hf_linattn.convert(BERT.build(), FavorPlusConfig(num_features=8))
    with pytest.raises(ConfigError, match="learned=True"):
        transfer_attention(plain, batches(BERT))
    model = converted(BERT)
    before = copy.deepcopy(tensors(model))
    for given in ([], iter([])):
        with pytest.raises(InputError, match="empty"):
            transfer_attention(model, given)
    with pytest.raises(InputError, match="real token"):
        transfer_attention(model, [{**batches(BERT)[0], "attention_mask": torch.zeros(3, 24).long()}])
    with pytest.raises(InputError, match="steps"):
        transfer_attention(model, batches(BERT), steps=0)
    with pytest.raises(InputError, match="fit into the window"):
        transfer_attention(model, [{"input_ids": batches(BERT)[0]["input_ids"][:, :4]}])
    assert all(torch.equal(before[name], value) for name, value in tensors(model).items())
    native = AutoModel.from_config(BERT.config(), attn_implementation="favor_plus")
    native.config.linear_attention = {"learned": True}
    with pytest.raises(ConfigError):
        transfer_attention(native, batches(BERT))
