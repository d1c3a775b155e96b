"""What a model whose sequences processes share cannot compute correctly raises, on all processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.tensor.experimental
from cases import BERT, VIT, converted
from sequence_processes import run_processes
from sharing import attention, batch, ids, mesh, model
from torch import nn
from transformers import BertForMaskedLM, BertForQuestionAnswering, BertModel, DynamicCache, GPT2LMHeadModel

import hf_linattn
from hf_linattn import LinAttnError
from hf_linattn.conversion.ablation import ablated
from hf_linattn.distributed.collectives import SequenceGroup
from hf_linattn.training import context_parallel

ROWS = {"input_ids": ids(2, 29)}
PACKED = torch.tensor([[*range(16), *range(13)]])


def other_rows(made: Any) -> Any:
    return made(input_ids=ids(2, 29, seed=torch.distributed.get_rank()))


def other_lengths(made: Any) -> Any:
    return made(input_ids=ids(2, 29 + torch.distributed.get_rank()))


def layer_alone(made: Any) -> Any:
    return made.base_model.h[0].attn(torch.zeros(2, 8, 32).double())


def within(context: Callable[[Any], AbstractContextManager[Any]], call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def run(made: Any) -> Any:
        with context(made):
            return call(made)

    return run


def softmax(made: Any) -> Any:
    made.set_attn_implementation("sdpa")
    try:
        return made(**ROWS)
    finally:
        made.set_attn_implementation("favor_plus")


def with_cache(made: Any) -> Any:
    return made(ROWS["input_ids"], DynamicCache(config=made.config))


# What is done in the context, and a part of the message.
GPT2_CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "other rows": (other_rows, "must call the model with the same rows"),
    "other lengths": (other_lengths, "must call the model with the same rows"),
    "cache": (lambda made: made(**ROWS, use_cache=True), "use_cache has no answer"),
    "a cache": (with_cache, "A cache was passed"),
    "generation": (lambda made: made.generate(**ROWS, max_new_tokens=2), "Generate outside of context_parallel"),
    "hidden states": (lambda made: made(**ROWS, output_hidden_states=True), "gather_output=True"),
    "mask of pairs": (lambda made: made(**ROWS, attention_mask=torch.ones(2, 1, 29, 29)), "must be [batch, tokens]"),
    "short mask": (lambda made: made(**ROWS, attention_mask=torch.ones(2, 28)), "must be [batch, tokens]"),
    "packed": (lambda made: made(**ROWS, position_ids=PACKED), "must increase along the real tokens"),
    "packed by number": (lambda made: made(**ROWS, seq_idx=PACKED * 0, position_ids=PACKED), "seq_idx has no answer"),
    "too long": (lambda made: made(input_ids=ids(2, 65)), "64 positions; got a text of 65 tokens"),
    "some logits": (lambda made: made(**ROWS, logits_to_keep=1), "logits_to_keep is not supported"),
    "tuple": (lambda made: made(**ROWS, return_dict=False), "return_dict=False is not supported"),
    "labels of a part": (lambda made: made(**ROWS, labels=ids(2, 16)), "labels must be [batch, tokens]"),
    "softmax": (softmax, "would see the tokens of this process alone"),
    "calibration": (lambda made: hf_linattn.compare(made, [ROWS]), "would see the tokens of this process alone"),
    "ablation": (within(lambda made: ablated(made, "slots_alone"), lambda made: made(**ROWS)), "needs whole rows"),
    "layer": (layer_alone, "call the model, not its layers"),
    "nested": (lambda made: within(lambda m: context_parallel(m, mesh(cp=2)), lambda m: m(**ROWS))(made), "is open"),
}


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except LinAttnError as error:
        return str(error)
    return "nothing was raised"


def test_calls(tmp_path: Path) -> None:
    def work(group: SequenceGroup) -> dict[str, str]:
        made, parts = model(GPT2LMHeadModel), mesh(cp=2)
        found = {}
        with attention("slow"), context_parallel(made, parts):
            for name, (call, _) in GPT2_CALLS.items():
                found[name] = message_of(lambda call=call: call(made))
            made(**ROWS).logits.sum().backward()  # as if nothing had happened
        assert made.sequence_parallel is None
        assert all(layer.sequence_parallel is None for layer in hf_linattn.integrations.layers.active_layers(made))
        return found

    for found in run_processes(2, work, tmp_path):
        wrong = {name: found[name] for name, (_, text) in GPT2_CALLS.items() if text not in found[name]}
        assert not wrong


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "softmax in a layer": (lambda: model(BertForMaskedLM, layers=[0]), {}, "Layers 1 of the model have softmax"),
    "stock": (lambda: BERT.build(), {}, "holds 0 converted models"),
    "native": (lambda: BERT.stock(BERT.config(attn_implementation="favor_plus")), {}, "native mode included"),
    "images": (lambda: converted(VIT, "favor_plus"), {}, "reads images"),
    "data parallel": (lambda: nn.DataParallel(model(BertModel)), {}, "DataParallel runs one process"),
    "compiled": (lambda: torch.compile(model(BertModel), backend="eager"), {}, "A compiled model cannot share"),
    "two models": (lambda: nn.ModuleList([model(BertModel), model(BertModel)]), {}, "holds 2 converted models"),
    "whole rows needed": (lambda: model(BertForQuestionAnswering), {"gather_output": False}, "reads more than single"),
    "buffers without dims": (lambda: model(BertModel), {"buffers": [ids(2, 24)]}, "a dimension for each buffer"),
    "another buffer": (lambda: model(BertModel), {"no_restore_buffers": {ids(2, 24)}}, "not among them"),
    "unequal parts": (
        lambda: model(BertModel),
        {"buffers": [ids(2, 25)], "buffer_seq_dims": [1]},
        "must have a multiple of 2 tokens",
    ),
}


def test_models_and_arguments(tmp_path: Path) -> None:
    def work(group: SequenceGroup) -> dict[str, str]:
        parts = mesh(cp=2)

        def enter(make: Callable[[], Any], options: dict[str, Any]) -> None:
            with context_parallel(make(), parts, **options):
                pass

        return {name: message_of(partial(enter, make, options)) for name, (make, options, _) in MODELS.items()}

    for found in run_processes(2, work, tmp_path):
        wrong = {name: found[name] for name, (_, _, text) in MODELS.items() if text not in found[name]}
        assert not wrong


def test_context_of_torch(tmp_path: Path) -> None:
    """Which Accelerate opens for `cp_size`: a converted layer, and one in native mode, would see a part alone."""

    def work(group: SequenceGroup) -> list[str]:
        ring, found = torch.distributed.tensor.experimental.context_parallel, []
        for made in (model(GPT2LMHeadModel), BERT.stock(BERT.config(attn_implementation="favor_plus"))):
            tokens = ids(2, 24)
            with ring(mesh(cp=2), buffers=[tokens], buffer_seq_dims=[1]):
                found.append(message_of(partial(made, input_ids=tokens)))
            made(input_ids=ids(2, 24))
        return found

    for found in run_processes(2, work, tmp_path):
        assert all("Use hf_linattn.training.context_parallel" in message for message in found), found


def test_meshes(tmp_path: Path) -> None:
    """Of one dimension; with one process nothing is shared, and nothing refused."""

    def work(group: SequenceGroup) -> Any:
        both, made = mesh(dp=1, cp=1), model(BertForMaskedLM)
        with context_parallel(made, both["cp"]):
            loss = made(**batch(), output_hidden_states=True).loss.detach()
        return loss, message_of(lambda: context_parallel(made, both).__enter__())

    loss, message = run_processes(1, work, tmp_path)[0]
    torch.testing.assert_close(loss, model(BertForMaskedLM)(**batch()).loss.detach())
    assert "mesh must be a DeviceMesh of one dimension" in message
    assert "('dp', 'cp')" in message
