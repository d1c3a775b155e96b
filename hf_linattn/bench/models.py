"""Whole models with random weights on long inputs: softmax, native kinds and converted models."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModel, BertConfig, GPT2Config, PreTrainedConfig, PreTrainedModel, ViTConfig

from ..conversion import calibrate, convert, needs_calibration
from ..errors import ConfigError
from ..modules.registry import get_kind
from .attention import Plan, Report, settings_of
from .cases import DTYPES, Unavailable, Workload, choose
from .measure import explain, time_interleaved
from .ours import KindOptions
from .results import Row, timed, with_ratios

PATCH, CHANNELS = 16, 3
CALIBRATION_TOKENS = 1024
FORMS = ("native", "converted")


@dataclass(frozen=True)
class ModelSize:
    """A model to measure. `config` makes its config for a number of tokens and of layers."""

    layers: int
    heads: int
    head_dim: int
    is_causal: bool
    config: Callable[[int, int], PreTrainedConfig]


def _minilm(tokens: int, layers: int) -> PreTrainedConfig:
    return BertConfig(
        hidden_size=384,
        num_attention_heads=12,
        intermediate_size=1536,
        num_hidden_layers=layers,
        max_position_embeddings=tokens,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _bert(tokens: int, layers: int) -> PreTrainedConfig:
    return BertConfig(
        num_hidden_layers=layers,
        max_position_embeddings=tokens,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _gpt2(tokens: int, layers: int) -> PreTrainedConfig:
    return GPT2Config(
        n_layer=layers, n_positions=tokens, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, use_cache=False
    )


def _vit(tokens: int, layers: int) -> PreTrainedConfig:
    return ViTConfig(
        num_hidden_layers=layers,
        image_size=PATCH * side(tokens),
        patch_size=PATCH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


MODELS = {
    "minilm": ModelSize(6, 12, 32, False, _minilm),
    "bert": ModelSize(12, 12, 64, False, _bert),
    "gpt2": ModelSize(12, 12, 64, True, _gpt2),
    "vit": ModelSize(12, 12, 64, False, _vit),
}


def side(tokens: int) -> int:
    """Patches along each side of the square image that has about so many of them."""
    return max(1, round(math.sqrt(tokens)))


def run_models(
    plan: Plan,
    models: tuple[str, ...] = tuple(MODELS),
    *,
    layers: int | None = None,
    windows: tuple[int | None, ...] = (None,),
    forms: tuple[str, ...] = FORMS,
    report: Report = lambda _: None,
) -> Iterator[list[Row]]:
    """Time a forward pass and a training step (no optimizer) of whole models.

    Args:
        plan: Lengths, kinds, dtypes, modes, batch, options and limits; its directions and sizes are the models' own.
        layers: Fewer layers than the model has, to be done sooner.
        windows: Window sizes; `None` is the default of the model family.
        forms: Some of `FORMS`: how a kind gets into a model.
    Yields: The rows of one workload at a time.
    Raises: `ConfigError` for an unknown model or form, or no layers.
    """
    for form in forms:
        choose("forms", form, FORMS)
    if layers is not None and layers < 1:
        raise ConfigError(f"layers must be an integer >= 1; got {layers!r}.")
    for name in models:
        size = MODELS[choose("models", name, MODELS)]
        for dtype in plan.dtypes:
            for mode in plan.modes:
                for tokens in sorted(set(plan.lengths)):
                    if name == "vit":
                        tokens = side(tokens) ** 2 + 1  # [CLS]
                    work = Workload(
                        tokens, plan.batch, size.heads, size.head_dim, size.is_causal, dtype, mode, plan.device
                    )
                    report(f"{name}, {tokens} tokens, {dtype}, {mode}")
                    yield _run_one(plan, name, work, layers or size.layers, windows, forms)


def _run_one(
    plan: Plan, name: str, work: Workload, layers: int, windows: tuple[int | None, ...], forms: tuple[str, ...]
) -> list[Row]:
    limit = plan.max_softmax_length
    softmax = Row("models", "sdpa", "softmax", work, name)
    patches = work.tokens - 1 if name == "vit" else work.tokens
    with _quiet():
        torch.manual_seed(0)
        config = MODELS[name].config(patches, layers)
        model = AutoModel.from_config(config, attn_implementation="sdpa").to(work.device, DTYPES[work.dtype])
        batch = _batch(name, work, config)
        steps: dict[str, Callable[[], object]] = {}
        rows = {softmax.name: softmax}
        if limit is not None and work.tokens > limit:
            rows[softmax.name] = replace(softmax, reason=f"longer than the {limit} tokens set for softmax")
        else:
            steps[softmax.name] = _step(model, batch, work)
        for kind in plan.kinds:
            for window in windows:
                options = replace(plan.options, window_size=window)
                for form in forms:
                    make = _native if form == "native" else _converted
                    row = Row("models", _title(kind, window, form), "linear", work, name)
                    row = replace(row, settings=settings_of(kind, options))
                    try:
                        steps[row.name] = _step(make(model, kind, options, work), batch, work)
                    except Exception as error:
                        row = replace(row, reason=explain(error))
                    rows[row.name] = row
        for key, result in time_interleaved(steps, device=plan.device, seconds=plan.seconds).items():
            rows[key] = timed(rows[key], result)
    return with_ratios(list(rows.values()))


def _title(kind: str, window: int | None, form: str) -> str:
    return f"{kind}, {form}" if window is None else f"{kind}, window {window}, {form}"


def _batch(name: str, work: Workload, config: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if name == "vit":
        size = (work.batch, CHANNELS, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(size, generator=generator).to(work.device, DTYPES[work.dtype])}
    ids = torch.randint(config.vocab_size, (work.batch, work.tokens), generator=generator)
    return {"input_ids": ids.to(work.device)}


def _sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model around the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _native(model: PreTrainedModel, kind: str, options: KindOptions, work: Workload) -> PreTrainedModel:
    if work.is_causal and not get_kind(kind).native_causal:
        raise Unavailable("a causal layer has to be converted and calibrated")
    made = _sharing_copy(model)
    made.config.linear_attention = options.config(kind).to_dict()
    made.set_attn_implementation(kind)
    return made


def _converted(model: PreTrainedModel, kind: str, options: KindOptions, work: Workload) -> PreTrainedModel:
    made = convert(_sharing_copy(model), options.config(kind)).to(work.device)
    if needs_calibration(made):
        vocabulary, tokens = made.config.vocab_size, min(CALIBRATION_TOKENS, work.tokens)
        rows = CALIBRATION_TOKENS // tokens  # of short ones more: statistics need a number of tokens
        ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(1))
        calibrate(made, [{"input_ids": ids.to(work.device)}])
    return made


def _step(model: PreTrainedModel, batch: dict[str, torch.Tensor], work: Workload) -> Callable[[], object]:
    def forward() -> object:
        with torch.no_grad():
            return model(**batch).last_hidden_state

    def train() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(**batch).last_hidden_state.float().square().mean().backward()

    if not work.is_training:
        model.eval()
        return forward
    model.train()
    return train


@contextmanager
def _quiet() -> Iterator[None]:
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
