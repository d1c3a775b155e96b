"""A run of a `Trainer` is the same on any number of processes: redraws, noise and dropout of slots included.

The global batch is 8 rows always, in the order of the rows. What differs is how it is cut: over processes, and over
micro-batches of accumulation.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from cases import BY_NAME, VOCAB, checkpoint_activations, ready
from forked import in_processes
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

import hf_linattn
from hf_linattn.training import LinAttnCallback
from hf_linattn.training.callback import data_process

GLOBAL_BATCH, ROWS, STEPS, SAVED_AT = 8, 24, 4, 2
SETTINGS: dict[str, dict[str, Any]] = {
    "favor_plus": {"redraw_interval": 1, "slot_dropout": 0.3},
    "favor_sharp": {"slot_dropout": 0.3},
    "lara": {"sample_noise": True, "slot_dropout": 0.3},
    "eva": {"sample_noise": True, "slot_dropout": 0.3},
}
NO_DROPOUT = {
    "bert-classifier": {"hidden_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "vit": {"hidden_dropout_prob": 0.0},
}


class Way(NamedTuple):
    """How the global batch is cut, and how the model runs."""

    processes: int
    accumulation: int = 1
    recompute: bool | None = None  # use_reentrant
    compiled: bool = False
    split_batches: bool = False
    dispatch_batches: bool | None = None

    @property
    def batch(self) -> int:
        """What a data loader is told."""
        return GLOBAL_BATCH // self.accumulation // (1 if self.split_batches else self.processes)


class Rows(torch.utils.data.Dataset):
    """Rows of a model, texts of different lengths; random, but the same in every process."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        if self.name == "vit":
            return {"pixel_values": torch.randn(3, 24, 24, generator=generator), "labels": index % 2}
        length = 40 if self.name == "gpt2" else 20 + index * 7 % 21
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        return {"input_ids": ids, "labels": ids if self.name == "gpt2" else index % 2}


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded to the longest of these rows: of other rows in every way of cutting."""
    labels = [torch.as_tensor(row["labels"]) for row in rows]
    if "pixel_values" in rows[0]:
        return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": torch.stack(labels)}
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.stack(labels)}


class Recorded(Trainer):
    """In the order of the rows, with the loss of every micro-batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # a mean over rows, or over rows of equally many tokens
        self.losses: list[float] = []

    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


def train(folder: Path, model: Any, name: str, way: Way, told: bool, steps: int, resume: bool) -> dict[str, Tensor]:
    """The weights, and as "losses" those of this process, micro-batch by micro-batch."""
    if way.recompute is not None:
        checkpoint_activations(model, {"use_reentrant": way.recompute})
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=steps,
        per_device_train_batch_size=way.batch,
        gradient_accumulation_steps=way.accumulation,
        accelerator_config={"split_batches": way.split_batches, "dispatch_batches": way.dispatch_batches},
        torch_compile_backend="aot_eager" if way.compiled else None,  # partitions the graph, and is quickly done
        learning_rate=0.05,
        optim="sgd",  # Adam makes of rounding what it makes of gradients
        lr_scheduler_type="constant",
        save_steps=SAVED_AT,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        seed=7,
    )
    callbacks = [LinAttnCallback()] if told else []
    trainer = Recorded(model, arguments, collate, train_dataset=Rows(name), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume or None)
    assert trainer.state.global_step == steps
    assert all(layer.training_place is None for layer in model.modules() if hasattr(layer, "training_place"))
    return {"losses": torch.tensor(trainer.losses, dtype=torch.float64), **model.state_dict()}


def run(
    folder: Path,
    name: str,
    kind: str,
    way: Way,
    *,
    told: bool = True,
    steps: int = STEPS,
    resume: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss of every step, and the weights, which all processes share."""
    case = BY_NAME[name]
    model = ready(hf_linattn.convert(case.build(**NO_DROPOUT[name]), case.settings(kind, **SETTINGS[kind])))
    found = in_processes(folder, way.processes, train, folder, model, name, way, told, steps, resume, launched=True)
    losses = torch.stack([tensors.pop("losses") for tensors in found])
    for weights in found[1:]:
        assert all(torch.equal(weights[key], found[0][key]) for key in weights)
    return losses.unflatten(1, (-1, way.accumulation)).mean((0, 2)), found[0]


def distance(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> float:
    """The largest difference of losses and weights."""
    weights = [float((ours[1][key].double() - theirs[1][key].double()).abs().max()) for key in ours[1]]
    return max(float((ours[0] - theirs[0]).abs().max()), *weights)


ONE = Way(1)
_whole: dict[tuple[str, str], tuple[Tensor, dict[str, Tensor]]] = {}


def undisturbed(name: str, kind: str, folder: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """The run of one process with whole batches."""
    if (name, kind) not in _whole:
        _whole[name, kind] = run(folder / "whole", name, kind, ONE)
    return _whole[name, kind]


TWO, FOUR = Way(2), Way(4)
DEFAULT = [
    ("bert-classifier", "lara", Way(2, accumulation=2)),
    ("gpt2", "eva", Way(4, recompute=False)),
    ("vit", "favor_plus", Way(2, recompute=True)),
]
SLOW = [
    ("bert-classifier", "favor_plus", FOUR),
    ("bert-classifier", "favor_sharp", Way(2, accumulation=4, recompute=False)),
    ("bert-classifier", "eva", Way(4, accumulation=2)),
    ("bert-classifier", "lara", Way(1, accumulation=4)),
    ("bert-classifier", "lara", Way(2, compiled=True)),
    ("bert-classifier", "eva", Way(2, split_batches=True)),
    ("bert-classifier", "eva", Way(2, dispatch_batches=True)),
    ("gpt2", "favor_plus", Way(4, accumulation=2, recompute=True)),
    ("gpt2", "favor_sharp", TWO),
    ("gpt2", "lara", Way(4, recompute=False)),
    ("gpt2", "eva", Way(2, compiled=True)),
    ("gpt2", "lara", Way(2, accumulation=2, split_batches=True)),
    ("vit", "favor_sharp", Way(4, accumulation=2)),
    ("vit", "lara", Way(2, recompute=True)),
    ("vit", "eva", Way(2, accumulation=2)),
    ("vit", "eva", Way(4, dispatch_batches=True)),
]


def identity(value: Any) -> str:
    if not isinstance(value, Way):
        return value if isinstance(value, str) else ", then ".join(map(identity, value))
    own = {key: field for key, field in value._asdict().items() if field != Way._field_defaults.get(key)}
    return "-".join(f"{key}={field}" for key, field in own.items())


@pytest.mark.parametrize(
    ("name", "kind", "way"), [*DEFAULT, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW)], ids=identity
)
def test_losses_and_weights_of_one_process(name: str, kind: str, way: Way, tmp_path: Path) -> None:
    whole = undisturbed(name, kind, tmp_path)
    ours = run(tmp_path / "cut", name, kind, way)
    assert ours[0].shape == (STEPS,)
    assert distance(ours, whole) < 1e-5


@pytest.mark.parametrize(("together", "expected"), [(None, (5, 6)), (1, (5, 6)), (2, (2, 3)), (3, (1, 2))])
def test_processes_that_read_the_same_rows(
    together: int | None, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of six, with tensor or context parallel groups."""
    config = together and SimpleNamespace(non_data_parallel_size=together)
    monkeypatch.setattr("accelerate.state.AcceleratorState", lambda: SimpleNamespace(parallelism_config=config))
    assert data_process(SimpleNamespace(process_index=5, world_size=6)) == expected


def test_untold_runs_differ(tmp_path: Path) -> None:
    """What the test above would show without keys of rows."""
    name, kind = "bert-classifier", "lara"
    whole, ours = (run(tmp_path / str(way.processes), name, kind, way, told=False) for way in (ONE, TWO))
    assert float((ours[0] - whole[0]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("name", "kind", "ways"),
    [
        pytest.param("bert-classifier", "lara", (ONE, FOUR), marks=pytest.mark.slow),
        pytest.param("gpt2", "favor_plus", (Way(1, accumulation=4), FOUR), marks=pytest.mark.slow),
        pytest.param("vit", "eva", (Way(4, accumulation=2), Way(1)), marks=pytest.mark.slow),
    ],
    ids=identity,
)
def test_resumed_on_another_number_of_processes(name: str, kind: str, ways: tuple[Way, ...], tmp_path: Path) -> None:
    """Two processes stop; others go on, and do what one would have done all the time."""
    whole = undisturbed(name, kind, tmp_path)
    for way in ways:
        folder = tmp_path / identity(way)
        run(folder, name, kind, TWO, steps=SAVED_AT)
        losses, weights = run(folder, name, kind, way, resume=True)
        assert distance((losses, weights), (whole[0][SAVED_AT:], whole[1])) < 1e-5
