"""LARA: random feature attention is biased, randomized attention is not, LARA is in between (Zheng et al. 2022,
arXiv:2204.04667).

    python experiments/papers/randomized_bias.py --out experiments/results/papers/randomized_bias.json

Many draws of the attention output of the same queries, keys and values, of random ones and of the layers of a BERT,
against softmax: how far the mean over draws is off (bias) and a single draw (error), with S samples per output. RFA:
S random features that all queries share (FAVOR+). RA: the mean of S draws from each query's own density, at quadratic
cost. LARA: S proposals at landmarks, without learned maps, one sample of each ("at the means": without noise, as
published models are evaluated).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

import paper_tools
import torch
import typer
from paper_tools import AttentionInputs, Claim, Estimate, below, estimate
from rich.progress import track
from torch import Tensor

from hf_linattn import functional

SAMPLES = (4, 16, 64)
RANDOM = "random"


# -- estimators -----------------------------------------------------------------------------------------------------
# From inputs `[1, draws, tokens, head_dim]`, every draw a head, to outputs of the same shape.
def rfa(inputs: AttentionInputs, samples: int, seed: int) -> Tensor:
    _, draws, _, dim = inputs.query.shape
    seed = functional.derive_seed("directions", seed, samples)
    directions = functional.draw_projection(draws, samples, dim, seed=seed)
    return functional.favor_attention(*inputs[:3], directions, scaling=inputs.scaling)


def ra(inputs: AttentionInputs, samples: int, seed: int) -> Tensor:
    torch.manual_seed(functional.derive_seed("ra", seed, samples))
    options = {"scaling": inputs.scaling, "proposal": "sampled", "noise": True}
    return sum(functional.randomized_attention(*inputs[:3], **options) for _ in range(samples)) / samples


def lara(inputs: AttentionInputs, samples: int, seed: int, weighting: str = "balance", noise: bool = True) -> Tensor:
    torch.manual_seed(functional.derive_seed("lara", seed, samples))
    options = {"num_landmarks": samples, "weighting": weighting, "noise": noise}
    return functional.lara_attention(*inputs[:3], scaling=inputs.scaling, **options)


ESTIMATORS: dict[str, Callable[[AttentionInputs, int, int], Tensor]] = {
    "RFA": rfa,
    "LARA": lara,
    "LARA, optimal weights": partial(lara, weighting="optimal"),
    "LARA, at the means": partial(lara, noise=False),
    "RA": ra,
}


# -- bias and error -------------------------------------------------------------------------------------------------
Found = dict[tuple[str, int], Tensor]  # (estimator, samples) -> squared bias and error of every seed, `[seeds, 2]`


def bias_and_error(outputs: Tensor, exact: Tensor) -> Tensor:
    """Squared bias and squared error of draws `[heads, draws, tokens, head_dim]`, over the squares of the output.

    The mean of `draws` outputs has an error besides its bias, their variance over `draws`, which is taken off: the
    result is right in expectation, and may be below 0.
    """
    draws = outputs.shape[1]
    error = (outputs - exact.unsqueeze(1)).square().mean(1)
    spread = outputs.var(1)
    bias = (outputs.mean(1) - exact).square() - spread / draws
    return torch.stack([z.sum() for z in (bias, error)]) / exact.square().sum()


def measure(inputs: AttentionInputs, draws: int, seeds: int) -> Found:
    """Of the inputs of one row, `[1, heads, tokens, head_dim]`."""
    exact = functional.softmax_attention(*inputs[:3], scaling=inputs.scaling)[0]
    heads = [
        AttentionInputs(*(z[:, head : head + 1].expand(-1, draws, -1, -1) for z in inputs[:3]), inputs.scaling)
        for head in range(exact.shape[0])
    ]
    found: Found = {}
    for name, attention in ESTIMATORS.items():
        for samples in SAMPLES:
            repeated = []
            for seed in range(seeds):
                outputs = [
                    attention(head, samples, seed * len(heads) + number)[0] for number, head in enumerate(heads)
                ]
                repeated.append(bias_and_error(torch.stack(outputs), exact))
            found[name, samples] = torch.stack(repeated)
    return found


# -- the experiment -------------------------------------------------------------------------------------------------
def random_inputs(tokens: int) -> AttentionInputs:
    """Normal queries, keys and values of dimension 16; logits have a standard deviation of 1."""
    draws = torch.randn(3, 1, 2, tokens, 16, generator=torch.Generator().manual_seed(0))
    return AttentionInputs(*draws, 16**-0.5)


def claims_of(found: dict[str, Found]) -> list[Claim]:
    def mean(name: str, samples: int, column: int) -> Estimate:
        return estimate(torch.stack([cell[name, samples][:, column] for cell in found.values()]).mean(0))

    def listed(name: str, column: int) -> str:
        return ", ".join(f"{mean(name, samples, column).mean:.3g}" for samples in SAMPLES)

    def ordered(less: str, more: str, column: int) -> list[str]:
        return [
            below(cell[less, samples][:, column], cell[more, samples][:, column])
            for cell in found.values()
            for samples in SAMPLES
        ]

    unbiased = [(mean("RA", samples, 0), mean("RFA", samples, 0)) for samples in SAMPLES]
    of_samples = f"S = {', '.join(map(str, SAMPLES))}, mean over {', '.join(found)}"
    zero = [torch.zeros_like(cell["RFA", samples][:, 0]) for cell in found.values() for samples in SAMPLES]
    rfa_bias = [cell["RFA", samples][:, 0] for cell in found.values() for samples in SAMPLES]
    return [
        Claim(
            "LARA, section 3",
            "Randomized attention is unbiased",
            f"squared bias {', '.join(str(ra) for ra, _ in unbiased)} of the squared output ({of_samples})",
            "yes" if all(abs(ra.mean) < rfa.mean / 100 for ra, rfa in unbiased) else "no",
        ),
        Claim.judged(
            "LARA, section 3",
            "Random feature attention is biased",
            f"squared bias {listed('RFA', 0)} of the squared output",
            [below(*pair) for pair in zip(zero, rfa_bias, strict=True)],
        ),
        Claim.judged(
            "LARA, section 3",
            "Randomized attention has a lower error than random feature attention",
            f"squared error {listed('RA', 1)}, RFA {listed('RFA', 1)} of the squared output",
            ordered("RA", "RFA", 1),
        ),
        Claim.judged(
            "LARA, section 4",
            "LARA has less bias than random feature attention, at the same linear cost",
            f"squared bias {listed('LARA', 0)}, RFA {listed('RFA', 0)}",
            ordered("LARA", "RFA", 0),
        ),
        Claim.judged(
            "LARA, section 4",
            "LARA has a lower error than random feature attention",
            f"squared error {listed('LARA', 1)}, RFA {listed('RFA', 1)}",
            ordered("LARA", "RFA", 1),
        ),
        Claim.judged(
            "LARA, section 4",
            "The same at the means of the proposals, without noise",
            f"squared error {listed('LARA, at the means', 1)}, RFA {listed('RFA', 1)}",
            ordered("LARA, at the means", "RFA", 1),
        ),
        Claim.judged(
            "LARA, section 4",
            "Weights that depend on the query lower the error of LARA",
            f"squared error with optimal weights {listed('LARA, optimal weights', 1)}, without {listed('LARA', 1)}",
            ordered("LARA, optimal weights", "LARA", 1),
        ),
    ]


def main(
    seeds: paper_tools.Seeds = 4,
    draws: Annotated[int, typer.Option(min=2, help="Outputs whose mean shows the bias, for each seed.")] = 32,
    tokens: paper_tools.Tokens = 128,
    layers: Annotated[str, typer.Option(help="Layers of the BERT, separated by commas.")] = "0,2,5",
    heads: Annotated[int, typer.Option(min=1, help="Heads of a layer.")] = 3,
    model: paper_tools.Model = None,
    text: paper_tools.Text = None,
    out: paper_tools.Out = None,
) -> None:
    """Bias and error of randomized attentions."""
    read = paper_tools.attention_of_text(model, text, tokens, 1)
    chosen = paper_tools.numbers(layers, "--layers", len(read))
    cells = {RANDOM: random_inputs(tokens)}
    for number in chosen:
        cells[f"layer {number}"] = AttentionInputs(*(z[:, :heads] for z in read[number][:3]), read[number].scaling)
    found = {name: measure(inputs, draws, seeds) for name, inputs in track(cells.items(), description="Drawing")}
    rows = [
        {"table": f"Squared {what} over the squared output", "inputs": name, "attention": attention}
        | {f"S = {samples}": estimate(cell[attention, samples][:, column]) for samples in SAMPLES}
        for column, what in enumerate(("bias", "error"))
        for name, cell in found.items()
        for attention in ESTIMATORS
    ]
    settings = {"seeds": seeds, "draws": draws, "tokens": tokens, "heads": heads}
    paper_tools.finish(out, settings, rows, claims_of(found))


if __name__ == "__main__":
    typer.run(main)
