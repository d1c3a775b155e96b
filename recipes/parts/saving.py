"""Checkpoints that count when all processes have written their parts; saves that fail on all of them or on none."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer

from .damage import MANIFEST, STATE, damage, sizes
from .together import SaveError, describe_failure, gather, is_write_failure, together


class CheckedSaves(Trainer):
    """A `Trainer` whose checkpoints are complete on all processes before they count.

    In that of Transformers one process writes `trainer_state.json` and deletes older checkpoints, whether the others
    have written their random states or not, and if its disk is full, the others wait for it in the next step.
    """

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        existed = folder.exists()
        try:
            with self._together(folder):
                if self.args.should_save:  # one that is written again does not count meanwhile
                    (folder / STATE).unlink(missing_ok=True)
                super()._save_checkpoint(model, trial)
        except SaveError:
            if self.args.should_save and not existed and folder.is_dir() and damage(folder, self.args.save_only_model):
                shutil.rmtree(folder, ignore_errors=True)  # what is left of it takes room
            raise

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self._together(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub and not _internal_call:  # takes long: outside of what the others wait for
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._together(output_dir):
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_scaler(self, output_dir: str) -> None:
        with self._together(output_dir):
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        # The last that all processes write. STATE follows it, and says that the checkpoint is complete.
        with self._together(output_dir):
            super()._save_rng_state(output_dir)
        # Every process sees its own files; one may not see yet what another node wrote.
        seen = gather(sizes(Path(output_dir)), self.args)
        with self._together(output_dir):
            if self.args.should_save:
                files = sizes(Path(output_dir)) if self.args.save_on_each_node else _merged(seen)
                content = {"processes": self.args.world_size, "files": {**files}}
                write_atomically(Path(output_dir, MANIFEST), json.dumps(content, indent=1) + "\n")

    @contextmanager
    def _together(self, folder: str | os.PathLike[str]) -> Iterator[None]:
        """`together`, or where saving is itself an exchange between processes (FSDP, DeepSpeed) a clear error alone.

        There a process that fails cannot tell the others, which wait for it until the launcher ends them.
        """
        what = Path(folder).name if Path(folder).name.startswith("checkpoint-") else "The model"
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            with together(what, folder, self.args, self._needed_bytes):
                yield
            return
        try:
            yield
        except SaveError:
            raise
        except Exception as error:
            if not is_write_failure(error):
                raise
            raise SaveError(describe_failure(what, folder, error)) from error
        gather(None, self.args)

    def _needed_bytes(self) -> int:
        """Of a checkpoint, about."""
        states = self.optimizer.state.values() if self.optimizer is not None and not self.args.save_only_model else ()
        tensors = [value for state in states for value in state.values() if hasattr(value, "nbytes")]
        model = self.accelerator.unwrap_model(self.model)
        return sum(each.nbytes for each in (*model.state_dict().values(), *tensors))


def _merged(seen: list[dict[str, int]]) -> dict[str, int]:
    """The files that any process sees, with the largest of the lengths."""
    found: dict[str, int] = {}
    for each in seen:
        for name, length in each.items():
            found[name] = max(length, found.get(name, 0))
    return found


def write_atomically(path: Path, content: str) -> None:
    """Cut off at any moment, the file has its old content or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(content, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
