r"""All kinds of attention on one page: the formulas in plain torch, dense and slow. Start reading here.

With `x = sqrt(s) q` and `y = sqrt(s) k`, softmax attention is `o_t = sum_n softmax_n(x_t . y_n) v_n`. Every kind
estimates it by two softmaxes over slots `j`, with log-weights `c` of the keys and `a` of the queries:

    slots read keys       u_j = sum_n softmax_n(c[j, n]) v_n        b_j = logsumexp_n c[j, n]
    queries read slots    o_t = sum_j softmax_j(a[t, j] + b_j) u_j

    FAVOR+, FAVOR#   slot = random feature      a, c = log of the feature map of query and key
    LARA             slot = sample of a proposal a, c = log-densities, with the sample's importance weight in a
    EVA              slot = chunk of keys        u = control variate; a + b = an estimate of the chunk's log-sum-exp

A key may be exact for a query (in its window, or a global token): it then stands beside the slots in the second
softmax, with the logit `x_t . y_n`, and not in the slots that this query reads. In the causal form these hold the keys
before the query. The other files of `ops` give the same without anything of size queries x keys x slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .eva.learned import LearnedSummariser
from .favor.statistics import FavorStatistics
from .lara.proposals import CalibratedProposals
from .learned import LearnedFeatureMap
from .softmax import mask_logits, softmax_with_lse

Grid = tuple[int, int] | None


# -- the two softmaxes ----------------------------------------------------------------------------------------------
def slots_read_keys(c: Tensor, value: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """`u` `[heads, queries, slots, head_dim]` and `b` `[heads, queries, slots]`: what the slots hold for each query.

    Args: c: `[heads, slots, keys]`. read: `[queries, keys]`, True for keys that a query reads through slots.
    """
    state = softmax_with_lse(mask_logits(c.unsqueeze(1), read[:, None]), value.unsqueeze(1))
    return state.output, state.lse


def queries_read(x: Tensor, y: Tensor, value: Tensor, exact: Tensor, logits: Tensor, u: Tensor) -> Tensor:
    """One softmax over exact keys (`exact` `[queries, keys]`) and slots (`logits` `[heads, queries, slots]`)."""
    logits = torch.cat([mask_logits(x @ y.mT, exact), logits], -1)
    values = torch.cat([value.unsqueeze(1).expand(-1, x.shape[1], -1, -1), u], -2)
    return softmax_with_lse(logits.unsqueeze(-2), values).output.squeeze(-2)


def exact_and_read(
    tokens: int, window_size: int = 0, num_global_tokens: int = 0, is_causal: bool = False, grid: Grid = None
) -> tuple[Tensor, Tensor]:
    """`[queries, keys]`: which keys are exact for a query, and which it reads through slots."""
    place = torch.arange(tokens) - num_global_tokens
    window = place // window_size if window_size else torch.arange(tokens)
    if grid is not None and window_size:
        window = place // grid[1] // window_size * grid[1] + place % grid[1] // window_size
    exact = (window[:, None] == window) & bool(window_size) | (place[:, None] < 0) | (place < 0)
    seen = torch.ones(tokens, tokens, dtype=torch.bool)
    seen = seen.tril() if is_causal else seen
    return seen & exact, seen & ~exact


def by_row(
    attention: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """`attention(x, y, value, row)` of the real tokens of every row, `[heads, tokens, head_dim]`; 0 at padding."""
    root = (query.shape[-1] ** -0.5 if scaling is None else scaling) ** 0.5
    rows = []
    for row in range(query.shape[0]):
        real = torch.arange(key.shape[2]) if key_mask is None else key_mask[row].nonzero().squeeze(-1)
        output = torch.zeros_like(value[row])
        if len(real):
            x, y, v = query[row][:, real] * root, key[row][:, real] * root, value[row][:, real]
            output = output.index_copy(1, real, attention(x, y, v, row))
        rows.append(output)
    return torch.stack(rows)


# -- the kinds ------------------------------------------------------------------------------------------------------
def favor_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    *,
    statistics: FavorStatistics | None = None,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    **where: object,
) -> Tensor:
    """FAVOR+ (Lemma 1 of arXiv:2009.14794) and, with statistics, FAVOR# (arXiv:2302.00787). `where`: `exact_and_read`.

    `log f(w, x) = w'Aw + log det(I - 4A) / 4 + w'(I - 4A)^(1/2) x - |x|^2 / 2`, of centred, transformed tokens.
    """

    def log_feature(x: Tensor, shape: Tensor) -> Tensor:
        stretch = (1 - 4 * shape).sqrt()
        own = (projection.square() * shape).sum(-1) + stretch.log().sum(-1) / 2
        return x @ (projection * stretch).mT + own.unsqueeze(-2) - x.square().sum(-1, keepdim=True) / 2

    def attention(x: Tensor, y: Tensor, v: Tensor, row: int) -> Tensor:
        exact, read = exact_and_read(x.shape[1], **where)  # type: ignore[arg-type]
        shape = torch.zeros_like(x[:, :1])
        query_shift = key_shift = torch.zeros_like(x[..., :1])
        x_features, y_features = x, y
        if statistics is not None:
            of_row = FavorStatistics(*(z[row if len(z) > 1 else 0] for z in statistics))
            shape = of_row.shape
            query_shift = ((x - of_row.query_mean) * of_row.key_mean).sum(-1, keepdim=True)
            key_shift = (y * of_row.query_mean).sum(-1, keepdim=True)
            x_features, y_features = of_row.transform(x, y)
        a = log_feature(x_features, shape) + query_shift - math.log(projection.shape[-2])
        c = (log_feature(y_features, shape) + key_shift).mT
        u, b = slots_read_keys(c, v, read)
        return queries_read(x, y, v, exact, a + b, u)

    return by_row(attention, query, key, value, key_mask, scaling)


def learned_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    feature_map: LearnedFeatureMap,
    *,
    query_adapter: Tensor | None = None,
    key_adapter: Tensor | None = None,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    **where: object,
) -> Tensor:
    """Learned maps (the formulas of `ops/learned.py`). `where`: `exact_and_read`.

    Residual maps (`adapter`, `[heads, head_dim, head_dim]`) make `z + z A` of what the directions meet.
    """

    def attention(x: Tensor, y: Tensor, v: Tensor, row: int) -> Tensor:
        exact, read = exact_and_read(x.shape[1], **where)  # type: ignore[arg-type]
        maps, num_slots = feature_map, feature_map.num_slots
        x_features, y_features = x, y
        if maps.statistics is not None:
            x_features, y_features = (z.squeeze(0) for z in maps.statistics.transform(x[None], y[None]))
        x_shifted, y_shifted = x_features - maps.query_shift.unsqueeze(1), y_features - maps.key_shift.unsqueeze(1)
        x_mapped = x_shifted if query_adapter is None else x_shifted + x_shifted @ query_adapter
        y_mapped = y_shifted if key_adapter is None else y_shifted + y_shifted @ key_adapter
        a = x_mapped @ maps.query_directions.mT + maps.slot_bias.unsqueeze(1)
        a = a + maps.far_offset[:, None, None] + x_shifted @ maps.far_slope.unsqueeze(-1)
        c = y_mapped @ maps.key_directions.mT
        if maps.normalizer == "slots":
            c = c.log_softmax(-1)
        else:
            a = a - x_features.square().sum(-1, keepdim=True) / 2 - math.log(num_slots)
            c = c - y_features.square().sum(-1, keepdim=True) / 2
        if maps.statistics is not None:
            query_mean, key_mean = maps.statistics.query_mean.squeeze(0), maps.statistics.key_mean.squeeze(0)
            a = a + ((x - query_mean) * key_mean).sum(-1, keepdim=True)
            c = c + (y * query_mean).sum(-1, keepdim=True)
        u, b = slots_read_keys(c.mT, v, read)
        return queries_read(x, y, v, exact, a + b, u)

    return by_row(attention, query, key, value, key_mask, scaling)


def lara_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_landmarks: int = 64,
    proposals: CalibratedProposals | None = None,
    offset: Tensor | None = None,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    **where: object,
) -> Tensor:
    """LARA (section 4 of arXiv:2204.04667): samples of proposals N(mu, I), weighed by the balance heuristic.

    `l(x, w) = w . x - |x|^2 / 2`; `c = l(y, w)` and `a = l(x, w) - log(mean over mu of exp l(mu, w)) - log(samples)`.
    Without `proposals`, one sample at each `mu`, the mean query plus the mean key of a segment of the sequence.
    `offset` `[heads]` is added to the log-sum-exp of the slots beside exact keys. `where`: `exact_and_read`.
    """

    def log_feature(x: Tensor, w: Tensor) -> Tensor:
        return x @ w.mT - x.square().sum(-1, keepdim=True) / 2

    def attention(x: Tensor, y: Tensor, v: Tensor, row: int) -> Tensor:
        exact, read = exact_and_read(x.shape[1], **where)  # type: ignore[arg-type]
        first = int(where.get("num_global_tokens", 0))  # type: ignore[call-overload]
        segments = landmark_segments(x.shape[1] - first, num_landmarks, first)
        if proposals is None:
            mu = torch.stack([x[:, s].mean(1) + y[:, s].mean(1) for s in segments], 1)
            samples = mu
        else:
            mu, samples = proposals
        mixture = log_feature(mu, samples).logsumexp(1, keepdim=True) - math.log(mu.shape[1])
        a = log_feature(x, samples) - mixture - math.log(samples.shape[1])
        u, b = slots_read_keys(log_feature(y, samples).mT, v, read)
        if exact.any() and proposals is None:
            # Beside exact keys, samples at the means need a correction of the mass of all slots, from one query each.
            probe = [segment[len(segment) // 2] for segment in segments]
            lse = (x[:, probe] @ y[:, first:].mT).logsumexp(-1)
            through_slots = (a[:, probe] + log_feature(y[:, first:], samples).logsumexp(1, keepdim=True)).logsumexp(-1)
            a = a + (lse - through_slots).mean(-1).detach()[:, None, None]
        if exact.any() and offset is not None:
            a = a + offset[:, None, None]
        return queries_read(x, y, v, exact, a + b, u)

    return by_row(attention, query, key, value, key_mask, scaling)


def landmark_segments(tokens: int, num_landmarks: int, first: int = 0) -> list[Tensor]:
    """Consecutive segments of nearly equal length, the longer ones last; no more than tokens."""
    count = min(tokens, num_landmarks)
    sizes = [(tokens + number) // count for number in range(count)]
    return list((torch.arange(tokens) + first).split(sizes))


def eva_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window_size: int,
    chunk_size: int,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
) -> Tensor:
    """EVA (section 4 of arXiv:2302.04542): exact in a window, one control variate per chunk outside it.

    `c[j, n] = mu_j . y_n - |y_n|^2 / 2` over the chunk's own keys, `mu` from its mean query and key; the chunk's logit
    is `x_t . mean(y) + log(size)`. Chunks divide windows here, so that every key counts once.
    """

    def attention(x: Tensor, y: Tensor, v: Tensor, row: int) -> Tensor:
        tokens = x.shape[1]
        exact, read = exact_and_read(tokens, window_size, is_causal=is_causal)
        chunk = torch.arange(tokens) // chunk_size
        member = chunk == torch.arange(-(-tokens // chunk_size))[:, None]
        size = member.sum(-1, keepdim=True).to(x)
        query_mean, key_mean = (member.to(x) @ x) / size, (member.to(x) @ y) / size
        c = mask_logits((query_mean + key_mean) @ y.mT - y.square().sum(-1).unsqueeze(-2) / 2, member)
        u, _ = slots_read_keys(c, v, torch.ones_like(read))
        whole = (read.unsqueeze(1) | ~member).all(-1)  # [queries, chunks]: a chunk is read as a whole or not at all
        return queries_read(x, y, v, exact, mask_logits(x @ key_mean.mT + size.squeeze(-1).log(), whole), u)

    return by_row(attention, query, key, value, key_mask, scaling)


def learned_eva_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    summarise: LearnedSummariser,
    *,
    window_size: int,
    chunk_size: int,
    key_mask: Tensor | None = None,
    scaling: float | None = None,
    **where: object,
) -> Tensor:
    """EVA with learned summaries (the formulas of `ops/eva/learned.py`). `where`: the rest of `exact_and_read`.

    Chunks divide windows here; on a grid both are squares.
    """

    def attention(x: Tensor, y: Tensor, v: Tensor, row: int) -> Tensor:
        maps, tokens = summarise, x.shape[1]
        exact, read = exact_and_read(tokens, window_size, **where)  # type: ignore[arg-type]
        same_chunk, _ = exact_and_read(tokens, chunk_size, **{**where, "is_causal": False})  # type: ignore[arg-type]
        first = int(where.get("num_global_tokens", 0))  # type: ignore[call-overload]
        member = same_chunk[first:].unique(dim=0)  # [chunks, tokens]
        member[:, :first] = False
        key_pool = mask_logits((y @ maps.key_pooling.unsqueeze(-1)).mT, member).softmax(-1)
        value_pool = mask_logits((y @ maps.value_pooling.unsqueeze(-1)).mT, member).softmax(-1)
        key_mean = key_pool @ y
        key_mean = key_mean + key_mean @ maps.key_adapter
        logits = (x + x @ maps.query_adapter) @ key_mean.mT + member.sum(-1).to(x).log()
        logits = logits + maps.far_offset[:, None, None] + x @ maps.far_slope.unsqueeze(-1)
        logits = logits + (key_mean @ maps.key_slope.unsqueeze(-1)).mT
        whole = (read.unsqueeze(1) | ~member).all(-1)  # [queries, chunks]: a chunk is read as a whole or not at all
        u = (value_pool @ v).unsqueeze(1).expand(-1, tokens, -1, -1)
        return queries_read(x, y, v, exact, mask_logits(logits, whole), u)

    return by_row(attention, query, key, value, key_mask, scaling)
