"""EVA: control variates close the gap between random feature attention and softmax (Zheng et al. 2023,
arXiv:2302.04542).

    python experiments/papers/control_variates.py --out experiments/results/papers/control_variates.json

Relative error of the attention output of the layers of a BERT, mean over layers; repetitions are rows of text. RFA is
FAVOR+ with as many random features as EVA has chunks, beside the same window. Groups by themselves, without windows,
show the theory: a group of keys has one control variate, whose coefficient is the group's value at one random
direction; one group is RFA with one feature, and groups of one key are softmax. The weights of groups are exact there,
which costs what softmax costs; EVA estimates them by the mean key of a chunk.
"""

from __future__ import annotations

from typing import Annotated

import paper_tools
import torch
import typer
from paper_tools import AttentionInputs, Claim, below, estimate, relative_error
from rich.progress import track
from torch import Tensor

from hf_linattn import functional

GROUPS = (1, 4, 16, 64, 256)
CHUNKS = (8, 32, 128)
WINDOWS = (8, 32, 128)
MOST_CHUNKS, MOST_WINDOW = "EVA, chunks of one token", "EVA, one window"


# -- attentions -----------------------------------------------------------------------------------------------------
def grouped_attention(inputs: AttentionInputs, count: int) -> Tensor:
    """`sum_c (weight of group c) beta_c`, groups of consecutive keys, exact weights (section 4 of the paper).

    `beta_c = sum_n softmax_n(w_c.y_n - |y_n|^2 / 2) v_n` over the group's keys, `w_c` the mean query plus the mean key
    of the group: the coefficient of its control variate that a single direction gives.
    """
    x, y = (z * inputs.scaling**0.5 for z in inputs[:2])
    groups = torch.arange(y.shape[2]).tensor_split(count)
    weights = torch.softmax(x @ y.mT, -1)
    output = torch.zeros_like(inputs.value)
    for members in groups:
        w = (x[:, :, members].mean(2) + y[:, :, members].mean(2)).unsqueeze(2)
        keys = y[:, :, members]
        logits = w @ keys.mT - keys.square().sum(-1).unsqueeze(2) / 2
        output += weights[..., members].sum(-1, keepdim=True) * (
            torch.softmax(logits, -1) @ inputs.value[:, :, members]
        )
    return output


def one_feature(inputs: AttentionInputs) -> Tensor:
    """RFA with a single random direction, the one that `grouped_attention` has with one group."""
    x, y = (z * inputs.scaling**0.5 for z in inputs[:2])
    rows, heads, _, dim = y.shape
    w = (x.mean(2) + y.mean(2)).view(1, rows * heads, 1, dim)
    folded = (z.reshape(1, rows * heads, -1, dim) for z in inputs[:3])
    return functional.favor_attention(*folded, w[0], scaling=inputs.scaling).view_as(inputs.value)


def rfa(inputs: AttentionInputs, features: int, window: int, seed: int) -> Tensor:
    heads, dim = inputs.query.shape[1], inputs.query.shape[3]
    drawn = functional.derive_seed("directions", seed, features)
    directions = functional.draw_projection(heads, features, dim, seed=drawn)
    return functional.favor_attention(*inputs[:3], directions, scaling=inputs.scaling, window_size=window)


def eva(inputs: AttentionInputs, chunks: int, window: int, published: bool = False) -> Tensor:
    options = {"window_size": window, "num_chunks": chunks}
    if published:
        options |= {"chunking": "published", "weighting": "none", "proposals": "mean"}
    return functional.eva_attention(*inputs[:3], scaling=inputs.scaling, **options)


# -- the experiment -------------------------------------------------------------------------------------------------
Found = dict[str, Tensor]  # attention -> relative error of every row of text, mean over layers


def cell(name: str, chunks: int, window: int) -> str:
    return f"{name}, {chunks} chunks, window {window}"


def errors_of(inputs: AttentionInputs, seeds: int) -> Found:
    """Of one layer."""
    exact = functional.softmax_attention(*inputs[:3], scaling=inputs.scaling)
    tokens = exact.shape[2]

    def error(output: Tensor) -> Tensor:
        return relative_error(output, exact)

    def random_error(features: int, window: int) -> Tensor:
        return torch.stack([error(rfa(inputs, features, window, seed)) for seed in range(seeds)]).mean(0)

    found = {"one feature": error(one_feature(inputs))}
    for count in (*(count for count in GROUPS if count < tokens), tokens):
        found[f"groups, {count}"] = error(grouped_attention(inputs, count))
    for chunks in CHUNKS:
        found[f"RFA, {chunks}"] = random_error(chunks, 0)
        for window in WINDOWS:
            found[cell("EVA", chunks, window)] = error(eva(inputs, chunks, window))
            found[cell("published EVA", chunks, window)] = error(eva(inputs, chunks, window, published=True))
            found[cell("RFA", chunks, window)] = random_error(chunks, window)
    found[MOST_CHUNKS] = error(eva(inputs, tokens, 1))
    found[MOST_WINDOW] = error(eva(inputs, CHUNKS[0], tokens))
    return found


def falling(found: Found, names: list[str]) -> list[str]:
    """Whether every error is below the one before."""
    return [below(found[less], found[more]) for more, less in zip(names, names[1:], strict=False)]


def listed(found: Found, names: list[str]) -> str:
    return ", ".join(f"{float(found[name].mean()):.3g}" for name in names)


def claims_of(found: Found, tokens: int) -> list[Claim]:
    groups = [name for name in found if name.startswith("groups")]
    by_chunks = {name: [[cell(name, c, w) for c in CHUNKS] for w in WINDOWS] for name in ("EVA", "published EVA")}
    by_window = [[cell("EVA", chunks, window) for window in WINDOWS] for chunks in CHUNKS]
    middle = WINDOWS[1]
    counts = f"{', '.join(map(str, CHUNKS))} chunks"
    difference = float((found["one feature"] - found[groups[0]]).abs().max())
    cells = [(chunks, window) for chunks in CHUNKS for window in WINDOWS]

    def limit(name: str, source: str, claim: str) -> Claim:
        most = float(found[name].max())
        return Claim(source, claim, f"relative error {most:.1e}", "yes" if most < 1e-4 else "no")

    return [
        Claim(
            "EVA, section 3",
            "Random feature attention has one control variate coefficient for all keys",
            f"one group and RFA with one feature differ by {difference:.1e}",
            "yes" if difference < 1e-4 else "no",
        ),
        Claim.judged(
            "EVA, section 4",
            "More coefficients, for smaller groups of keys, close the gap to softmax",
            f"relative error {listed(found, groups)} with {', '.join(name.split(', ')[1] for name in groups)} groups",
            falling(found, groups),
        ),
        limit(groups[-1], "EVA, section 3", "With one coefficient for every key the gap is closed"),
        Claim.judged(
            "EVA, section 4",
            "EVA is closer to softmax than random feature attention (as many features as chunks, the same window)",
            f"relative error {listed(found, [cell('EVA', c, middle) for c in CHUNKS])},"
            f" RFA {listed(found, [cell('RFA', c, middle) for c in CHUNKS])} ({counts}, window {middle})",
            [below(found[cell("EVA", *place)], found[cell("RFA", *place)]) for place in cells],
        ),
        Claim.judged(
            "EVA, section 4",
            "The same with chunks and weights as published (untrained)",
            f"relative error {listed(found, by_chunks['published EVA'][1])}",
            [below(found[cell("published EVA", *place)], found[cell("RFA", *place)]) for place in cells],
        ),
        Claim.judged(
            "EVA, section 4",
            "More chunks lower the error",
            f"{listed(found, by_chunks['EVA'][1])} ({counts}, window {middle})",
            [answer for names in by_chunks["EVA"] for answer in falling(found, names)],
        ),
        Claim.judged(
            "EVA, section 4",
            "More chunks lower the error, as published",
            f"{listed(found, by_chunks['published EVA'][1])} ({counts}, window {middle})",
            [answer for names in by_chunks["published EVA"] for answer in falling(found, names)],
        ),
        Claim.judged(
            "EVA, section 4",
            "Longer windows lower the error",
            f"{listed(found, by_window[1])} (windows {', '.join(map(str, WINDOWS))}, {CHUNKS[1]} chunks)",
            [answer for names in by_window for answer in falling(found, names)],
        ),
        limit(MOST_CHUNKS, "EVA, section 4", f"With a chunk for each of {tokens} tokens EVA is softmax attention"),
        limit(MOST_WINDOW, "EVA, section 4", "With one window EVA is softmax attention"),
    ]


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Draws of random features, averaged.")] = 2,
    tokens: paper_tools.Tokens = 512,
    rows: paper_tools.Rows = 4,
    model: paper_tools.Model = None,
    text: paper_tools.Text = None,
    out: paper_tools.Out = None,
) -> None:
    """Errors of attention outputs."""
    if tokens < max(*CHUNKS, *WINDOWS) or tokens % max(WINDOWS):
        paper_tools.fail(f"--tokens must be a multiple of {max(WINDOWS)}; got {tokens}.")
    layers = paper_tools.attention_of_text(model, text, tokens, rows)
    by_layer = [errors_of(inputs, seeds) for inputs in track(layers, description="Layers")]
    found = {name: torch.stack([layer[name] for layer in by_layer]).mean(0) for name in by_layer[0]}
    title = f"Relative error, mean over {len(layers)} layers, {rows} rows of {tokens} tokens"
    table = [{"table": title, "attention": name, "error": estimate(errors)} for name, errors in found.items()]
    settings = {"seeds": seeds, "tokens": tokens, "rows of text": rows}
    paper_tools.finish(out, settings, table, claims_of(found, tokens))


if __name__ == "__main__":
    typer.run(main)
