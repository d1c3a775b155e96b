"""A model compiled for a fixed shape is one graph, forward and backward, that a GPU can record and replay.

There need be no GPU: the model is on the device "meta", which has no values and, like a GPU, is not the device on
which a tensor is made by default. A graph for `mode="reduce-overhead"` (CUDA graphs) may have no tensor on the CPU and
no operator that waits for a value.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch._dynamo
from cases import BY_NAME, CAUSAL_KINDS, GPT2, KINDS, VIT, ModelCase
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hf_linattn
from hf_linattn.functional import draw_projection, eva_attention, favor_attention
from hf_linattn.kernels import attend, block_slots, causal_slots, decode, half_norm, window_chunks
from hf_linattn.modules.config import AttentionConfig

BERT = BY_NAME["bert-classifier"]
SETTINGS: dict[str, dict[str, Any]] = {"random": {}, "learned": {"learned": True}}
if any(field.name == "exact_below" for field in fields(AttentionConfig)):
    SETTINGS["exact"] = {"exact_below": 1000}
# Operators whose result is on the host, or whose shape is a value.
HOST = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "_to_cpu")


@pytest.fixture(autouse=True)
def _autocast_of_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The one thing that "meta" has not and "cuda" has."""
    autocast, is_enabled = torch.autocast, torch.is_autocast_enabled

    def either(device: str, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if device == "meta" else autocast(device, *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", either)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: device != ("meta",) and is_enabled(*device))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def name_of(target: Any) -> str:
    """`aten._local_scalar_dense.default` as `_local_scalar_dense`."""
    return str(target).split(".")[1] if str(target).startswith(("aten.", "prims.")) else ""


def faults(graph: torch.fx.Graph) -> list[str]:
    """What keeps a graph from being recorded: operators for the host, and tensors that are elsewhere."""
    found = []
    for node in graph.nodes:
        value = getattr(graph.owning_module, node.target) if node.op == "get_attr" else node.meta.get("val")
        devices = {z.device.type for z in tree_leaves(value) if isinstance(z, Tensor)}
        if name_of(node.target) in HOST or devices - {"meta"}:
            found.append(f"{node.format_node()} {devices}")
    return found


def recorded(call: Any) -> tuple[Any, dict[str, list[torch.fx.Graph]]]:
    """The call as it is compiled, and the graphs that are made when it runs, by the pass that they are of."""
    graphs: dict[str, list[torch.fx.Graph]] = {"forward": [], "backward": [], "inference": []}

    def compiler(which: str) -> Any:
        def compile_graph(module: torch.fx.GraphModule, _: Any) -> Any:
            graphs[which].append(module.graph)
            return make_boxed_func(module.forward)

        return compile_graph

    backend = aot_autograd(
        fw_compiler=compiler("forward"), bw_compiler=compiler("backward"), inference_compiler=compiler("inference")
    )
    return torch.compile(call, backend=backend, fullgraph=True, dynamic=False), graphs


def cudagraph_obstacle(graph: torch.fx.Graph) -> Any:
    """What Inductor itself would not record, where this version of torch says so."""
    utils = importlib.import_module("torch._inductor.utils")
    find = getattr(utils, "get_first_incompatible_cudagraph_node", None)
    return find and find(graph.owning_module)


def elsewhere(case: ModelCase, kind: str, **settings: Any) -> nn.Module:
    """A converted model of one layer on "meta", after a call (a layer's first one reads whether it is calibrated)."""
    fewer = {"n_layer": 1} if case is GPT2 else {"num_hidden_layers": 1}
    small = replace(case, config=lambda **changes: case.config(**{**fewer, **changes}))
    model = hf_linattn.convert(small.build(), case.settings(kind, **settings))
    if hf_linattn.needs_calibration(model):
        hf_linattn.calibrate(model, [case.inputs(4)])
    with torch.no_grad():
        model(**case.inputs())
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # of the stock model; its random numbers are not what is looked at
            module.p = 0.0
    return model.to("meta")


def combinations() -> list[Any]:
    """Models x kinds x settings x with and without a mask x passes; tracing takes seconds."""
    quick = {
        ("bert-classifier", "favor_plus", "random", True, True),
        ("gpt2", "eva", "random", False, True),
        ("vit", "lara", "learned", False, False),
    }
    return [
        pytest.param(
            case, *chosen[1:], id="-".join(map(str, chosen)), marks=[] if chosen in quick else pytest.mark.slow
        )
        for case in (BERT, GPT2, VIT)
        for kind in (CAUSAL_KINDS if case.is_causal else KINDS)
        for words in SETTINGS
        for masked in ((False,) if case is VIT else (False, True))
        for trains in (False, True)
        for chosen in [(case.name, kind, words, masked, trains)]
    ]


@pytest.mark.parametrize(("case", "kind", "words", "masked", "trains"), combinations())
def test_one_graph_without_the_host(case: ModelCase, kind: str, words: str, masked: bool, trains: bool) -> None:
    """Three training steps, or three forward passes without gradients."""
    model = elsewhere(case, kind, **SETTINGS[words]).train(trains)
    given = {name: torch.empty_like(z, device="meta") for name, z in case.inputs().items()}
    if masked:
        given["attention_mask"] = torch.empty_like(given["input_ids"])
    if case is GPT2:
        given["use_cache"] = False  # type: ignore[assignment]
    call, graphs = recorded(model)
    for _ in range(3):
        with torch.set_grad_enabled(trains):
            logits = call(**given)[0]
        if trains:
            logits.sum().backward()
    made = {which: len(some) for which, some in graphs.items()}
    assert made == {"forward": int(trains), "backward": int(trains), "inference": int(not trains)}
    for which, graph in ((which, graph) for which, some in graphs.items() for graph in some):
        assert len(graph.nodes) > 20
        assert faults(graph) == [], which
        assert cudagraph_obstacle(graph) is None, which


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x + torch.arange(x.shape[-1]).sum(),
        lambda x: x * torch.tensor(2.0),
        lambda x: x[torch.arange(2)],
    ],
)
def test_faults_are_seen(fault: Any) -> None:
    """The check itself: a table that is made on the CPU, as a scalar, as a constant and as an index."""
    call, graphs = recorded(fault)
    with contextlib.suppress(RuntimeError):  # some of them raise when they run
        call(torch.empty(3, 4, device="meta"))
    (graph,) = graphs["inference"]
    assert faults(graph)


# -- without a compiler -----------------------------------------------------------------------------------------------
class OnlyThere(TorchDispatchMode):
    """Raises where an operator has to do with a tensor on the CPU, or asks for a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        devices = {z.device.type for z in tree_leaves((args, kwargs, output)) if isinstance(z, Tensor)}
        assert name_of(func) not in HOST, func
        assert devices <= {"meta"}, (func, devices)
        return output


def attention_calls() -> dict[str, Any]:
    with torch.device("cpu"):
        projection = draw_projection(2, 8, 4, seed=0).to("meta")
    return {
        "favor": lambda q, **options: favor_attention(q, q, q, projection, **options),
        "favor, heavy keys": lambda q, **options: favor_attention(q, q, q, projection, num_heavy_keys=2, **options),
        "eva": lambda q, **options: eva_attention(q, q, q, num_chunks=4, chunk_size=2, **options),
    }


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["favor", "favor, heavy keys", "eva"])
@pytest.mark.parametrize("tokens", [4, 21])
def test_functions_stay_on_the_device(name: str, is_causal: bool, masked: bool, tokens: int) -> None:
    """Forward and backward, outside of compiled code: a row inside one window, and one of several windows."""
    if is_causal and "heavy" in name:
        return
    query = torch.empty(2, 2, tokens, 4, device="meta", requires_grad=True)
    options: dict[str, Any] = {"window_size": 8 if tokens < 8 else 4, "is_causal": is_causal}
    if masked:
        options["key_mask"] = torch.empty(2, tokens, dtype=torch.bool, device="meta")
    call = attention_calls()[name]
    call(query, **options)  # tables that are kept are made once, on the CPU
    with OnlyThere():
        call(query, **options).sum().backward()


LAUNCHES = [
    pytest.param(module, name, id=f"{module.__name__.rpartition('.')[2]}-{name}")
    for module in (attend, block_slots, causal_slots, decode, half_norm, window_chunks)
    for name in importlib.import_module(f"{module.__name__}.triton_launch").COMPILE_CASES
]


@pytest.mark.parametrize(("package", "name"), LAUNCHES)
def test_launches_of_triton_read_no_values(package: Any, name: str) -> None:
    """What is around a kernel's launch, on tensors without values, with the launch recorded instead of done."""
    pytest.importorskip("triton")
    common = importlib.import_module("hf_linattn.kernels.triton_common")
    case = importlib.import_module(f"{package.__name__}.triton_launch").COMPILE_CASES[name]
    with common.recording() as launches, torch.device("meta"), OnlyThere():
        case()
    assert launches
