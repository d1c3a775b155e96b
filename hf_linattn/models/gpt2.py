"""GPT-2 with linear attention: the config, and one class per head that Transformers has."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import (
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

from .config import LinAttnConfigMixin
from .mixin import LinAttnMixin


@strict
class LinAttnGPT2Config(LinAttnConfigMixin, GPT2Config):
    """`GPT2Config` with `linear_attention`: a kind's name, its settings, or the dictionary that config.json holds."""

    model_type = "linattn_gpt2"

    linear_attention: Any = None


class LinAttnGPT2Mixin(LinAttnMixin):
    config_class = LinAttnGPT2Config

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: of classes outside of Transformers, modules without tensors of their own are not told to initialise.

        In GPT-2 these scale down the projections that write to the residual stream.
        """
        return False


class LinAttnGPT2Model(LinAttnGPT2Mixin, GPT2Model):
    """`GPT2Model` with linear attention in the layers that `config.linear_attention` names."""


LinAttnGPT2Mixin.base_model_class = LinAttnGPT2Model


class LinAttnGPT2LMHeadModel(LinAttnGPT2Mixin, GPT2LMHeadModel):
    """`GPT2LMHeadModel` with linear attention."""


class LinAttnGPT2DoubleHeadsModel(LinAttnGPT2Mixin, GPT2DoubleHeadsModel):
    """`GPT2DoubleHeadsModel` with linear attention."""


class LinAttnGPT2ForSequenceClassification(LinAttnGPT2Mixin, GPT2ForSequenceClassification):
    """`GPT2ForSequenceClassification` with linear attention."""


class LinAttnGPT2ForTokenClassification(LinAttnGPT2Mixin, GPT2ForTokenClassification):
    """`GPT2ForTokenClassification` with linear attention."""


class LinAttnGPT2ForQuestionAnswering(LinAttnGPT2Mixin, GPT2ForQuestionAnswering):
    """`GPT2ForQuestionAnswering` with linear attention."""
