"""No query sees a later token: the gradient with respect to every later embedding is exactly zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CAUSAL_KINDS, GPT2, NATIVE_CAUSAL_KINDS, TOKENS, bert_config, largest, ready
from transformers import BertLMHeadModel

import hf_linattn

WINDOWS = {kind: (0, 8) if kind != "eva" else (8,) for kind in CAUSAL_KINDS}
CASES = [
    pytest.param(kind, window, converted, training, id=f"{kind}-window{window}-{mode}-{phase}")
    for kind in CAUSAL_KINDS
    for window in WINDOWS[kind]
    for converted, mode in ((False, "native"), (True, "converted"))
    if converted or kind in NATIVE_CAUSAL_KINDS
    for training, phase in ((False, "eval"), (True, "train"))
]


def leak(model: Any, embeddings: torch.Tensor, position: int) -> tuple[float, float]:
    """Largest gradient of one position's logits with respect to later embeddings, and to those up to it."""
    embeddings = embeddings.clone().requires_grad_()
    torch.manual_seed(5)
    out = model(inputs_embeds=embeddings, use_cache=False)[0]
    (out[:, position] * torch.randn(out.shape[-1])).sum().backward()
    assert embeddings.grad is not None
    later = embeddings.grad[:, position + 1 :]
    return largest(later) if later.numel() else 0.0, float(embeddings.grad[:, : position + 1].abs().amax((0, 2)).min())


@pytest.mark.parametrize(("kind", "window", "converted", "training"), CASES)
def test_causality_of_gpt2(kind: str, window: int, converted: bool, training: bool) -> None:
    changes = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2.build(**changes)
    settings = GPT2.settings(kind, window_size=window, slot_dropout=0.2)
    if converted:
        ready(hf_linattn.convert(model, settings))
    else:
        model.config.linear_attention = settings.to_dict()
        model.set_attn_implementation(kind)
    model.train(training)
    embeddings = torch.randn(2, TOKENS, 32)
    for position in (0, 7, 8, 20, 31, 38):
        later, earlier = leak(model, embeddings, position)
        assert later == 0.0, (position, later)
        if not training:  # slot dropout may cut a token off
            assert earlier > 0.0, f"position {position} does not depend on an earlier token"


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_causality_of_a_bert_decoder(kind: str) -> None:
    torch.manual_seed(0)
    model = BertLMHeadModel(bert_config(is_decoder=True)).eval()
    ready(hf_linattn.convert(model, GPT2.settings(kind)))
    for position in (0, 11, 30):
        later, earlier = leak(model, torch.randn(2, TOKENS, 32), position)
        assert later == 0.0
        assert earlier > 0.0
