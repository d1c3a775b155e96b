"""Which forms of the four kinds are tried, each beside its plain formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_linattn import functional as F

from . import plain

BATCH, HEADS, TOKENS, DIM = 4, 2, 48, 16
SHAPE = (BATCH, HEADS, TOKENS, DIM)
FEATURES, LANDMARKS, WINDOW = 32, 8, 8
LENGTHS = (48, 31, 8, 1)  # of the rows of a batch with padding

PROJECTION = F.draw_projection(HEADS, FEATURES, DIM, seed=0)
CALIBRATED = F.sample_proposals(PROJECTION[:, :LANDMARKS] / 2, F.draw_projection(HEADS, 2 * LANDMARKS, DIM, seed=1))
NOISE = F.draw_projection(HEADS, LANDMARKS, DIM, seed=2)
MAPS = tuple(torch.eye(DIM) + PROJECTION[0, i * DIM : (i + 1) * DIM] / 8 for i in range(2))


def _moments() -> F.FavorMoments:
    generator = torch.Generator().manual_seed(7)
    query, key = (torch.randn(BATCH, HEADS, 256, DIM, generator=generator) for _ in range(2))
    return F.FavorMoments.empty(HEADS, DIM).update(query + 0.2, key - 0.1)


MOMENTS = _moments()
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """A form of a kind.

    Args:
        ours: Our attention function, called with `key_mask` where there is padding.
        plain: Its plain formula on one row without padding.
        is_padded: Rows have `LENGTHS`.
        dtypes: Names of dtypes that it is tried in.
    """

    name: str
    ours: Callable[..., Tensor]
    plain: Attention
    is_causal: bool = False
    is_padded: bool = False
    is_short: bool = True  # part of the test-suite
    inputs: tuple[str, ...] = field(default=())  # all if empty

    def mask(self) -> Tensor | None:
        return torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None] if self.is_padded else None

    def call(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = self.mask()
        return self.ours(query, key, value) if mask is None else self.ours(query, key, value, key_mask=mask)

    def formula(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not self.is_padded:
            return self.plain(query, key, value)
        rows = []
        for row, length in enumerate(LENGTHS):
            real = (z[row : row + 1, :, :length] for z in (query, key, value))
            rows.append(torch.nn.functional.pad(self.plain(*real), (0, 0, 0, TOKENS - length)))
        return torch.cat(rows)

    def softmax(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Torch's softmax attention with the same mask."""
        mask = self.mask()
        seen = None if mask is None else mask[:, None, None]
        if seen is not None and self.is_causal:
            seen = seen & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        attention = torch.nn.functional.scaled_dot_product_attention
        out = attention(query, key, value, attn_mask=seen, is_causal=self.is_causal and seen is None)
        return out if mask is None else out.masked_fill(~mask[:, None, :, None], 0.0)


# Options of the functions, and of the plain formulas: (where, ours, plain).
_PLACES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("no window", {}, {}),
    (f"window {WINDOW}", {"window_size": WINDOW}, {"window": WINDOW}),
    (
        f"overlapping window {WINDOW}",
        {"window_size": WINDOW, "overlap_window": True},
        {"window": WINDOW, "overlap": True},
    ),
    (
        "window and global tokens",
        {"window_size": WINDOW, "num_global_tokens": 2},
        {"window": WINDOW, "num_global": 2},
    ),
    ("heavy keys", {"num_heavy_keys": 4}, {"heavy": 4}),
]
_CAUSAL = _PLACES[:3]


def _favor(query: Tensor, key: Tensor, value: Tensor, statistics: str | None = None, **options: Any) -> Tensor:
    found = _statistics(query, key, statistics, options.get("key_mask"))
    return F.favor_attention(query, key, value, PROJECTION, statistics=found, **options)


def _statistics(query: Tensor, key: Tensor, name: str | None, mask: Tensor | None = None) -> Any:
    if name is None:
        return None
    variant, _, source = name.partition(" ")
    if source:
        return MOMENTS.statistics(variant)
    return F.favor_statistics(query.detach(), key.detach(), variant=variant, key_mask=mask)


def _plain_favor(query: Tensor, key: Tensor, value: Tensor, statistics: str | None = None, **options: Any) -> Tensor:
    found = _statistics(query, key, statistics)
    return plain.favor(query, key, value, PROJECTION.to(query), found, **options)


def _favors() -> list[Setting]:
    found = []
    for name, statistics, is_causal in (
        ("FAVOR+", None, False),
        ("FAVOR+ causal", None, True),
        ("FAVOR# saderf", "saderf", False),
        ("FAVOR# gerf", "gerf", False),
        ("FAVOR# aderf", "aderf", False),
        ("FAVOR# sderf", "sderf", False),
        ("FAVOR# dense", "dense", False),
        ("FAVOR# saderf, calibrated", "saderf calibrated", False),
        ("FAVOR# saderf, calibrated, causal", "saderf calibrated", True),
        ("FAVOR# dense, calibrated, causal", "dense calibrated", True),
    ):
        main = name in ("FAVOR+", "FAVOR+ causal", "FAVOR# saderf", "FAVOR# saderf, calibrated, causal")
        places = (_CAUSAL if is_causal else _PLACES) if main else _PLACES[:2]
        for place, ours, formula in places:
            shared = {"statistics": statistics, "is_causal": is_causal}
            found.append(
                Setting(
                    f"{name}, {place}",
                    partial(_favor, **shared, **ours),
                    partial(_plain_favor, **shared, **formula),
                    is_causal,
                    is_short=main and place != "heavy keys",
                )
            )
        if main:
            shared = {"statistics": statistics, "is_causal": is_causal}
            found.append(
                Setting(
                    f"{name}, window {WINDOW}, padding",
                    partial(_favor, **shared, window_size=WINDOW),
                    partial(_plain_favor, **shared, window=WINDOW),
                    is_causal,
                    is_padded=True,
                    is_short=is_causal,
                )
            )
    for kernel in ("relu", "exp", "square"):
        for is_causal in (False, True):
            found.append(
                Setting(
                    f"generalised kernel {kernel}{', causal' if is_causal else ''}",
                    partial(_generalized, kernel=kernel, is_causal=is_causal),
                    partial(_plain_generalized, kernel=kernel, epsilon=1e-3, is_causal=is_causal),
                    is_causal,
                    is_short=kernel == "relu",
                )
            )
    return found


def _generalized(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return F.generalized_attention(query, key, value, PROJECTION, **options)


def _plain_generalized(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return plain.generalized(query, key, value, PROJECTION.to(query), **options)


def _lara(
    query: Tensor, key: Tensor, value: Tensor, *, learned: bool = False, noisy: bool = False, **options: Any
) -> Tensor:
    if learned:
        options.update(query_map=lambda z: z @ MAPS[0].to(z), key_map=lambda z: z @ MAPS[1].to(z))
    if noisy:
        noise = NOISE.to(torch.promote_types(query.dtype, torch.float32))
        options.update(noise=noise.expand(query.shape[0], -1, -1, -1))
    return F.lara_attention(query, key, value, num_landmarks=LANDMARKS, **options)


def _lara_fixed(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return F.lara_attention(query, key, value, proposals=CALIBRATED, **options)


def _plain_lara_fixed(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return plain.lara_fixed(query, key, value, *(z.to(query) for z in CALIBRATED), **options)


def _laras() -> list[Setting]:
    found = []
    for name, ours, formula in (
        ("balance", {}, {}),
        ("optimal", {"weighting": "optimal"}, {"weighting": "optimal"}),
        ("biased", {"weighting": "biased"}, {"weighting": "biased"}),
        ("mixed keys", {"mixing": "key"}, {"mixing": True}),
        ("learned maps", {"learned": True}, {"linear": MAPS}),
        ("noise", {"noisy": True}, {"noise": NOISE}),
    ):
        for place, mine, theirs in _PLACES if name == "balance" else _PLACES[:2]:
            found.append(
                Setting(
                    f"LARA {name}, {place}",
                    partial(_lara, **ours, **mine),
                    partial(plain.lara, landmarks=LANDMARKS, **formula, **theirs),
                    is_short=name == "balance" and place != "heavy keys",
                )
            )
    for is_causal in (False, True):
        for place, mine, theirs in _CAUSAL if is_causal else _PLACES:
            found.append(
                Setting(
                    f"LARA calibrated{', causal' if is_causal else ''}, {place}",
                    partial(_lara_fixed, is_causal=is_causal, **mine),
                    partial(_plain_lara_fixed, is_causal=is_causal, **theirs),
                    is_causal,
                    is_short=is_causal,
                )
            )
    found.append(
        Setting(
            "LARA calibrated, causal, no window, padding",
            partial(_lara_fixed, is_causal=True),
            partial(_plain_lara_fixed, is_causal=True),
            True,
            is_padded=True,
            is_short=False,
        )
    )
    return found


def _eva(query: Tensor, key: Tensor, value: Tensor, *, learned: bool = False, **options: Any) -> Tensor:
    if learned:
        options.update(query_map=lambda z: z @ MAPS[0].to(z), key_map=lambda z: z @ MAPS[1].to(z))
    return F.eva_attention(query, key, value, window_size=WINDOW, **options)


def _evas() -> list[Setting]:
    found = []
    forms: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("6 chunks", {"num_chunks": 6}, {"chunk": 8}),
        ("12 chunks", {"num_chunks": 12}, {"chunk": 4}),
        ("48 chunks", {"num_chunks": 48}, {"chunk": 1}),
        ("12 chunks, mean", {"num_chunks": 12, "proposals": "mean"}, {"chunk": 4, "proposals": "mean"}),
        ("12 chunks, key", {"num_chunks": 12, "proposals": "key"}, {"chunk": 4, "proposals": "key"}),
        ("12 chunks, none", {"num_chunks": 12, "proposals": "none"}, {"chunk": 4, "proposals": "none"}),
        ("12 chunks, spread", {"num_chunks": 12, "weighting": "spread"}, {"chunk": 4, "weighting": "spread"}),
        ("12 chunks, learned maps", {"num_chunks": 12, "learned": True}, {"chunk": 4, "linear": MAPS}),
        ("12 chunks, overlap", {"num_chunks": 12, "overlap_window": True}, {"chunk": 4, "overlap": True}),
        (
            "12 chunks, published",
            {"num_chunks": 12, "chunking": "published", "weighting": "none"},
            {"chunk": 4, "published": True, "weighting": "none"},
        ),
    ]
    for name, ours, formula in forms:
        short = name in ("12 chunks", "12 chunks, key", "12 chunks, spread", "12 chunks, overlap")
        found.append(
            Setting(f"EVA {name}", partial(_eva, **ours), partial(plain.eva, window=WINDOW, **formula), is_short=short)
        )
    causal: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("key", {"proposals": "key"}, {"proposals": "key"}),
        ("sum", {"proposals": "sum"}, {"proposals": "sum"}),
        ("key, spread", {"proposals": "key", "weighting": "spread"}, {"proposals": "key", "weighting": "spread"}),
        ("key, overlap", {"proposals": "key", "overlap_window": True}, {"proposals": "key", "overlap": True}),
    ]
    for name, ours, formula in causal:
        run = partial(_eva, is_causal=True, chunk_size=4, **ours)
        found.append(
            Setting(
                f"EVA causal, {name}",
                run,
                partial(plain.eva, window=WINDOW, chunk=4, is_causal=True, **formula),
                True,
                is_short=name != "sum",
            )
        )
    found.append(
        Setting(
            "EVA 10 chunks, global tokens",
            partial(_eva, num_chunks=10, num_global_tokens=8),
            partial(plain.eva, window=WINDOW, chunk=4, num_global=8),
            is_short=False,
        )
    )
    return found


SETTINGS = [*_favors(), *_laras(), *_evas()]
