"""Heads of single tokens, and their loss where each process has a part of the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import cross_entropy, pad

from ..distributed.parts import SequenceParts
from ..errors import InputError
from ..models import COUNTERPARTS

IGNORED = -100  # a label that no loss counts

# Stock class -> whether a token's label is the token after it.
TOKEN_HEADS = {
    "BertForMaskedLM": False,
    "BertForTokenClassification": False,
    "BertLMHeadModel": True,
    "GPT2ForTokenClassification": False,
    "GPT2LMHeadModel": True,
}
# Those that read the pooled first token, and nothing else.
HEADS_OF_PARTS = ("BertForMultipleChoice", "BertForNextSentencePrediction", "BertForSequenceClassification")

_CONVERTED = {cls: stock.__name__ for stock, cls in COUNTERPARTS.items()}


def stock_head(model: Any) -> str | None:
    """Name of the stock class whose forward a converted model has; `None` for one that has a forward of its own."""
    own: Any = type(model)
    for cls in own.__mro__:
        if cls in _CONVERTED:
            return _CONVERTED[cls] if own.forward is cls.forward else None
    return None


def token_targets(head: str, labels: Tensor, shift_labels: Tensor | None) -> Tensor:
    """What each token of whole rows is to predict, `[batch, tokens]`.

    Of a causal language model the labels are shifted here, before the rows are cut: the last token of a part predicts
    the first one of the next part.
    """
    if not TOKEN_HEADS[head]:
        return labels
    return pad(labels, (0, 1), value=IGNORED)[:, 1:] if shift_labels is None else shift_labels


def part_loss(head: str, logits: Tensor, targets: Tensor, parts: SequenceParts, items: Tensor | int | None) -> Tensor:
    """The loss of a part, scaled so that its mean over the processes is the loss of the whole rows.

    That one is a sum over all labels, divided by their number. A mean over the means of parts would give the labels of
    a part with few of them more weight.

    Args:
        logits: `[batch, length, classes]`, of the part. targets: `[batch, tokens]`, of the whole rows.
        items: `num_items_in_batch` of Transformers: what the heads that know it divide by in place of the number.
    """
    if TOKEN_HEADS[head]:
        logits = logits.float()  # as Transformers does
    else:
        items = None
    own = parts.cut(targets, IGNORED).to(logits.device)
    total = cross_entropy(logits.flatten(0, 1), own.flatten(), ignore_index=IGNORED, reduction="sum")
    number = (targets != IGNORED).sum() if items is None else items
    return total * parts.group.size / (number.to(total.device) if isinstance(number, Tensor) else number)


def loss_weights(
    batches: Sequence[Mapping[str, Any]], mesh: DeviceMesh | None = None, *, shifted: bool
) -> list[Tensor]:
    """Factors of the losses of a step's batches with which every label counts the same, for loops without Trainer.

    A model's loss is a mean over the labels of its batch. Where batches have different numbers of labels, as they do
    on several processes and in accumulated steps, a mean of these means would not be that over all labels. With
    `(weight * loss).backward()` for each batch, the mean of the gradients over all processes is.

    Args:
        batches: Those of this process in one optimizer step, whole rows with `labels`.
        mesh: Of one dimension, the processes that have other rows: `mesh["dp"]`; `None` if there are none. Not those
            that share sequences: they have the same labels.
        shifted: Whether the model is a causal language model, which does not predict the first token of a row.
    Raises: InputError without labels.
    """
    counts = []
    for batch in batches:
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            raise InputError(f"A batch must have labels, a tensor, for its loss to be weighted; got {sorted(batch)}.")
        counts.append(((labels[:, 1:] if shifted else labels) != IGNORED).sum().double())
    total = torch.stack(counts).sum()
    if mesh is not None:
        dist.all_reduce(total, group=mesh.get_group())
        total /= mesh.size()
    return [(count / total).float() for count in counts]
