"""What the kinds are compared with: softmax attention under every backend, and other libraries."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Sequence
from functools import partial

import psutil
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..ops.favor.random_features import derive_seed, draw_projection
from .kinds import layer_for, registered
from .workload import DTYPES, AttentionCall, Contender, Unavailable, Workload, check_length, choose

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
CPU_BACKENDS = ("flash", "math")  # a CPU has no others
PEERS = ("sdpa", "performer-pytorch", "flash-linear-attention")
MEMORY_SHARE = 0.5  # of the memory that is free: what a contender with large matrices may take


def peer_contenders(
    names: Sequence[str], device: str, num_features: int, max_softmax_length: int | None = None
) -> list[Contender]:
    """The contenders behind names of `PEERS`. Raises `ConfigError` for any other name."""
    made = []
    for name in names:
        if choose("peers", name, PEERS) == "sdpa":
            backends = [None, *(BACKENDS if torch.device(device).type == "cuda" else CPU_BACKENDS)]
            for backend in backends:
                build = partial(_softmax, backend, max_softmax_length)
                made.append(Contender(f"sdpa:{backend}" if backend else "sdpa", "softmax", build))
        else:
            peer = {"performer-pytorch": _performer, "flash-linear-attention": _flash_linear_attention}[name]
            made.append(Contender(name, "peer", partial(peer, num_features)))
    return made


def require_memory(needed: float, device: str) -> None:
    """Raise `Unavailable` rather than be ended by the system: a CPU process that takes too much is killed."""
    is_cuda = torch.device(device).type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if is_cuda else psutil.virtual_memory().available
    if needed > MEMORY_SHARE * free:
        raise Unavailable(f"needs about {needed / 2**30:.1f} GiB")


def _softmax(backend: str | None, longest: int | None, work: Workload) -> AttentionCall:
    """Transformers' own function, or one backend of PyTorch's, for inputs up to a length."""
    check_length(work, longest)
    if backend is None:
        return registered("sdpa", layer_for(work))
    if backend == "math":
        # Logits and weights, in training their gradients too; half precision is computed in float32.
        size = max(4, DTYPES[work.dtype].itemsize) * work.batch * work.heads * float(work.tokens) ** 2
        require_memory(size * (4 if work.is_training else 3), work.device)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(BACKENDS[backend]):
            return scaled_dot_product_attention(query, key, value, is_causal=work.is_causal)

    return attention


def directions(work: Workload, num_features: int) -> Tensor:
    """`[num_features, head_dim]`: the orthogonal directions of FAVOR+'s first head."""
    return draw_projection(work.heads, num_features, work.head_dim, seed=derive_seed(0, 0, "projection"))[0]


def _performer(num_features: int, work: Workload) -> AttentionCall:
    if importlib.util.find_spec("performer_pytorch") is None:
        raise Unavailable("not installed")
    if work.is_causal:
        # Its form without a CUDA extension: one [features, head_dim] matrix per token, and their cumulative sum,
        # of a 128th of the tokens at a time; in training all of them stay.
        tokens = work.tokens if work.is_training else -(-work.tokens // 128)
        states = work.batch * work.heads * tokens * num_features * work.head_dim * DTYPES[work.dtype].itemsize
        require_memory(states * 3.0, work.device)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints which form it found
        warnings.simplefilter("ignore")  # its imports are deprecated
        from performer_pytorch import FastAttention

        attention = FastAttention(work.head_dim, num_features, causal=work.is_causal, generalized_attention=False)
    attention.projection_matrix.copy_(directions(work, num_features))
    return attention.to(work.device).train(work.is_training)


def _flash_linear_attention(num_features: int, work: Workload) -> AttentionCall:
    if importlib.util.find_spec("fla") is None:
        raise Unavailable("not installed")
    if torch.device(work.device).type != "cuda":
        raise Unavailable("needs a GPU")
    if not work.is_causal:
        raise Unavailable("causal only")
    from fla.ops.linear_attn import chunk_linear_attn

    projection = directions(work, num_features).to(work.device)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        features = [linear_attention_features(tensor, projection) for tensor in (query, key)]
        output, _ = chunk_linear_attn(*(t.transpose(1, 2) for t in (*features, value)), scale=1.0, normalize=True)
        return output.transpose(1, 2)

    return attention


def linear_attention_features(tokens: Tensor, projection: Tensor) -> Tensor:
    """Positive features `[batch, heads, tokens, num_features]` for a kernel that takes features.

    One stabiliser for the whole tensor, and a constant added, as performer-pytorch does for keys.
    """
    scaled = tokens * tokens.shape[-1] ** -0.25
    exponent = scaled @ projection.to(tokens.dtype).mT - scaled.square().sum(-1, keepdim=True) / 2
    return (exponent - exponent.amax().detach()).exp() + 1e-4
