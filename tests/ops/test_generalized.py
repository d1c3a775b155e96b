"""Generalised kernels against the plain formula: sums, prefix sums, padding, gradients, causality, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import per_row
from torch import Tensor

from hf_linattn.errors import InputError, UnsupportedError
from hf_linattn.functional import draw_projection
from hf_linattn.ops.favor.generalized import KERNELS, generalized_attention, generalized_log_features

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda z: z.clamp_min(0),
    "exp": torch.exp,
    "sigmoid": lambda z: 1 / (1 + torch.exp(-z)),
    "softplus": lambda z: torch.log1p(torch.exp(z)),
    "abs": torch.abs,
    "square": lambda z: z * z,
}
HEADS, DIM, FEATURES = 2, 4, 7
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
both = pytest.mark.parametrize("is_causal", [False, True])


def inputs(tokens: int, batch: int = 2, seed: int = 0, keys: int | None = None, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = (tokens, keys or tokens, keys or tokens)
    return [
        torch.randn(batch, HEADS, n, DIM, generator=generator, dtype=torch.float64) * s
        for n, s in zip(lengths, (scale, scale, 1.0), strict=True)
    ]


def directions(shared: bool = False) -> Tensor:
    return draw_projection(None if shared else HEADS, FEATURES, DIM, seed=3).double()


def naive(x: Tensor, y: Tensor, v: Tensor, *, w: Tensor, kernel: str, epsilon: float, is_causal: bool) -> Tensor:
    """`phi(Q) (phi(K)^T V) / (phi(Q) sum phi(K))` of one row and head; prefix sums if causal; 0 / 0 is 0."""
    phi_x, phi_y = (PLAIN[kernel](z @ w.T) + epsilon for z in (x, y))
    if not is_causal:
        total = phi_x @ phi_y.sum(0)
        return (phi_x @ (phi_y.T @ v)) / torch.where(total > 0, total, 1.0)[:, None]
    outputs, state, mass = [], torch.zeros(len(w), v.shape[-1]).to(v), torch.zeros(len(w)).to(v)
    skipped = len(y) - len(x)
    for n in range(len(y)):
        state, mass = state + phi_y[n][:, None] * v[n], mass + phi_y[n]
        if n >= skipped:
            total = phi_x[n - skipped] @ mass
            outputs.append(phi_x[n - skipped] @ state / torch.where(total > 0, total, 1.0))
    return torch.stack(outputs)


def expected(q: Tensor, k: Tensor, v: Tensor, w: Tensor, key_mask: Tensor | None = None, **options: Any) -> Tensor:
    own = w if w.ndim == 3 else w.expand(HEADS, -1, -1)
    scaling = options.pop("scaling", None)
    return per_row(naive, q, k, v, key_mask, scaling, per_head=[lambda _, head: {"w": own[head]}], **options)


def close(ours: Tensor, theirs: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


MASKS = {
    "full": None,
    "padded": torch.arange(45) < torch.tensor([[45], [30]]),
    "left": torch.arange(45) >= torch.tensor([[0], [11]]),
    "holes": torch.arange(45) % 3 != torch.tensor([[0], [1]]),
    "empty row": torch.arange(45) < torch.tensor([[45], [0]]),
}


@every_kernel
@both
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("epsilon", [1e-3, 0.0])
def test_the_plain_formula(kernel: str, is_causal: bool, mask: str, epsilon: float) -> None:
    q, k, v = inputs(45)
    for w in (directions(), directions(shared=True)):
        for chunk_size, scaling in ((8, None), (64, 0.7), (1, None)):
            ours = generalized_attention(
                q,
                k,
                v,
                w,
                kernel=kernel,
                kernel_epsilon=epsilon,
                key_mask=MASKS[mask],
                scaling=scaling,
                is_causal=is_causal,
                chunk_size=chunk_size,
            )
            options = {"kernel": kernel, "epsilon": epsilon, "is_causal": is_causal, "scaling": scaling}
            close(ours, expected(q, k, v, w, MASKS[mask], **options))


def test_defaults_are_performer_relu() -> None:
    """relu, epsilon 1e-3, queries and keys each scaled by head_dim ** -0.25."""
    q, k, v = inputs(9)
    w = directions()
    phi_q, phi_k = ((DIM**-0.25 * z @ w.mT).relu() + 1e-3 for z in (q, k))
    weights = phi_q @ phi_k.mT
    close(generalized_attention(q, k, v, w), weights @ v / weights.sum(-1, keepdim=True))


@both
def test_fewer_queries_than_keys(is_causal: bool) -> None:
    q, k, v = inputs(5, keys=13)
    w = directions()
    ours = generalized_attention(q, k, v, w, is_causal=is_causal, chunk_size=4)
    for b in range(2):
        for h in range(HEADS):
            row = naive(
                q[b, h] * DIM**-0.25,
                k[b, h] * DIM**-0.25,
                v[b, h],
                w=w[h],
                kernel="relu",
                epsilon=1e-3,
                is_causal=is_causal,
            )
            close(ours[b, h], row)


def test_cross_attention_of_equal_lengths() -> None:
    q, k, v = inputs(9)
    w, mask = directions(), torch.arange(9) < torch.tensor([[9], [4]])
    ours = generalized_attention(q, k, v, w, key_mask=mask, is_cross=True)
    close(ours[1:], generalized_attention(q[1:], k[1:, :, :4], v[1:, :, :4], w))
    assert (ours[1, :, 4:] != 0).all()
    with pytest.raises(InputError, match="is_cross=True.*is_causal=False"):
        generalized_attention(q, k, v, w, is_cross=True, is_causal=True)


@every_kernel
@both
@pytest.mark.parametrize("epsilon", [1e-3, 0.0])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_generalized_kernels(kernel: str, is_causal: bool, epsilon: float, masked: bool) -> None:
    tensors = [z.requires_grad_() for z in (*inputs(7, batch=1), directions())]
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1]]).bool() if masked else None

    def function(*z: Tensor) -> Tensor:
        return generalized_attention(
            *z, kernel=kernel, kernel_epsilon=epsilon, key_mask=mask, is_causal=is_causal, chunk_size=4
        )

    torch.autograd.gradcheck(function, tensors, fast_mode=True)


@every_kernel
@pytest.mark.parametrize("epsilon", [1e-3, 0.0])
@pytest.mark.parametrize("chunk_size", [1, 4, 32])
def test_nothing_of_a_later_token_enters(kernel: str, epsilon: float, chunk_size: int) -> None:
    tokens = 19
    q, k, v = (z.requires_grad_() for z in inputs(tokens, batch=1))
    out = generalized_attention(
        q, k, v, directions(), kernel=kernel, kernel_epsilon=epsilon, is_causal=True, chunk_size=chunk_size
    )
    for t in range(tokens):
        for gradient in torch.autograd.grad(out[:, :, t].sum(), (q, k, v), retain_graph=True):
            assert (gradient[:, :, t + 1 :] == 0).all()
    assert (torch.autograd.grad(out[:, :, -1].sum(), v)[0][:, :, :-1].abs().sum(-1) > 0).any()


@given(
    kernel=st.sampled_from(KERNELS),
    tokens=st.integers(1, 40),
    extra=st.integers(0, 9),
    is_causal=st.booleans(),
    epsilon=st.sampled_from([0.0, 1e-6, 1e-3, 1.0]),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    chunk_size=st.sampled_from([1, 2, 8, 64]),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
@settings(max_examples=examples(80), derandomize=True, database=None)
def test_any_shape_and_any_padding(
    kernel: str,
    tokens: int,
    extra: int,
    is_causal: bool,
    epsilon: float,
    scale: float,
    chunk_size: int,
    seed: int,
    data: st.DataObject,
) -> None:
    q, k, v = inputs(tokens, batch=1, seed=seed, scale=scale)
    w = directions()
    options: dict[str, Any] = {"kernel": kernel, "kernel_epsilon": epsilon, "is_causal": is_causal}
    plain = generalized_attention(q, k, v, w, chunk_size=chunk_size, **options)
    close(plain, expected(q, k, v, w, kernel=kernel, epsilon=epsilon, is_causal=is_causal), atol=1e-10)
    places = torch.tensor(sorted(data.draw(st.permutations(range(tokens + extra)))[:tokens]))
    mask = torch.zeros(1, tokens + extra, dtype=torch.bool)
    mask[0, places] = True
    padded = []
    for z in (q, k, v):
        wide = torch.full((1, HEADS, tokens + extra, DIM), math.nan, dtype=torch.float64)
        wide[:, :, places] = z
        padded.append(wide.requires_grad_())
    out = generalized_attention(*padded, w, key_mask=mask, chunk_size=chunk_size, **options)
    close(out[:, :, places], plain)
    assert (out[:, :, ~mask[0]] == 0).all()
    for gradient in torch.autograd.grad(out.square().sum(), padded, materialize_grads=True):
        assert gradient.isfinite().all()
        assert (gradient[:, :, ~mask[0]] == 0).all()


@every_kernel
def test_constant_values_are_kept(kernel: str) -> None:
    q, k, v = inputs(33, scale=3.0)
    for is_causal in (False, True):
        out = generalized_attention(q, k, torch.ones_like(v), directions(), kernel=kernel, is_causal=is_causal)
        close(out, torch.ones_like(v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_kernel
def test_log_features_of_extreme_inputs(kernel: str, dtype: torch.dtype) -> None:
    z = torch.tensor([-1e4, -300, -100, -40, -39.9, -20, -1, 0, 1, 20, 40, 100, 300, 1e4], dtype=dtype)
    reference = {
        "relu": lambda x: math.log(x) if x > 0 else -math.inf,
        "exp": lambda x: x,
        "sigmoid": lambda x: x - math.log1p(math.exp(x)) if x < 0 else -math.log1p(math.exp(-x)),
        "softplus": lambda x: (
            (math.log(math.log1p(math.exp(x))) if x > -300 else x) if x < 0 else math.log(x + math.log1p(math.exp(-x)))
        ),
        "abs": lambda x: math.log(abs(x)) if x else -math.inf,
        "square": lambda x: 2 * math.log(abs(x)) if x else -math.inf,
    }[kernel]
    for epsilon in (0.0, 1e-3):
        x = z.clone().requires_grad_()
        ours = generalized_log_features(x[:, None], torch.ones(1, 1, dtype=dtype), kernel, epsilon)[:, 0]
        values = [reference(float(value)) for value in z]
        if epsilon:
            log_eps = math.log(epsilon)
            values = [max(a, log_eps) + math.log1p(math.exp(-abs(a - log_eps))) for a in values]
        theirs = torch.tensor(values, dtype=torch.float64)
        rtol, atol = (1e-6, 1e-7) if dtype == torch.float32 else (1e-13, 1e-13)
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=atol)
        ours.masked_fill(~ours.isfinite(), 0.0).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_query_that_overlaps_no_key_with_and_without_epsilon() -> None:
    w = torch.eye(2, dtype=torch.float64)
    q = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64).view(1, 1, 2, 2)
    k = torch.tensor([[-1.0, 1.0], [-1.0, 2.0]], dtype=torch.float64).view(1, 1, 2, 2).requires_grad_()
    v = torch.tensor([[3.0, 3.0], [5.0, 5.0]], dtype=torch.float64).view(1, 1, 2, 2)
    for is_causal in (False, True):
        out = generalized_attention(q, k, v, w, kernel_epsilon=0.0, is_causal=is_causal)
        assert out[0, 0, 0].tolist() == [0, 0]
        assert out[0, 0, 1].tolist() == pytest.approx([13 / 3] * 2)
        assert torch.autograd.grad(out.sum(), k)[0].isfinite().all()
        alone = (z[:, :, :1] for z in (q, k, v))
        assert not generalized_attention(*alone, w, kernel_epsilon=0.0, is_causal=is_causal).any()
        out = generalized_attention(q, k, v, w, is_causal=is_causal)
        assert (out[0, 0, 0] >= 3).all()


@both
def test_half_precision_and_dropout(is_causal: bool) -> None:
    q, k, v = (z.float() for z in inputs(21))
    w = directions().float()
    exact = generalized_attention(q, k, v, w, is_causal=is_causal)
    low = generalized_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), w, is_causal=is_causal)
    assert low.dtype == torch.bfloat16
    close(low.float(), exact, atol=0.05)
    torch.manual_seed(0)
    options: dict[str, Any] = {"is_causal": is_causal, "slot_dropout": 0.3}
    dropped = torch.stack([generalized_attention(q, k, v, w, **options) for _ in range(400)])
    assert not torch.equal(dropped[0], dropped[1])
    z = (dropped.mean(0) - exact) / (dropped.std(0) / 20).clamp_min(1e-6)
    assert z.abs().max() < 5  # dropout keeps the mean


@both
def test_compiles_to_one_graph(is_causal: bool) -> None:
    torch._dynamo.reset()
    q, k, v = inputs(21)
    w, mask = directions(), torch.arange(21) < torch.tensor([[21], [8]])
    for kernel in KERNELS:
        compiled = torch.compile(generalized_attention, fullgraph=True, backend="eager")
        options: dict[str, Any] = {"kernel": kernel, "is_causal": is_causal, "key_mask": mask}
        close(compiled(q, k, v, w, **options), generalized_attention(q, k, v, w, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 4}, "not on the scale of the softmax.*window_size=4; set it to 0"),
        ({"overlap_window": True}, "overlap_window=True; set it to False"),
        ({"num_global_tokens": 1}, "num_global_tokens=1; set it to 0"),
        ({"num_heavy_keys": 2}, "num_heavy_keys=2; set it to 0"),
    ],
)
@both
def test_nothing_exact_beside_it(options: dict[str, Any], message: str, is_causal: bool) -> None:
    with pytest.raises(UnsupportedError, match=message):
        generalized_attention(*inputs(5), directions(), is_causal=is_causal, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "relus"}, "kernel must be one of.*'relus'.*Did you mean 'relu'"),
        ({"kernel": "softmax"}, "kernel must be one of"),
        ({"kernel_epsilon": -1e-3}, "kernel_epsilon must be a finite number >= 0 .*got -0.001"),
        ({"kernel_epsilon": math.inf}, "kernel_epsilon must be"),
        ({"kernel_epsilon": math.nan}, "kernel_epsilon must be"),
        ({"chunk_size": 3}, "chunk_size must be a power of two, or None; got 3"),
        ({"projection": torch.zeros(3, 5, DIM)}, r"projection must be \[heads, features, head_dim\].*\(3, 5, 4\)"),
        ({"projection": torch.zeros(5, 3)}, "projection must be"),
        ({"projection": torch.zeros(1, HEADS, 5, DIM)}, "projection must be"),
        ({"scaling": 0.0}, "scaling must be a finite number > 0"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generalized_attention(*inputs(5), **{"projection": directions(), **options})
