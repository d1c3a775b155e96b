"""The decode step under `torch.compile`: no graph breaks, and no new graph for every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from caches import given_cache
from cases import largest
from decoders import (
    BERT,
    GPT2,
    SETTINGS,
    TOLERANCE,
    Setting,
    all_kinds,
    decoder,
    left_padded,
    params,
    prompt,
    run,
    whole_logits,
)
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, DynamicCache, StaticCache

STEPS, START = 40, 13


# Tracing takes seconds: each test has its own few settings in the quick run.
def traced(*quick: str) -> Any:
    return pytest.mark.parametrize("setting", params(SETTINGS, quick))


def one_layer(case: Any, setting: Setting) -> Any:
    """Each layer is traced anew, and a second one would add nothing."""
    torch._dynamo.reset()
    return decoder(case, setting, config={"n_layer": 1} if case is GPT2 else {"num_hidden_layers": 1})


def steps(model: Any, call: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Logits of single tokens after a prompt that is read without compiling."""
    found = []
    with torch.no_grad():
        model(ids[:, :START], **given_cache(cache), attention_mask=None if mask is None else mask[:, :START])
        for position in range(START, START + STEPS):
            seen = None if mask is None else mask[:, : position + 1]
            step = ids[:, position : position + 1]
            found.append(call(step, **given_cache(cache), attention_mask=seen).logits)
    return torch.cat(found, dim=1)


@traced("favor_plus", "eva")
def test_compiled_step_with_a_static_cache(setting: Setting) -> None:
    """Nothing of a step depends on how many there have been."""
    model, ids = one_layer(GPT2, setting), prompt(2, START + STEPS)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=START + STEPS)
    found = steps(model, compiled, cache, ids, None)
    assert largest(found - whole_logits(model, ids)[:, START:]) < TOLERANCE
    assert 1 <= counter.frame_count <= 2


@traced("lara-overlap")
def test_static_cache_with_padding(setting: Setting) -> None:
    """A mask grows by a column a step, which costs one more graph, for any width."""
    model, ids = one_layer(GPT2, setting), prompt(2, START + STEPS)
    mask = (torch.arange(START + STEPS) >= torch.tensor([0, 5])[:, None]).long()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=START + STEPS)
    found = steps(model, compiled, cache, ids, mask)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits[:, START:]
    assert largest(found - expected) < TOLERANCE
    assert 1 <= counter.frame_count <= 3


@pytest.mark.slow
@pytest.mark.parametrize("case", [GPT2, BERT], ids=["gpt2", "bert"])
@all_kinds
def test_compiled_step_with_a_dynamic_cache(case: Any, setting: Setting) -> None:
    model, ids = one_layer(case, setting), prompt(2, START + STEPS)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    found = steps(model, compiled, DynamicCache(config=model.config), ids, None)
    assert largest(found - whole_logits(model, ids)[:, START:]) < TOLERANCE


@traced("favor_plus")
def test_generate_that_compiles(setting: Setting) -> None:
    """As `generate` does by itself on a GPU with a static cache: it compiles the call of the model."""
    model, batch = one_layer(GPT2, setting), left_padded([0, 5], 12)
    expected, expected_logits = run(model, 16, **batch, use_cache=False)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:  # a function, because the config is copied
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, dynamic=None, backend=backend, mode=None)  # type: ignore[arg-type]
    config._compile_all_devices = True
    found, found_logits = run(model, 16, **batch, cache_implementation="static", compile_config=config)
    assert torch.equal(found, expected)
    assert largest(found_logits - expected_logits) < TOLERANCE
    assert 1 <= len(graphs) <= 3
