"""Redrawn directions in real training loops: Trainer, resume, ranks, accumulation, checkpointing, wrappers."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import BERT, GPT2, VOCAB, checkpoint_activations, converted
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_linattn
from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.functional import derive_seed, draw_projection
from hf_linattn.training import LinAttnCallback, redraw_projections

INTERVAL, STEPS = 2, 5
KINDS = ["favor_plus", "favor_sharp"]


class Rows(torch.utils.data.Dataset):
    """Sixteen rows of random tokens."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, VOCAB, (12,), generator=generator)
        return {"input_ids": ids, "labels": ids}


def build(kind: str = "favor_plus", interval: int | None = INTERVAL, **settings: Any) -> Any:
    model = BERT.build(hidden_dropout_prob=0.0)
    fields = {"num_features": 8, "window_size": 4, "redraw_interval": interval, **settings}
    return hf_linattn.convert(model, {"kind": kind, **fields})


def projections(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for name, buffer in model.named_buffers() if name.endswith("linattn.projection")]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    assert len(ours) == len(theirs) == 2
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def expected(step: int, interval: int = INTERVAL) -> list[Tensor]:
    """From the published rule: (seed, layer, number of the redraw); 0 is what a layer without redraws has."""
    count = step // interval
    number = (count,) if count else ()
    return [draw_projection(4, 8, 8, seed=derive_seed(0, layer, "projection", *number)) for layer in range(2)]


class Record(TrainerCallback):
    """The directions and the loss-bearing weights that each forward pass of training has seen."""

    def __init__(self) -> None:
        self.seen: dict[int, list[Tensor]] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen[state.global_step] = projections(model)


def train(folder: Path, model: Any, resume: bool = False, callback: bool = True, **changes: Any) -> tuple[Any, Record]:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "save_steps": 3,
        "lr_scheduler_type": "constant",  # whatever the number of steps
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        **changes,
    }
    record = Record()
    trainer = Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=Rows(),
        callbacks=[*([LinAttnCallback()] if callback else []), record],
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer.model, record


# -- Trainer --------------------------------------------------------------------------------------------------------


@pytest.mark.compat("train")
@pytest.mark.parametrize("kind", KINDS)
def test_trainer_redraws_by_optimizer_steps(kind: str, tmp_path: Path) -> None:
    model, record = train(tmp_path, build(kind))
    assert sorted(record.seen) == list(range(STEPS))
    for step, seen in record.seen.items():
        assert same(seen, expected(step)), step
    assert same(projections(model), expected(STEPS))
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-3")
    assert same(projections(loaded), expected(3))  # the directions are saved, and evaluate as in training


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "recomputed", "reentrant"])
def test_accumulation_and_checkpointing_count_no_extra_steps(checkpointing: bool | None, tmp_path: Path) -> None:
    model = build()
    if checkpointing is not None:
        checkpoint_activations(model, {"use_reentrant": checkpointing})
    _, record = train(tmp_path, model, gradient_accumulation_steps=3, max_steps=3)
    for step, seen in record.seen.items():
        assert same(seen, expected(step)), step


@pytest.mark.compat("resume")
def test_a_resumed_run_is_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, whole_record = train(tmp_path / "whole", build())
    train(tmp_path / "parts", build(), max_steps=3)
    fresh = build()
    assert same(projections(fresh), expected(0))
    resumed, record = train(tmp_path / "parts", fresh, resume=True)
    assert sorted(record.seen) == [3, 4]
    assert all(same(record.seen[step], whole_record.seen[step]) for step in record.seen)
    assert same(projections(resumed), projections(whole))
    for (name, ours), theirs in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_a_run_starts_with_the_directions_of_its_own_first_step(tmp_path: Path) -> None:
    model = build()
    redraw_projections(model, 100)
    _, record = train(tmp_path, model, max_steps=1)
    assert same(record.seen[0], expected(0))


def test_two_ranks_agree_and_the_random_state_is_left_alone() -> None:
    first, second = build(), copy.deepcopy(build())
    for step in range(7):
        torch.manual_seed(step)
        state = torch.get_rng_state()
        redraw_projections(first, step)
        assert torch.equal(state, torch.get_rng_state())
        torch.manual_seed(100 + step)
        redraw_projections(second, step)
        assert same(projections(first), projections(second))


def test_without_an_interval_nothing_changes(tmp_path: Path) -> None:
    model, _ = train(tmp_path, build(interval=None), max_steps=3)
    assert same(projections(model), expected(0))
    assert redraw_projections(model, 100) == 0


def test_a_trainer_without_the_callback_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"redraw_interval=2.*LinAttnCallback\(\).*redraw_projections"):
        model, _ = train(tmp_path, build(), callback=False)
    assert same(projections(model), expected(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tmp_path, build())


# -- other loops ----------------------------------------------------------------------------------------------------


def test_redraws_are_in_place_and_once_per_interval() -> None:
    model = build(interval=3)
    buffer = model.bert.encoder.layer[0].attention.self.linattn.projection
    drawn = [redraw_projections(model, step) for step in (0, 0, 1, 2, 3, 3, 4, 7, 2)]
    assert drawn == [2, 0, 0, 0, 2, 0, 0, 2, 2]
    assert buffer is model.bert.encoder.layer[0].attention.self.linattn.projection
    assert same(projections(model), expected(2, 3))
    assert not same(expected(3, 3), expected(2, 3))


def test_after_loading_other_directions_the_step_decides() -> None:
    model, other = build(), build()
    redraw_projections(model, 4)
    model.load_state_dict(other.state_dict())
    assert same(projections(model), expected(0))
    assert redraw_projections(model, 4) == 2
    assert same(projections(model), expected(4))
    model.load_state_dict(other.state_dict(), assign=True)
    redraw_projections(model, 5)
    assert same(projections(model), expected(5))


def test_copies_keep_their_own_count() -> None:
    model = build()
    redraw_projections(model, 2)
    copied = copy.deepcopy(model)
    redraw_projections(model, 4)
    assert redraw_projections(copied, 2) == 0
    assert same(projections(copied), expected(2))
    assert redraw_projections(copied, 4) == 2
    assert same(projections(copied), projections(model))


def test_redraws_in_wrapped_models() -> None:
    model = build()
    wrapped = nn.DataParallel(nn.Sequential(model))
    assert redraw_projections(wrapped, 2) == 2
    assert same(projections(model), expected(2))


# Processes of their own, ended without torch's teardown: nothing can be left waiting in the process of the tests.
RANK = """
import os, sys
import torch
from torch import distributed
from test_training_callback import BERT, build, expected, projections, redraw_projections, same
rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", store=distributed.FileStore(store, 2), rank=rank, world_size=2)
model = build()
torch.manual_seed(rank)
wrapped = torch.nn.parallel.DistributedDataParallel(model)
inputs = BERT.inputs(seed=rank)
for step in range(4):
    wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
    drawn = redraw_projections(wrapped, step + 1)
    assert drawn == (2 if step in (0, 1, 3) else 0), drawn
    assert same(projections(model), expected(step + 1)), step
print("agreed", flush=True)
distributed.barrier()
os._exit(0)
"""


@pytest.mark.slow
def test_two_processes_under_ddp(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (root, root / "tests"))), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            out, err = process.communicate(timeout=120)
            assert "agreed" in out, err
    finally:
        for process in ranks:
            process.kill()


def test_compiled_models_see_new_directions() -> None:
    torch._dynamo.reset()
    model = build().train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = BERT.inputs()
    outputs = []
    for step in (0, 2, 0):
        redraw_projections(compiled, step)
        got = compiled(**inputs)[0]
        torch.testing.assert_close(got, model(**inputs)[0])
        outputs.append(got)
    assert not torch.allclose(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2])


@pytest.mark.parametrize("window", [0, 4])
def test_redraw_during_backward(window: int) -> None:
    model, inputs = build(window_size=window).train(), BERT.inputs()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    redraw_projections(model, 2)
    refused = None
    try:
        loss.backward()
    except RuntimeError as error:
        refused = str(error)
    if refused is None:  # the directions of the forward pass were kept
        torch.testing.assert_close([p.grad for p in model.parameters()], expected)
    else:
        assert "modified by an inplace operation" in refused


def test_wrong_arguments() -> None:
    model = build()
    for step in (-1, 1.0, "1", None, True, torch.tensor(1)):
        with pytest.raises(InputError, match="step must be the number of optimizer steps"):
            redraw_projections(model, step)
    with pytest.raises(UnsupportedError, match="needs a Transformers model; got str 'model'"):
        redraw_projections("model", 1)  # type: ignore[arg-type]


def test_native_mode_cannot_redraw() -> None:
    for case in (BERT, GPT2):
        model = case.build()
        model.config.linear_attention = {"kind": "favor_plus", "redraw_interval": 2}
        model.set_attn_implementation("favor_plus")
        with pytest.raises(UnsupportedError, match="redraw_interval=2.*native mode.*Convert it first"):
            redraw_projections(model, 2)
        model.config.linear_attention = {"kind": "favor_plus"}
        assert redraw_projections(model, 2) == 0


@pytest.mark.parametrize("push", [True, False])
def test_hidden_files_that_trainer_would_upload(push: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "secret.txt").write_text("KEY=1")
    folder = tmp_path / "output"
    (folder / ".git").mkdir(parents=True)
    (folder / ".env").write_text("KEY=1")
    (folder / "notes").symlink_to(tmp_path / "secret.txt")
    (folder / "config.json").write_text("{}")
    arguments = SimpleNamespace(push_to_hub=push, output_dir=str(folder))
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    LinAttnCallback().on_train_begin(arguments, state, None, model=converted(BERT, "favor_plus"))
    told = [message for message in caplog.messages if "uploads all" in message]
    assert len(told) == push
    assert all("has .env, notes. Move" in message for message in told)
