"""An order of the training data that a resumed run repeats: a function of the seed and the epoch alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

logger = logging.getLogger("hf_linattn.recipes")

GROUPED, RANDOM = "group_by_length", "random"


class EpochSampler(Sampler[int]):
    """Every row once an epoch, in an order drawn from (seed, epoch): the same on every rank and after every resume.

    Args:
        lengths: Of the rows, in tokens.
        group: Rows of similar length follow each other, in groups of so many; None for a plain permutation.
    """

    def __init__(self, lengths: Sequence[int], seed: int, group: int | None) -> None:
        self.lengths = list(lengths)
        self.seed = seed
        self.group = group
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.group is None:
            return iter(torch.randperm(len(self), generator=generator).tolist())
        return iter(LengthGroupedSampler(self.group, lengths=self.lengths, generator=generator))


class _TellEpoch(TrainerCallback):
    """The sampler has no `set_epoch`: Accelerate's wrappers pass it on or not, depending on how many there are."""

    sampler: EpochSampler | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.sampler is not None:
            self.sampler.epoch = int(state.epoch)


class RepeatableTrainer(Trainer):
    """A `Trainer` whose resumed runs see the data, and draw the random numbers, of the undisturbed run.

    That of Transformers draws the order of `group_by_length` from the global generator when an epoch begins. A run
    resumed in its second epoch is at another place of that generator then, and so are ranks whose dropout drew
    different amounts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tell_epoch = _TellEpoch()
        self.add_callback(self._tell_epoch)

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        args = self.args
        if args.train_sampling_strategy not in (GROUPED, RANDOM):
            return loader
        if not hasattr(loader, "set_sampler"):
            logger.warning(
                "The order of the data cannot be set in a %s: a resumed run will see another one than an undisturbed "
                "run, unless --train_sampling_strategy is sequential",
                type(loader).__name__,
            )
            return loader
        lengths = self.train_dataset[args.length_column_name]
        group = args.train_batch_size * args.gradient_accumulation_steps
        sampler = EpochSampler(
            lengths,
            seed=args.seed if args.data_seed is None else args.data_seed,
            group=group if args.train_sampling_strategy == GROUPED else None,
        )
        loader.set_sampler(sampler)
        self._tell_epoch.sampler = sampler
        return loader

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Its data loader draws a number. A run resumed from a checkpoint before an evaluation may leave that out.
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)
