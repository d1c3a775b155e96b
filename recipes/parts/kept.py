"""What a run does before it trains is kept until it ends: a run that was killed goes on behind it.

In the folder `_before_training` of the output folder: `calibration.safetensors`, the checkpoints of attention transfer
in `transfer`, and `flags.json`, the flags that they follow from.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from .damage import file_damage
from .saving import write_atomically
from .together import decided, gather, together

logger = logging.getLogger("hf_linattn.recipes")

FOLDER, CALIBRATION, FLAGS = "_before_training", "calibration.safetensors", "flags.json"
# Flags that another number of processes changes.
CUTS = ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size")


class Kept:
    """The folder, checked against the flags of this start.

    Args:
        comes_from: The flags.
        from_scratch: Do everything anew.
        is_needed: Whether the run begins without a checkpoint, which would hold all of it.
    """

    def __init__(
        self, training: TrainingArguments, comes_from: Mapping[str, Any], from_scratch: bool, is_needed: bool = True
    ) -> None:
        self.training = training
        self.folder = Path(training.output_dir, FOLDER)
        self.transfer = self.folder / "transfer"
        self.comes_from = json.loads(json.dumps(comes_from, default=str))
        self.done: dict[str, Any] = {}  # what `adapt` returned

        def look() -> dict[str, Any]:
            found = self._read()
            if found and not from_scratch and self._is_same(found["comes_from"], () if is_needed else CUTS):
                return dict(found["done"])
            if is_needed and self.folder.exists():
                if found and not from_scratch:
                    before = found["comes_from"]
                    changed = [name for name, value in self.comes_from.items() if before.get(name) != value]
                    logger.warning(
                        "Calibration and attention transfer begin anew: %s holds those of other flags (%s)",
                        self.folder,
                        ", ".join(changed),
                    )
                shutil.rmtree(self.folder)
            return {}

        self.done = decided(look, training)[0]

    def _is_same(self, before: Mapping[str, Any], left_out: tuple[str, ...]) -> bool:
        names = (before.keys() | self.comes_from.keys()).difference(left_out)
        return all(before.get(name) == self.comes_from.get(name) for name in names)

    def _read(self) -> dict[str, Any]:
        path = self.folder / FLAGS
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not file_damage(path) else {}

    def load_calibration(self, model: PreTrainedModel) -> bool:
        """Set the statistics that an earlier start has found; False if there are none. One process reads for all."""
        path = self.folder / CALIBRATION
        found: dict[str, Tensor] | None = None
        if self.training.process_index == 0 and path.is_file():
            if reason := file_damage(path):
                logger.warning("Calibrating anew: %s %s", path, reason)
            else:
                found = load_file(path)
        found = gather(found, self.training)[0]
        if found is None:
            return False
        model.load_state_dict(found, strict=False)
        logger.info("Calibrated before (%s)", path)
        return True

    def save_calibration(self, model: PreTrainedModel) -> None:
        path = self.folder / CALIBRATION
        with together("The calibration", self.folder, self.training):
            if self.training.should_save:
                self._write_flags()
                own = {name: value for name, value in model.state_dict().items() if ".linattn." in name}
                state = {
                    name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
                    for name, value in own.items()
                }
                save_file(state, path.with_suffix(".part"))
                os.replace(path.with_suffix(".part"), path)

    def record(self, done: Mapping[str, Any]) -> None:
        """Write down with which flags something is done, before it begins, and what came out, after it."""
        self.done = dict(done)
        with together("The record of what comes before training", self.folder, self.training):
            if self.training.should_save:
                self._write_flags()

    def _write_flags(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"comes_from": self.comes_from, "done": self.done}
        write_atomically(self.folder / FLAGS, json.dumps(content, indent=1) + "\n")

    def remove(self) -> None:
        """When the run has ended."""
        if self.training.should_save:
            shutil.rmtree(self.folder, ignore_errors=True)
