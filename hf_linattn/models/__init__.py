"""Converted model classes: one per stock head, and their registration with Transformers' Auto classes."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..integrations.expected import changed, describe
from ..integrations.model_seams import AutoConfig, auto_class, share_preprocessing
from ..integrations.seams import attempt

try:
    from . import bert, gpt2, vit
except Exception as error:
    raise changed("names", describe(error)) from error

# Stock class -> converted class.
COUNTERPARTS: dict[type[PreTrainedModel], Any] = {
    cls.__bases__[-1]: cls
    for cls in (
        bert.LinAttnBertModel,
        bert.LinAttnBertForPreTraining,
        bert.LinAttnBertLMHeadModel,
        bert.LinAttnBertForMaskedLM,
        bert.LinAttnBertForNextSentencePrediction,
        bert.LinAttnBertForSequenceClassification,
        bert.LinAttnBertForMultipleChoice,
        bert.LinAttnBertForTokenClassification,
        bert.LinAttnBertForQuestionAnswering,
        gpt2.LinAttnGPT2Model,
        gpt2.LinAttnGPT2LMHeadModel,
        gpt2.LinAttnGPT2DoubleHeadsModel,
        gpt2.LinAttnGPT2ForSequenceClassification,
        gpt2.LinAttnGPT2ForTokenClassification,
        gpt2.LinAttnGPT2ForQuestionAnswering,
        vit.LinAttnViTModel,
        vit.LinAttnViTForImageClassification,
        vit.LinAttnViTForMaskedImageModeling,
    )
}

CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "bert": bert.LinAttnBertConfig,
    "gpt2": gpt2.LinAttnGPT2Config,
    "vit": vit.LinAttnViTConfig,
}

# Auto class -> stock class it picks for each model; `tests/conversion/test_conversion.py` compares this with
# Transformers.
AUTO_CLASSES: dict[str, tuple[str, ...]] = {
    "AutoModel": ("BertModel", "GPT2Model", "ViTModel"),
    "AutoModelForPreTraining": ("BertForPreTraining", "GPT2LMHeadModel"),
    "AutoModelForCausalLM": ("BertLMHeadModel", "GPT2LMHeadModel"),
    "AutoModelForMaskedLM": ("BertForMaskedLM",),
    "AutoModelForNextSentencePrediction": ("BertForNextSentencePrediction",),
    "AutoModelForSequenceClassification": ("BertForSequenceClassification", "GPT2ForSequenceClassification"),
    "AutoModelForTokenClassification": ("BertForTokenClassification", "GPT2ForTokenClassification"),
    "AutoModelForMultipleChoice": ("BertForMultipleChoice",),
    "AutoModelForQuestionAnswering": ("BertForQuestionAnswering", "GPT2ForQuestionAnswering"),
    "AutoModelForTextEncoding": ("BertModel",),
    "AutoModelForImageClassification": ("ViTForImageClassification",),
    "AutoModelForMaskedImageModeling": ("ViTForMaskedImageModeling",),
}


def register_auto_classes() -> None:
    """Register configs and models with Transformers. Repeatable. What fails is told at the first use (`canary.py`)."""
    attempt(_register)


def _register() -> None:
    by_name = {stock.__name__: cls for stock, cls in COUNTERPARTS.items()}
    for config_class in CONFIGS.values():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_name, stock_names in AUTO_CLASSES.items():
        for stock_name in stock_names:
            cls = by_name[stock_name]
            auto_class(auto_name).register(cls.config_class, cls, exist_ok=True)
    for name, config_class in CONFIGS.items():
        share_preprocessing(config_class, name)
