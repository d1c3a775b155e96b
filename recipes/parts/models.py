"""The model of a run: loaded in float32, with longer positions and another attention where that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import hf_linattn
from hf_linattn.cli.checkpoints import has_vocabulary
from hf_linattn.errors import LinAttnError, did_you_mean

from .adaptation import AdaptationArguments
from .common import AttentionArguments, RecipeError, apply_attention, linear_attention_of, refuse_idle_flags
from .text import LengthArguments
from .training import ModelArguments, NewModelArguments


def load_config(args: ModelArguments) -> PreTrainedConfig:
    """That of the checkpoint; of a model from scratch the one that the flags describe."""
    if not is_new(args):
        return _found(AutoConfig, args.model_name_or_path, args)
    assert isinstance(args, NewModelArguments)
    if args.config_name is not None:
        config = _found(AutoConfig, args.config_name, args)
    elif args.model_type in CONFIG_MAPPING:
        config = CONFIG_MAPPING[args.model_type]()
    else:
        close = did_you_mean(args.model_type, list(CONFIG_MAPPING))
        raise RecipeError(f"--model_type {args.model_type!r} is none that Transformers knows.{close}")
    if args.config_overrides:
        override(config, args.config_overrides)
    return config


def override(config: PreTrainedConfig, text: str) -> None:
    """Set fields of a config as `--config_overrides` says. Raises: RecipeError for what is no field, or no value."""
    known, unset = [], {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if value and getattr(config, name, "") is None:  # Transformers does not change it: it has no type
            unset[name] = yaml.safe_load(value)
        else:
            known.append(part)
    try:
        if known:
            config.update_from_string(",".join(known))
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"--config_overrides must be fields of {type(config).__name__}, as 'hidden_size=192,num_hidden_layers="
            f"4'; got {text!r} ({error})."
        ) from error
    for name, value in unset.items():
        setattr(config, name, value)


def load_model(auto_class: Any, args: ModelArguments, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """In float32, whatever the checkpoint is stored in: `--bf16` trains in mixed precision.

    A model from scratch draws its weights from the seed of the run.
    """
    if not is_new(args):
        return _found(auto_class, args.model_name_or_path, args, dtype=torch.float32, config=config, **options)
    config.architectures = config.architectures or []  # Auto classes with several heads for a type iterate over it
    try:
        return auto_class.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise RecipeError(f"No model can be made from this config: {str(error).strip().splitlines()[0]}") from error


def is_new(args: ModelArguments) -> bool:
    """Whether the model starts from random weights."""
    return args.model_name_or_path is None


def load_processor(auto_class: Any, args: ModelArguments, **options: Any) -> Any:
    """The tokenizer, the image processor."""
    return _found(auto_class, args.tokenizer_name or args.model_name_or_path, args, **options)


def load_tokenizer(args: ModelArguments, config: PreTrainedConfig, **options: Any) -> PreTrainedTokenizerBase:
    """With a padding token, which the config gets to know. That of a new model gets to know the vocabulary, too."""
    if is_new(args) and args.tokenizer_name is None:
        raise RecipeError("A model from scratch needs --tokenizer_name.")
    tokenizer = load_vocabulary(args, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if is_new(args):
        config.vocab_size = len(tokenizer)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def load_vocabulary(args: ModelArguments, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer as it was saved. Raises: RecipeError if there is none."""
    path = args.tokenizer_name or args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=args.model_revision, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"There is no tokenizer in {path!r}: name one with --tokenizer_name ({reason})") from error
    if not has_vocabulary(tokenizer, path, args.model_revision):
        raise RecipeError(f"There is no tokenizer in {path!r}, only a model: name one with --tokenizer_name.")
    return tokenizer


def extend(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lengths: LengthArguments) -> None:
    """Give model and tokenizer the positions that `--extend_positions` asks for."""
    refuse_idle_flags(lengths, {"extend_positions": ["extend_method"]})
    if lengths.extend_positions is not None:
        hf_linattn.extend_positions(model, lengths.extend_positions, method=lengths.extend_method)
        tokenizer.model_max_length = lengths.extend_positions


def convert(model: PreTrainedModel, attention: AttentionArguments, adaptation: AdaptationArguments) -> PreTrainedModel:
    """The attention that the run asks for; with learned maps where they are going to be trained."""
    model = apply_attention(model, attention, **({"learned": True} if adaptation.transfer_steps else {}))
    if adaptation.transfer_steps and linear_attention_of(model) is None:
        raise RecipeError("--transfer_steps needs a kind of linear attention: give --attention.")
    return model


def _found(auto_class: Any, path: str, args: ModelArguments, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(path, revision=args.model_revision, **options)
    except LinAttnError:
        raise
    except (OSError, ValueError) as error:  # no such name, no connection, no such head: the first line says which
        if Path(path).is_absolute() and not Path(path).is_dir():
            raise RecipeError(f"There is no folder {path!r} with a checkpoint.") from error
        raise RecipeError(f"{path!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
