"""`torch.export` with symbols for the batch and for the number of tokens."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
import torch
from cases import GPT2, VIT, ModelCase, converted, native
from roads import CLASSIFIER, Road, check, check_gradients, padded, road, roads


def exported(model: Road, batch: dict[str, torch.Tensor], *, strict: bool = False) -> Any:
    rows, tokens = torch.export.Dim("rows", min=1, max=64), torch.export.Dim("tokens", min=2, max=64)
    sizes = {name: {0: rows, 1: tokens} if tensor.ndim == 2 else {0: rows} for name, tensor in batch.items()}
    with torch.no_grad():
        return torch.export.export(model, (), kwargs=batch, dynamic_shapes=sizes, strict=strict)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("case", "kind", "mode"), roads())
def test_any_number_of_rows_and_tokens(case: ModelCase, kind: str, mode: Any, strict: bool) -> None:
    """Also of GPT-2 with its cache, which is left in the graph."""
    model = road(case, kind, mode)
    first = VIT.inputs(2) if case is VIT else padded()
    start = time.process_time()
    program = exported(model, first, strict=strict)
    assert time.process_time() - start < 60
    call = program.module()
    if case is VIT:
        check(call, model, first, VIT.inputs(3, seed=1), VIT.inputs(1))
    else:
        check(call, model, first, padded(padding=0), padded(1, 23), padded(3, 64), padded(5, 3, padding=1))


def test_export_without_a_mask() -> None:
    model = road(CLASSIFIER, "eva", native)
    ids = [{"input_ids": padded(*size, padding=0)["input_ids"]} for size in ((2, 40), (3, 17), (1, 2))]
    check(exported(model, ids[0]).module(), model, *ids)


@pytest.mark.parametrize(("case", "kind", "mode"), [(CLASSIFIER, "lara", converted)])
def test_saved_loaded_decomposed_and_compiled(case: ModelCase, kind: str, mode: Any) -> None:
    model = road(case, kind, mode)
    program = exported(model, padded())
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    decomposed = loaded.run_decompositions()
    assert any("hf_linattn" in str(node.target) for node in decomposed.graph.nodes)
    for call in (loaded.module(), decomposed.module(), torch.compile(loaded.module(), backend="aot_eager")):
        check(call, model, padded(), padded(3, 17))


def test_gradients_at_another_length() -> None:
    model = road(CLASSIFIER, "eva", converted)
    check_gradients(exported(model, padded()).module(), model, padded(2, 23))


def test_layers_left_on_softmax() -> None:
    model = Road(converted(GPT2, "favor_plus", layers=[1])).eval()
    check(exported(model, padded()).module(), model, padded(), padded(3, 17))


@pytest.mark.parametrize("kind", ["eva"])
def test_random_numbers_of_training_are_refused(kind: str) -> None:
    model = road(CLASSIFIER, kind, converted, slot_dropout=0.5).train()
    with pytest.raises(Exception, match=r"model\.eval\(\)"):
        exported(model, padded())
