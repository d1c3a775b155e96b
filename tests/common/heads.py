"""Every converted class: tiny, with inputs and labels that its head takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BERT, GPT2, KINDS, VIT, ModelCase, ready
from torch import Tensor
from transformers import PreTrainedModel

import hf_linattn
from hf_linattn.models import COUNTERPARTS

Stock = type[PreTrainedModel]
CLASSES: list[Stock] = list(COUNTERPARTS)
FAMILIES = {"bert": BERT, "gpt2": GPT2, "vit": VIT}
TEXT = [cls for cls in CLASSES if cls.config_class.model_type != "vit"]
DECODERS = [cls for cls in CLASSES if cls.__name__ in ("BertLMHeadModel", "GPT2LMHeadModel")]
GPT2_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout", "classifier_dropout")
WITHOUT_LOSS = ("BertModel", "GPT2Model", "ViTModel")
WITH_LOSS = [cls for cls in CLASSES if cls.__name__ not in WITHOUT_LOSS]


def case_of(stock: Stock) -> ModelCase:
    return FAMILIES[stock.config_class.model_type]


def pairs(classes: list[Stock]) -> list[Any]:
    """Every class with one kind, and every family with every kind."""
    chosen: list[tuple[Stock, str]] = []
    for family in FAMILIES:
        members = [cls for cls in classes if cls.config_class.model_type == family]
        count = max(len(members), len(KINDS)) if members else 0
        chosen += [(members[index % len(members)], KINDS[index % len(KINDS)]) for index in range(count)]
    return [pytest.param(cls, kind, id=f"{cls.__name__}-{kind}") for cls, kind in chosen]


def every_class(classes: list[Stock] = CLASSES) -> Any:
    return pytest.mark.parametrize("stock", classes, ids=lambda cls: cls.__name__)


def every_class_and_family(classes: list[Stock] = CLASSES) -> Any:
    return pytest.mark.parametrize(("stock", "kind"), pairs(classes))


every_kind = pytest.mark.parametrize("kind", KINDS)


def settings(stock: Stock, kind: str) -> Any:
    return case_of(stock).settings(kind)


def build(stock: Stock, **changes: Any) -> Any:
    """A stock model without dropout, so that two training steps can be compared."""
    family = stock.config_class.model_type
    if family == "gpt2":
        changes = {**dict.fromkeys(GPT2_DROPOUTS, 0.0), **changes}
    else:
        changes = {"hidden_dropout_prob": 0.0, **changes}
    if stock.__name__ == "BertLMHeadModel":
        changes = {"is_decoder": True, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, **changes}
    torch.manual_seed(0)
    return stock(case_of(stock).config(**changes)).eval()


def convert(stock: Stock, kind: str, **changes: Any) -> Any:
    """Converted with small settings, and calibrated where it has to be."""
    model = hf_linattn.convert(build(stock, **changes), settings(stock, kind))
    causal_lara = stock.config_class.model_type == "gpt2" or stock.__name__ == "BertLMHeadModel"
    if stock.__name__ == "GPT2DoubleHeadsModel" and hf_linattn.needs_calibration(model):
        return hf_linattn.calibrate(model, [inputs(stock)])
    return ready(model) if causal_lara else model


def inputs(stock: Stock, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    case = case_of(stock)
    if stock.__name__ in ("BertForMultipleChoice", "GPT2DoubleHeadsModel"):
        ids = case.inputs(batch=2 * batch, seed=seed)["input_ids"].view(batch, 2, -1)
        places = {"mc_token_ids": torch.tensor([[5, 39]] * batch)} if "GPT2" in stock.__name__ else {}
        return {"input_ids": ids, **places}
    found = case.inputs(batch=batch, seed=seed)
    if stock.__name__ == "ViTForMaskedImageModeling":
        found["bool_masked_pos"] = torch.arange(36).expand(batch, 36) % 3 == 0
    return found


def labels(stock: Stock, batch: int = 2) -> dict[str, Tensor]:
    """What makes the head compute its loss."""
    name, ids = stock.__name__, inputs(stock, batch).get("input_ids")
    one = torch.arange(batch) % 2
    if name == "BertForPreTraining":
        return {"labels": ids, "next_sentence_label": one}
    if name.endswith("ForQuestionAnswering"):
        return {"start_positions": one + 3, "end_positions": one + 9}
    if name == "GPT2DoubleHeadsModel":
        return {"labels": ids, "mc_labels": one}
    if name.endswith("ForTokenClassification"):
        return {"labels": ids % 2}
    if name == "ViTForMaskedImageModeling":
        return {}  # its loss is that of reconstruction, given bool_masked_pos
    return {"labels": ids if name in ("BertLMHeadModel", "BertForMaskedLM", "GPT2LMHeadModel") else one}


def tensors(output: Any) -> list[Tensor]:
    return [value for value in output.values() if isinstance(value, Tensor)]
