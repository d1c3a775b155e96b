"""A `Trainer` whose processes share the sequences of training."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from ..errors import InputError, UnsupportedError
from .context_parallel import context_parallel, converted_model


class ContextParallelTrainer(Trainer):
    """A `Trainer` in which groups of `context_parallel_size` processes share every sequence that they train on.

    The processes of a group get the same rows, and each computes its part of the tokens (`context_parallel`). To
    Trainer they are replicas that have the same rows: the loss it logs is a mean over all processes, and so are the
    gradients. Evaluation and prediction keep no activations: there every process has rows of its own, whole ones.

    Args:
        context_parallel_size: Divides the number of processes. 1: as `Trainer`.
        args, kwargs: Those of `Trainer`.
    Raises: InputError and UnsupportedError for what the processes of a group would not compute correctly.
    """

    def __init__(self, *args: Any, context_parallel_size: int = 1, **kwargs: Any) -> None:
        self.context_parallel_size = context_parallel_size
        self.mesh: DeviceMesh | None = None
        if context_parallel_size != 1:
            model = kwargs.get("model", args[0] if args else None)
            arguments: Any = kwargs.get("args", args[1] if len(args) > 1 else None)
            check_context_parallel(model, arguments, context_parallel_size)
            if kwargs.get("compute_loss_func") is not None:
                raise UnsupportedError("compute_loss_func would get the logits of a part. Use the loss of the model.")
            # Accelerate would hand out the rows of a stream by the process's rank.
            arguments.accelerator_config.dispatch_batches = False
        super().__init__(*args, **kwargs)
        if context_parallel_size != 1:
            sizes = (self.args.world_size // context_parallel_size, context_parallel_size)
            # The names that Accelerate knows: it gives processes along "cp" the same rows.
            self.args.context_parallel_size = context_parallel_size  # for LinAttnCallback, which numbers the rows
            self.mesh = init_device_mesh(self.args.device.type, sizes, mesh_dim_names=("dp_replicate", "cp"))

    def get_train_dataloader(self) -> DataLoader:
        if self.mesh is None:
            return super().get_train_dataloader()
        state = self.accelerator.state
        before, state.device_mesh = state.device_mesh, self.mesh
        try:
            return super().get_train_dataloader()
        finally:
            state.device_mesh = before

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        if self.mesh is None:
            return super().training_step(model, *args, **kwargs)
        with context_parallel(model, self.mesh["cp"]):
            return super().training_step(model, *args, **kwargs)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Rows of a step."""
        return super().get_total_train_batch_size(args) // self.context_parallel_size

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return super().floating_point_ops(inputs) // self.context_parallel_size


def check_context_parallel(model: Any, args: TrainingArguments | None, size: int) -> None:
    """Raise InputError or UnsupportedError for what groups of `size` processes would not compute correctly."""
    if args is None or not isinstance(model, nn.Module):
        raise InputError("With context_parallel_size give Trainer a model and args; a model_init is not supported.")
    if size < 1 or args.world_size % size:
        raise InputError(
            f"context_parallel_size must divide the number of processes, {args.world_size}; got {size}. Start a"
            f" multiple of {max(size, 1)} processes, with accelerate launch or torchrun."
        )
    if args.deepspeed or args.parallel_mode.name != "DISTRIBUTED":
        raise UnsupportedError("context_parallel_size works with DDP and FSDP2; leave DeepSpeed out.")
    batches = args.accelerator_config.dispatch_batches
    unsupported = {
        "label_smoothing_factor": (args.label_smoothing_factor, "It needs the logits of whole rows."),
        "include_num_input_tokens_seen": (
            args.include_num_input_tokens_seen,
            "Trainer would count the tokens of a group several times.",
        ),
        "torch_compile": (args.torch_compile, "A compiled model exchanges nothing."),
        "dispatch_batches": (batches, "Accelerate would give each process rows of its own."),
    }
    for name, (value, reason) in unsupported.items():
        if value not in (0.0, "no", None):
            raise UnsupportedError(f"{name}={value!r} does not work with context_parallel_size={size}: {reason}")
    converted_model(model, training=True)
