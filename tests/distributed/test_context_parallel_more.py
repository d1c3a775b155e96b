"""Further ways to call a model whose sequences processes share: other groupings, buffers, outputs, accumulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from around.wrapped import Own, lora
from cases import checkpoint_activations
from sequence_processes import run_processes
from sharing import assert_close, attention, batch, gradients, ids, mesh, model
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from hf_linattn.distributed.collectives import SequenceGroup
from hf_linattn.training import context_parallel, loss_weights, reduce_gradients

STEPS = [[batch("ragged", seed=2 * step + row) for step in range(2)] for row in range(2)]  # of two replicas


def rows_labelled(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "labels": torch.tensor([1, 0])}


def one_process(stock: Any, *, by_labels: bool) -> dict[str, Any]:
    """Gradients of two replicas' two batches: each batch counts the same, or each label does."""
    made, every = model(stock), [each for own in STEPS for each in own]
    items = sum((each["labels"][:, 1:] != -100).sum() for each in every)
    for each in every:
        each = rows_labelled(each) if stock is BertForSequenceClassification else each
        loss = made(**each, num_items_in_batch=items).loss if by_labels else made(**each).loss / len(every)
        loss.backward()
    return gradients(made)


def replicas_that_share(stock: Any, folder: Path, *, by_labels: bool, ddp: bool) -> list[dict[str, Any]]:
    """The same on 2 x 2 processes."""

    def work(group: SequenceGroup) -> dict[str, Any]:
        made, every = model(stock), mesh(dp=2, cp=2)
        own = STEPS[every["dp"].get_local_rank()]
        weights = loss_weights(own, every["dp"], shifted=stock is GPT2LMHeadModel) if by_labels else [0.5] * len(own)
        wrapped = DistributedDataParallel(made) if ddp else made
        with attention("slow"), context_parallel(wrapped, every["cp"]):
            for i, (weight, each) in enumerate(zip(weights, own, strict=True)):
                if ddp and i == 0:
                    with wrapped.no_sync():
                        (weight * wrapped(**each).loss).backward()
                else:
                    (weight * wrapped(**each).loss).backward()
        if not ddp:
            reduce_gradients(made, every)
        return gradients(made)

    return run_processes(4, work, folder)


def test_replicas_under_ddp(tmp_path: Path) -> None:
    for each in replicas_that_share(BertForMaskedLM, tmp_path, by_labels=False, ddp=True):
        assert_close(each, one_process(BertForMaskedLM, by_labels=False))


def test_replicas_and_accumulated_steps_with_every_label_counted_once(tmp_path: Path) -> None:
    expected = one_process(GPT2LMHeadModel, by_labels=True)
    for each in replicas_that_share(GPT2LMHeadModel, tmp_path, by_labels=True, ddp=False):
        assert_close(each, expected)


def test_transformers_number_of_items_counts_every_label_once(tmp_path: Path) -> None:
    items = {"num_items_in_batch": torch.tensor(100)}
    expected = model(GPT2LMHeadModel)(**batch(), **items).loss.detach()

    def work(group: SequenceGroup) -> Any:
        made = model(GPT2LMHeadModel)
        with attention("slow"), context_parallel(made, mesh(cp=2)):
            return made(**batch(), **items).loss.detach()

    torch.testing.assert_close(sum(run_processes(2, work, tmp_path)) / 2, expected, rtol=0, atol=1e-6)


def test_outputs(tmp_path: Path) -> None:
    """Of whole rows, in the order of the input, or of parts; the pooled token is right on all processes."""
    rows = {"input_ids": batch("left")["input_ids"], "attention_mask": batch("left")["attention_mask"]}

    def work(group: SequenceGroup) -> dict[str, Any]:
        made, parts, found = model(BertModel), mesh(cp=2), {}
        with torch.no_grad(), attention("slow"):
            for name in ("whole", "part"):
                with context_parallel(made, parts, gather_output=name == "whole"):
                    output = made(**rows)
                found |= {name: output.last_hidden_state, f"{name} pooled": output.pooler_output}
            head = model(BertForMaskedLM)
            with context_parallel(head, parts, gather_output=True):
                output = head(**batch("left"))
            return {**found, "logits": output.logits, "loss": output.loss}

    with torch.no_grad():
        whole = model(BertModel)(**rows)
        head = model(BertForMaskedLM)(**batch("left"))
    found = run_processes(2, work, tmp_path)
    # Real tokens first: 21 of the first row and 29 of the second; parts of 16.
    states = whole.last_hidden_state
    first = torch.stack([states[0, 8:24], states[1, :16]])
    torch.testing.assert_close(found[0].pop("part"), first, rtol=0, atol=1e-9)
    torch.testing.assert_close(found[1].pop("part")[1, :13], states[1, 16:], rtol=0, atol=1e-9)
    expected = {"whole": states, "whole pooled": whole.pooler_output, "part pooled": whole.pooler_output}
    for each in found:
        assert_close(each, {**expected, "logits": head.logits, "loss": head.loss}, atol=1e-9)


@pytest.mark.parametrize("stock", [GPT2LMHeadModel, GPT2ForSequenceClassification])
def test_buffers_as_in_torch(stock: Any, tmp_path: Path) -> None:
    tokens = ids(2, 24)
    tokens[0, 7:] = 0  # padding, where GPT-2's head of rows looks for it
    rows = {"input_ids": tokens, "attention_mask": (tokens > 0).long()}
    labels = torch.where(tokens > 0, tokens, -100) if stock is GPT2LMHeadModel else torch.tensor([0, 1])
    expected = model(stock)(**rows, labels=labels).loss.detach()

    def work(group: SequenceGroup) -> Any:
        made, own = model(stock), {name: each.clone() for name, each in rows.items()}
        cut = {"buffers": list(own.values()), "buffer_seq_dims": [1, 1], "no_restore_buffers": {own["attention_mask"]}}
        with attention("slow"), context_parallel(made, mesh(cp=2), **cut):
            assert torch.equal(own["input_ids"], tokens[:, 12 * group.rank : 12 * group.rank + 12])
            loss = made(**own, labels=labels).loss.detach()
        assert torch.equal(own["input_ids"], tokens)
        assert own["attention_mask"].shape == (2, 12)
        return loss

    torch.testing.assert_close(sum(run_processes(2, work, tmp_path)) / 2, expected, rtol=0, atol=1e-6)


def test_embeddings_positions_and_types_go_with_their_tokens(tmp_path: Path) -> None:
    tokens = batch("left")
    given = {
        "inputs_embeds": torch.randn(2, 29, 32, generator=torch.Generator().manual_seed(1)).double(),
        "position_ids": torch.arange(10, 39)[None],
        "token_type_ids": (torch.arange(29) > 15).long().expand(2, -1),
        "attention_mask": tokens["attention_mask"],
        "labels": tokens["labels"],
    }

    def results(made: Any) -> dict[str, Any]:
        embeds = given["inputs_embeds"].clone().requires_grad_()
        made(**{**given, "inputs_embeds": embeds}).loss.backward()
        return {**gradients(made), "embeds": embeds.grad}

    def work(group: SequenceGroup) -> dict[str, Any]:
        made, parts = model(BertForMaskedLM), mesh(cp=2)
        with attention("slow"), context_parallel(made, parts):
            found = results(made)
        reduce_gradients(made, parts)
        return {**found, **gradients(made)}

    expected = results(model(BertForMaskedLM))
    found = run_processes(2, work, tmp_path)
    embeds = sum(each.pop("embeds") for each in found) / 2
    torch.testing.assert_close(embeds, expected.pop("embeds"), rtol=0, atol=1e-6)
    for each in found:
        assert_close(each, expected)


def test_activation_checkpointing(tmp_path: Path) -> None:
    rows = {**batch(), "labels": torch.tensor([1, 0])}
    made = model(BertForSequenceClassification)
    made(**rows).loss.backward()
    expected = gradients(made)

    def work(group: SequenceGroup) -> tuple[dict[str, Any], str]:
        made, parts = model(BertForSequenceClassification), mesh(cp=2)
        checkpoint_activations(made)
        with attention("slow"):
            with context_parallel(made, parts):
                made(**rows).loss.backward()
            reduce_gradients(made, parts)
            found = gradients(made)
            with context_parallel(made, parts):
                loss = made(**rows).loss
            try:
                loss.backward()
            except Exception as error:
                return found, str(error)
        return found, ""

    for found, message in run_processes(2, work, tmp_path):
        assert_close(found, expected)
        assert "call it within the context_parallel block" in message


def test_fsdp2_over_all_processes(tmp_path: Path) -> None:
    """The mean that FSDP2 makes of the gradients is that of the whole sequences, too."""
    expected = gradients_of(model(GPT2LMHeadModel))

    def work(group: SequenceGroup) -> dict[str, Any]:
        made, parts = model(GPT2LMHeadModel), mesh(cp=2)
        for block in made.transformer.h:
            fully_shard(block, mesh=parts)
        fully_shard(made, mesh=parts)
        assert isinstance(made, FSDPModule)
        with attention("fast"), context_parallel(made, parts):
            made(**batch()).loss.backward()
        return {name: p.grad.full_tensor() for name, p in made.named_parameters() if p.grad is not None}

    for each in run_processes(2, work, tmp_path):
        assert_close(each, expected)


def gradients_of(made: Any) -> dict[str, Any]:
    made(**batch()).loss.backward()
    return gradients(made)


@pytest.mark.parametrize("name", ["own module", "lora"])
def test_models_within_others(name: str, tmp_path: Path) -> None:
    """A module of a user's, whose head reads the first token; adapters, which call `forward` themselves."""

    def make() -> Any:
        return Own(model(BertModel)).double() if name == "own module" else lora(model(GPT2LMHeadModel)).train()

    def loss(made: Any) -> Any:
        rows = batch("left")
        if name == "lora":
            return made(**rows).loss
        del rows["labels"]
        return made.head(made.encoder(**rows).last_hidden_state[:, 0]).square().mean()

    def work(group: SequenceGroup) -> dict[str, Any]:
        parts = mesh(cp=2)
        with attention("fast"), context_parallel(made, parts):
            loss(made).backward()
        reduce_gradients(made, parts)
        return gradients(made)

    made = make()
    found = run_processes(2, work, tmp_path)
    loss(made).backward()
    for each in found:
        assert_close(each, gradients(made))


@pytest.mark.slow
def test_fsdp2_with_replicas(tmp_path: Path) -> None:
    """Sharded over the processes that share a sequence, replicated over those with other rows."""
    expected = one_process(BertForSequenceClassification, by_labels=False)

    def work(group: SequenceGroup) -> dict[str, Any]:
        made, every = model(BertForSequenceClassification), mesh(dp=2, cp=2)
        for block in made.bert.encoder.layer:
            fully_shard(block, mesh=every)
        fully_shard(made, mesh=every)
        with attention("fast"), context_parallel(made, every["cp"]):
            for each in STEPS[every["dp"].get_local_rank()]:
                (made(**rows_labelled(each)).loss / 2).backward()
        return {name: p.grad.full_tensor() for name, p in made.named_parameters() if p.grad is not None}

    for each in run_processes(4, work, tmp_path):
        assert_close(each, expected)
