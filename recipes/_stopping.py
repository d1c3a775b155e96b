"""Saving when the scheduler says SIGTERM: `--enable_jit_checkpoint`, for any number of processes."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

from transformers import TrainerCallback

from _processes import agree

logger = logging.getLogger("hf_linattn.recipes")

STATUS = 128 + signal.SIGTERM  # with which a run ends that was told to


class SaveOnSigterm(TrainerCallback):
    """After SIGTERM the step is ended and saved, and training stops, on all processes after the same step.

    In the callback of Transformers every process waits for three seconds and saves at the next occasion: of two
    processes one may save while the other has begun the next step, whose gradients it waits for in vain.
    """

    received = False
    stopped = False
    _before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_: Any) -> None:
        self.received = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if agree(self.received, args):
            self.stopped = state.global_step < state.max_steps
            control.should_training_stop = control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped:  # it is not the end of an epoch, and there is no time to evaluate
            control.should_evaluate = control.should_save = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if self.stopped:
            logger.warning(
                "SIGTERM: saved checkpoint-%d of %d steps. The same command line goes on from there",
                state.global_step,
                state.max_steps,
            )
