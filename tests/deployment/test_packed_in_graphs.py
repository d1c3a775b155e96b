"""Several sequences in one row: refused by graphs that are told by positions alone, when they run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from caches import given_cache
from cases import GPT2, NATIVE_CAUSAL_KINDS, VOCAB, ModelCase, checkpoint_activations, converted, largest, native
from roads import Road, padded
from torch import Tensor
from transformers import DataCollatorWithFlattening, StaticCache

IN_WORDS = r"Packed sequences (in a compiled or exported model need cu_seq_lens_q|\(several in one row\) need)"
HALF = 10


def packed() -> dict[str, Tensor]:
    """Two texts in one row, positions restarting: no mask."""
    rows = [torch.randint(3, VOCAB, (HALF,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(2)]
    batch = DataCollatorWithFlattening()([{"input_ids": row} for row in rows])
    return {name: batch[name] for name in ("input_ids", "position_ids")}


def in_order() -> dict[str, Tensor]:
    return {"input_ids": packed()["input_ids"], "position_ids": torch.arange(2 * HALF)[None]}


def model_of(kind: str, mode: Callable[..., Any], *, use_cache: bool = False, layers: int = 1, **changes: Any) -> Any:
    small = {"n_layer": layers, "use_cache": use_cache, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    case = ModelCase(**{**vars(GPT2), "config": lambda **more: GPT2.config(**{**small, **changes, **more})})
    torch._dynamo.reset()
    return mode(case, kind)


def check_refused(call: Callable[..., Any], model: Any) -> None:
    """Packed rows raise, with the words of the library; others give what they give without a graph."""
    with torch.no_grad():
        for batch in (in_order(), {"input_ids": in_order()["input_ids"]}):
            assert largest(call(**batch)[0] - model(**batch)[0]) < 1e-5
        with pytest.raises(Exception, match=IN_WORDS):
            call(**packed())
        padding = {"attention_mask": torch.ones_like(packed()["input_ids"])}  # Transformers does not look then
        assert largest(call(**in_order(), **padding)[0] - model(**in_order(), **padding)[0]) < 1e-5
        with pytest.raises(Exception, match=IN_WORDS):
            call(**packed(), **padding)


MODES = [pytest.param(native, id="native"), pytest.param(converted, id="converted")]
KINDS = [pytest.param(k, marks=[] if k == "eva" else pytest.mark.slow) for k in NATIVE_CAUSAL_KINDS]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_input_in_compiled_graphs(kind: str, mode: Callable[..., Any]) -> None:
    model = model_of(kind, mode)
    check_refused(torch.compile(model, backend="eager", fullgraph=True), model)


def test_compiled_in_place() -> None:
    model = model_of("favor_plus", converted)
    plain = model_of("favor_plus", converted)
    model.compile(backend="aot_eager", fullgraph=True)
    check_refused(model, plain)


def test_packed_input_with_a_cache() -> None:
    """Transformers does not look for packed rows then, and the graph breaks."""
    model = model_of("favor_plus", native, use_cache=True)
    check_refused(torch.compile(model, backend="eager"), model)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("dynamic", [False, True])
def test_default_compiler(dynamic: bool) -> None:
    model = model_of("favor_plus", native)
    check_refused(torch.compile(model, fullgraph=True, dynamic=dynamic), model)


@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_packed_input_in_a_training_step(checkpointing: bool) -> None:
    model = model_of("favor_plus", converted, layers=2).train()
    if checkpointing:
        checkpoint_activations(model, {"use_reentrant": False})
    call = torch.compile(model, backend="aot_eager")
    mask = {"attention_mask": torch.ones_like(packed()["input_ids"])}
    call(**in_order(), **mask)[0].sum().backward()
    for more in ({}, mask):
        with pytest.raises(Exception, match=IN_WORDS):
            call(**packed(), **more)[0].sum().backward()


def test_once_per_forward() -> None:
    """Not in every layer, where the mask is made within the graph."""
    model = model_of("favor_plus", native, layers=3)
    counted: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        counted.append(sum("_assert_async" in str(node.target) for node in graph.graph.nodes))
        return graph

    mask = {"attention_mask": torch.ones_like(packed()["input_ids"])}
    with torch.no_grad():
        torch.compile(model, backend=count, fullgraph=True)(**in_order(), **mask)
    assert counted == [1]


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", MODES)
def test_packed_input_in_exported_graphs(mode: Callable[..., Any], strict: bool) -> None:
    model = Road(model_of("favor_plus", mode)).eval()
    mask = {"attention_mask": torch.ones_like(packed()["input_ids"])}
    with torch.no_grad():
        for more in ({}, mask):
            program = torch.export.export(model, (), kwargs={**in_order(), **more}, strict=strict)
            for call in (program.module(), program.run_decompositions().module()):
                assert largest(call(**in_order(), **more) - model(**in_order(), **more)) < 1e-5
                with pytest.raises(Exception, match=IN_WORDS):
                    call(**packed(), **more)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
@pytest.mark.parametrize("mode", MODES)
def test_packed_input_in_traced_graphs(mode: Callable[..., Any]) -> None:
    model = Road(model_of("eva", mode)).eval()
    mask = {"attention_mask": torch.ones_like(packed()["input_ids"])}
    with torch.no_grad():
        for more in ({}, mask):
            call = torch.jit.trace(model, example_kwarg_inputs={**in_order(), **more}, check_trace=False)
            for form in (call, torch.jit.freeze(call)):
                assert largest(form(**in_order(), **more) - model(**in_order(), **more)) < 1e-5
                with pytest.raises(Exception, match=IN_WORDS):
                    form(**packed(), **more)


def test_numbers_alone_are_refused_while_tracing() -> None:
    model = model_of("eva", native)
    call = torch.compile(model, backend="eager")
    numbers = torch.tensor([[0] * HALF + [1] * HALF])
    with torch.no_grad(), pytest.raises(Exception, match=IN_WORDS):
        call(**packed(), seq_idx=numbers)


def test_static_cache_and_a_mask_of_another_width() -> None:
    """How many tokens a static cache has seen is a value: the graph compares."""
    model = model_of("favor_plus", native, use_cache=True)
    ids = padded(2, 12, padding=0)["input_ids"]
    call = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = model(ids).logits
        for wide in (False, True):
            cache = StaticCache(config=model.config, max_cache_len=16)
            model(ids[:, :8], **given_cache(cache), attention_mask=torch.ones(2, 8, dtype=torch.long))
            mask = torch.ones(2, 16 if wide else 12, dtype=torch.long)
            if wide:
                with pytest.raises(Exception, match="attention_mask must cover all tokens"):
                    call(ids[:, 8:], **given_cache(cache), attention_mask=mask)
            else:
                found = call(ids[:, 8:], **given_cache(cache), attention_mask=mask).logits
                assert largest(found - expected[:, 8:]) < 1e-4
