"""What `extend_positions` refuses: wrong numbers, and models whose tables it cannot extend. They stay as they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import BERT, GPT2, VIT, gpt2_config
from position_tables import NEW, OLD, snapshot
from torch import Tensor, nn
from transformers import BertConfig, DistilBertConfig, DistilBertModel, GPT2LMHeadModel, PreTrainedModel

from hf_linattn import extend_positions
from hf_linattn.errors import ConfigError, UnsupportedError


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (OLD - 1, "at least the 64 positions.*got 63"),
        (0, "at least the 64"),
        (-1, "at least the 64"),
        (150.0, r"integer.*150\.0 \(float\)"),
        ("150", r"integer.*'150' \(str\)"),
        (True, "integer.*True"),
        (None, "integer.*None"),
        (torch.tensor(150.0), "integer"),
    ],
)
def test_impossible_numbers_of_positions(number: Any, message: str) -> None:
    model = GPT2.build()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        extend_positions(model, number)
    assert repr(snapshot(model)) == repr(before)


def test_unknown_method_of_extension() -> None:
    with pytest.raises(ConfigError, match=r"\['tile', 'interpolate'\]; got 'interpolation'.*mean 'interpolate'"):
        extend_positions(GPT2.build(), NEW, method="interpolation")
    with pytest.raises(ConfigError, match="got None"):
        extend_positions(GPT2.build(), NEW, method=None)  # type: ignore[arg-type]


def _meta() -> Any:
    with torch.device("meta"):
        return GPT2LMHeadModel(gpt2_config())


def _offloaded() -> Any:
    return pytest.importorskip("accelerate").cpu_offload(GPT2.build(), execution_device="cpu")


def _parametrized() -> Any:
    model = GPT2.build()
    nn.utils.parametrizations.weight_norm(model.transformer.wpe)
    return model


def _wrong_config() -> Any:
    model = GPT2.build()
    model.config.n_positions = OLD + 1
    return model


def _subclass() -> Any:
    model = GPT2.build()
    model.transformer.wpe.weight = nn.Parameter(torch.Tensor._make_subclass(Sharded, torch.zeros(OLD, 32)))
    return model


class Sharded(Tensor):
    """In place of a DTensor, which needs a process group."""


REFUSED = {
    "vit": (VIT.build, "set_image_size"),
    "distilbert": (
        lambda: DistilBertModel(DistilBertConfig(vocab_size=9, dim=8, n_heads=2, n_layers=1, hidden_dim=8)),
        "'distilbert'",
    ),
    "class": (lambda: GPT2LMHeadModel, "the class GPT2LMHeadModel"),
    "wrapped": (lambda: nn.DataParallel(GPT2.build()), "DataParallel.*before it is wrapped"),
    "compiled": (lambda: torch.compile(GPT2.build()), "OptimizedModule"),
    "relative": (
        lambda: BERT.stock(BertConfig(**{**BERT.config().to_dict(), "position_embedding_type": "relative_key"})),
        "'relative_key'",
    ),
    "meta": (_meta, "meta device"),
    "offloaded": (_offloaded, "before offloading"),
    "parametrized": (_parametrized, "got ParametrizedEmbedding"),
    "config": (_wrong_config, r"\(65, 32\) by the config; got a Tensor of shape \(64, 32\)"),
    "sharded": (_subclass, "got a Sharded"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_models(name: str) -> None:
    build, message = REFUSED[name]
    model = build()
    before = snapshot(copy.copy(model)) if isinstance(model, PreTrainedModel) else None
    with pytest.raises(UnsupportedError, match=message):
        extend_positions(model, 1000)
    if before is not None:
        assert repr(snapshot(model)) == repr(before)
