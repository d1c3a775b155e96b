"""The formulas of the kinds as one dense softmax over keys and chunks, differentiated by autograd: the plain way.

They share no code with the library. `x`, `y` are scaled queries and keys `[..., tokens, dim]`, `value` the values. A
factor that belongs to the query alone is left out where nothing exact stands beside it, because it cancels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

INF = float("inf")


def scaled(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    root = query.shape[-1] ** -0.25
    return query * root, key * root


def near(tokens: int, window: int, overlap: bool, is_causal: bool, reach: int | None = None) -> Tensor:
    """Which keys a query's window holds, `[queries, keys]`."""
    place = torch.arange(tokens)
    start = place // max(window, 1) * window
    reach = (window if is_causal else window // 2) if reach is None else reach
    left, right = (reach if overlap else 0), (reach if overlap and not is_causal else 0)
    return (place >= (start - left)[:, None]) & (place < (start + window + right)[:, None])


def mean_of(logits: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    if is_causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -INF)
    return logits.softmax(-1) @ value


def log_xi(x: Tensor, w: Tensor) -> Tensor:
    """`w . x - |x|^2 / 2`, `[..., tokens, directions]`."""
    return x @ w.mT - (x * x).sum(-1, keepdim=True) / 2


def through(a: Tensor, c: Tensor) -> Tensor:
    """`log sum_j exp(a[t, j] + c[n, j])`."""
    return (a.unsqueeze(-2) + c.unsqueeze(-3)).logsumexp(-1)


def is_alone(exact: dict[str, Any]) -> bool:
    """Whether no query sees a key exactly. `exact`: arguments of `beside`."""
    return not any(exact.get(name) for name in ("window", "num_global", "heavy"))


def beside(
    kernel: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    window: int = 0,
    overlap: bool = False,
    is_causal: bool = False,
    num_global: int = 0,
    heavy: int = 0,
) -> Tensor:
    """Exact logits where a query sees a key exactly, those of `kernel` elsewhere."""
    tokens = x.shape[-2]
    keep = torch.zeros(tokens, tokens, dtype=torch.bool)
    g = num_global
    if window:
        keep[g:, g:] = near(tokens - g, window, overlap, is_causal)
    keep[:g], keep[:, :g] = True, True
    if heavy:
        spread = (x - x.mean(-2, keepdim=True)).square().mean(-2, keepdim=True)
        score = (y * x.mean(-2, keepdim=True)).sum(-1) + (y.square() * spread).sum(-1) / 2
        chosen = score.argsort(dim=-1, descending=True, stable=True)[..., :heavy]
        keep = keep | torch.zeros_like(score, dtype=torch.bool).scatter(-1, chosen, True).unsqueeze(-2)
    return torch.where(keep, x @ y.mT, kernel)


def favor(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    statistics: Any = None,
    *,
    is_causal: bool = False,
    **exact: Any,
) -> Tensor:
    """FAVOR+, and FAVOR# with the constants given."""
    x, y = scaled(query, key)
    alone = is_alone(exact)
    w, own, p, q = projection, torch.zeros_like(projection[..., 0]), x, y
    bias_x, bias_y = 0.0, 0.0
    if statistics is not None:
        mean_x, mean_y, to_x, to_y, shape = (z.to(x) for z in statistics)
        dense = to_x.shape[-2] > 1
        p = (x - mean_x) @ to_x if dense else (x - mean_x) * to_x
        q = (y - mean_y) @ to_y if dense else (y - mean_y) * to_y
        stretch = (1 - 4 * shape).sqrt()
        own = (projection.square() * shape).sum(-1) + stretch.log().sum(-1) / 2
        w = projection * stretch
        bias_x = (x * mean_y).sum(-1, keepdim=True) - (mean_x * mean_y).sum(-1, keepdim=True)
        bias_y = (y * mean_x).sum(-1, keepdim=True)
    reading = p @ w.mT + own.unsqueeze(-2) - math.log(w.shape[-2])
    if not alone:
        reading = reading + bias_x - (p * p).sum(-1, keepdim=True) / 2
    writing = log_xi(q, w) + own.unsqueeze(-2) + bias_y
    kernel = through(reading, writing)
    if not alone:
        kernel = beside(kernel, x, y, is_causal=is_causal, **exact)
    return mean_of(kernel, value, is_causal)


def generalized(
    query: Tensor, key: Tensor, value: Tensor, projection: Tensor, *, kernel: str, epsilon: float, is_causal: bool
) -> Tensor:
    """A generalised kernel: the logarithm of `phi(x) . phi(y)`."""
    functions = {
        "relu": lambda z: (z.relu() + epsilon).log(),
        "exp": lambda z: torch.logaddexp(z, z.new_tensor(math.log(epsilon))),
        "square": lambda z: (z.square() + epsilon).log(),
    }
    a, c = (functions[kernel](z @ projection.mT) for z in scaled(query, key))
    return mean_of(through(a, c), value, is_causal)


# -- LARA ------------------------------------------------------------------------------------------------------------


def segment_means(tokens: int, count: int, like: Tensor) -> tuple[Tensor, list[int]]:
    """`[segments, tokens]` whose product is the mean of every segment, and its middle tokens."""
    small, large = tokens // count, tokens % count
    sizes = [small] * (count - large) + [small + 1] * large
    mean, start, middles = like.new_zeros(count, tokens), 0, []
    for row, size in enumerate(sizes):
        mean[row, start : start + size] = 1 / size
        middles.append(start + size // 2)
        start += size
    return mean, middles


def lara(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    landmarks: int,
    weighting: str = "balance",
    noise: Tensor | None = None,
    mixing: bool = False,
    linear: tuple[Tensor, Tensor] | None = None,
    **exact: Any,
) -> Tensor:
    """LARA with landmarks; `linear` are maps of the mean queries and keys."""
    x, y = scaled(query, key)
    g, alone = exact.get("num_global", 0), is_alone(exact)
    rx, ry = x[..., g:, :], y[..., g:, :]
    mean, middles = segment_means(rx.shape[-2], landmarks, x)
    query_mean, key_mean = mean @ rx, mean @ ry
    if linear is not None:
        query_mean, key_mean = query_mean @ linear[0].to(x), key_mean @ linear[1].to(x)
    if mixing:
        key_mean = (key_mean @ key_mean.mT).softmax(-1) @ key_mean
    mu = query_mean + key_mean
    samples = mu if noise is None else mu + noise.to(mu)
    density = log_xi(mu, samples).mT  # [samples, landmarks]
    total = density.logsumexp(-1)
    weight = -total.unsqueeze(-2)
    if weighting == "optimal":
        share = (rx @ query_mean.mT).softmax(-2)
        own = density.diagonal(dim1=-2, dim2=-1)
        balance = (own - total).exp().unsqueeze(-2)
        weight = (balance + share - share.mean(-1, keepdim=True)).clamp_min(1e-8).log() - own.unsqueeze(-2)
    reading = rx @ samples.mT + weight
    if weighting == "biased":
        affinity = rx @ mu.mT
        reading = reading + affinity
        if not alone:
            reading = reading - affinity.logsumexp(-1, keepdim=True) + math.log(landmarks)
    if not alone:
        reading = reading - (rx * rx).sum(-1, keepdim=True) / 2
    kernel = through(reading, log_xi(ry, samples))
    if alone:
        return mean_of(kernel, value, False)
    if noise is None:
        right = (rx[..., middles, :] @ ry.mT).logsumexp(-1)
        kernel = kernel + (right - kernel[..., middles, :].logsumexp(-1)).mean(-1).detach()[..., None, None]
    whole = torch.nn.functional.pad(kernel, (g, 0, g, 0))
    return mean_of(beside(whole, x, y, **exact), value, False)


def lara_fixed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    centroids: Tensor,
    samples: Tensor,
    *,
    is_causal: bool = False,
    **exact: Any,
) -> Tensor:
    """LARA with proposals fixed in advance."""
    x, y = scaled(query, key)
    alone = is_alone(exact)
    each = samples.shape[-2] // centroids.shape[-2]
    weight = -log_xi(centroids, samples).logsumexp(-2) - math.log(each)
    reading = (x @ samples.mT if alone else log_xi(x, samples)) + weight.unsqueeze(-2)
    kernel = through(reading, log_xi(y, samples))
    if not alone:
        kernel = beside(kernel, x, y, is_causal=is_causal, **exact)
    return mean_of(kernel, value, is_causal)


# -- EVA -------------------------------------------------------------------------------------------------------------


def eva(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    chunk: int,
    overlap: bool = False,
    is_causal: bool = False,
    proposals: str = "sum",
    weighting: str = "size",
    published: bool = False,
    linear: tuple[Tensor, Tensor] | None = None,
    num_global: int = 0,
) -> Tensor:
    """EVA with chunks that divide the window, on whole windows."""
    x, y = scaled(query, key)
    g = num_global
    rx, ry, rv = x[..., g:, :], y[..., g:, :], value[..., g:, :]
    tokens = rx.shape[-2]
    place, count = torch.arange(tokens), tokens // chunk
    member = place // chunk == torch.arange(count)[:, None]
    mean = member.to(x) / chunk
    query_mean, key_mean = mean @ rx, mean @ ry
    if linear is not None:
        query_mean, key_mean = query_mean @ linear[0].to(x), key_mean @ linear[1].to(x)
    parts = {"sum": query_mean + key_mean, "mean": (query_mean + key_mean) / 2, "key": key_mean}
    mu = parts.get(proposals, torch.zeros_like(key_mean))
    inside = log_xi(ry, mu).mT.masked_fill(~member, -INF)
    chunk_value = inside.softmax(-1) @ rv
    far = rx @ key_mean.mT + (0.0 if weighting == "none" else math.log(chunk))
    if weighting == "spread":
        centred = (ry.unflatten(-2, (count, chunk)) - (mean @ ry).unsqueeze(-2)).square().mean(-2)
        far = far + rx.square() @ centred.mT / 2
    reach = None if is_causal else -(-(window // 2) // chunk) * chunk
    seen = near(tokens, window, overlap, is_causal, reach)
    exact = (rx @ ry.mT).masked_fill(~seen, -INF)
    if is_causal:
        exact = exact.masked_fill(torch.ones_like(seen).triu(1), -INF)
    if not published:
        touched = (seen[:, None] & member).any(-1)
        if is_causal:
            touched = touched | (torch.arange(count) * chunk > place[:, None])
        far = far.masked_fill(touched, -INF)
    front = rx @ y[..., :g, :].mT
    weights = torch.cat([front, exact, far], -1).softmax(-1)
    out = weights @ torch.cat([value[..., :g, :], rv, chunk_value], -2)
    return torch.cat([(x[..., :g, :] @ y.mT).softmax(-1) @ value, out], -2)
