"""The model of the small protocol: a BERT encoder, one vector for all of its tokens, two layers on top.

As in the code published with Nystromformer (Xiong et al. 2021), which the papers after it use. Departures: BERT
normalises after each sublayer and not before it, and the mean is one over the tokens that are there, not over padding.
The vector may also be that of a token put in front, as in Long Range Arena's own code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

import hf_linattn  # noqa: F401  (so that Auto classes know converted checkpoints)


class BertForLongRangeArena(BertPreTrainedModel):
    """A class for one text, or for two that go through the same encoder.

    Args:
        config: Of BERT, or of a BERT converted to linear attention. `num_towers` is how many texts a row has (1 or 2),
            `pooling` "mean", or "cls": then the last id of the vocabulary is put in front of every text.
        encoder: The encoder, stock or converted; by default one that the config describes.
    """

    def __init__(self, config: Any, encoder: BertModel | None = None) -> None:
        super().__init__(config)
        self.num_towers, self.pooling = config.num_towers, config.pooling
        self.bert = AutoModel.from_config(config, add_pooling_layer=False) if encoder is None else encoder
        features = {1: 1, 2: 4}[self.num_towers] * config.hidden_size
        self.classifier = nn.Sequential(
            nn.Linear(features, config.intermediate_size),
            nn.ReLU(),
            nn.Linear(config.intermediate_size, config.num_labels),
        )
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; the checkpoint may be converted."""
        if kwargs.get("config") is None:
            kwargs["config"] = AutoConfig.from_pretrained(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Args: `input_ids`, `attention_mask`: `[batch, tokens]`, or `[batch, 2, tokens]` for two texts."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        ids, mask = (x.reshape(-1, x.shape[-1]) for x in (input_ids, attention_mask))
        if self.pooling == "cls":
            ids = nn.functional.pad(ids, (1, 0), value=self.config.vocab_size - 1)
            mask = nn.functional.pad(mask, (1, 0), value=1)
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = hidden[:, 0] if self.pooling == "cls" else _mean(hidden, mask)
        if self.num_towers == 2:
            first, second = pooled.unflatten(0, (-1, 2)).unbind(1)
            pooled = torch.cat([first, second, first * second, first - second], dim=-1)
        logits = self.classifier(pooled)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Over the tokens that are there."""
    weights = mask[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
