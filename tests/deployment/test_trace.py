"""`torch.jit.trace`: the traced model is the model, for other sizes and masks too."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import GPT2, VIT, ModelCase, converted, native
from forked_programs import run_forked
from hub_server import environment
from roads import CLASSIFIER, Road, check, check_gradients, padded, road, roads

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]


def traced(model: Road, batch: dict[str, torch.Tensor]) -> Any:
    with torch.no_grad():
        return torch.jit.trace(model, example_kwarg_inputs=batch, check_trace=False)


@pytest.mark.parametrize(("case", "kind", "mode"), roads())
def test_other_sizes_and_masks(case: ModelCase, kind: str, mode: Any) -> None:
    """A mask without padding is not taken for no mask, nor 40 tokens for the length of all texts."""
    model = road(case, kind, mode)
    if case is VIT:
        check(traced(model, case.inputs(2)), model, case.inputs(2), case.inputs(3, seed=1))
        return
    full = padded(padding=0)
    check(traced(model, full), model, full, padded(), padded(1, 23), padded(3, 9, padding=4), padded(2, 3, padding=1))
    ids = {"input_ids": full["input_ids"]}
    check(traced(model, ids), model, ids, {"input_ids": ids["input_ids"][:1, :17]})


def test_checks_of_transformers_run_outside_of_the_trace() -> None:
    """In a process whose first call is traced."""
    code = (
        "import torch, hf_linattn, cases, roads\n"
        "from roads import *\n"
        "for case, kind in ((cases.VIT, 'eva'), (cases.GPT2, 'favor_plus'), (CLASSIFIER, 'lara')):\n"
        "    model = road(case, kind, cases.native)\n"
        "    first, second = case.inputs(2), case.inputs(3)\n"
        "    with torch.no_grad():\n"
        "        call = torch.jit.trace(model, example_kwarg_inputs=first)\n"
        "    check(call, model, first, second)\n"
    )
    here = Path(__file__).resolve().parent
    path = ":".join(map(str, (here, here.parent, here.parents[1])))
    run_forked(["-c", code], environment(PYTHONPATH=path))


@pytest.mark.parametrize(("case", "kind", "mode"), [(CLASSIFIER, "eva", native), (GPT2, "favor_plus", converted)])
def test_saved_frozen_and_loaded(case: ModelCase, kind: str, mode: Any) -> None:
    model = road(case, kind, mode)
    call = traced(model, padded())
    file = io.BytesIO()
    torch.jit.save(call, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for form in (loaded, torch.jit.freeze(call), torch.jit.optimize_for_inference(loaded)):
        check(form, model, padded(), padded(3, 17, padding=6))


@pytest.mark.parametrize(("case", "kind", "mode"), [(CLASSIFIER, "lara", native), (GPT2, "eva", converted)])
def test_gradients_of_traced_models(case: ModelCase, kind: str, mode: Any) -> None:
    model = road(case, kind, mode)
    check_gradients(torch.jit.trace(model, example_kwarg_inputs=padded()), model, padded(2, 23))


def test_second_derivatives_raise() -> None:
    model = road(CLASSIFIER, "eva", native)
    call = torch.jit.trace(model, example_kwarg_inputs=padded())
    weight = model.model.get_input_embeddings().weight
    (first,) = torch.autograd.grad(call(**padded()).sin().sum(), weight, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="first derivatives only"):
        first.sum().backward()


@pytest.mark.parametrize("kind", ["lara", "eva"])
def test_random_numbers_of_training_are_refused(kind: str) -> None:
    model = road(CLASSIFIER, kind, converted, slot_dropout=0.5).train()
    with pytest.raises(NotImplementedError, match=r"model\.eval\(\)"):
        torch.jit.trace(model, example_kwarg_inputs=padded(), check_trace=False)


def test_another_image_size_raises() -> None:
    """The grid of patches is part of the trace."""
    model = road(VIT, "eva", converted)
    call = traced(model, VIT.inputs(2))
    with pytest.raises(Exception, match=r"size|grid"):
        call(pixel_values=torch.randn(2, 3, 32, 32))
