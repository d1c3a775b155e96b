"""Slow forms of LARA and EVA with all their options: one row without padding at a time, loops over tokens.

They share no code with the library, whose own `hf_linattn.ops.reference` has all kinds with their default options.
`x`, `y` are scaled queries and keys `[tokens, dim]`, `v` the values; functions return `[tokens, dim]`. `per_row`
applies one to `[batch, heads, tokens, dim]` with a mask by cutting the padding out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Grid = tuple[int, int] | None


def per_row(
    function: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    per_head: Sequence[Callable[[int, int], dict]] = (),
    **settings: object,
) -> Tensor:
    """Run `function` on the real tokens of every row and head; zeros at padding.

    `per_head` functions give further keyword arguments for (row, head).
    """
    root = math.sqrt(query.shape[-1] ** -0.5 if scaling is None else scaling)
    rows = []
    for b in range(query.shape[0]):
        mask = torch.ones(key.shape[2], dtype=torch.bool) if key_mask is None else key_mask[b]
        heads = []
        for h in range(query.shape[1]):
            out = torch.zeros_like(value[b, h])
            if mask.any():
                extra = {k: v for give in per_head for k, v in give(b, h).items()}
                x, y, v = query[b, h][mask] * root, key[b, h][mask] * root, value[b, h][mask]
                out = out.index_put((mask,), function(x, y, v, **settings, **extra))
            heads.append(out)
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def block_of(token: int, window: int, grid: Grid) -> tuple[int, ...]:
    if grid is None:
        return (token // window,)
    return (token // grid[1] // window, token % grid[1] // window)


def from_log_weights(log_weights: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(log_weights, -1) @ v


def exact_where(
    log_kernel: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    window: int = 0,
    grid: Grid = None,
    num_global: int = 0,
    causal: bool = False,
) -> Tensor:
    """Log-weights `[queries, keys]`, exact inside a block and for global tokens, cut off if causal."""
    n = x.shape[0]
    dots = x @ y.T
    keep = torch.zeros(n, n, dtype=torch.bool)
    for t in range(n):
        for s in range(n):
            special = t < num_global or s < num_global
            blocks = [block_of(i - num_global, window, grid) for i in (t, s)] if window and not special else [0, 1]
            near = blocks[0] == blocks[1]
            keep[t, s] = bool(special or near)
    out = torch.where(keep, dots, log_kernel)
    return out.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf")) if causal else out


# -- RA and LARA ----------------------------------------------------------------------------------------------------


def log_xi(x: Tensor, w: Tensor) -> Tensor:
    """`w . x - |x|^2 / 2` for one `w` and every `x` `[..., d]`."""
    return x @ w - (x * x).sum(-1) / 2


def randomized(
    x: Tensor, y: Tensor, v: Tensor, noise: Tensor, proposal: str, causal: bool = False, keys: Tensor | None = None
) -> Tensor:
    out = []
    for t in range(x.shape[0]):
        seen = y[: t + 1] if causal else y
        if proposal == "softmax_mean":
            near = torch.softmax(seen @ x[t], 0) @ seen
        else:
            near = seen.mean(0) if keys is None else y[keys[t]]
        w = x[t] + near + noise[t]
        out.append(torch.softmax(log_xi(seen, w), 0) @ v[: len(seen)])
    return torch.stack(out)


def segments(n: int, landmarks: int) -> list[list[int]]:
    if n <= landmarks:
        return [[t] for t in range(n)]
    small = n // landmarks
    sizes = [small] * ((small + 1) * landmarks - n) + [small + 1] * (n - small * landmarks)
    starts = [sum(sizes[:i]) for i in range(landmarks)]
    return [list(range(s, s + size)) for s, size in zip(starts, sizes, strict=True)]


def bins(grid: tuple[int, int], landmarks: int) -> list[list[int]]:
    p = math.isqrt(landmarks)
    height, width = grid
    return [
        [
            row * width + column
            for row in range(math.floor(r * height / p), math.ceil((r + 1) * height / p))
            for column in range(math.floor(c * width / p), math.ceil((c + 1) * width / p))
        ]
        for r in range(p)
        for c in range(p)
    ]


def mixed(k_bar: Tensor, v_bar: Tensor | None) -> Tensor:
    """Every key landmark as the softmax average of all of them."""
    rows = []
    for p in k_bar:
        logits = torch.stack([p @ c for c in k_bar])
        if v_bar is not None:
            logits = logits + torch.stack([torch.log(c.norm() + 1e-4) for c in v_bar])
        rows.append(torch.softmax(logits, 0) @ k_bar)
    return torch.stack(rows)


def lara(
    x: Tensor,
    y: Tensor,
    v: Tensor,
    landmarks: int,
    weighting: str = "balance",
    alpha_coeff: float = 1.0,
    noise: Tensor | None = None,
    samples: int = 1,
    antithetic: bool = False,
    query_map: Tensor | Callable[[Tensor], Tensor] | None = None,
    key_map: Tensor | Callable[[Tensor], Tensor] | None = None,
    map_tokens: bool = False,
    mixing: str = "none",
    offset: float = 0.0,
    window: int = 0,
    grid: Grid = None,
    num_global: int = 0,
    correct: bool = True,
) -> Tensor:
    """`noise` is in scaled coordinates, `[samples * landmarks, dim]`. Maps act on scaled vectors, one at a time."""
    g = num_global
    rx, ry, rv = x[g:], y[g:], v[g:]
    groups = bins(grid, landmarks) if grid else segments(len(rx), landmarks)

    def pooled(z: Tensor, mapping: Tensor | Callable[[Tensor], Tensor] | None) -> Tensor:
        if mapping is None:
            return torch.stack([z[m].mean(0) for m in groups])
        apply = mapping if callable(mapping) else mapping.T.__matmul__
        if map_tokens:
            return torch.stack([torch.stack([apply(z[t]) for t in m]).mean(0) for m in groups])
        return torch.stack([apply(z[m].mean(0)) for m in groups])

    log_kernel = torch.full((len(x), len(x)), float("-inf"), dtype=x.dtype)
    if groups:
        q_bar, k_bar = pooled(rx, query_map), pooled(ry, key_map)
        if mixing != "none":
            k_bar = mixed(k_bar, pooled(rv, None) if mixing == "key_value" else None)
        mu = q_bar + k_bar
        owners, drawn = list(range(len(mu))), [mu[c] for c in range(len(mu))]
        if noise is not None:
            owners = [c for _ in range(samples) for c in range(len(mu))]
            drawn = [mu[c] + noise[a] for a, c in enumerate(owners)]
            if antithetic:
                drawn += [mu[c] - noise[a] for a, c in enumerate(owners)]
                owners = owners * 2
        share = torch.softmax(q_bar @ rx.T, dim=1)  # over the queries
        log_terms = []
        for w, c in zip(drawn, owners, strict=True):
            density = log_xi(mu, w)
            total = torch.logsumexp(density, 0) + math.log(len(owners) / len(mu))
            if weighting == "optimal":
                centred = share[c] - sum(share[o] for o in owners) / len(owners)
                alpha = (density[c] - total).exp() + alpha_coeff * centred
                e = alpha.clamp_min(1e-8).log() - density[c]
            else:
                e = -total
            if weighting == "biased":
                e = e + rx @ mu[c]
                if window or g:  # beside exact keys the weights of the proposals average to one
                    e = e - torch.logsumexp(rx @ mu.T, -1) + math.log(len(mu))
            target = log_xi(rx, w) + e
            log_terms.append(target[:, None] + log_xi(ry, w)[None])
        near = torch.logsumexp(torch.stack(log_terms), 0)
        if (window or g) and correct and noise is None:
            probes = [m[len(m) // 2] for m in groups]
            gaps = [torch.logsumexp(ry @ rx[t], 0) - torch.logsumexp(near[t], 0) for t in probes]
            near = near + torch.stack(gaps).mean().detach()
        log_kernel = log_kernel.clone()
        log_kernel[g:, g:] = near + (offset if window or g else 0.0)
    return from_log_weights(exact_where(log_kernel, x, y, window=window, grid=grid, num_global=g), v)


# -- EVA ------------------------------------------------------------------------------------------------------------


def chunk_side(window: int, num_chunks: int, n: int) -> int:
    fits = (
        c
        for c in range(1, n * window + window + 1)
        if (window % c == 0 or c % window == 0) and -(-n // c) <= num_chunks
    )
    return next(fits)


def within(token: int, start: tuple[int, ...], size: int, left: int, right: int, grid: Grid) -> bool:
    """Whether a token lies in the block that starts there, or up to `left` and `right` from it."""
    place = (token,) if grid is None else (token // grid[1], token % grid[1])
    return all(s - left <= p < s + size + right for p, s in zip(place, start, strict=True))


def eva(
    x: Tensor,
    y: Tensor,
    v: Tensor,
    window: int,
    num_chunks: int = 64,
    chunk_size: int | None = None,
    causal: bool = False,
    proposals: str = "sum",
    weighting: str = "size",
    chunking: str = "exclusive",
    overlap: str | None = None,
    query_map: Callable[[Tensor], Tensor] | None = None,
    key_map: Callable[[Tensor], Tensor] | None = None,
    noise: Tensor | None = None,
    bias: Tensor | None = None,
    grid: Grid = None,
    num_global: int = 0,
) -> Tensor:
    """`bias` `[window (** 2), slots (** 2)]` with slots for a whole window before and after the window."""
    g = min(num_global, len(x))
    rx, ry, rv = x[g:], y[g:], v[g:]
    n = len(rx)
    published = chunking == "published"
    padded = -(-n // window) * window if grid is None else n
    count_bound = num_chunks if grid is None else math.isqrt(num_chunks)
    if chunk_size:
        side = chunk_size
    elif published:
        side = max(1, padded // num_chunks if grid is None else math.isqrt(n // num_chunks))
    else:
        side = chunk_side(window, count_bound, max(grid or (n,)))
    half = max(1, window // 2)
    if overlap == "both":
        fits = (r for r in range(half, window + 1) if r % side == 0)
        reach = half if published else window if side > window else next(fits)
        left = right = reach
    else:
        left, right = (window if overlap else 0), 0
    wider = right if published else 0

    def starts(size: int, padded: int) -> list[tuple[int, ...]]:
        if grid is None:
            return [(s,) for s in range(0, padded, size)]
        return [(a, b) for a in range(0, grid[0], size) for b in range(0, grid[1], size)]

    def summary(members: list[int], slots: int, eps: Tensor | None) -> tuple[Tensor, Tensor, Tensor, float]:
        keys = ry[members]
        k_bar = keys.sum(0) / slots
        k_bar = k_bar if key_map is None else key_map(k_bar)
        q_bar = rx[members].sum(0) / slots
        q_bar = q_bar if query_map is None else query_map(q_bar)
        mu = {"sum": q_bar + k_bar, "mean": (q_bar + k_bar) / 2, "key": k_bar, "none": 0 * k_bar}[proposals]
        mu = mu if eps is None else mu + eps
        u = torch.softmax(log_xi(keys, mu), 0) @ rv[members] if members else torch.zeros_like(v[0])
        variance = ((keys - keys.mean(0)) ** 2).mean(0) if weighting == "spread" else torch.zeros_like(k_bar)
        log_size = 0.0 if weighting == "none" else math.log(len(members)) if members else -math.inf
        return k_bar, variance.nan_to_num(), u, log_size

    def logit(query: Tensor, part: tuple[Tensor, Tensor, Tensor, float]) -> Tensor:
        return query @ part[0] + part[3] + (query**2) @ part[1] / 2

    tokens, dims = range(n), 1 if grid is None else 2
    chunks = []
    for c, start in enumerate(starts(side, padded if published else n)):
        members = [s for s in tokens if within(s, start, side, wider, wider, grid)]
        slots = (side + 2 * wider) ** dims if published else len(members)
        chunks.append((start, members, summary(members, slots, None if noise is None else noise[c])))
    windows = starts(window, n)
    owned = [[s for s in tokens if within(s, start, window, 0, 0, grid)] for start in windows]
    out = [torch.softmax(y @ x[t], 0) @ v for t in range(g)]
    for t in tokens:
        own = next(i for i, members in enumerate(owned) if t in members)
        start = windows[own]
        near = [s for s in tokens if within(s, start, window, left, right, grid)]
        logits, values = [rx[t] @ y[s] for s in range(g)], [v[s] for s in range(g)]
        for s in near:
            if causal and s > t:
                continue
            extra = 0.0
            if bias is not None:  # the places of query and key in a square that starts a window before this one
                place = [(i,) if grid is None else (i // grid[1], i % grid[1]) for i in (t, s)]
                a, j = 0, 0
                for p, q, r in zip(place[0], place[1], start, strict=True):
                    a, j = a * window + p - r, j * 3 * window + q - r + window
                extra = bias[a, j]
            logits.append(rx[t] @ ry[s] + extra)
            values.append(rv[s])
        parts = []
        for begin, members, part in chunks:
            if published:
                parts += [part] if not causal or begin[0] // side < t // side else []
            elif causal:
                parts += [part] if begin[0] + side <= start[0] - left else []
            elif not set(members) & set(near):
                parts.append(part)
            else:  # a chunk that is partly seen: the windows in it that are not, one by one
                unseen = [w for w in owned if set(w) & set(members) and not set(w) & set(near)]
                parts += [summary(w, len(w), None) for w in unseen] if side > window else []
        logits += [logit(rx[t], part) for part in parts]
        values += [part[2] for part in parts]
        out.append(torch.softmax(torch.stack(logits), 0) @ torch.stack(values))
    return torch.stack(out)
