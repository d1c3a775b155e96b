"""The functions of `hf_linattn.functional` on small inputs: outputs with and without gradients, and the gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_linattn import functional as F

from .record import Record, random

BATCH, HEADS, TOKENS, DIM, FEATURES = 2, 3, 45, 8, 24
GRID = (6, 7)  # and three global tokens before it


def masks(tokens: int) -> dict[str, Tensor | None]:
    """Rows of different lengths; with "holes" also a row of padding alone."""
    place = torch.arange(tokens).expand(BATCH, tokens)
    length = torch.tensor([[tokens], [tokens // 2 + 1]])
    holes = (place * 7 + torch.tensor([[0], [3]])) % 5 != 0
    return {
        "none": None,
        "right": place < length,
        "left": place >= tokens - length,
        "holes": torch.cat([holes[:1], torch.zeros_like(holes[:1])]),
    }


def inputs(tokens: int = TOKENS, queries: int | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shape = (BATCH, HEADS, tokens, DIM)
    query, key, value = (random(name, *shape, dtype=torch.float64) for name in ("query", "key", "value"))
    key = 1.5 * key + random("mean key", 1, HEADS, 1, DIM, dtype=torch.float64)
    return [z.to(dtype) for z in (query[:, :, tokens - (queries or tokens) :], key, value)]


def attention(function: Callable[..., Tensor], parts: list[Tensor], **options: Any) -> dict[str, Any]:
    """Output without autograd, with it, and all gradients."""
    state = torch.get_rng_state()
    with torch.no_grad():
        alone = function(*parts, **options)
    torch.set_rng_state(state)
    parts = [part.clone().requires_grad_() for part in parts]
    output = function(*parts, **options)
    output.backward(random("cotangent", *output.shape, dtype=output.dtype))
    grads = {f"gradient {name}": z.grad for name, z in zip(("query", "key", "value"), parts, strict=True)}
    return {"inference": alone, "output": output, **{name: grad for name, grad in grads.items() if grad is not None}}


WINDOWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_size": 8},
    "overlap": {"window_size": 8, "overlap_window": True},
    "window-of-all": {"window_size": 64},
}
EXACT_KEYS: dict[str, dict[str, Any]] = {
    "heavy": {"num_heavy_keys": 4},
    "heavy-window": {"num_heavy_keys": 4, "window_size": 8},
    "global": {"num_global_tokens": 3},
    "global-window": {"num_global_tokens": 3, "window_size": 8},
    "global-heavy-overlap": {"num_global_tokens": 3, "num_heavy_keys": 2, "window_size": 8, "overlap_window": True},
    "grid": {"grid": GRID, "num_global_tokens": 3},
    "grid-window": {"grid": GRID, "num_global_tokens": 3, "window_size": 2},
}
SLOTS: dict[str, dict[str, Any]] = {
    **WINDOWS,
    **EXACT_KEYS,
    "chunk": {"window_size": 8, "chunk_size": 16},
    "scaling": {"scaling": 0.7, "window_size": 8},
    "dropout": {"slot_dropout": 0.3},
    "dropout-window": {"slot_dropout": 0.3, "window_size": 8},
}
CAUSAL: dict[str, dict[str, Any]] = {
    **{f"causal-{name}": {"is_causal": True, **options} for name, options in WINDOWS.items()},
    "causal-chunk": {"is_causal": True, "chunk_size": 16},
    "causal-chunk-window": {"is_causal": True, "chunk_size": 16, "window_size": 8},
    "causal-scaling": {"is_causal": True, "scaling": 0.7},
    "causal-dropout": {"is_causal": True, "slot_dropout": 0.3},
}


def _masked(
    record: Record, group: str, cases: dict[str, dict[str, Any]], function: Callable[..., Tensor], **shared: Any
) -> None:
    """Every case under every mask; some also in other dtypes, with other lengths, and with large logits."""
    for (name, options), (mask_name, mask) in itertools.product(cases.items(), masks(TOKENS).items()):
        run = partial(attention, function, inputs(), key_mask=mask, **{**shared, **options})
        record.case(group, f"{name}/{mask_name}", run)
    for name, options in cases.items():
        arguments = {**shared, **options}
        for dtype in (torch.float64, torch.bfloat16):
            record.case(group, f"{name}/{dtype}", partial(attention, function, inputs(dtype=dtype), **arguments))
        if "grid" in options:
            continue
        query, key, value = inputs(200)
        record.case(group, f"{name}/long", partial(attention, function, [query, key, value], **arguments))
        mask = masks(200)["left"]
        run = partial(attention, function, [8 * query, 8 * key, value], key_mask=mask, **arguments)
        record.case(group, f"{name}/long-large", run)
        if options.get("is_causal"):
            run = partial(attention, function, inputs(queries=7), key_mask=masks(TOKENS)["left"], **arguments)
            record.case(group, f"{name}/fewer-queries", run)


def _moments() -> Any:
    moments = F.FavorMoments.empty(HEADS, DIM)
    for index in range(3):
        query, key, _ = inputs()
        moments = moments.update(query + 0.1 * index, key, key_mask=masks(TOKENS)["right"])
    return moments


def _row_statistics(variant: str, centring: bool) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None, **options: Any) -> Tensor:
        scaling = options.get("scaling")
        statistics = F.favor_statistics(
            query, key, key_mask=key_mask, scaling=scaling, variant=variant, centring=centring
        )
        return F.favor_attention(query, key, value, key_mask=key_mask, statistics=statistics, **options)

    return attend


def favor(record: Record) -> None:
    projection = F.draw_projection(HEADS, FEATURES, DIM, seed=3)
    _masked(record, "favor", {**SLOTS, **CAUSAL}, F.favor_attention, projection=projection)
    others = {"cross": {"is_cross": True}, "shared-directions": {"projection": projection[0]}}
    _masked(record, "favor", others, F.favor_attention, projection=projection)
    run = partial(attention, F.favor_attention, [inputs(31)[0], *inputs()[1:]], projection=projection)
    record.case("favor", "cross/lengths", run)
    wide = [*inputs()[:2], random("wide", BATCH, HEADS, TOKENS, 5)]
    record.case("favor", "value-dim", partial(attention, F.favor_attention, wide, projection=projection))
    some = {name: SLOTS[name] for name in ("plain", "overlap", "heavy-window", "global-window", "grid-window")}
    for variant, centring in itertools.product(("gerf", "saderf", "aderf", "sderf", "dense"), (True, False)):
        name = f"{variant}{'' if centring else '-uncentred'}"
        cases = some if centring else {"plain": {}}
        cases = {f"{name}/{case}": options for case, options in cases.items()}
        _masked(record, "favor-sharp-row", cases, _row_statistics(variant, centring), projection=projection)
        statistics = _moments().statistics(variant)
        if centring:
            cases = {f"{name}/{case}": CAUSAL[case] for case in ("causal-plain", "causal-overlap")}
            cases[f"{name}/window"] = {"window_size": 8}
            arguments = {"projection": projection, "statistics": statistics}
            _masked(record, "favor-sharp-moments", cases, F.favor_attention, **arguments)
    for kernel in ("relu", "exp", "sigmoid", "softplus", "abs", "square"):
        cases = {f"{kernel}/plain": {}, f"{kernel}/causal": {"is_causal": True}}
        cases[f"{kernel}/no-epsilon"] = {"kernel_epsilon": 0.0}
        _masked(record, "generalized", cases, F.generalized_attention, projection=projection, kernel=kernel)


def lara(record: Record) -> None:
    projection = F.draw_projection(HEADS, FEATURES, DIM, seed=4)
    proposals = F.sample_proposals(random("centroids", HEADS, 6, DIM), projection[:, :12], antithetic=True)
    cases: dict[str, dict[str, Any]] = dict(SLOTS)
    for weighting, mixing, stage in itertools.product(
        ("balance", "biased", "optimal"), ("none", "key", "key_value"), ("mean", "tokens")
    ):
        options = {"weighting": weighting, "mixing": mixing, "map_stage": stage}
        cases[f"{weighting}-{mixing}-{stage}"] = {**options, "query_map": torch.tanh, "key_map": torch.sin}
    noise = {"noise": random("noise", BATCH, HEADS, 16, DIM), "samples_per_landmark": 2}
    cases["noise"] = noise
    cases["noise-antithetic-window"] = {**noise, "antithetic": True, "window_size": 8}
    cases["noise-drawn"] = {"noise": True, "noise_scale": "published"}
    cases["offset"] = {"offset": torch.tensor([0.3, -0.2, 0.1]), "window_size": 8}
    cases["optimal-grid"] = {"weighting": "optimal", "alpha_coeff": 0.5, **EXACT_KEYS["grid-window"]}
    _masked(record, "lara", cases, F.lara_attention, num_landmarks=8)
    some = ("plain", "window", "overlap", "heavy-window", "global-window", "grid-window")
    fixed = {f"fixed/{name}": options for name, options in {**{n: SLOTS[n] for n in some}, **CAUSAL}.items()}
    _masked(record, "lara-calibrated", fixed, F.lara_attention, proposals=proposals)
    for name, options in {
        "softmax_mean": {},
        "mean": {"proposal": "mean"},
        "noise": {"noise": random("ra", BATCH, HEADS, TOKENS, DIM)},
        "causal": {"is_causal": True},
    }.items():
        run = partial(attention, F.randomized_attention, inputs(), key_mask=masks(TOKENS)["left"], **options)
        record.case("randomized", name, run)


def eva(record: Record) -> None:
    shared = {"window_size": 8, "num_chunks": 9}
    cases: dict[str, dict[str, Any]] = {}
    for proposal, weighting, chunking in itertools.product(
        ("sum", "mean", "key", "none"), ("none", "size", "spread"), ("exclusive", "published")
    ):
        cases[f"{proposal}-{weighting}-{chunking}"] = {
            "proposals": proposal,
            "weighting": weighting,
            "chunking": chunking,
        }
    for chunking in ("exclusive", "published"):
        side: dict[str, Any] = {"chunking": chunking, "overlap_window": True}
        cases[f"overlap-{chunking}"] = side
        cases[f"overlap-left-{chunking}"] = {**side, "overlap_side": "left"}
        cases[f"causal-{chunking}"] = {"is_causal": True, "chunking": chunking, "chunk_size": 4, "proposals": "key"}
        cases[f"causal-overlap-{chunking}"] = {**cases[f"causal-{chunking}"], "overlap_window": True}
        cases[f"causal-sum-{chunking}"] = {**cases[f"causal-{chunking}"], "proposals": "sum", "weighting": "spread"}
        grid = {"grid": GRID, "num_global_tokens": 3, "window_size": 2, "chunking": chunking}
        cases[f"grid-{chunking}"] = grid
        cases[f"grid-overlap-{chunking}"] = {**grid, "overlap_window": True}
    bounded = {"is_causal": True, "max_chunks": 3, "chunk_size": 4, "proposals": "key"}
    cases["causal-bounded"] = bounded
    cases["causal-bounded-spread"] = {**bounded, "weighting": "spread", "overlap_window": True}
    cases["causal-default"] = {"is_causal": True}
    cases["long-chunks"] = {"num_chunks": 2}
    cases["chunk-size"] = {"chunk_size": 4}
    cases["global"] = {"num_global_tokens": 3}
    cases["maps"] = {"query_map": torch.tanh, "key_map": torch.sin}
    cases["noise"] = {"noise": random("eva noise", BATCH, HEADS, 100, DIM)}
    cases["noise-drawn"] = {"noise": True, "noise_scale": "published"}
    cases["dropout"] = {"slot_dropout": 0.3}
    cases["scaling"] = {"scaling": 0.7}
    table = random("table", HEADS, F.table_size(8, 8, 8))
    cases["bias"] = {"window_bias": table[:, F.table_index(8, 8, 8)], "overlap_window": True}
    table = random("causal table", HEADS, F.table_size(8, 8, 0))
    cases["causal-bias"] = {**bounded, "window_bias": table[:, F.table_index(8, 8, 0)], "overlap_window": True}
    _masked(record, "eva", cases, F.eva_attention, **shared)


def softmax(record: Record) -> None:
    cases = {"plain": {}, "causal": {"is_causal": True}, "scaling": {"scaling": 0.7}}
    _masked(record, "softmax", cases, F.softmax_attention)


def parts(record: Record) -> None:
    """Directions, statistics, variances, proposals, indices."""
    query, key, value = inputs()
    mask = masks(TOKENS)["holes"][:1].expand(BATCH, -1)  # type: ignore[index]
    for features, orthogonal, regularized in ((5, True, False), (24, True, True), (24, False, False)):
        draw = partial(F.draw_projection, HEADS, features, DIM, seed=7, orthogonal=orthogonal, regularized=regularized)
        record.case("parts", f"directions-{features}-{orthogonal}-{regularized}", lambda draw=draw: {"rows": draw()})
    record.case("parts", "seeds", lambda: {"seed": [F.derive_seed(1, 2, 3), F.derive_seed("a", 0)]})
    projection = F.draw_projection(HEADS, FEATURES, DIM, seed=3)
    for variant in ("gerf", "saderf", "aderf", "sderf", "dense"):
        row = F.favor_statistics(query, key, variant=variant)
        record.case("parts", f"row-{variant}", lambda v=variant: dict(_statistics(query, key, mask, v)))
        record.case("parts", f"moments-{variant}", lambda v=variant: _moments().statistics(v)._asdict())
        record.case("parts", f"variance-{variant}", lambda row=row: _variances(query, key, value, mask, row))
        record.case(
            "parts",
            f"log-features-{variant}",
            lambda row=row: dict(
                zip(("query", "key"), F.favor_log_features(query, key, projection, row), strict=True)
            ),
        )
    record.case("parts", "variance", lambda: _variances(query, key, value, mask, None))
    record.case("parts", "shape", lambda: {"shape": F.optimal_shape(random("phi", 3, 8).exp())})
    record.case("parts", "kmeans", lambda: {"centroids": F.kmeans(random("points", HEADS, 90, DIM), 7, seed=2)})
    for grid, convention in itertools.product((False, True), ("corrected", "published")):
        options: dict[str, Any] = {"is_grid": grid, "convention": convention}
        record.case("parts", f"table-{grid}-{convention}", lambda o=options: {"index": F.table_index(4, 2, 2, **o)})
        t5 = {**options, "num_buckets": 16, "max_distance": 12}
        record.case("parts", f"t5-{grid}-{convention}", lambda o=t5: {"index": F.t5_index(4, 2, 2, **o)})


def _statistics(query: Tensor, key: Tensor, mask: Tensor, variant: str) -> dict[str, Tensor]:
    return F.favor_statistics(query, key, key_mask=mask, variant=variant)._asdict()


def _variances(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, statistics: Any) -> dict[str, Tensor]:
    return {
        "moment": F.log_relative_moment(query, key, statistics),
        "mean": F.mean_log_second_moment(query, key, statistics, key_mask=mask),
        "kernel": F.kernel_relative_variance(query, key, FEATURES, statistics, orthogonal=True),
        "output": F.predicted_output_error(query, key, value, FEATURES, statistics),
    }


GROUPS = (favor, lara, eva, softmax, parts)
