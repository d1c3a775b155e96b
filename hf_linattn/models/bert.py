"""BERT with linear attention: the config, and one class per head that Transformers has."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
)

from .config import LinAttnConfigMixin
from .mixin import LinAttnMixin


@strict
class LinAttnBertConfig(LinAttnConfigMixin, BertConfig):
    """`BertConfig` with `linear_attention`: a kind's name, its settings, or the dictionary that config.json holds."""

    model_type = "linattn_bert"

    linear_attention: Any = None


class LinAttnBertMixin(LinAttnMixin):
    config_class = LinAttnBertConfig


class LinAttnBertModel(LinAttnBertMixin, BertModel):
    """`BertModel` with linear attention in the layers that `config.linear_attention` names."""


LinAttnBertMixin.base_model_class = LinAttnBertModel


class LinAttnBertForPreTraining(LinAttnBertMixin, BertForPreTraining):
    """`BertForPreTraining` with linear attention."""


class LinAttnBertLMHeadModel(LinAttnBertMixin, BertLMHeadModel):
    """`BertLMHeadModel` with linear attention."""


class LinAttnBertForMaskedLM(LinAttnBertMixin, BertForMaskedLM):
    """`BertForMaskedLM` with linear attention."""


class LinAttnBertForNextSentencePrediction(LinAttnBertMixin, BertForNextSentencePrediction):
    """`BertForNextSentencePrediction` with linear attention."""


class LinAttnBertForSequenceClassification(LinAttnBertMixin, BertForSequenceClassification):
    """`BertForSequenceClassification` with linear attention."""


class LinAttnBertForMultipleChoice(LinAttnBertMixin, BertForMultipleChoice):
    """`BertForMultipleChoice` with linear attention."""


class LinAttnBertForTokenClassification(LinAttnBertMixin, BertForTokenClassification):
    """`BertForTokenClassification` with linear attention."""


class LinAttnBertForQuestionAnswering(LinAttnBertMixin, BertForQuestionAnswering):
    """`BertForQuestionAnswering` with linear attention."""
