"""What makes a resumed run equal an undisturbed one: the order of the data, and the place of the random numbers.

The order is a function of the seed and the epoch alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, SequentialSampler
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler, find_batch_size
from transformers.trainer_utils import TrainOutput, has_length

from hf_linattn.errors import did_you_mean
from hf_linattn.training import ContextParallelTrainer

from .common import RecipeError
from .saving import CheckedSaves
from .stopping import StoppableTrainer

logger = logging.getLogger("hf_linattn.recipes")

GROUPED, RANDOM = "group_by_length", "random"


class EpochSampler(Sampler[int]):
    """Every row once an epoch, in an order drawn from (seed, epoch): the same on every rank and after every resume.

    Args:
        rows: How many there are.
        lengths: Of the rows, in tokens: rows of similar length follow each other. None for a plain permutation.
        group: In groups of so many.
    """

    def __init__(self, rows: int, seed: int, lengths: Sequence[int] | None = None, group: int = 1) -> None:
        self.rows = rows
        self.seed = seed
        self.lengths = None if lengths is None else list(lengths)
        self.group = group
        self.epoch = 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.lengths is None:
            return iter(torch.randperm(self.rows, generator=generator).tolist())
        return iter(LengthGroupedSampler(self.group, lengths=self.lengths, generator=generator))


class _TellEpoch(TrainerCallback):
    """The sampler has no `set_epoch`: Accelerate's wrappers pass it on or not, depending on how many there are.

    A collator that draws has one.
    """

    sampler: EpochSampler | None = None
    collate: Any = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.sampler is not None:
            self.sampler.epoch = int(state.epoch)
        if hasattr(self.collate, "set_epoch"):
            self.collate.set_epoch(int(state.epoch))


@contextmanager
def _same_model(checkpoint: str | None) -> Iterator[None]:
    """Tell what it means when tensors of a checkpoint do not fit. Raises: RecipeError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if "size mismatch" not in str(error) and "parameter group" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(
            f"{checkpoint} was trained with another model, other positions, labels or LoRA than this run has "
            f"({reason}). Use another --output_dir, the same flags, or --from_scratch."
        ) from error


class RepeatableTrainer(StoppableTrainer, CheckedSaves, ContextParallelTrainer):
    """A `Trainer` whose resumed runs see the data, and draw the random numbers, of the undisturbed run.

    That of Transformers draws the order of `group_by_length` from the global generator when an epoch begins. A run
    resumed in its second epoch is at another place of that generator then, and so are ranks whose dropout drew
    different amounts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tell_epoch = _TellEpoch()
        self._tell_epoch.collate = self.data_collator
        self.add_callback(self._tell_epoch)

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        args = self.args
        if isinstance(self.train_dataset, IterableDataset):  # a stream has one order
            return loader
        if args.train_sampling_strategy not in (GROUPED, RANDOM):
            return loader
        if not hasattr(loader, "set_sampler"):
            logger.warning(
                "The order of the data cannot be set in a %s: a resumed run will see another one than an undisturbed "
                "run, unless --train_sampling_strategy is sequential",
                type(loader).__name__,
            )
            return loader
        sampler = EpochSampler(
            len(self.train_dataset),
            seed=args.seed if args.data_seed is None else args.data_seed,
            lengths=self.train_dataset[args.length_column_name] if args.train_sampling_strategy == GROUPED else None,
            # The rows of a step, so that the order is the same on any number of processes.
            group=self.get_total_train_batch_size(args),
        )
        loader.set_sampler(sampler)
        self._tell_epoch.sampler = sampler
        return loader

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        # In the order of the rows: that of Transformers groups them by length, and predictions would follow it.
        if self.args.world_size <= 1 and has_length(eval_dataset):
            return SequentialSampler(eval_dataset)
        return None

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> TrainOutput:
        # Trainer would take one step more where the last one is not the end of an epoch.
        if resume_from_checkpoint and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint, TRAINER_STATE_NAME)))
            if 0 < self.args.max_steps <= state.global_step:
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                if self.args.load_best_model_at_end and state.best_model_checkpoint:
                    self._load_best_model()
                return TrainOutput(state.global_step, 0.0, {"epoch": state.epoch})
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _same_model(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _same_model(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # In evaluation a loss is that of this process's rows. Divided by the number of labels on all processes, as in
        # training, it would count the rows that Accelerate repeats.
        accepts, self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs, False
        try:
            return self._prediction_step(model, inputs, *args, **kwargs)
        finally:
            self.model_accepts_loss_kwargs = accepts

    def _prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # Accelerate repeats rows to fill the last batch of every process. It drops their predictions; in the mean loss
        # of the batch they would count. The order of all processes' last batches is that of the rows.
        found = super().prediction_step(model, inputs, *args, **kwargs)
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder < 1 or found[0] is None:
            return found
        number = find_batch_size(inputs)
        own = min(max(state.remainder - number * self.args.process_index, 1), number)  # 1: its loss is dropped
        first = {name: value[:own] for name, value in inputs.items()}
        return super().prediction_step(model, first, True)[0], *found[1:]

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            names = [name.removeprefix("eval_") for name in metrics if name.startswith("eval_")]
            wanted = self.args.metric_for_best_model
            close = did_you_mean(wanted, names)
            raise RecipeError(
                f"--metric_for_best_model must be one of {', '.join(names)}; got {wanted!r}.{close}"
            ) from error

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Its data loader draws a number. A run resumed from a checkpoint before an evaluation may leave that out.
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)
