r"""Softmax attention with a bias per key and a differentiable log-sum-exp, as Triton kernels.

    s[t, n] = query_t . key_n + bias_n                         (-inf where not visible)
    output_t = sum_n softmax_n(s[t, n]) value_n                log_mass_t = logsumexp_n s[t, n]

Both softmaxes of attention through slots are this: few queries (slots) over very many keys, and very many queries
over few keys. Nothing of size `[queries, keys]` is stored. Source of the tiling: Dao 2023, arXiv:2307.08691; new are
the gradient of the log-sum-exp (it joins the row sums of the output's) and that of the bias.

Where one side is short there would be too few programs, so the long side is cut into parts whose results are merged
(forward) or summed (backward) in a fixed order: there are no atomic additions, and two runs agree bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _attend_backward, _attend_forward
from ._common import CompileCases, check, launch, padded, rows, splits

_NONE, _KEYS, _PAIRS = 0, 1, 2  # what `visible` depends on: nothing (absent), the key, or query and key

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class _Blocks(NamedTuple):
    queries: int
    keys: int
    num_warps: int
    num_stages: int


# Blocks by (bytes per element, padded head_dim). Chosen so that the tiles of all stages fit into the shared memory of
# sm_80 (163 KiB a block) and accumulators into registers, not tuned on a device: the same everywhere.
_FORWARD = {
    (2, 64): _Blocks(128, 64, 4, 3),
    (2, 128): _Blocks(128, 64, 8, 2),
    (2, 256): _Blocks(128, 32, 8, 2),
    (4, 64): _Blocks(64, 32, 4, 2),
    (4, 128): _Blocks(64, 32, 8, 2),
    (4, 256): _Blocks(32, 32, 8, 1),
}
_OF_QUERIES = {
    (2, 64): _Blocks(128, 64, 8, 2),
    (2, 128): _Blocks(128, 64, 8, 2),
    (2, 256): _Blocks(64, 32, 8, 2),
    (4, 64): _Blocks(64, 32, 8, 2),
    (4, 128): _Blocks(32, 32, 8, 2),
    (4, 256): _Blocks(32, 16, 8, 1),
}
_OF_KEYS = {
    (2, 64): _Blocks(64, 128, 8, 2),
    (2, 128): _Blocks(64, 64, 8, 2),
    (2, 256): _Blocks(32, 64, 8, 2),
    (4, 64): _Blocks(32, 64, 8, 2),
    (4, 128): _Blocks(32, 32, 8, 2),
    (4, 256): _Blocks(16, 32, 8, 1),
}
# The least work of a part, when the long side is cut: below it the parts' results cost more than they save.
_LEAST_PART = 512
