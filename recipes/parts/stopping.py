"""Saving when the run is told to stop: SIGINT (Ctrl-C), and SIGTERM with `--enable_jit_checkpoint`; on any number of
processes.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import SaveStrategy, TrainOutput

logger = logging.getLogger("hf_linattn.recipes")

STATUS = 128 + signal.SIGTERM  # with which a run ends that was told to by SIGTERM


class _StopEvaluation(Exception):  # noqa: N818  # no error
    """Leaves an evaluation within training."""


class Listener:
    """Hears signals in a thread of its own, also while the main thread waits for another process.

    Python runs handlers in the main thread only, and not before a call into torch has returned.

    Args:
        heard: Called with the number of a signal; with 0 twice a second.
    """

    active = False  # in this process

    def __init__(self, heard: Callable[[int], None]) -> None:
        self._heard = heard
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        Listener.active = True
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            numbers = b"\0"
            if select.select([self._reader], [], [], 0.5)[0] and not (numbers := os.read(self._reader, 64)):
                os.close(self._reader)
                return
            for number in numbers:
                self._heard(number)

    def stop(self) -> None:
        Listener.active = False
        signal.set_wakeup_fd(self._before)
        os.close(self._writer)


def _hear_nothing() -> None:
    """In a process that a data loader forks: what reaches it would be taken for the parent's."""
    if Listener.active:
        Listener.active = False
        with suppress(ValueError):
            signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_hear_nothing)


class SaveOnSignal(TrainerCallback):
    """After a signal the step is ended and saved, and training stops, on all processes after the same step.

    In the callback of Transformers every process waits for three seconds and saves at the next occasion: of two
    processes one may save while the other has begun the next step, whose gradients it waits for in vain.

    A second SIGINT ends the process at once. So does SIGTERM, if the step does not end (`PATIENCE`): another process
    has died then, and the launcher sent the signal.

    Args:
        signals: Their numbers.
    """

    PATIENCE = 30.0  # seconds after SIGTERM, beside three times what the longest step took

    def __init__(self, signals: Sequence[int]) -> None:
        self.signals = signals
        self.received = 0
        self.stopped = 0  # the signal after which all processes stop
        self._before: dict[int, Any] = {}
        self._listener: Listener | None = None
        self._is_training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.received = self.stopped = self._interrupts = 0
        self._longest, self._begun, self._told_at = 0.0, None, None
        self._is_training = True
        if self.signals and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in self.signals}
            self._listener = Listener(self._hear)

    def _receive(self, number: int, *_: Any) -> None:
        if number == signal.SIGINT and not self.received:
            logger.warning("Ctrl-C: saving after this step. Press it again to stop at once")
        self.received = max(self.received, number)

    def _hear(self, number: int) -> None:
        """In the thread of the listener."""
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            _end(signal.SIGINT, "Ctrl-C: stopped at once")
        if number == signal.SIGTERM and self._told_at is None:
            self._told_at = time.monotonic()
        if self._told_at is None or self._begun is None or not self._longest:
            return
        limit = self.PATIENCE + 3 * self._longest
        if time.monotonic() - max(self._told_at, self._begun) > limit:
            _end(signal.SIGTERM, f"SIGTERM: the step did not end within {limit:.0f} s. Nothing is saved")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopped = self._agreed(args)
        self._longest = max(self._longest, time.monotonic() - (self._begun or time.monotonic()))
        self._begun = None
        if self.stopped:
            control.should_training_stop = control.should_save = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_training and not self.stopped:
            self.stopped = self._agreed(args)
        if self._is_training and self.stopped:  # there is no time to evaluate
            raise _StopEvaluation

    def _agreed(self, training: TrainingArguments) -> int:
        """The signal that any process received, or 0. Every process has to ask."""
        if not self.signals or training.world_size == 1:
            return self.received
        found = torch.tensor(self.received, device=training.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return int(found)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped:  # it is not the end of an epoch
            control.should_evaluate = control.should_save = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Leave signals to those who had them before; also after an error."""
        self._is_training = False
        if self._listener is not None:
            self._listener.stop()
            self._listener = None
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before = {}


def _end(number: int, message: str) -> NoReturn:
    """End the process from any thread, whatever the main thread waits for."""
    print(message, file=sys.stderr, flush=True)
    os._exit(128 + number)


class StoppableTrainer(Trainer):
    """A `Trainer` that saves and ends the program, with the status of a shell, when it is told to stop.

    SIGTERM is left alone without `--enable_jit_checkpoint`; SIGINT, if nothing is to be saved (`--save_strategy no`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        handler = signal.getsignal(signal.SIGTERM)
        super().__init__(*args, **kwargs)
        by_scheduler = self.args.enable_jit_checkpoint
        by_user = by_scheduler or self.args.save_strategy != SaveStrategy.NO
        if by_scheduler:
            self.remove_callback(JITCheckpointCallback)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
        self.stopping = SaveOnSignal([*([signal.SIGTERM] * by_scheduler), *([signal.SIGINT] * by_user)])
        self.add_callback(self.stopping)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Raises: SystemExit after a signal, with the status that a shell gives such a process."""
        try:
            found = super().train(*args, **kwargs)
        finally:
            self.stopping.restore()
        if number := self.stopping.stopped:
            logger.warning(
                "%s: stopped after step %d of %d. The same command line goes on from the last checkpoint",
                signal.Signals(number).name,
                self.state.global_step,
                self.state.max_steps,
            )
            raise SystemExit(128 + number)
        return found

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ):
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except _StopEvaluation:
            self.control.should_training_stop = True
            self.control.should_evaluate = self.control.should_save = False
            # A checkpoint without the metrics of its step might keep a run from finding the best one.
            if not (self.args.load_best_model_at_end or self.args.save_strategy == SaveStrategy.BEST):
                self._save_checkpoint(model, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
