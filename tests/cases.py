"""The matrix that the tests of models run over: kinds x models x modes, with tiny models built in code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

import hf_linattn
from hf_linattn.modules.registry import get_kind, list_kinds

KINDS = list_kinds()
CAUSAL_KINDS = [kind for kind in KINDS if get_kind(kind).supports_causal]
NATIVE_CAUSAL_KINDS = [kind for kind in CAUSAL_KINDS if get_kind(kind).native_causal]
VOCAB = 60
TOKENS = 40  # five windows of 8, so that most of a query's keys are reached through the slots
WINDOW = 8

# Weights large enough that attention is far from uniform: a wrong estimator or mask shows in the logits.
COMMON: dict[str, Any] = {
    "initializer_range": 0.2,
    "attention_probs_dropout_prob": 0.1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def bert_config(**changes: Any) -> BertConfig:
    return BertConfig(**{**COMMON, "vocab_size": VOCAB, "max_position_embeddings": 64, **changes})


def gpt2_config(**changes: Any) -> GPT2Config:
    return GPT2Config(
        **{
            "initializer_range": 0.2,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "vocab_size": VOCAB,
            "bos_token_id": 1,
            "eos_token_id": None,  # generation runs to its full length
            "pad_token_id": 0,
            **changes,
        }
    )


def vit_config(**changes: Any) -> ViTConfig:
    """6 x 6 patches and [CLS]: 37 tokens, windows of 2 x 2."""
    return ViTConfig(**{**COMMON, "image_size": 24, "patch_size": 4, "encoder_stride": 4, **changes})


@dataclass(frozen=True)
class ModelCase:
    """One stock model and the Auto class that loads its converted form."""

    name: str
    stock: type[PreTrainedModel]
    config: Callable[..., Any]
    auto: Any
    window: int = WINDOW
    is_causal: bool = False

    def build(self, **changes: Any) -> Any:
        torch.manual_seed(0)
        return self.stock(self.config(**changes)).eval()

    def inputs(self, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if self.name == "vit":
            return {"pixel_values": torch.randn(batch, 3, 24, 24, generator=generator)}
        return {"input_ids": torch.randint(3, VOCAB, (batch, TOKENS), generator=generator)}

    def settings(self, kind: str, **changes: Any) -> Any:
        """Small settings of a kind in which the slots do the work."""
        fields = {"window_size": self.window, **get_kind(kind).example, **changes}
        return get_kind(kind).config_cls(**fields)


MODELS = [
    ModelCase("bert-classifier", BertForSequenceClassification, bert_config, AutoModelForSequenceClassification),
    ModelCase("bert-mlm", BertForMaskedLM, bert_config, AutoModelForMaskedLM),
    ModelCase("gpt2", GPT2LMHeadModel, gpt2_config, AutoModelForCausalLM, is_causal=True),
    ModelCase("vit", ViTForImageClassification, vit_config, AutoModelForImageClassification, window=2),
]
BY_NAME = {case.name: case for case in MODELS}
BERT, GPT2, VIT = BY_NAME["bert-mlm"], BY_NAME["gpt2"], BY_NAME["vit"]


def supported(kind: str, case: ModelCase, *, native: bool = False) -> bool:
    """Whether a kind works in a model: converted, or in native mode."""
    record = get_kind(kind)
    if native:
        return record.native_causal if case.is_causal else record.native
    return record.supports_causal or not case.is_causal


def ready(model: Any) -> Any:
    """A converted model that can be run: calibrated on random tokens if a layer of it needs statistics."""
    buffers = [buffer for name, buffer in model.named_buffers() if name.endswith("calibrated_tokens")]
    if not any(bool(buffer == 0) for buffer in buffers):
        return model
    generator = torch.Generator().manual_seed(11)
    rows = [torch.randint(3, VOCAB, (4, TOKENS), generator=generator) for _ in range(2)]
    return hf_linattn.calibrate(model, [{"input_ids": row} for row in rows])


def converted(case: ModelCase, kind: str, *, layers: list[int] | None = None, **changes: Any) -> Any:
    """The case's model converted with small settings, and calibrated if it has to be."""
    return ready(hf_linattn.convert(case.build(), case.settings(kind, **changes), layers=layers))


def away_from_start(model: Any, case: ModelCase) -> Any:
    """A converted model in eval mode, calibrated where it has to be, with random values added to what it learns."""
    if hf_linattn.needs_calibration(model):
        hf_linattn.calibrate(model, [case.inputs(4)])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".linattn." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def native(case: ModelCase, kind: str, **changes: Any) -> Any:
    """The case's stock model under a kind, with small settings."""
    model = case.build()
    model.config.linear_attention = case.settings(kind, **changes).to_dict()
    model.set_attn_implementation(kind)
    return model


def matrix(*cases: ModelCase, native: bool = False) -> list[Any]:
    """Kinds x models, as far as they work together."""
    return [
        pytest.param(kind, case, id=f"{kind}-{case.name}")
        for kind in KINDS
        for case in cases
        if supported(kind, case, native=native)
    ]


MATRIX = matrix(*MODELS)
NATIVE_MATRIX = matrix(*MODELS, native=True)
MODES = [pytest.param(native, id="native"), pytest.param(converted, id="converted")]


def checkpoint_activations(model: Any, *options: Any) -> None:
    """Switch checkpointing on, by its name since Transformers 5.23 or the older one."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(*options)


def logits(model: Any, **inputs: Any) -> Tensor:
    """The first tensor of a model's output, in float32, without gradients."""
    with torch.no_grad():
        return model(**inputs)[0].float()


def largest(difference: Tensor) -> float:
    return float(difference.detach().abs().max())


def left_padded() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (3, 20), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :6], mask[2, :13] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}
