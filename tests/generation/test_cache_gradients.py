"""Training through a cache: a later piece's loss reaches what earlier pieces were made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import cache_of, given_cache
from cases import ModelCase, largest
from decoders import (
    BERT,
    BY_NAME,
    GPT2,
    Setting,
    all_kinds,
    all_settings,
    both,
    decoder,
    is_recurrent,
    prompt,
)
from torch import Tensor
from transformers import DynamicCache

NO_DROPOUT = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
FIRST = 13


def exact(case: ModelCase, setting: Setting) -> Any:
    """Float64, without dropout. Buffers of a converted model stay float32, which both sides read alike."""
    return decoder(case, setting, config=NO_DROPOUT[case.name]).double()


def loss(logits: Tensor) -> Tensor:
    """Something that depends on every logit in another way."""
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).reshape(logits.shape).cos()).sum()


def gradients(model: Any, embeddings: Tensor, lengths: list[int], mask: Tensor | None = None) -> dict[str, Tensor]:
    """Of embeddings and parameters, from the loss on all tokens but those of the first piece."""
    model.zero_grad(set_to_none=True)
    leaf = embeddings.clone().requires_grad_()
    cache = DynamicCache(config=model.config) if len(lengths) > 1 else None
    found, end = [], 0
    for piece in leaf.split(lengths, dim=1):
        end += piece.shape[1]
        seen = None if mask is None else mask[:, :end]
        out = model(inputs_embeds=piece, **given_cache(cache), attention_mask=seen, use_cache=cache is not None)
        found.append(out.logits)
    loss(torch.cat(found, dim=1)[:, FIRST:]).backward()
    assert leaf.grad is not None
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"embeddings": leaf.grad, **named}


def compare(model: Any, pieces: list[int], mask: Tensor | None = None) -> None:
    ids = prompt(2, sum(pieces))
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
    found = gradients(model, embeddings, pieces, mask)
    expected = gradients(model, embeddings, [sum(pieces)], mask)
    assert float(expected["embeddings"][:, :FIRST].abs().max()) > 1e-2
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert largest(found[name] - gradient) < 1e-8 * max(1, float(gradient.abs().max())), name


@all_settings
def test_gradient_of_a_continuation(setting: Setting) -> None:
    compare(exact(GPT2, setting), [FIRST, 19])


@all_kinds
def test_gradient_of_several_pieces(setting: Setting) -> None:
    """Steps among them, and padding."""
    mask = (torch.arange(32) >= torch.tensor([0, 5])[:, None]).long()
    compare(exact(GPT2, setting), [FIRST, 1, 1, 9, 8], mask)


@all_kinds
def test_gradient_in_bert(setting: Setting) -> None:
    compare(exact(BERT, setting), [FIRST, 1, 18])


@both
@all_kinds
def test_loss_of_a_training_step(case: ModelCase, setting: Setting) -> None:
    """A training forward also makes a cache unless told not to; neither loss nor gradients know."""
    model, ids = exact(case, setting).train(), prompt(2, 30)
    results = []
    for options in ({}, {"use_cache": True}, {"use_cache": False}):
        model.zero_grad(set_to_none=True)
        out = model(ids, labels=ids, **options)
        out.loss.backward()
        results.append((out.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert is_recurrent(cache_of(model(ids))) == [True, True]
    expected, expected_grads = results[-1]
    for found, grads in results[:-1]:
        assert torch.equal(found, expected)
        assert grads.keys() == expected_grads.keys()
        for name, gradient in expected_grads.items():
            assert largest(grads[name] - gradient) < 1e-10, name


@all_kinds
def test_no_graph_without_gradients(setting: Setting) -> None:
    """A cache that was filled under autograd and is detached, or was filled without, holds no graph."""
    model, ids = decoder(GPT2, setting), prompt(2, 20)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **given_cache(cache))
    out = model(prompt(2, 7), **given_cache(cache))  # goes on under autograd
    out.logits.sum().backward()
    with torch.no_grad():
        found = model(prompt(2, 3), **given_cache(cache)).logits
        everything = torch.cat([ids, prompt(2, 7), prompt(2, 3)], dim=1)
        expected = model(everything, use_cache=False).logits[:, -3:]
    assert not found.requires_grad
    assert largest(found - expected) < 1e-4


@pytest.mark.parametrize("name", ["favor_plus", "lara-overlap", "eva"])
def test_cache_filled_in_inference_mode(name: str) -> None:
    """`torch.inference_mode` makes tensors that autograd refuses to save: reading them without gradients works."""
    model, ids = decoder(GPT2, BY_NAME[name]), prompt(2, 30)
    cache, found = DynamicCache(config=model.config), []
    with torch.inference_mode():
        for piece in (ids[:, :11], ids[:, 11:12]):
            found.append(model(piece, **given_cache(cache)).logits)
    with torch.no_grad():
        for piece in (ids[:, 12:13], ids[:, 13:]):
            found.append(model(piece, **given_cache(cache)).logits)
        expected = model(ids, use_cache=False).logits
    assert largest(torch.cat([part.clone() for part in found], dim=1) - expected) < 1e-4
