"""The model of a run: loaded in float32, with longer positions and another attention where that is asked for."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import hf_linattn
from _adaptation import AdaptationArguments
from _common import AttentionArguments, RecipeError, apply_attention
from _text import LengthArguments
from _training import ModelArguments


def load_config(args: ModelArguments) -> PreTrainedConfig:
    return _found(AutoConfig, args.model_name_or_path, args)


def load_model(auto_class: Any, args: ModelArguments, **options: Any) -> PreTrainedModel:
    """In float32, whatever the checkpoint is stored in: `--bf16` trains in mixed precision."""
    return _found(auto_class, args.model_name_or_path, args, dtype=torch.float32, **options)


def load_processor(auto_class: Any, args: ModelArguments, **options: Any) -> Any:
    """The tokenizer, the image processor."""
    return _found(auto_class, args.tokenizer_name or args.model_name_or_path, args, **options)


def load_tokenizer(args: ModelArguments, config: PreTrainedConfig, **options: Any) -> PreTrainedTokenizerBase:
    """With a padding token, which the config gets to know."""
    tokenizer = load_processor(AutoTokenizer, args, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def extend(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lengths: LengthArguments) -> None:
    """Give model and tokenizer the positions that `--extend_positions` asks for."""
    if lengths.extend_positions is not None:
        hf_linattn.extend_positions(model, lengths.extend_positions, method=lengths.extend_method)
        tokenizer.model_max_length = lengths.extend_positions


def convert(model: PreTrainedModel, attention: AttentionArguments, adaptation: AdaptationArguments) -> PreTrainedModel:
    """The attention that the run asks for; with learned maps where they are going to be trained."""
    return apply_attention(model, attention, **({"learned": True} if adaptation.transfer_steps else {}))


def _found(auto_class: Any, path: str, args: ModelArguments, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(path, revision=args.model_revision, **options)
    except OSError as error:  # no such folder, no such name, no connection: the first line says which
        raise RecipeError(f"{path!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
