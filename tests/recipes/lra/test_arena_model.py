"""The model of the small protocol, on stock and on converted encoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertModel

import hf_linattn
from hf_linattn.modules.registry import list_kinds
from long_range_arena import ArenaArguments, encoder_config
from lra.model import BertForLongRangeArena
from lra.tasks import TASKS

KINDS = (None, *list_kinds())
SMALL = ArenaArguments("text", hidden_size=16, intermediate_size=32)


def build(name: str, kind: str | None, pooling: str = "mean", tokens: int = 48) -> BertForLongRangeArena:
    sizes = replace(SMALL, pooling=pooling)
    encoder = BertModel(encoder_config(sizes, TASKS[name], tokens, 257), add_pooling_layer=False)
    if kind is not None:
        encoder = hf_linattn.convert(encoder, {"kind": kind, "window_size": 4})
    return BertForLongRangeArena(encoder.config, encoder).eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(1, 257, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "pooling"), [("text", "mean"), ("matching", "cls")])
def test_padding_changes_nothing(name: str, pooling: str, kind: str | None) -> None:
    model = build(name, kind, pooling)
    tokens = ids(3, 40) if name == "text" else ids(3, 2, 40)
    padded = torch.nn.functional.pad(tokens, (0, 8))
    with torch.no_grad():
        plain, beside = model(tokens), model(padded, (padded > 0).long())
    torch.testing.assert_close(beside.logits, plain.logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_load(kind: str | None, tmp_path: Path) -> None:
    model = build("matching", kind)
    model.save_pretrained(tmp_path)
    again = BertForLongRangeArena.from_pretrained(tmp_path).eval()
    tokens = ids(2, 2, 40)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        encoder = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
        assert type(encoder) is type(model.bert)
        assert torch.equal(encoder(tokens[:, 0]).last_hidden_state, model.bert(tokens[:, 0]).last_hidden_state)


def test_softmax_and_kinds_begin_with_the_same_weights() -> None:
    states = []
    for kind in KINDS:
        torch.manual_seed(3)
        states.append(build("text", kind).state_dict())
    for name, value in states[0].items():
        assert all(torch.equal(state[name], value) for state in states[1:])


def test_a_token_in_front_speaks_for_the_text() -> None:
    model, tokens = build("text", None, "cls"), ids(2, 48)
    assert model.config.vocab_size == 258
    with torch.no_grad():
        hidden = model.bert(torch.cat([torch.full((2, 1), 257), tokens], dim=1)).last_hidden_state
        torch.testing.assert_close(model(tokens).logits, model.classifier(hidden[:, 0]))


def test_both_texts_are_compared() -> None:
    model = build("matching", None)
    tokens = ids(2, 2, 40)
    seen: list[torch.Tensor] = []
    model.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(tokens)
        model(tokens.flip(1))
    (first, second, product, difference), swapped = seen[0].chunk(4, -1), seen[1].chunk(4, -1)
    torch.testing.assert_close(product, first * second)
    torch.testing.assert_close(difference, first - second)
    for one, other in zip(swapped, (second, first, product, -difference), strict=True):
        torch.testing.assert_close(one, other)


def test_the_loss_is_a_mean_over_rows() -> None:
    model, tokens, labels = build("text", "eva"), ids(4, 20), torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        single = [model(t[None], labels=x[None]).loss for t, x in zip(tokens, labels, strict=True)]
        torch.testing.assert_close(model(tokens, labels=labels).loss, torch.stack(single).mean())
