"""What a forward pass takes and returns: forms of input and of output that must not change the numbers."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from cases import KINDS, TOKENS, largest
from heads import (
    CLASSES,
    DECODERS,
    TEXT,
    Stock,
    build,
    convert,
    every_class,
    every_class_and_family,
    every_kind,
    inputs,
    tensors,
)
from torch import Tensor
from transformers import BertForMaskedLM, BertModel, GPT2LMHeadModel

from hf_linattn.models import COUNTERPARTS


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in flat(part)] if isinstance(value, (tuple, list)) else []


def run(model: Any, **batch: Any) -> Any:
    with torch.no_grad():
        return model(**batch)


@every_class_and_family()
def test_tuples_and_dictionaries_say_the_same(stock: Stock, kind: str) -> None:
    model, batch = convert(stock, kind), inputs(stock)
    for options in ({}, {"output_hidden_states": True}):
        as_dict = run(model, **batch, **options)
        as_tuple = run(model, **batch, **options, return_dict=False)
        assert isinstance(as_tuple, tuple)
        pairs = list(zip(flat(as_dict.to_tuple()), flat(as_tuple), strict=True))
        assert pairs
        assert all(torch.equal(one, other) for one, other in pairs)


@every_class_and_family()
def test_forward_is_deterministic(stock: Stock, kind: str) -> None:
    model, batch = convert(stock, kind), inputs(stock)
    for one, other in zip(tensors(run(model, **batch)), tensors(run(model, **batch)), strict=True):
        assert torch.equal(one, other)


@every_class_and_family()
def test_rows_do_not_depend_on_their_batch(stock: Stock, kind: str) -> None:
    """A row alone is what it is in a batch of three."""
    if stock.__name__ == "GPT2ForSequenceClassification":
        pytest.skip("reads the last token that is not padding; has no pad token in a batch of one")
    model, batch = convert(stock, kind), inputs(stock, batch=3)
    together = run(model, **batch)
    for row in range(3):
        alone = run(model, **{name: value[row : row + 1] for name, value in batch.items()})
        for one, other in zip(tensors(alone), tensors(together), strict=True):
            if one.ndim:
                assert largest(one[0] - other[row]) < 1e-4 * (1 + largest(other))


@every_class_and_family()
def test_hidden_states(stock: Stock, kind: str) -> None:
    """By an argument or by the config; their gradients can be kept."""
    model, batch = convert(stock, kind), inputs(stock)
    states = model(**batch, output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert all(state.shape[-1] == 32 for state in states)
    assert run(model, **batch).hidden_states is None
    for state in states:
        state.retain_grad()
    states[-1].square().sum().backward()
    assert all(state.grad is not None and torch.isfinite(state.grad).all() for state in states)
    model.config.output_hidden_states = True
    again = run(model, **batch).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(again, states, strict=True))


# The stock GPT2DoubleHeadsModel does not take embeddings of several choices either.
@every_class_and_family([cls for cls in TEXT if cls.__name__ != "GPT2DoubleHeadsModel"])
def test_embeddings_instead_of_ids(stock: Stock, kind: str) -> None:
    model, batch = convert(stock, kind), inputs(stock)
    if stock.__name__ == "GPT2ForSequenceClassification":
        model.config.pad_token_id = None  # which token is the last one cannot be seen from embeddings
        batch = {name: value[:1] for name, value in batch.items()}
    expected = run(model, **batch)
    ids = batch.pop("input_ids")
    found = run(model, inputs_embeds=model.get_input_embeddings()(ids), **batch)
    for one, other in zip(tensors(found), tensors(expected), strict=True):
        assert largest(one - other) < 1e-5


@every_kind
@pytest.mark.parametrize("stock", DECODERS, ids=lambda cls: cls.__name__)
def test_only_the_last_logits(stock: Stock, kind: str) -> None:
    model, batch = convert(stock, kind), inputs(stock)
    whole = run(model, **batch).logits
    assert whole.shape[1] == TOKENS
    assert largest(run(model, **batch, logits_to_keep=1).logits - whole[:, -1:]) < 1e-5
    some = torch.tensor([3, 17])
    assert largest(run(model, **batch, logits_to_keep=some).logits - whole[:, some]) < 1e-5


@every_kind
@pytest.mark.parametrize("stock", [BertForMaskedLM, BertModel], ids=lambda cls: cls.__name__)
def test_feed_forward_in_chunks(stock: Stock, kind: str) -> None:
    """What is cut there is after the attention: the same numbers."""
    whole, chunked = convert(stock, kind), convert(stock, kind, chunk_size_feed_forward=1)
    assert chunked.base_model.encoder.layer[0].chunk_size_feed_forward == 1
    assert largest(run(chunked, **inputs(stock))[0] - run(whole, **inputs(stock))[0]) < 1e-4


@every_kind
@pytest.mark.parametrize("stock", [BertForMaskedLM, GPT2LMHeadModel], ids=lambda cls: cls.__name__)
def test_positions_given_or_not(stock: Stock, kind: str) -> None:
    model, batch = convert(stock, kind), inputs(stock)
    positions = torch.arange(TOKENS)[None]
    for options in ({"position_ids": positions}, {"attention_mask": torch.ones_like(batch["input_ids"])}):
        assert largest(run(model, **batch, **options)[0] - run(model, **batch)[0]) < 1e-5


@every_class()
def test_main_input(stock: Stock) -> None:
    """Given by its place, it is what it is by its name."""
    model, batch = convert(stock, "favor_plus"), inputs(stock)
    name = model.main_input_name
    assert next(iter(inspect.signature(stock.forward).parameters.values())).name == "self"
    with torch.no_grad():
        found = model(batch[name], **{key: value for key, value in batch.items() if key != name})
    assert torch.equal(tensors(found)[0], tensors(run(model, **batch))[0])


@every_class()
def test_shapes_are_those_of_the_stock_model(stock: Stock) -> None:
    expected = run(build(stock), **inputs(stock))
    for kind in KINDS:
        found = run(convert(stock, kind), **inputs(stock))
        assert type(found) is type(expected)
        assert {k: v.shape for k, v in found.items() if isinstance(v, Tensor)} == {
            k: v.shape for k, v in expected.items() if isinstance(v, Tensor)
        }


def test_heads_cannot_be_pruned_here_or_there() -> None:
    """Transformers has removed it; were it to return, the slots of the heads would have to follow."""
    for stock in CLASSES:
        assert hasattr(COUNTERPARTS[stock], "prune_heads") == hasattr(stock, "prune_heads")
        layer = copy.deepcopy(convert(stock, "favor_plus")).base_model
        assert hasattr(layer, "_prune_heads") == hasattr(build(stock).base_model, "_prune_heads")
