"""FAVOR+: attention kernels beyond softmax, trained from scratch on pixel prediction (Choromanski et al. 2021,
arXiv:2009.14794).

    python experiments/papers/attention_kernels.py --out experiments/results/papers/attention_kernels.json

A small causal GPT-2 predicts the pixels of scikit-learn's digits one after the other (8 x 8 pixels of 17 grey levels;
1437 images to train on, 360 to test), as the paper does with ImageNet64: with softmax attention, with FAVOR+, which
estimates it, and with the generalised kernels of the library, `phi(z) = f(W z) + 0.001`. A control reads all pixels
before alike. Same start, same batches; only the attention differs. Bits per pixel of the test images: lower is better.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import paper_tools
import shared
import torch
import typer
from paper_tools import Claim, below, estimate
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import hf_linattn
from hf_linattn import FavorPlusConfig

PIXELS, LEVELS = 64, 17
TRAIN = 1437  # images; the rest is for testing
BATCH = 16
RATE = 3e-3
SOFTMAX, ESTIMATED, UNIFORM = "softmax", "FAVOR+", "uniform"
KERNELS = ("relu", "exp", "sigmoid", "softplus", "abs", "square")
ATTENTIONS = (SOFTMAX, ESTIMATED, *KERNELS, UNIFORM)


def images() -> Tensor:
    """Grey levels `[images, pixels]`, in an order of their own."""
    pixels = torch.from_numpy(load_digits().data).long()
    return pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]


def build(attention: str, num_features: int, seed: int) -> Any:
    torch.manual_seed(seed)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=PIXELS, vocab_size=LEVELS, bos_token_id=0)
    for field in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, field, 0.0)
    model = GPT2LMHeadModel(config)
    if attention == SOFTMAX:
        return model
    kernel = {ESTIMATED: {"kernel": "softmax"}, UNIFORM: {"kernel": "relu", "kernel_epsilon": 1e6}}
    options = kernel.get(attention, {"kernel": attention})
    return hf_linattn.convert(model, FavorPlusConfig(num_features=num_features, window_size=0, seed=seed, **options))


def train(model: Any, pixels: Tensor, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    model.train()
    for _ in range(steps):
        batch = pixels[torch.randint(len(pixels), (BATCH,), generator=generator)]
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def bits_per_pixel(model: Any, pixels: Tensor) -> float:
    losses = [float(model(part, labels=part).loss) * len(part) for part in pixels.split(BATCH)]
    return sum(losses) / len(pixels) / math.log(2)


# -- the experiment -------------------------------------------------------------------------------------------------
def claims_of(found: dict[str, list[float]]) -> list[Claim]:
    shown = {name: str(estimate(values)) for name, values in found.items()}
    others = [name for name in KERNELS if name != "relu"]
    gap = estimate(torch.tensor(found[ESTIMATED]) - torch.tensor(found[SOFTMAX]))
    source = "FAVOR+, generalized attention"
    return [
        Claim.judged(
            source,
            "Attention with other kernels learns (all kernels beside the control that reads everything alike)",
            f"bits per pixel: {', '.join(f'{name} {shown[name]}' for name in KERNELS)}, control {shown[UNIFORM]}",
            [below(found[name], found[UNIFORM]) for name in KERNELS],
        ),
        Claim.judged(
            source,
            "ReLU is at least as good as the estimate of softmax",
            f"ReLU {shown['relu']}, FAVOR+ {shown[ESTIMATED]}",
            [below(found["relu"], found[ESTIMATED])],
        ),
        Claim.judged(
            source,
            "ReLU is the best of these kernels",
            f"best: {min(KERNELS, key=lambda name: estimate(found[name]).mean)}",
            [below(found["relu"], found[name]) for name in others],
        ),
        Claim(
            "FAVOR+, experiments",
            "FAVOR+ trained from scratch is as good as softmax attention",
            f"{gap} bits per pixel more than softmax ({shown[SOFTMAX]})",
            "yes" if gap.mean <= paper_tools.CERTAIN * gap.error else "no",
        ),
    ]


def main(
    seeds: paper_tools.Seeds = 3,
    steps: Annotated[int, typer.Option(min=4, help="Training steps.")] = 250,
    features: Annotated[int, typer.Option(min=1, help="Random features of a head.")] = 32,
    out: paper_tools.Out = None,
) -> None:
    """Train the same model with every attention."""
    torch.set_num_threads(1)
    shared.quiet()
    pixels = images()
    found: dict[str, list[float]] = {name: [] for name in ATTENTIONS}
    for seed in track(range(seeds), description="Training"):
        for name in ATTENTIONS:
            model = build(name, features, seed)
            train(model, pixels[:TRAIN], steps, seed)
            found[name].append(bits_per_pixel(model, pixels[TRAIN:]))
    title = f"Bits per pixel after {steps} steps of {BATCH} images"
    rows = [{"table": title, "attention": name, "bits": estimate(values)} for name, values in found.items()]
    settings = {"seeds": seeds, "steps": steps, "features": features, "batch": BATCH, "learning rate": RATE}
    paper_tools.finish(out, settings, rows, claims_of(found))


if __name__ == "__main__":
    typer.run(main)
