"""FAVOR+: errors of positive and trigonometric, orthogonal and independent features (Choromanski et al. 2021,
arXiv:2009.14794).

    python experiments/papers/favor_plus_error.py --out experiments/results/papers/favor_plus_error.json

The output of attention, as in the paper's figure 4 (4096 tokens of dimension 16, normal queries, keys and values), and
kernel values exp(x.y) of unit vectors at several angles, as in its lemma 2 and theorems. M counts random directions:
of trigonometric features each has a sine and a cosine; hyperbolic ones use every direction with both signs.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Annotated

import paper_tools
import torch
import typer
from paper_tools import Claim, below, estimate
from rich.progress import track
from torch import Tensor

from hf_linattn import functional

DIM = 16
HEADS = 4
SIZES = (0.5, 1.0)  # standard deviation of queries and keys
COUNTS = (16, 64, 256)  # M, for attention
ATTENTIONS = (
    "positive, orthogonal",
    "positive, independent",
    "trigonometric, orthogonal",
    "trigonometric, independent",
)
COSINES = (-1.0, -0.75, -0.5, 0.0, 0.5, 1.0)
KERNELS = (*ATTENTIONS, "hyperbolic, half of M", "positive, regularized")
REGULARIZED = KERNELS[-1]


def directions(kind: str, count: int, seed: int, heads: int | None = None) -> Tensor:
    """`[count, dim]`, or `[heads, count, dim]`; not from the seed that queries and keys come from."""
    derived = functional.derive_seed("directions", seed)
    options = {"orthogonal": "independent" not in kind, "regularized": kind == REGULARIZED}
    return functional.draw_projection(heads, count, DIM, seed=derived, **options)


# -- attention ------------------------------------------------------------------------------------------------------
def trigonometric_features(x: Tensor, w: Tensor) -> Tensor:
    """`exp(|x|^2 / 2) (cos w.x, sin w.x)`, `[..., tokens, 2 M]` (section 2.3 of the paper)."""
    angles = x @ w.mT
    return (x.square().sum(-1, keepdim=True) / 2).exp() * torch.cat([angles.cos(), angles.sin()], -1)


def trigonometric_attention(query: Tensor, key: Tensor, value: Tensor, w: Tensor) -> Tensor:
    q, k = (trigonometric_features(z * DIM**-0.25, w) for z in (query, key))
    return q @ (k.mT @ value) / (q @ k.sum(-2).unsqueeze(-1))


Errors = dict[tuple[float, int], dict[str, Tensor]]  # (size, M) -> kind -> error, seed by seed


def attention_errors(tokens: int, seeds: int) -> Errors:
    """Squared errors of the output over the squares of softmax's, geometric means over heads.

    Logarithms and geometric means, so that one wild row of trigonometric features does not decide a figure.
    """
    found: dict[tuple[float, int], dict[str, list[Tensor]]] = {
        cell: {kind: [] for kind in ATTENTIONS} for cell in product(SIZES, COUNTS)
    }
    for seed in track(range(seeds), description="Attention"):
        draws = torch.randn(3, 1, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed))
        for size in SIZES:
            query, key, value = size * draws[0], size * draws[1], draws[2]
            exact = functional.softmax_attention(query, key, value)
            for kind, count in product(ATTENTIONS, COUNTS):
                attention = functional.favor_attention if kind.startswith("positive") else trigonometric_attention
                output = attention(query, key, value, directions(kind, count, seed, HEADS))
                errors = (output - exact).square().sum((0, 2, 3)) / exact.square().sum((0, 2, 3))
                found[size, count][kind].append(errors.log().mean().exp())
    return {cell: {kind: torch.stack(z) for kind, z in by_kind.items()} for cell, by_kind in found.items()}


def attention_claims(found: Errors) -> list[Claim]:
    counts = f"M = {', '.join(map(str, COUNTS))}"

    def compared(claim: str, less: str, more: str, size: float) -> Claim:
        logs = [(found[size, count][less].log(), found[size, count][more].log()) for count in COUNTS]
        ratios = ", ".join(f"{float((more - less).mean().exp()):.3g}" for less, more in logs)
        figure = f"squared error {ratios} times as large ({more} over {less}, {counts})"
        return Claim.judged("FAVOR+, figure 4", f"{claim} (size {size:g})", figure, [below(*pair) for pair in logs])

    lower = "Orthogonal directions lower the error of the attention output"
    positive = "Positive features have a lower error than trigonometric ones"
    return [
        compared(claim, ATTENTIONS[0], more, size)
        for claim, more in ((lower, ATTENTIONS[1]), (positive, ATTENTIONS[2]))
        for size in SIZES
    ]


# -- kernel values --------------------------------------------------------------------------------------------------
def unit_pair(cosine: float) -> tuple[Tensor, Tensor]:
    """Two unit vectors with this angle, `[dim]`."""
    x, y = torch.zeros(2, DIM)
    x[0], y[0], y[1] = 1.0, cosine, max(1 - cosine**2, 0.0) ** 0.5
    return x, y


def kernel_ratios(kind: str, x: Tensor, y: Tensor, count: int, draws: int, seed: int) -> Tensor:
    """Estimates of `exp(x.y)` over its value, `[draws]`, each with `count` directions of its own."""
    if kind.startswith("hyperbolic"):
        half = directions("positive, independent", count // 2, seed, draws)
        w = torch.cat([half, -half], -2)
    else:
        w = directions(kind, count, seed, draws)
    x, y = (z.expand(1, draws, 1, DIM) for z in (x, y))
    if kind.startswith("trigonometric"):
        values = (trigonometric_features(x, w) * trigonometric_features(y, w)).sum(-1) / count
    else:
        a, c = functional.favor_log_features(x, y, w)
        values = (a + c).exp().sum(-1)
    return (values / (x * y).sum(-1).exp()).flatten()


def kernel_values(count: int, draws: int, seeds: int) -> dict[str, dict[float, Tensor]]:
    """Of a kind at a cosine: the mean and the mean squared error of the estimates over the value, `[seeds, 2]`."""
    found: dict[str, dict[float, Tensor]] = {kind: {} for kind in KERNELS}
    for kind in track(KERNELS, description="Kernel values"):
        for cosine in COSINES:
            ratios = [kernel_ratios(kind, *unit_pair(cosine), count, draws, seed) for seed in range(seeds)]
            found[kind][cosine] = torch.stack([torch.stack([z.mean(), (z - 1).square().mean()]) for z in ratios])
    return found


def predicted(cosine: float, count: int, *, orthogonal: bool) -> float:
    """Relative squared error of positive features in closed form."""
    pair = (z[None, None, None].double() for z in unit_pair(cosine))
    return float(functional.kernel_relative_variance(*pair, count, scaling=1.0, orthogonal=orthogonal))


def kernel_claims(found: dict[str, dict[float, Tensor]], count: int) -> list[Claim]:
    def error(kind: str, cosine: float) -> Tensor:
        return found[kind][cosine][:, 1]

    def listed(kind: str, cosines: tuple[float, ...]) -> str:
        return ", ".join(f"{float(error(kind, cosine).mean()):.3g}" for cosine in cosines)

    # At -1, where x + y = 0, positive features have no error; at acute angles estimates have such tails that their
    # squared error is hardly measured.
    obtuse, between, rest = COSINES[:3], COSINES[1:3], COSINES[1:]
    orthogonal, independent, trigonometric = (
        "positive, orthogonal",
        "positive, independent",
        "trigonometric, independent",
    )
    pairs = [(predicted(c, count, orthogonal=True), predicted(c, count, orthogonal=False)) for c in rest]
    bounds = [2 * (count - 1) / (count * (DIM + 2)) * (1 - math.exp(-1 - c)) ** 2 for c in rest]
    measured = [
        predicted(cosine, count, orthogonal=kind == orthogonal) / float(error(kind, cosine).mean())
        for kind in (orthogonal, independent)
        for cosine in between
    ]
    means = torch.stack([z[:, 0] for z in found[REGULARIZED].values()]).mean(0)
    return [
        Claim.judged(
            "FAVOR+, lemma 2",
            "Where the kernel is small, positive features have a lower error than trigonometric ones",
            f"relative squared error {listed(independent, obtuse)}, trigonometric {listed(trigonometric, obtuse)}"
            f" (cosines {', '.join(map(str, obtuse))})",
            [below(error(independent, cosine), error(trigonometric, cosine)) for cosine in obtuse],
        ),
        Claim.judged(
            "FAVOR+, lemma 2",
            "Hyperbolic features have a lower error than as many positive ones",
            f"{listed('hyperbolic, half of M', between)}, positive {listed(independent, between)} (cosines"
            f" {', '.join(map(str, between))})",
            [below(error("hyperbolic, half of M", cosine), error(independent, cosine)) for cosine in between],
        ),
        Claim(
            "FAVOR+, theorem 2",
            "Orthogonal directions lower the error of kernel values in every dimension, by a bound at least",
            f"closed form: orthogonal over independent {', '.join(f'{o / i:.2f}' for o, i in pairs)}",
            "yes" if all(i - o >= least for (o, i), least in zip(pairs, bounds, strict=True)) else "no",
        ),
        Claim(
            "FAVOR+, lemma 2",
            "The error has a closed form (with orthogonal directions: derived in this library)",
            f"predicted over measured {min(measured):.2f} to {max(measured):.2f}",
            "yes" if 0.9 < min(measured) and max(measured) < 1.1 else "no",
        ),
        Claim.judged(
            "FAVOR+, theorem 1",
            "With directions of fixed length the kernel is never larger than that of softmax, and close to it",
            f"mean over its value {estimate(means)}, dimension {DIM}",
            [below(means, torch.ones_like(means))],
        ),
    ]


# -- the experiment -------------------------------------------------------------------------------------------------
def main(
    seeds: paper_tools.Seeds = 15,
    tokens: Annotated[int, typer.Option(min=2, help="Queries, and as many keys.")] = 4096,
    draws: Annotated[int, typer.Option(min=2, help="Estimates of a kernel value, for each seed.")] = 2000,
    count: Annotated[int, typer.Option(min=2, help="Random directions of a kernel value.")] = DIM,
    out: paper_tools.Out = None,
) -> None:
    """Errors of attention outputs and of kernel values."""
    torch.set_num_threads(1)
    attention, values = attention_errors(tokens, seeds), kernel_values(count, draws, seeds)
    rows = [
        {"table": f"Relative squared error of attention, {tokens} tokens", "features": kind}
        | {f"size {size:g}, M = {m}": estimate(by_kind[kind]) for (size, m), by_kind in attention.items()}
        for kind in ATTENTIONS
    ]
    rows += [
        {"table": f"Relative squared error of exp(x.y), M = {count}", "features": kind}
        | {f"cosine {cosine:g}": estimate(z[:, 1]) for cosine, z in by_cosine.items()}
        for kind, by_cosine in values.items()
    ]
    settings = {"seeds": seeds, "tokens": tokens, "draws": draws, "directions of a kernel value": count}
    paper_tools.finish(out, settings, rows, attention_claims(attention) + kernel_claims(values, count))


if __name__ == "__main__":
    typer.run(main)
