"""What the training recipes share: flags of model and Trainer, the Trainer itself, the log."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
import transformers
import yaml
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from hf_linattn.errors import did_you_mean
from hf_linattn.hub import write_card

from .common import KIND_SETTINGS, RecipeError, linear_attention_of, write_json
from .processes import prepare_sharding, tell_missing_processes
from .publish import Publisher
from .repeatable import RepeatableTrainer
from .together import existing, together

logger = logging.getLogger("hf_linattn.recipes")

SAMPLING = ("group_by_length", "random", "sequential", "batch_rebalance")  # of TrainingArguments


# -- flags ------------------------------------------------------------------------------------------------------------
@dataclass
class ModelArguments:
    """Which model."""

    model_name_or_path: str = field(metadata={"help": "Hub name or local folder; stock or already converted"})
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer or image processor, if it is not with the model",
            "aliases": ["--image_processor_name"],
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub"})
    base_model: str | None = field(
        default=None, metadata={"help": "Hub name for the model card, if the path is local"}
    )

    @property
    def base_on_hub(self) -> str | None:
        """Hub name of the model that the run starts from; None for a local folder, and for a model from scratch."""
        local = self.model_name_or_path is None or Path(self.model_name_or_path).exists()
        return self.base_model or (None if local else self.model_name_or_path)


@dataclass
class NewModelArguments(ModelArguments):
    """Which model, pretrained or with random weights."""

    model_name_or_path: str | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Hub name or local folder; stock or already converted"}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Instead of it: a model from scratch, with this config (Hub name or folder)"}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Instead of both: a model from scratch, with the stock config of this type"}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Fields of the config of a model from scratch, for example 'hidden_size=192,patch_size=4'"},
    )

    def __post_init__(self) -> None:
        sources = {name: getattr(self, name) for name in ("model_name_or_path", "config_name", "model_type")}
        given = [f"--{name}" for name, value in sources.items() if value is not None]
        if len(given) != 1:
            raise RecipeError(
                f"Give one of --model_name_or_path (pretrained), --config_name and --model_type (from scratch); got "
                f"{' and '.join(given) or 'none of them'}."
            )
        if self.config_overrides and self.model_name_or_path is not None:
            raise RecipeError("--config_overrides is for a model from scratch: give --config_name or --model_type.")


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """`TrainingArguments` that put texts of similar length into a batch, and need no `--use_cpu` without a GPU."""

    train_sampling_strategy: str = field(default="group_by_length", metadata={"help": f"One of {', '.join(SAMPLING)}"})
    context_parallel_size: int = field(
        default=1,
        metadata={"help": "So many processes share every sequence in training: each has a part of its tokens"},
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise --bf16 is refused
            self.dataloader_pin_memory = False
        counts = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        for name in (*counts, "context_parallel_size"):
            if getattr(self, name) < 1:
                raise RecipeError(f"--{name} must be at least 1; got {getattr(self, name)}.")
        if self.train_sampling_strategy not in SAMPLING:
            got = self.train_sampling_strategy
            raise RecipeError(f"--train_sampling_strategy must be one of {', '.join(SAMPLING)}; got {got!r}.")
        place = self.output_dir and Path(self.output_dir)
        if place and place.exists() and not place.is_dir():
            raise RecipeError(f"--output_dir must be a folder; {self.output_dir!r} is a file.")
        if place and not os.access(found := existing(place), os.W_OK | os.X_OK):
            raise RecipeError(f"--output_dir {self.output_dir!r}: nothing can be written to {os.fspath(found)!r}.")
        super().__post_init__()
        get_reporting_integration_callbacks(self.report_to)  # a name that does not exist raises


def parse_flags(parts: Sequence[type], argv: Sequence[str] | None, description: str | None) -> tuple[Any, ...]:
    """One instance of each dataclass: from the command line, after the flags of its `--config` file.

    Raises: RecipeError for flags and keys that do not exist, and for values that are not allowed.
    """
    parser = HfArgumentParser(
        parts, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config",
        action="append",
        help="YAML file of flags, without the dashes; of several a later one wins, and the command line over all",
    )
    parser.error = _raise  # type: ignore[method-assign]  # in place of a page of usage
    argv = list(sys.argv[1:] if argv is None else argv)
    if len(argv) == 1 and argv[0].endswith((".json", ".yaml", ".yml")):
        argv = ["--config", argv[0]]
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", action="append", default=[])
    files.add_argument("--attention")
    given = files.parse_known_args(argv)[0]
    argv = [*config_flags(given.config, parser._option_string_actions, given.attention), *argv]
    try:
        *found, unknown = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    except (ValueError, ImportError) as error:  # TrainingArguments check themselves
        raise RecipeError(" ".join(str(error).split())) from error
    if unknown:
        flag = unknown[0].split("=")[0]
        names = [name for name in parser._option_string_actions if name.startswith("--")]
        raise RecipeError(f"{flag!r} is not a flag of this recipe.{did_you_mean(flag, names)}")
    return tuple(found[: len(parts)])


def config_flags(paths: Sequence[str], known: Mapping[str, Any], attention: str | None = None) -> list[str]:
    """The flags of YAML (or JSON) files, as a command line. A mapping becomes JSON, a list several values.

    Settings belong to the kind of attention that they stand beside: who names another kind later does not get them.

    Args:
        known: Flag -> what the parser knows of it.
        attention: What the command line says.
    Raises: RecipeError for a file that cannot be read, and for keys that are no flags.
    """
    values: dict[str, Any] = {}
    for path in paths:
        content = _read_config(path, known)
        values = {**_without_other_settings(values, content.get("attention")), **content}
    flags: list[str] = []
    for name, value in _without_other_settings(values, attention).items():
        if value is None:
            continue
        flags.append(f"--{name}")
        flags += [_as_text(each) for each in value] if isinstance(value, list) else [_as_text(value)]
    return flags


def _read_config(path: str, known: Mapping[str, Any]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise RecipeError(f"--config {path!r} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"--config {path!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"--config {path!r} must hold 'flag: value' lines; got a {type(content).__name__}.")
    for name in content:
        if name in ("config", "help"):
            raise RecipeError(f"--config {path!r}: {name!r} is a flag of the command line alone.")
        if f"--{name}" not in known:
            close = did_you_mean(str(name), [flag.removeprefix("--") for flag in known])
            raise RecipeError(f"--config {path!r}: {name!r} is not a flag of this recipe.{close}")
    return content


def _without_other_settings(values: Mapping[str, Any], attention: str | None) -> dict[str, Any]:
    """The values of files, without settings of a kind in whose place `attention` was named."""
    if attention is None or values.get("attention") in (None, attention):
        return dict(values)
    return {name: value for name, value in values.items() if name not in KIND_SETTINGS}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _raise(message: str) -> NoReturn:
    raise RecipeError(message)


def start_logging(training: TrainingArguments, quiet: bool) -> None:
    """One process tells what happens; with `quiet` it only warns."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.ERROR if not training.should_log else logging.WARNING if quiet else logging.INFO)
    if not training.should_log:
        transformers.utils.logging.set_verbosity_error()
        datasets.utils.disable_progress_bars()
    tell_missing_processes(training)


# -- the Trainer ------------------------------------------------------------------------------------------------------
class RecipeTrainer(RepeatableTrainer):
    """A `Trainer` with the model card of the library, which uploads nothing but model, tokenizer and card."""

    card_facts: dict[str, Any]

    def __init__(self, *, args: TrainingArguments, callbacks: Sequence[TrainerCallback] = (), **kwargs: Any) -> None:
        self.publisher = Publisher(args)
        prepare_sharding(kwargs["model"])
        size = args.context_parallel_size if args.do_train else 1
        super().__init__(args=args, callbacks=[*callbacks, self.publisher], context_parallel_size=size, **kwargs)
        self.publisher.trainer = self

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        try:
            super().init_hf_repo(token, private)
        except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
            reason = str(error).strip().splitlines()[0]
            raise RecipeError(
                f"--push_to_hub: no repository for {self.args.hub_model_id or self.args.output_dir!r}: {reason}"
            ) from error

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if self.hub_model_id is None:
            self.args.hub_private_repo = self.args.hub_private_repo if private is None else private
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self.publisher.finish()
        return self.publisher.push(blocking, commit_message=commit_message, token=token, revision=revision)

    def create_model_card(self, **kwargs: Any) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if linear_attention_of(model) is None:
            path = Path(self.args.output_dir, "README.md")
            if self.is_world_process_zero() and path.is_symlink():  # Trainer would write to its target
                path.unlink()
            super().create_model_card(**kwargs)
        elif self.is_world_process_zero():
            write_card(model, self.args.output_dir, **self.card_facts)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if _is_adapted(self.model):  # an adapter does not say what the attention under it is
            self.model.get_base_model().config.save_pretrained(output_dir or self.args.output_dir)

    def merge_adapter(self) -> None:
        """Save LoRA by itself, in the folder `adapter`, and go on with the whole model that it makes."""
        if not _is_adapted(self.model):
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            logger.warning("The weights are spread over processes: LoRA is saved without the model under it.")
            return
        adapter = Path(self.args.output_dir, "adapter")
        with together("The adapter", adapter, self.args):
            if self.is_world_process_zero():
                self.model.save_pretrained(adapter)
        self.model = self.model_wrapped = self.model.merge_and_unload()

    def finish(self, results: dict[str, Any]) -> dict[str, Any]:
        """Write `results.json`, and publish where that is asked for. The model and its card are saved already."""
        if self.is_world_process_zero():
            path = write_json(Path(self.args.output_dir) / "results.json", results)
            logger.info("Wrote %s", path)
        if self.args.push_to_hub:
            self.push_to_hub()
        return results

    def settings(self) -> dict[str, Any]:
        """The flags of the Trainer for a results file, without tokens."""
        return {**json.loads(self.args.to_json_string()), "hub_strategy": self.publisher.strategy.value}


def _is_adapted(model: Any) -> bool:
    """Whether a model is PEFT's, around one of Transformers."""
    return hasattr(model, "merge_and_unload")
