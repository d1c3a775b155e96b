"""Models under `torch.compile`, `torch.export`, gradient checkpointing and autocast: the same numbers as without."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from cases import (
    BY_NAME,
    CAUSAL_KINDS,
    GPT2,
    KINDS,
    MODES,
    NATIVE_CAUSAL_KINDS,
    VIT,
    VOCAB,
    ModelCase,
    checkpoint_activations,
    converted,
    largest,
    native,
)
from torch import Tensor

from hf_linattn.functional import eva_attention, favor_attention, lara_attention

CLASSIFIER = BY_NAME["bert-classifier"]
# Tracing takes seconds: in the quick run those whose operators differ.
SOME_KINDS = [pytest.param(kind, marks=[] if kind in ("favor_plus", "eva") else pytest.mark.slow) for kind in KINDS]
INDUCTOR = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")


def one_layer(case: ModelCase, kind: str, mode: Callable[..., Any] = converted, **settings: Any) -> Any:
    """Each layer is traced anew: one is enough. No dropout, whose random numbers a compiler draws differently."""
    small = {"n_layer": 1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    if case is not GPT2:
        small = {"num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    fewer = ModelCase(**{**vars(case), "config": lambda **changes: case.config(**{**small, **changes})})
    return mode(fewer, kind, **settings)


def inputs_of(case: ModelCase, *, batch: int = 2, tokens: int | None = None) -> dict[str, Tensor]:
    """With padding in one row of text."""
    inputs = case.inputs(batch)
    if case is VIT:
        return inputs
    ids = inputs["input_ids"][:, :tokens]
    mask = torch.ones_like(ids)
    mask[-1, ids.shape[1] * 3 // 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def step(model: Any, call: Callable[..., Any], inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradients of all parameters after one training step."""
    model.zero_grad(set_to_none=True)
    logits = call(**inputs)[0]
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).reshape(logits.shape).cos()
    (logits * weights).sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_step(model: Any, call: Callable[..., Any], inputs: dict[str, Tensor], limit: float = 1e-5) -> None:
    logits, grads = step(model, call, inputs)
    expected, expected_grads = step(model, model, inputs)
    assert largest(logits - expected) < limit * float(expected.abs().max())
    assert grads.keys() == expected_grads.keys()
    # Some gradients are 0 but for rounding: those of key biases under exact softmax.
    scale = max(float(g.abs().max()) for g in expected_grads.values())
    for name, grad in expected_grads.items():
        assert largest(grads[name] - grad) < limit * scale, name


def combinations(*, native_mode: bool, windows: tuple[bool, ...]) -> list[Any]:
    """Models x kinds x windows that exist."""
    causal_kinds = NATIVE_CAUSAL_KINDS if native_mode else CAUSAL_KINDS
    return [
        pytest.param(case, kind, window, id=f"{case.name}-{kind}-{'window' if window else 'plain'}")
        for case in (CLASSIFIER, GPT2, VIT)
        for kind in (causal_kinds if case.is_causal else KINDS)
        for window in windows
        if window or kind != "eva"  # EVA always has a window
    ]


def window_of(case: ModelCase, window: bool) -> int:
    return case.window if window else 0


# -- torch.compile ---------------------------------------------------------------------------------------------------


TRAINED = [(CLASSIFIER, "favor_plus"), (GPT2, "eva"), (VIT, "favor_plus")]  # by default


def check_compiled(case: ModelCase, kind: str, window: bool, mode: Callable[..., Any], backend: Any) -> None:
    torch._dynamo.reset()
    model = one_layer(case, kind, mode, window_size=window_of(case, window))
    inputs = inputs_of(case)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert largest(compiled(**inputs)[0] - model(**inputs)[0]) < 1e-5
    check_step(model, torch.compile(model.train(), fullgraph=True, backend=backend), inputs)


@pytest.mark.parametrize(
    ("case", "kind", "window"),
    [
        pytest.param(*c.values, id=c.id, marks=[] if c.values[:2] in TRAINED else pytest.mark.slow)
        for c in combinations(native_mode=False, windows=(True,))
    ],
)
def test_training_step_without_graph_breaks(case: ModelCase, kind: str, window: bool) -> None:
    torch._dynamo.reset()
    model = one_layer(case, kind, window_size=window_of(case, window)).train()
    check_step(model, torch.compile(model, fullgraph=True, backend="aot_eager"), inputs_of(case))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kind", "window"), combinations(native_mode=False, windows=(False, True)))
def test_converted_models_compile(case: ModelCase, kind: str, window: bool) -> None:
    check_compiled(case, kind, window, converted, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kind", "window"), combinations(native_mode=True, windows=(False, True)))
def test_native_models_compile(case: ModelCase, kind: str, window: bool) -> None:
    check_compiled(case, kind, window, native, "aot_eager")


@INDUCTOR
@pytest.mark.slow
@pytest.mark.parametrize(("case", "kind"), [(CLASSIFIER, "favor_plus"), (GPT2, "eva"), (VIT, "lara")])
def test_default_compiler(case: ModelCase, kind: str) -> None:
    """Inductor, which lays tensors out in memory as it likes."""
    check_compiled(case, kind, True, converted, "inductor")


@pytest.mark.parametrize("kind", ["eva", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "eva")])
def test_another_batch_size_is_compiled_once(kind: str) -> None:
    torch._dynamo.reset()
    model = one_layer(CLASSIFIER, kind)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (2, 3, 5, 7):
        inputs = inputs_of(CLASSIFIER, batch=batch)
        with torch.no_grad():
            assert largest(compiled(**inputs)[0] - model(**inputs)[0]) < 1e-5
    assert counter.frame_count <= 2  # for the first size, and for all others


@pytest.mark.parametrize("kind", ["favor_plus", pytest.param("favor_sharp", marks=pytest.mark.slow)])
def test_another_length_is_compiled_once(kind: str) -> None:
    """Without a window. With one the number of windows is part of the graph."""
    torch._dynamo.reset()
    model = one_layer(CLASSIFIER, kind, window_size=0)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for tokens in (40, 31, 25, 17):
        inputs = inputs_of(CLASSIFIER, tokens=tokens)
        with torch.no_grad():
            assert largest(compiled(**inputs)[0] - model(**inputs)[0]) < 1e-5
    assert counter.frame_count <= 2


# -- torch.export ----------------------------------------------------------------------------------------------------


def exported(model: Any, inputs: dict[str, Tensor]) -> Any:
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(model, (), kwargs=inputs, dynamic_shapes={name: {0: batch} for name in inputs})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", SOME_KINDS)
@pytest.mark.parametrize(
    "case", [GPT2, *(pytest.param(c, marks=pytest.mark.slow) for c in (CLASSIFIER, VIT))], ids=lambda case: case.name
)
def test_exported_attention(case: ModelCase, kind: str, mode: Callable[..., Any]) -> None:
    """Any batch size, and the gradients of the model."""
    if case.is_causal and kind not in (NATIVE_CAUSAL_KINDS if mode is native else CAUSAL_KINDS):
        return
    model = one_layer(case, kind, mode)
    program = exported(model, inputs_of(case)).module()
    for batch in (1, 2, 5):
        inputs = inputs_of(case, batch=batch)
        assert largest(program(**inputs)[0] - model(**inputs)[0]) < 3e-6
    check_exported_gradients(model, program, inputs_of(case))
    assert not any(isinstance(z, torch._subclasses.FakeTensor) for z in model(**inputs_of(case))[:1])


def check_exported_gradients(model: Any, program: Any, inputs: dict[str, Tensor]) -> None:
    _, grads = step(program, program, inputs)
    _, expected = step(model, model, inputs)
    assert grads.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, grad in expected.items():
        assert largest(grads[name] - grad) < 1e-6 * scale, name


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_exported_operators_have_gradients_after_loading(kind: str) -> None:
    """A loaded program calls the operators alone, not the functions around them."""
    model, inputs = one_layer(CLASSIFIER, kind, window_size=8), inputs_of(CLASSIFIER)
    program = exported(model, inputs)
    decomposed = program.run_decompositions()  # for inference: without what stops gradients
    assert any("hf_linattn" in str(node.target) for node in decomposed.graph.nodes)
    assert largest(decomposed.module()(**inputs)[0] - model(**inputs)[0]) < 1e-6
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert largest(loaded(**inputs)[0] - model(**inputs)[0]) < 1e-6
    check_exported_gradients(model, loaded, inputs)


# -- gradient checkpointing and autocast -----------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("case", "kind", "window"), combinations(native_mode=False, windows=(False, True)))
def test_gradient_checkpointing(case: ModelCase, kind: str, window: bool, use_reentrant: bool) -> None:
    model = one_layer(case, kind, window_size=window_of(case, window)).train()
    logits, expected = step(model, model, inputs_of(case))
    # Its name in Transformers changed.
    checkpoint_activations(model, {"use_reentrant": use_reentrant})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    again, found = step(model, model, inputs_of(case))
    assert torch.equal(again, logits)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("case", "kind", "window"), combinations(native_mode=True, windows=(True,)))
def test_compiled_under_autocast(
    case: ModelCase, kind: str, window: bool, dtype: torch.dtype, mode: Callable[..., Any]
) -> None:
    """As close to float32 as the model's own products in half precision are."""
    model = one_layer(case, kind, mode, window_size=window_of(case, window)).train()
    softmax = one_layer(case, "favor_plus", native)
    softmax.set_attn_implementation("sdpa")

    def error(some: Any) -> tuple[float, float]:
        def half(**inputs: Any) -> Any:
            with torch.autocast("cpu", dtype):
                return some(**inputs)

        (logits, grads), (expected, expected_grads) = (step(some, call, inputs_of(case)) for call in (half, some))
        assert logits.isfinite().all()
        assert grads.keys() == expected_grads.keys()
        assert all(g.isfinite().all() for g in grads.values())
        scale = max(float(g.abs().max()) for g in expected_grads.values())
        worst = max(largest(grads[name] - g) for name, g in expected_grads.items())
        return largest(logits - expected) / float(expected.abs().max()), worst / scale

    for ours, theirs in zip(error(model), error(softmax), strict=True):
        assert ours < 3 * theirs + 1e-3


# -- torch.func ------------------------------------------------------------------------------------------------------


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DIRECTIONS = random(2, 8, 4, seed=9)
ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "favor": lambda q, k, v, **o: favor_attention(q, k, v, DIRECTIONS, **o),
    "lara": lambda q, k, v, **o: lara_attention(q, k, v, num_landmarks=4, **o),
    "eva": lambda q, k, v, **o: eva_attention(
        q, k, v, **{"num_chunks": 4, "chunk_size": 2, **o, "window_size": o.get("window_size") or 4}
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_size": 4},
    "causal": {"is_causal": True},
    "causal window": {"is_causal": True, "window_size": 4},
    "mask": {"window_size": 4, "key_mask": torch.tensor([[True] * 11 + [False, False]])},
}
FUNC_CASES = [
    pytest.param(name, options, id=f"{name}-{options}")
    for name in ATTENTIONS
    for options in OPTIONS
    if name != "lara" or "causal" not in options  # takes proposals
]


@pytest.mark.parametrize(("name", "options"), FUNC_CASES)
def test_attention_under_torch_func(name: str, options: str) -> None:
    """`grad`, `vmap`, `vmap(grad)`, and what has no derivative."""
    rows = [tuple(random(1, 2, 13, 4, seed=3 * row + i) for i in range(3)) for row in range(3)]
    batched = [torch.stack(z) for z in zip(*rows, strict=True)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ATTENTIONS[name](q, k, v, **OPTIONS[options])

    def scalar(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v).sin().sum()

    def plain(row: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        leaves = [z.clone().requires_grad_() for z in row]
        return torch.autograd.grad(scalar(*leaves), leaves)

    outputs = torch.func.vmap(attend)(*batched)
    grads = torch.func.vmap(torch.func.grad(scalar, argnums=(0, 1, 2)))(*batched)
    for i, row in enumerate(rows):
        torch.testing.assert_close(outputs[i], attend(*row))
        alone = torch.func.grad(scalar, argnums=(0, 1, 2))(*row)
        for mine, ours, theirs in zip(alone, (g[i] for g in grads), plain(row), strict=True):
            torch.testing.assert_close(mine, theirs)
            torch.testing.assert_close(ours, theirs)
    q, k, v = rows[0]
    for other in (
        lambda: torch.func.jvp(lambda q: scalar(q, k, v), (q,), (q,)),
        lambda: torch.func.grad(lambda q: torch.func.grad(scalar)(q, k, v).sum())(q),
        lambda: torch.autograd.functional.hessian(lambda v: scalar(q, k, v), v),
    ):
        with pytest.raises(NotImplementedError, match="first derivatives only|jvp function"):
            other()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_functional_call(kind: str, mode: Callable[..., Any]) -> None:
    """Gradients of every row on its own, as differential privacy needs them."""
    model = one_layer(CLASSIFIER, kind, mode)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    ids = torch.randint(3, VOCAB, (3, 21))

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (), {"input_ids": row.unsqueeze(0)})[0].sin().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="error")(parameters, ids)
    for i, row in enumerate(ids):
        model.zero_grad()
        model(input_ids=row.unsqueeze(0))[0].sin().sum().backward()
        scale = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
        for name, p in model.named_parameters():
            if p.grad is not None:
                assert largest(found[name][i] - p.grad) < 1e-5 * scale, name


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_backward_pass_under_autocast_is_that_without(is_causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 70, 4, generator=generator).requires_grad_() for _ in range(3))
    directions = torch.randn(2, 8, 4, generator=generator)
    out = favor_attention(q, k, v, directions, is_causal=is_causal)
    expected = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(out.sum(), (q, k, v))
    torch.testing.assert_close(found, expected)
