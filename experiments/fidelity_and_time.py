"""What a kind costs and what it gains: the table and the picture of the README.

    python experiments/fidelity_and_time.py                 # measures for a quarter of an hour on one core, then draws
    python experiments/fidelity_and_time.py --draw-only     # from experiments/results

Whole models of the size of MiniLM and ViT, two layers, random weights, float32, one thread, processor time, a forward
pass or a training step; every row is timed in turns with softmax. Fidelity is that of `experiments/zero_shot.py`:
MiniLM-L6 without training.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import shared
import torch
import transformers
import typer
from matplotlib import pyplot

import hf_linattn
from hf_linattn.bench.timing import time_calls, time_in_turns
from hf_linattn.modules.config import AttentionConfig

RESULTS = Path(__file__).parent / "results"
TIMES = RESULTS / "fidelity_and_time.json"
FIDELITY = RESULTS / "zero_shot.json"
PICTURE = Path(__file__).parents[1] / "docs" / "fidelity_and_time.svg"
LONG = 4096
LENGTHS = (128, 197, 256, 512, 1024, 2048, LONG)
TOKENS_OF_A_BATCH = 2048
IMAGE = 224  # 196 patches and [CLS]

# Beside the defaults and the learned maps of every kind.
OTHERS: dict[str, dict[str, Any]] = {
    "favor_plus, 256 slots": {"kind": "favor_plus", "num_features": 256},
    "eva, 64 slots": {"kind": "eva", "num_chunks": 64},
}
if any(field.name == "exact_below" for field in dataclasses.fields(AttentionConfig)):
    OTHERS["favor_plus, exact below 512"] = {"kind": "favor_plus", "exact_below": 512}
# Row of zero_shot.json -> the side of its point on which its name stands.
POINTS = {
    "FAVOR+": "right",
    "FAVOR+, window": "left",
    "FAVOR# SADERF, window": "left",
    "FAVOR# SADERF, window, heavy keys": "right",
    "FAVOR# dense, window": "left",
    "FAVOR# dense, overlap, heavy keys": "right",
    "LARA": "right",
    "LARA, window": "right",
    "LARA, calibrated proposals, window": "right",
    "EVA, 128 chunks": "right",
    "EVA, 128 chunks, overlap": "right",
}


def bert(tokens: int) -> transformers.PreTrainedModel:
    sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 2}
    return transformers.BertModel(transformers.BertConfig(**sizes, max_position_embeddings=tokens)).eval()


def converted(model: transformers.PreTrainedModel, settings: dict[str, Any]) -> transformers.PreTrainedModel:
    """A converted copy; what it would take from data it takes from rows, or images, of noise."""
    if model.main_input_name == "pixel_values":
        batches = [{"pixel_values": torch.randn(1, 3, IMAGE, IMAGE)} for _ in range(4)]
    else:
        size = (1, min(512, model.config.max_position_embeddings))
        batches = [{"input_ids": torch.randint(model.config.vocab_size, size)} for _ in range(4)]
    return shared.converted(model, settings, batches)


def speedups(
    models: dict[str, transformers.PreTrainedModel], inputs: dict[str, torch.Tensor], *, trains: bool = False
) -> dict[str, float]:
    """Name -> times as fast as the model called "softmax": medians of processor time, measured in turns.

    Args:
        trains: Time a training step without its optimizer instead of a forward pass.
    """

    def step(model: transformers.PreTrainedModel) -> None:
        with torch.inference_mode(not trains):
            output = model(**inputs).last_hidden_state
        if trains:
            model.zero_grad(set_to_none=True)
            output.square().mean().backward()

    calls = {name: partial(step, model) for name, model in models.items()}
    found = time_in_turns(calls, seconds=1, measure=partial(time_calls, clock=time.process_time))
    return {name: round(found["softmax"].median / time.median, 3) for name, time in found.items()}


def measure() -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shared.quiet()

    def beside_softmax(
        stock: Any, settings: dict[str, dict[str, Any]], inputs: dict[str, Any], trains: bool = False
    ) -> dict[str, float]:
        models = {"softmax": stock, **{name: converted(stock, config) for name, config in settings.items()}}
        typer.echo(found := speedups(models, inputs, trains=trains))
        return found

    default: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in hf_linattn.list_kinds()}
    learned = {f"{kind}, learned": {"kind": kind, "learned": True} for kind in default}
    lengths, training = {}, {}
    for tokens in LENGTHS:
        inputs = {"input_ids": torch.randint(1000, 2000, (max(1, TOKENS_OF_A_BATCH // tokens), tokens))}
        lengths[tokens] = beside_softmax(bert(tokens), default | learned | OTHERS, inputs)
        training[tokens] = beside_softmax(bert(tokens), default | learned, inputs, trains=True)
    vit = transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=2, image_size=IMAGE)).eval()
    rows = json.loads(FIDELITY.read_text(encoding="utf-8"))["results"]
    points = {name: rows[name]["settings"] for name in POINTS}
    return {
        "machine": platform.processor() or platform.machine(),
        "threads": 1,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "lengths": lengths,
        "training": training,
        "vit": beside_softmax(vit, default | learned, {"pixel_values": torch.randn(4, 3, IMAGE, IMAGE)}),
        "long": beside_softmax(bert(LONG), points, {"input_ids": torch.randint(1000, 2000, (1, LONG))}),
    }


def draw() -> None:
    """Fidelity at 512 tokens over the speed of the whole model at 4096."""
    speeds = json.loads(TIMES.read_text(encoding="utf-8"))["long"]
    rows = json.loads(FIDELITY.read_text(encoding="utf-8"))["results"]
    colours = {"FAVOR+": "tab:blue", "FAVOR#": "tab:orange", "LARA": "tab:green", "EVA": "tab:red"}
    matplotlib.rcParams.update({"svg.hashsalt": "hf_linattn", "svg.fonttype": "none", "font.size": 9})
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    for name, side in POINTS.items():
        at = speeds[name], rows[name]["cosine"]
        axes.plot(*at, "o", color=colours[name.split(",")[0].split()[0]])
        offset, align = ((6, -3), "left") if side == "right" else ((-6, -3), "right")
        axes.annotate(name, at, offset, textcoords="offset points", ha=align)
    axes.plot(1, 1, "k*", markersize=10)
    axes.annotate("softmax", (1, 1), (8, -8), textcoords="offset points")
    axes.set_xlabel(f"times as fast as softmax: whole MiniLM, {LONG} tokens, one CPU core")
    axes.set_ylabel("cosine to softmax without training, 512 tokens")
    axes.set_xlim(0.8, 3.4)
    axes.grid(alpha=0.3)
    figure.savefig(PICTURE, metadata={"Date": None})


def main(draw_only: bool = False) -> None:
    if not draw_only:
        TIMES.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    draw()


if __name__ == "__main__":
    typer.run(main)
