"""The training step and the rows, told to the layers that redraw their directions or draw random numbers."""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..distributed.fully_sharded import keep_precision
from ..errors import UnsupportedError
from ..integrations.adapters import keep_in_adapters
from ..integrations.advice import convert_first
from ..integrations.canary import check_trainer
from ..integrations.expected import changed
from ..integrations.layers import active_layers
from ..integrations.wrappers import module_of
from ..modules.config import AttentionConfig
from ..modules.redraw import check_step, redraws
from .row_noise import key_noise

logger = logging.getLogger(__name__)


def redraw_projections(model: nn.Module, step: int) -> int:
    """Give every layer with a `redraw_interval` the directions of a training step.

    Call it after every optimizer step, and once before the first (or after loading a checkpoint) with the number of
    steps already taken::

        optimizer.step()
        completed_steps += 1
        redraw_projections(model, completed_steps)

    It does nothing between two redraws, nothing in layers without an interval, and does not touch the global random
    generator. Directions follow from (seed, layer, `step // redraw_interval`), so that all ranks agree and a resumed
    run continues as if it had not been interrupted.

    Args:
        model: A converted model, as it is or wrapped (DDP, FSDP, `torch.compile`, `Accelerator.prepare`). With an
            adapter (PEFT) the directions are the adapter's: from the first call on it holds them, as with
            `modules_to_save=["linattn"]`, and the model under it keeps its own.
        step: Optimizer steps taken so far; micro-batches of gradient accumulation do not count.
    Returns: The number of layers whose directions were drawn.
    Raises: InputError if `step` is not a number of steps; UnsupportedError if `model` holds none, for a model in
        native mode (`attn_implementation=`) whose settings ask for redraws (it has no layers that could keep them),
        and for several active adapters.
    Cost: a QR factorisation of `num_features / head_dim` blocks per head and layer, on the CPU, at each redraw.
    """
    check_step(step)
    model = module_of(model, "redraw_projections")
    if not any(redraws(layer) for layer in active_layers(model)):
        _check_native(model)
        return 0
    keep_in_adapters(model, redraws)
    return sum(layer.set_training_step(step) for layer in active_layers(model) if redraws(layer))


def _check_native(model: nn.Module) -> None:
    """Raise if a model without attention modules of its own asks for redraws in its config."""
    for module in model.modules():
        settings = getattr(getattr(module, "config", None), "linear_attention", None)
        if isinstance(settings, AttentionConfig):
            settings = settings.to_dict()
        interval = settings.get("redraw_interval") if isinstance(settings, dict) else None
        if interval is not None:
            raise UnsupportedError(
                f"config.linear_attention asks for redraw_interval={interval}, but {type(module).__name__} works in"
                " native mode and has no layers that could keep new directions. Set"
                f" redraw_interval to None. {convert_first(getattr(module, 'config', None))}"
            )


# What nobody puts into a folder to publish it; the Hub's client leaves these few out by itself.
_LEFT_OUT = (".git", ".cache", ".gitattributes", ".gitignore")


def _tell_what_is_published(folder: str) -> None:
    """Warn of hidden files and links in a folder that a Trainer will upload as a whole."""
    found = [p.name for p in Path(folder).glob("*") if p.is_symlink() or p.name.startswith(".")]
    found = sorted(name for name in found if name not in _LEFT_OUT)
    if found:
        logger.warning(
            "Trainer uploads all of output_dir, whatever it is: %s has %s. Move what is not to be published, or push"
            " the model by itself: model.push_to_hub(name).",
            folder,
            ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else ""),
        )


def _keep_precision(model: nn.Module) -> None:
    """Under FSDP2 let what layers learn stay in float32, or tell that it does not."""
    mixed = keep_precision(model)
    if mixed:
        logger.warning(
            "FSDP2 gathers what the linear attention of %d layers has learned together with other weights, rounded to"
            " the same dtype. To keep it in float32 wrap %s too (fsdp_transformer_layer_cls_to_wrap).",
            len(mixed),
            type(mixed[0]).__name__,
        )


def data_process(args: Any) -> tuple[int, int]:
    """Which share of the data this process reads, and how many there are: processes of a tensor or context parallel
    group read the same."""
    if args.world_size == 1:
        return 0, 1
    config = import_module("accelerate.state").AcceleratorState().parallelism_config
    together = 1 if config is None else config.non_data_parallel_size
    together *= getattr(args, "context_parallel_size", 1)  # ContextParallelTrainer
    return args.process_index // together, args.world_size // together


class LinAttnCallback(TrainerCallback):
    """Tells a model's layers the training step of a `Trainer`: `Trainer(..., callbacks=[LinAttnCallback()])`.

    New directions come after every `redraw_interval` optimizer steps, never with a forward pass. The noise of LARA and
    EVA and the dropout of slots are those of the rows (`key_noise`, with `args.seed`), the same on any number of
    processes (DataParallel splits a batch after the fact: there they are those of torch's generators). Nothing is
    stored in the checkpoint but the directions: a resumed run draws those that belong to the step it resumes at. A run
    that ended with an error leaves its last place behind: call `key_noise(model, None)` before a loop of your own.
    With `push_to_hub` it warns of hidden files and links in `output_dir`, which a Trainer uploads as a whole. Under
    FSDP2 through Accelerate, linear attention that is a unit keeps what it has learned in float32.
    """

    def __init__(self) -> None:
        check_trainer()
        self._begun: int | None = None
        self._micro_batch = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if getattr(args, "push_to_hub", False) and state.is_world_process_zero:
            _tell_what_is_published(args.output_dir)
        _keep_precision(model)
        redraw_projections(model, state.global_step)
        self._begun = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._micro_batch = 0
        self._key_noise(args, state, model)

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._micro_batch += 1
        self._key_noise(args, state, model)

    def _key_noise(self, args: Any, state: Any, model: Any) -> None:
        """Accelerate deals batches out in turn; with split_batches it deals every batch out in parts."""
        process, processes = data_process(args)
        # The state of a resumed run has the number of the run before.
        rows = state.train_batch_size if args.auto_find_batch_size else args.train_batch_size
        if getattr(args.accelerator_config, "split_batches", False):
            rows = max(1, rows // processes)
        first_row = (self._micro_batch * processes + process) * rows
        key_noise(model, state.global_step, first_row, rows=rows, seed=args.seed)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        key_noise(model, None)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._begun is not None and state.global_step <= self._begun:
            found = f"global_step {state.global_step} at the end of the step after {self._begun}"
            raise changed("trainer events", found)
        redraw_projections(model, state.global_step)
