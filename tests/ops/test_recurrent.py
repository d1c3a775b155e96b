"""Causal attention one token at a time, from a state of constant size, gives what the parallel form gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from variants import fixed_statistics

from hf_linattn.functional import (
    CalibratedProposals,
    FavorStatistics,
    draw_projection,
    favor_attention,
    lara_attention,
    sample_proposals,
)
from hf_linattn.kernels.attend import attend
from hf_linattn.kernels.attention_state import AttentionState, merge_states
from hf_linattn.ops.favor.features import favor_feature_map
from hf_linattn.ops.inputs import scale_inputs
from hf_linattn.ops.lara.features import proposal_feature_map
from hf_linattn.ops.linear_weights import LinearSlotWeights

HEADS, DIM = 2, 3
PROJECTION = draw_projection(HEADS, 5, DIM, seed=0).double()


def proposals() -> CalibratedProposals:
    generator = torch.Generator().manual_seed(1)
    centroids, noise = (torch.randn(HEADS, n, DIM, generator=generator, dtype=torch.float64) for n in (2, 4))
    return sample_proposals(centroids, noise)


def log_weights(kind: str, x: Tensor, y: Tensor) -> tuple[LinearSlotWeights, LinearSlotWeights]:
    if kind == "lara":
        feature_map = proposal_feature_map(x, proposals())
    else:
        feature_map = favor_feature_map(x, PROJECTION, statistics(kind))
    return feature_map.query_weights(x), feature_map.key_weights(y)


def statistics(kind: str) -> FavorStatistics | None:
    return fixed_statistics(HEADS, DIM) if kind == "favor_sharp" else None


def recurrent(kind: str, query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Keeps the slots of complete blocks and the keys of the current one: nothing else of the past."""
    x, y = scale_inputs(query, key, None)
    state: AttentionState | None = None
    current: list[int] = []
    outputs = []
    for t in range(x.shape[2]):
        if len(current) == max(window, 1):
            _, old = log_weights(kind, x[:, :, current], y[:, :, current])
            block = old.summarise(value[:, :, current])
            state = block if state is None else merge_states([state, block])
            current = []
        current.append(t)
        reader, own = log_weights(kind, x[:, :, t : t + 1], y[:, :, t : t + 1])
        if window:
            parts = [attend(x[:, :, t : t + 1], y[:, :, current], value[:, :, current])]
        else:
            parts = [reader.add_token_bias(reader.read(own.summarise(value[:, :, t : t + 1])))]
        if state is not None:
            parts.append(reader.add_token_bias(reader.read(state)))
        outputs.append(merge_states(parts).output)
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("kind", ["favor_plus", "favor_sharp", "lara"])
@given(
    tokens=st.integers(1, 40), window=st.integers(0, 9), chunk=st.sampled_from([1, 4, 32]), seed=st.integers(0, 999)
)
def test_recurrent_equals_parallel(kind: str, tokens: int, window: int, chunk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, HEADS, tokens, DIM, generator=generator, dtype=torch.float64) for _ in range(3))
    options = {"is_causal": True, "window_size": window, "chunk_size": chunk}
    if kind == "lara":
        full = lara_attention(q, k, v, proposals=proposals(), **options)
    else:
        full = favor_attention(q, k, v, PROJECTION, statistics=statistics(kind), **options)
    torch.testing.assert_close(recurrent(kind, q, k, v, window), full, rtol=0, atol=1e-11)
