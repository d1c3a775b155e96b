"""On how many processes and devices a run is, what splits the work among them, and how fast it goes.

What the launcher asks for comes from its environment: `accelerate launch` and `torchrun` tell their processes nothing
in another way.
"""

from __future__ import annotations

import logging
import os
import time
from datetime import datetime, timedelta
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from hf_linattn.modules.base import LinearAttention

from .common import RecipeError

logger = logging.getLogger("hf_linattn.recipes")

# How many processes there are to be, as MPI, Slurm and torchrun tell theirs.
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
ADVICE = (
    "GPUs: accelerate launch --multi_gpu --num_processes N. CPU processes: accelerate launch --config_file "
    "recipes/configs/accelerate/cpu.yaml --num_processes N (docs/clusters.md)"
)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


# -- what runs --------------------------------------------------------------------------------------------------------
def strategy(training: TrainingArguments) -> str:
    """What splits the work: "one process", "DataParallel", "DDP", "FSDP2", "DeepSpeed ZeRO-3"."""
    if training.world_size == 1 and training.n_gpu > 1:
        return "DataParallel"
    if _asks_for_deepspeed(training) and not _is_set("ACCELERATE_USE_CPU"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        return "DeepSpeed" + (f" ZeRO-{stage}" if stage and not training.deepspeed else "")
    if training.device.type != "cpu" and _is_set("ACCELERATE_USE_FSDP"):
        return "FSDP" + os.environ.get("FSDP_VERSION", "1").replace("1", "")
    if training.device.type != "cpu" and training.fsdp:
        return "FSDP"
    return "DDP" if training.world_size > 1 else "one process"


def _asks_for_deepspeed(training: TrainingArguments) -> bool:
    return bool(training.deepspeed) or _is_set("ACCELERATE_USE_DEEPSPEED")


def describe_processes(training: TrainingArguments) -> str:
    """Processes, device, strategy and effective batch, as a part of a line."""
    rows, steps, processes = (
        training.train_batch_size,
        training.gradient_accumulation_steps,
        training.world_size,
    )
    how, sharing = strategy(training), sharing_processes(training)
    groups = processes // sharing
    shared = f", {sharing} share a sequence" if sharing > 1 else ""
    return (
        f"{processes} process{'es' if processes > 1 else ''} on {training.device.type}"
        f"{'' if how == 'one process' else f' ({how}{shared})'},"
        f" {rows * steps * groups} rows a step ({rows} in a batch x {steps} batches x {groups})"
    )


def sharing_processes(training: TrainingArguments) -> int:
    """How many processes share every sequence in training."""
    return getattr(training, "context_parallel_size", 1)


def missing_processes(processes: int) -> str | None:
    """What the launcher's environment asks for beyond the processes there are, as a sentence; None if nothing.

    `accelerate launch --num_processes 2` without `--multi_gpu`, on a machine with less than two GPUs or with `--cpu`,
    starts one process. It sets the address where the processes would meet, and no number of them.
    """
    counts = {name: int(os.environ[name]) for name in COUNTS if os.environ.get(name, "").isdigit()}
    for name, count in counts.items():
        if count > processes:
            return f"{name}={count} asks for {count} processes, but this run has {processes}"
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if processes == 1 and by_accelerate and "WORLD_SIZE" not in os.environ:
        return "accelerate launch was asked for several processes, but started one"
    return None


def tell_missing_processes(training: TrainingArguments) -> None:
    """Warn, in a line each, if there are fewer processes than were asked for, or they do something else."""
    if found := missing_processes(training.world_size):
        logger.warning("%s. %s", found, ADVICE)
    left_out = []
    if training.device.type == "cpu" and (training.fsdp or _is_set("ACCELERATE_USE_FSDP")):
        left_out.append("FSDP")
    if _asks_for_deepspeed(training) and _is_set("ACCELERATE_USE_CPU"):
        left_out.append("DeepSpeed")
    for name in left_out:
        logger.warning("%s was asked for. On a CPU Accelerate leaves it out: this run is %s", name, strategy(training))


# -- FSDP -------------------------------------------------------------------------------------------------------------
def prepare_sharding(model: PreTrainedModel) -> None:
    """Let FSDP2 shard the model's layers, and refuse what Accelerate cannot shard.

    By itself Accelerate takes the classes that must not be split over devices. With BERT and ViT they include the
    embeddings, which it then shards a second time, and fails.

    Raises: RecipeError.
    """
    if not _is_set("ACCELERATE_USE_FSDP") or os.environ.get("FSDP_VERSION") != "2":
        return
    if _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise RecipeError(
            "fsdp_cpu_ram_efficient_loading must be false with FSDP2: Accelerate cannot distribute the buffers of "
            "linear attention then."
        )
    output = getattr(model, "get_output_embeddings", lambda: None)()
    bias = getattr(output, "bias", None)
    owners = [name for name, module in model.named_modules() if any(p is bias for p in module._parameters.values())]
    if bias is not None and len(owners) > 1:
        raise RecipeError(
            f"FSDP2 cannot shard {type(model).__name__}: {' and '.join(owners)} share a bias, which Accelerate puts "
            "into two groups. Use ddp.yaml, or DeepSpeed (zero3.yaml)."
        )
    layers = [name for name in getattr(model, "_no_split_modules", None) or () if not name.endswith("Embeddings")]
    layers += linear_attention_classes(model)
    if layers:
        os.environ.setdefault("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(layers))


def linear_attention_classes(model: PreTrainedModel) -> list[str]:
    """Names of the classes whose parameters are to stay float32: units of their own (`LinAttnCallback`)."""
    layers = [module for module in model.modules() if isinstance(module, LinearAttention)]
    return sorted({type(layer).__name__ for layer in layers if any(True for _ in layer.parameters())})


# -- how fast ---------------------------------------------------------------------------------------------------------
class Progress(TrainerCallback):
    """A line on speed and estimated end: after `FIRST` steps, and whenever Trainer logs.

    Rows and tokens are those of steps, evaluation and saving left out; the estimated end counts them in.
    """

    FIRST = 10

    first: int | None = None  # steps done before this start of the run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun, self.first = time.perf_counter(), state.global_step
        self.in_steps, self.tokens, self.told = 0.0, state.num_input_tokens_seen, state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_steps += time.perf_counter() - self.step_begun
        if state.global_step - (self.first or 0) == self.FIRST:
            self.tell(args, state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tell(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tell(args, state)

    def tell(self, args: TrainingArguments, state: Any) -> None:
        if self.first is None or not state.is_world_process_zero or state.global_step <= self.told:
            return  # without training, on another process, or told already
        done = state.global_step - self.first
        self.told = state.global_step
        groups = args.world_size // sharing_processes(args)
        rows = done * args.train_batch_size * args.gradient_accumulation_steps * groups
        parts = [f"{rows / self.in_steps:,.1f} rows/s"]
        if tokens := state.num_input_tokens_seen - self.tokens:  # with --include_num_input_tokens_seen
            parts.append(f"{tokens / self.in_steps:,.0f} tokens/s")
        left = state.max_steps - state.global_step
        if left > 0:
            seconds = (time.perf_counter() - self.begun) / done * left
            end = datetime.now() + timedelta(seconds=seconds)
            parts.append(f"{timedelta(seconds=round(seconds))} left, until about {end:%Y-%m-%d %H:%M}")
        logger.info("Step %d of %d: %s", state.global_step, state.max_steps, ", ".join(parts))


def agree(answer: bool, training: TrainingArguments) -> bool:
    """Whether the answer of any process is yes. Every process has to ask."""
    if training.world_size == 1:
        return answer
    found = torch.tensor(int(answer), device=training.device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found)
