"""Whole models with random weights, under softmax and converted."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, BertConfig, GPT2Config, PreTrainedModel, ViTConfig

from ..conversion import calibrate, convert, needs_calibration
from ..modules.config import AttentionConfig
from .plan import Plan, Report, new_row, race
from .results import Row
from .workload import DTYPES, Workload, check_length, choose

PATCH, CHANNELS = 16, 3
CALIBRATION_TOKENS = 1024
# Texts of short classifiers, patches and [CLS] of a ViT, the longest input of BERT and of GPT-2, and documents.
LENGTHS = (128, 14 * 14 + 1, 256, 512, 1024, 4096)
BATCH, MOST_TOKENS = 8, 8192
NO_DROPOUT = dict.fromkeys(
    ("hidden_dropout_prob", "attention_probs_dropout_prob", "embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0
)
MINILM = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 6}
MODELS: dict[str, tuple[type, dict[str, int]]] = {
    "minilm": (BertConfig, MINILM),
    "bert": (BertConfig, {}),
    "gpt2": (GPT2Config, {}),
    "vit": (ViTConfig, {}),
}


def run_models(plan: Plan, report: Report = lambda _: None) -> Iterator[list[Row]]:
    """Time a forward pass and a training step (no optimizer). Yields the rows of one workload at a time.

    Raises: `ConfigError` for an unknown model.
    """
    for name in plan.models:
        choose("models", name, MODELS)
    for name, dtype, mode, tokens in product(plan.models, plan.dtypes, plan.modes, sorted(set(plan.lengths))):
        report(f"{name}, {tokens} tokens, {dtype}, {mode}")
        with quiet():
            yield _run_one(plan, name, tokens, dtype, mode)


def _run_one(plan: Plan, name: str, tokens: int, dtype: str, mode: str) -> list[Row]:
    model, batch, work = stock_model(plan, name, tokens, dtype, mode)

    def make(config: AttentionConfig | None) -> Callable[[], object]:
        if config is None:
            check_length(work, plan.max_softmax_length)
            return model_step(model, batch, work)
        return model_step(converted(model, config, batch), batch, work)

    entries = []
    for contender in plan.model_contenders():
        row = new_row("models", contender, work, name)
        row.name += ", converted" if contender.config else ""
        entries.append((row, partial(make, contender.config)))
    return race(entries, plan.seconds)


def stock_model(
    plan: Plan, name: str, tokens: int, dtype: str = "float32", mode: str = "forward"
) -> tuple[PreTrainedModel, dict[str, Tensor], Workload]:
    """A model of `MODELS` under softmax, a batch for it, and what its attention is given.

    Args:
        tokens: Of a row; a ViT gets the square image that has about so many patches.
    """
    torch.manual_seed(0)
    make_config, sizes = MODELS[name]
    if plan.layers is not None:
        sizes = {**sizes, "num_hidden_layers": plan.layers}
    if name == "vit":
        side = max(1, round(math.sqrt(tokens)))
        tokens, sizes = side**2 + 1, {**sizes, "image_size": PATCH * side, "patch_size": PATCH}  # and [CLS]
    config: Any = make_config(**NO_DROPOUT, **sizes, max_position_embeddings=tokens)
    heads, width = config.num_attention_heads, config.hidden_size
    batch_size = plan.batch if plan.most_tokens is None else max(1, min(plan.batch, plan.most_tokens // tokens))
    work = Workload(tokens, batch_size, heads, width // heads, name == "gpt2", dtype, mode, plan.device)
    model = AutoModel.from_config(config, attn_implementation="sdpa").to(work.device, DTYPES[dtype])
    return model, _batch(work, config), work


def converted(model: PreTrainedModel, config: AttentionConfig, batch: dict[str, Tensor]) -> PreTrainedModel:
    """A copy of a model around the same weights, converted.

    Args:
        batch: To calibrate on where that has to be: images, or tokens `[rows, tokens]`, of which some are enough.
    """
    shared = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    made = convert(shared, config).to(model.device)
    if needs_calibration(made):
        calibrate(made, [_few(batch, model.config)])
    return made


def _few(batch: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """At most `CALIBRATION_TOKENS` tokens of a batch, in rows that the model has positions for."""
    if "input_ids" not in batch:
        return batch
    ids = batch["input_ids"]
    row = min(CALIBRATION_TOKENS, config.max_position_embeddings, ids.shape[1])
    return {"input_ids": ids.flatten()[: min(CALIBRATION_TOKENS, ids.numel()) // row * row].view(-1, row)}


def _batch(work: Workload, config: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if isinstance(config, ViTConfig):
        size = (work.batch, CHANNELS, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(size, generator=generator).to(work.device, DTYPES[work.dtype])}
    ids = torch.randint(config.vocab_size, (work.batch, work.tokens), generator=generator)
    return {"input_ids": ids.to(work.device)}


def model_step(model: PreTrainedModel, batch: dict[str, Tensor], work: Workload) -> Callable[[], object]:
    """What is timed: a forward pass without autograd, or one with the gradients of all parameters."""
    given = {**batch, **({"use_cache": False} if work.is_causal else {})}

    def step() -> object:
        with torch.set_grad_enabled(work.is_training):
            output = model(**given).last_hidden_state
        if work.is_training:
            model.zero_grad(set_to_none=True)
            output.float().square().mean().backward()
        return output

    model.train(work.is_training)
    return step


@contextmanager
def quiet() -> Iterator[None]:
    """Without what conversion has to say about every model: here it would be said hundreds of times."""
    logger = logging.getLogger("hf_linattn")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="hf_linattn")
            yield
    finally:
        logger.setLevel(level)
