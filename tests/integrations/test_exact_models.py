"""`exact_below` in whole models: mixed batches, generation, compiled models, native mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from cases import BERT, GPT2, KINDS, MODES, TOKENS, VOCAB, away_from_start, converted, largest, native
from torch import Tensor

from hf_linattn.modules.base import LinearAttention
from hf_linattn.modules.kinds.favor_plus import FavorPlusAttention
from hf_linattn.modules.registry import get_kind

BORDER = 12
# Beside kinds in the models: a border between the rows of `mixed`.
SETTINGS = {"exact_below": BORDER, "window_size": 4}


def mixed() -> dict[str, Tensor]:
    """Rows below the border, at it and above."""
    lengths = torch.tensor([TOKENS, 5, BORDER, BORDER + 1])
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    return {"input_ids": BERT.inputs(4)["input_ids"] * mask, "attention_mask": mask}


def small(kind: str, is_causal: bool) -> dict[str, Any]:
    return {**SETTINGS, **({"chunk_size": 2} if kind == "eva" and is_causal else {})}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_of_a_mixed_batch_are_what_they_are_alone(kind: str, mode: Any) -> None:
    model, batch = mode(BERT, kind, **small(kind, False)), mixed()
    logits, softmax = model(**batch).logits, BERT.build()
    for row, real in enumerate(batch["attention_mask"].bool()):
        alone = batch["input_ids"][row : row + 1, real]
        assert largest(logits[row, real] - model(alone).logits[0]) < 2e-4
        difference = largest(logits[row, real] - softmax(alone).logits[0])
        assert difference < 2e-4 if int(real.sum()) <= BORDER else difference > 1e-2


def test_a_short_batch_calls_no_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither statistics nor slots: the padded length is within the border."""

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("computed")

    model, ids = converted(BERT, "favor_plus", exact_below=TOKENS), BERT.inputs()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    monkeypatch.setattr(FavorPlusAttention, "compute", refuse)
    logits = model(input_ids=ids, attention_mask=mask).logits
    expected = BERT.build()(input_ids=ids, attention_mask=mask).logits
    assert largest((logits - expected) * mask[..., None]) < 1e-5


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if get_kind(kind).supports_causal])
def test_generation_is_that_of_whole_sequences(kind: str, static: bool) -> None:
    """Over the border, in rows with padding on the left; the same without a cache."""
    model = away_from_start(converted(GPT2, kind, **small(kind, True)), GPT2)
    ids = torch.randint(3, VOCAB, (3, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    given = {"input_ids": ids * mask, "attention_mask": mask, "max_new_tokens": 14, "do_sample": False}
    cache = {"cache_implementation": "static"} if static else {}
    found = model.generate(**given, **cache, use_cache=True, output_logits=True, return_dict_in_generate=True)
    whole = model.generate(**given, use_cache=False, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(found.sequences, whole.sequences)
    assert largest(torch.stack(found.logits) - torch.stack(whole.logits)) < 1e-3


@torch.no_grad()
def test_the_first_tokens_of_a_decoder_are_softmax() -> None:
    model, ids = native(GPT2, "favor_plus", **SETTINGS), GPT2.inputs()["input_ids"]
    difference = (model(ids).logits - GPT2.build()(ids).logits).abs().amax((0, 2))
    assert float(difference[:BORDER].max()) < 1e-5 < 1e-2 < float(difference[BORDER:].max())


def test_compiled_models_take_mixed_batches() -> None:
    """One graph, whichever rows are short: the layers decide by operations on tensors."""
    model = converted(BERT, "favor_plus", **SETTINGS)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    batch = mixed()
    for order in ([0, 1, 2, 3], [3, 0, 0, 1]):
        rows = {name: z[order] for name, z in batch.items()}
        with torch.no_grad():
            difference = (compiled(**rows).logits - model(**rows).logits) * rows["attention_mask"][..., None]
        assert largest(difference) < 2e-4
    assert counter.frame_count == 1


def test_it_is_saved_and_read(tmp_path: Any) -> None:
    model = converted(BERT, "favor_plus", **SETTINGS)
    model.save_pretrained(tmp_path)
    loaded = BERT.auto.from_pretrained(tmp_path)
    layers = [layer for layer in loaded.modules() if isinstance(layer, LinearAttention)]
    assert [layer.config.exact_below for layer in layers] == [BORDER, BORDER]
