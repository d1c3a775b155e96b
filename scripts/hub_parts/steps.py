"""What is done with every model, and with every kind in it. Each method is one part: it raises, or returns values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import hf_linattn
from hf_linattn.modules.registry import get_kind

from .models import Batch, HubModel
from .record import Refused
from .repositories import Repositories
from .weights import ADDED, check_weights, digest, digest_of_all

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4  # relative; two processes may round differently
LONGEST = 1800  # seconds to load a model back
DIFFERENT = 1e-3  # relative; less would mean that softmax attention ran


@dataclass(frozen=True)
class Settings:
    """Of the run.

    Args:
        calibration_batches: Of four rows each; the library advises some tens of thousands of tokens.
    """

    device: str = "cpu"
    steps: int = 20
    learning_rate: float = 5e-5
    calibration_batches: int = 24


class ModelCheck:
    """A stock checkpoint: its file, its inputs, and its outputs under softmax."""

    def __init__(self, model: HubModel, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.auto = getattr(transformers, model.auto)

    def load(self) -> dict[str, Any]:
        """The stock model has every weight of the file, whatever names they have there."""
        repo = self.model.repo
        # Weights from safetensors only: nothing is unpickled.
        self.file = load_file(hf_hub_download(repo, "model.safetensors"))
        loaded, info = self.auto.from_pretrained(repo, use_safetensors=True, output_loading_info=True)
        check_info(info, self.model)
        found = check_weights(loaded, self.file, self.model.is_unused)
        self.processor = getattr(transformers, self.model.processor).from_pretrained(repo)
        self.batches = self.model.batches(self.processor, count=4)
        self.inputs = without_labels(self.batches[0])
        self.softmax = logits_of(loaded, self.inputs)
        old = [name for name in self.file if name.endswith((".gamma", ".beta"))]
        return {
            "shown": f"{found} tensors equal to the file's" + (f", {len(old)} of them by old names" if old else ""),
            "class": type(loaded).__name__,
            "tensors": found,
            "old_names": len(old),
            "unused_tensors": sorted(name for name in self.file if self.model.is_unused(name))[:8],
        }


class KindCheck:
    """One kind in one model."""

    def __init__(self, stock: ModelCheck, kind: str, repositories: Repositories) -> None:
        self.stock, self.kind, self.repositories = stock, kind, repositories
        self.model, self.settings = stock.model, stock.settings
        self.repo = repositories.name(stock.model.name, kind)

    def native(self) -> dict[str, Any]:
        """`from_pretrained(attn_implementation=kind)`: the file's weights, other outputs than softmax."""
        refusal = self.model.is_causal and not get_kind(self.kind).native_causal
        try:
            loaded, info = self.stock.auto.from_pretrained(
                self.model.repo, attn_implementation=self.kind, use_safetensors=True, output_loading_info=True
            )
            check_info(info, self.model)
            check_weights(loaded, self.stock.file, self.model.is_unused)
            logits = logits_of(loaded, self.stock.inputs)
        except hf_linattn.UnsupportedError as error:
            if refusal:
                raise Refused(error) from error
            raise
        if refusal:
            raise AssertionError(f"native causal {self.kind} has to raise UnsupportedError, and did not")
        return {"shown": "ok", "difference": difference(logits, self.stock.softmax, self.stock.inputs)}

    def convert(self) -> dict[str, Any]:
        """`convert`, and `calibrate` where it is needed; the weights stay those of the file."""
        stock = self.stock.auto.from_pretrained(self.model.repo, use_safetensors=True)
        self.converted = hf_linattn.convert(stock, self.kind)
        calibrated = hf_linattn.needs_calibration(self.converted)
        if calibrated:
            count = self.settings.calibration_batches
            batches = self.model.batches(self.stock.processor, count, seed=1)
            self.converted.to(self.settings.device)
            hf_linattn.calibrate(self.converted, on_device(batches, self.settings.device))
            self.converted.to("cpu")
        check_weights(self.converted, self.stock.file, self.model.is_unused)
        logits = logits_of(self.converted, self.stock.inputs)
        return {
            "shown": "calibrated" if calibrated else "ok",
            "class": type(self.converted).__name__,
            "difference": difference(logits, self.stock.softmax, self.stock.inputs),
        }

    def direct(self) -> dict[str, Any]:
        """The stock checkpoint loaded straight into the converted class: what `convert` makes of it."""
        converted = type(self.converted)
        loaded, info = converted.from_pretrained(
            self.model.repo, linear_attention=self.kind, use_safetensors=True, output_loading_info=True
        )
        check_info({**info, "missing_keys": [name for name in info["missing_keys"] if ADDED not in name]}, self.model)
        check_weights(loaded, self.stock.file, self.model.is_unused)
        if loaded.config.linear_attention != self.converted.config.linear_attention:
            raise AssertionError(f"settings are {loaded.config.linear_attention}")
        waits = hf_linattn.needs_calibration(loaded)
        if not waits and digest_of_all(loaded) != digest_of_all(self.converted):
            raise AssertionError("other linear attention tensors than those of a converted model")
        return {"shown": "same, uncalibrated" if waits else "same"}

    def compare(self) -> dict[str, Any]:
        """How close to softmax, before any training."""
        self.converted.to(self.settings.device)
        report = hf_linattn.compare(self.converted, on_device(self.stock.batches[:2], self.settings.device))
        self.converted.to("cpu")
        values = report.to_dict()
        numbers = {name: values[name] for name in ("hidden_cosine", "mean_layer_error", "argmax_agreement")}
        if not all(number == number for number in numbers.values()):
            raise AssertionError(f"not numbers: {numbers}")
        return {"shown": f"{report.hidden_cosine:.3f}", **numbers, "tokens": report.tokens}

    def train(self) -> dict[str, Any]:
        """Some steps of the Trainer on the same few rows: the loss has to fall."""
        before = {name: digest(tensor) for name, tensor in self.converted.named_parameters()}
        rows = [
            dict(zip(batch, row, strict=True))
            for batch in self.stock.batches
            for row in zip(*batch.values(), strict=True)
        ]
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=self.settings.steps,
                per_device_train_batch_size=4,
                learning_rate=self.settings.learning_rate,
                save_strategy="no",
                logging_steps=1,
                report_to=[],
                disable_tqdm=True,
                use_cpu=self.settings.device == "cpu",
                seed=0,
            )
            trainer = Trainer(model=self.converted, args=arguments, train_dataset=rows)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        self.converted.to("cpu")
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        check_losses(losses, self.settings.steps)
        changed = [name for name, tensor in self.converted.named_parameters() if digest(tensor) != before[name]]
        own = [name for name in before if ADDED in name]
        if not [name for name in changed if ADDED not in name] or (own and not [n for n in changed if ADDED in n]):
            raise AssertionError(f"training left weights as they were; {len(changed)} of {len(before)} changed")
        few = max(1, len(losses) // 4)
        first, last = sum(losses[:few]) / few, sum(losses[-few:]) / few
        return {"shown": f"{first:.2f} → {last:.2f}", "losses": [round(loss, 4) for loss in losses]}

    def push(self) -> dict[str, Any]:
        """To a private repository, with a model card, and nothing pickled."""
        self.repositories.claim(self.repo)
        self.converted.push_to_hub(self.repo, private=True)
        api = self.repositories.api
        info = api.model_info(self.repo)
        files = sorted(entry.rfilename for entry in info.siblings)
        if not info.private or _is_public(api, self.repo):
            raise AssertionError(f"{self.repo} is not private")
        lacking = {"README.md", "config.json", "model.safetensors"} - set(files)
        pickled = [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
        if lacking or pickled:
            raise AssertionError(f"of the files in {self.repo}, missing: {sorted(lacking)}; pickled: {pickled}")
        return {"shown": "private", "repository": self.repo, "files": files}

    def reload(self) -> dict[str, Any]:
        """By name, in a new process with an empty cache: the same class, weights and outputs."""
        with tempfile.TemporaryDirectory() as folder:
            inputs, output = str(Path(folder, "inputs.safetensors")), str(Path(folder, "output.safetensors"))
            save_file({name: tensor.contiguous() for name, tensor in self.stock.inputs.items()}, inputs)
            command = [
                sys.executable,
                str(ROOT / "scripts" / "hub_parts" / "load_back.py"),
                self.repo,
                self.model.auto,
                inputs,
                output,
            ]
            paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
            caches = {name: str(Path(folder, name)) for name in ("HF_HUB_CACHE", "HF_XET_CACHE")}
            environment = {**os.environ, **caches, "PYTHONPATH": paths}
            done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=LONGEST)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["nothing printed"]
                raise RuntimeError("\n".join([f"the new process ended with {done.returncode}: {lines[-1]}", *lines]))
            found = json.loads(done.stdout.splitlines()[-1])
            logits = load_file(output)["logits"]
        wanted = {
            "class": type(self.converted).__name__,
            "attention": self.kind,
            "missing": [],
            "unexpected": [],
            "weights": digest_of_all(self.converted),
        }
        other = {name: found[name] for name, value in wanted.items() if found[name] != value}
        if other:
            raise AssertionError(f"loaded back with {other}")
        off = relative(logits, logits_of(self.converted, self.stock.inputs))
        if not off <= TOLERANCE:
            raise AssertionError(f"loaded back with other outputs: relative difference {off:.2e}")
        return {"shown": f"same ({off:.0e})" if off else "same", "class": found["class"], "difference": off}

    def delete(self) -> dict[str, Any]:
        self.repositories.delete(self.repo)
        return {"shown": "gone"}


# -- what the parts look at ------------------------------------------------------------------------------------------
def check_info(info: dict[str, Any], model: HubModel) -> None:
    """Raise if Transformers says that weights are missing, of another shape, or left over for no known reason."""
    left_over = [name for name in info["unexpected_keys"] if not model.is_unused(name)]
    if info["missing_keys"] or info["mismatched_keys"] or left_over:
        raise AssertionError(
            f"missing: {sorted(info['missing_keys'])[:3]}, of another shape: {list(info['mismatched_keys'])[:3]},"
            f" left over: {sorted(left_over)[:3]}"
        )


def check_losses(losses: list[float], steps: int) -> None:
    """Raise unless there is one for each step, all are numbers, and they fall from the first to the last quarter."""
    few = max(1, len(losses) // 4)
    if len(losses) != steps or not all(0 <= loss < float("inf") for loss in losses):
        raise AssertionError(f"{len(losses)} losses in {steps} steps: {losses}")
    if steps > 1 and not sum(losses[-few:]) < sum(losses[:few]):
        raise AssertionError(f"the loss does not fall: {losses}")


def without_labels(batch: Batch) -> Batch:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def on_device(batches: list[Batch], device: str) -> list[Batch]:
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]


def logits_of(model: Any, inputs: Batch) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def relative(got: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest value; not a number where one is none."""
    return float((got - wanted).abs().max() / wanted.abs().max())


def difference(logits: Tensor, softmax: Tensor, inputs: Batch) -> float:
    """From softmax, on real tokens. Raises where there is none, or no number."""
    mask = inputs.get("attention_mask")
    if mask is not None and logits.shape[:2] == mask.shape:
        logits, softmax = logits[mask.bool()], softmax[mask.bool()]
    if not torch.isfinite(logits).all():
        raise AssertionError("outputs that are not finite")
    found = relative(logits, softmax)
    if not found > DIFFERENT:
        raise AssertionError(f"outputs are those of softmax attention: relative difference {found:.1e}")
    return found


def _is_public(api: HfApi, repo: str) -> bool:
    """Whether somebody without a token sees it."""
    try:
        api.model_info(repo, token=False)
    except RepositoryNotFoundError:
        return False
    return True
