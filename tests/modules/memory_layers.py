"""Causal layers of every kind, and how they read a sequence piece by piece with a memory."""

from __future__ import annotations

from typing import Any

import torch
from cases import CAUSAL_KINDS
from torch import Tensor

from hf_linattn.modules.base import AttentionInputs, LayerShape, LinearAttention
from hf_linattn.modules.memory import RecurrentMemory
from hf_linattn.modules.registry import get_kind

BATCH, HEADS, DIM, TOKENS = 3, 2, 8, 45
SCALING = DIM**-0.5

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "favor_plus": ("favor_plus", {"window_size": 0}),
    "favor_plus-window": ("favor_plus", {"window_size": 4}),
    "favor_plus-overlap": ("favor_plus", {"window_size": 4, "overlap_window": True}),
    "favor_plus-shared": ("favor_plus", {"window_size": 5, "shared_projection": True}),
    "relu": ("favor_plus", {"kernel": "relu"}),
    "relu-without-epsilon": ("favor_plus", {"kernel": "relu", "kernel_epsilon": 0.0}),
    "favor_sharp": ("favor_sharp", {"window_size": 0, "variant": "dense"}),
    "favor_sharp-window": ("favor_sharp", {"window_size": 6}),
    "lara": ("lara", {"window_size": 0}),
    "lara-window": ("lara", {"window_size": 4}),
    "lara-overlap": ("lara", {"window_size": 4, "overlap_window": True}),
    "eva": ("eva", {"window_size": 8, "chunk_size": 4}),
    "eva-overlap": ("eva", {"window_size": 4, "chunk_size": 2, "overlap_window": True}),
    "eva-sum-spread": ("eva", {"window_size": 6, "chunk_size": 3, "proposals": "sum", "weighting": "spread"}),
    "eva-bounded": ("eva", {"window_size": 4, "chunk_size": 2, "max_chunks": 3}),
    "eva-learned": ("eva", {"window_size": 4, "chunk_size": 2, "learned": True}),
    "eva-positions": ("eva", {"window_size": 4, "chunk_size": 2, "relative_position": "table"}),
    "eva-published": ("eva", {"window_size": 4, "chunk_size": 2, "conventions": "published"}),
    "favor_plus-exact": ("favor_plus", {"window_size": 0, "exact_below": 11}),
    "favor_plus-overlap-exact": ("favor_plus", {"window_size": 4, "overlap_window": True, "exact_below": 7}),
    "favor_sharp-exact": ("favor_sharp", {"window_size": 0, "variant": "dense", "exact_below": 20}),
    "lara-exact": ("lara", {"window_size": 4, "exact_below": 9}),
    "eva-exact": ("eva", {"window_size": 4, "chunk_size": 2, "exact_below": 13}),
    "eva-sum-exact": ("eva", {"window_size": 6, "chunk_size": 3, "proposals": "sum", "exact_below": 10}),
}
CASES |= {
    kind: (kind, {"window_size": 4}) for kind in CAUSAL_KINDS if kind not in {kind for kind, _ in CASES.values()}
}
_SMALL = {"lara": {"num_landmarks": 6}, "eva": {}}


def build(name: str) -> LinearAttention:
    """A layer in float64 with learned parameters and statistics that are not at their first values."""
    kind, changes = CASES[name]
    declared = get_kind(kind)
    config = declared.config_cls(**{**_SMALL.get(kind, {declared.size_field: 16}), **changes})
    layer = declared.module_cls(config, LayerShape(HEADS, DIM, is_causal=True)).double().eval()
    generator = torch.Generator().manual_seed(7)
    calibration = layer.new_calibration()
    if calibration is not None:
        parts = (torch.randn(4, HEADS, 100, DIM, generator=generator).double() for _ in range(3))
        calibration.update(AttentionInputs(*parts, None, scaling=SCALING, is_causal=True))
        layer.set_tensors(calibration.result())
    for buffer in list(layer._buffers):
        layer._buffers[buffer] = layer._buffers[buffer].double()  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return layer


LAYERS: dict[str, LinearAttention] = {}


def get_layer(name: str) -> LinearAttention:
    return LAYERS.setdefault(name, build(name))


def inputs(
    tokens: int = TOKENS, *, mask: Tensor | None = None, seed: int = 0, dtype: Any = torch.float64
) -> list[Tensor]:
    """Query, key, value; NaN where there is padding, which must not be read."""
    generator = torch.Generator().manual_seed(seed)
    parts = [1.5 * torch.randn(BATCH, HEADS, tokens, DIM, generator=generator, dtype=dtype) for _ in range(3)]
    return parts if mask is None else [z.masked_fill(~mask[:, None, :, None], float("nan")) for z in parts]


def in_pieces(
    layer: LinearAttention, parts: list[Tensor], sizes: Any, mask: Tensor | None = None, memory: Any = None
) -> tuple[Tensor, RecurrentMemory]:
    """The layer's output, read in pieces of `sizes` tokens, and the memory."""
    memory = RecurrentMemory() if memory is None else memory
    outputs, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        seen = None if mask is None or bool(mask[:, part].all()) else mask[:, part]
        outputs.append(layer(*(z[:, :, part] for z in parts), seen, scaling=SCALING, memory=memory))
        start += size
    return torch.cat(outputs, dim=2), memory
