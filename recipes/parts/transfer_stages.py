"""The flags and the Trainer of attention transfer, in one or two stages: attention outputs, then hidden states.

For `attention_transfer.py` alone; the order of a fine-tuning run, `--transfer_steps` among it, is in `finetuning.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, get_scheduler

from hf_linattn.training import AttentionTransferTrainer
from hf_linattn.training.transfer import LEARNING_RATES

from .common import RecipeError
from .training import RecipeTrainer, RecipeTrainingArguments

STEPS = 200


# -- flags ------------------------------------------------------------------------------------------------------------
@dataclass
class TransferArguments:
    """What is trained towards what, and what is compared."""

    second_stage_steps: int = field(
        default=0,
        metadata={"help": "Steps after --max_steps that train all layers together towards the hidden states"},
    )
    second_stage_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the first of these steps (default: a third of --learning_rate)"}
    )
    transfer_layers: str | None = field(
        default=None, metadata={"help": "Layers to train, for example '0,1,4-5' (default: all converted ones)"}
    )
    row_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy between attention rows (short inputs)"}
    )
    ablations: bool = field(
        default=False, metadata={"help": "Compare also the window alone, the slots alone, and shuffled slots"}
    )

    def __post_init__(self) -> None:
        if self.second_stage_steps < 0:
            raise RecipeError(f"--second_stage_steps must be at least 0; got {self.second_stage_steps}.")
        if self.second_stage_learning_rate is not None and not self.second_stage_steps:
            raise RecipeError("--second_stage_learning_rate needs --second_stage_steps.")


@dataclass
class TransferTrainingArguments(RecipeTrainingArguments):
    """`TrainingArguments` with the steps and the optimizer of `hf_linattn.training.transfer_attention`."""

    learning_rate: float = field(default=LEARNING_RATES["attention"], metadata={"help": "Of the first step"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Decay of the learning rate"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "0 does not clip gradients"})
    num_train_epochs: float | None = field(
        default=None, metadata={"help": f"In place of --max_steps, which is {STEPS} without both"}
    )
    train_sampling_strategy: str = field(
        default="random", metadata={"help": "'random' or 'sequential': all rows have the same length"}
    )
    logging_steps: float = field(default=10, metadata={"help": "The errors of the layers are logged so often"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The rows hold inputs of the model alone"})

    def __post_init__(self) -> None:
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise RecipeError(
                f"--train_sampling_strategy must be 'random' or 'sequential'; got {self.train_sampling_strategy!r}: "
                "all rows have the same length."
            )
        if self.context_parallel_size != 1:
            raise RecipeError(
                f"--context_parallel_size {self.context_parallel_size}: attention transfer compares layers on whole "
                "rows. Leave it out; give it to the recipe that fine-tunes."
            )
        if self.num_train_epochs is None:
            self.max_steps = self.max_steps if self.max_steps > 0 else STEPS
            self.num_train_epochs = 3.0  # that of Trainer, which looks at `max_steps` first
        super().__post_init__()


# -- the Trainer ------------------------------------------------------------------------------------------------------
class SecondStage(TrainerCallback):
    """From one step on the target is the hidden states. The optimizer begins anew there."""

    def __init__(self, trainer: AttentionTransferTrainer, first: int) -> None:
        self.trainer = trainer
        self.first = first

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if state.global_step >= self.first:
            self.trainer.set_target("hidden_states")
        if state.global_step == self.first:
            optimizer.state.clear()


class TransferTrainer(RecipeTrainer, AttentionTransferTrainer):
    """Both stages in one course of steps, with one series of checkpoints.

    Args:
        second_stage_steps: Of the last steps, how many belong to the second stage.
        second_stage_learning_rate: Of its first step.
    """

    def __init__(self, *, second_stage_steps: int, second_stage_learning_rate: float | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.second_stage_steps = second_stage_steps
        self.second_stage_learning_rate = second_stage_learning_rate or self.args.learning_rate / 3
        if second_stage_steps:
            self.add_callback(SecondStage(self, self.args.max_steps - second_stage_steps))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if not self.second_stage_steps or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = optimizer or self.optimizer
        first_steps = num_training_steps - self.second_stage_steps
        first, second = (self._decay(optimizer, steps) for steps in (first_steps, self.second_stage_steps))
        ratio = self.second_stage_learning_rate / self.args.learning_rate

        def factor(step: int) -> float:
            return first(step) if step < first_steps else ratio * second(step - first_steps)

        self.lr_scheduler = LambdaLR(optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _decay(self, optimizer: Any, steps: int) -> Any:
        """Step -> factor of the learning rate, for one stage."""
        kind = self.args.lr_scheduler_type
        scheduler = get_scheduler(
            kind,
            optimizer,
            num_warmup_steps=self.args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
        )
        if not isinstance(scheduler, LambdaLR):
            raise RecipeError(
                "--second_stage_steps needs an --lr_scheduler_type that follows from the step alone, such as cosine, "
                f"linear or constant; got {getattr(kind, 'value', kind)!r}."
            )
        return scheduler.lr_lambdas[0]
