"""How close each kind is to softmax attention on pretrained weights, without any training.

    python benchmarks/zero_shot.py                       # the table of docs/decisions.md
    python benchmarks/zero_shot.py --text book.txt --length 512 --only heavy

Per layer the relative error of the attention output on the inputs that the layer has under softmax, and end to end the
cosine between the mean-pooled embeddings of both models. Calibrated rows take their statistics from other text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import minilm
import torch
import transformers
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track

import hf_linattn
from hf_linattn import EvaConfig, FavorPlusConfig, FavorSharpConfig, LaraConfig

DOCS = minilm.ROOT / "docs"


def settings() -> dict[str, Any]:
    """Name -> settings: at most 256 slots, windows of at most 64 tokens."""
    favor = {"num_features": 256, "window_size": 0}
    dense = FavorSharpConfig(variant="dense", **favor)
    window, sliding = {"window_size": 64}, {"window_size": 64, "overlap_window": True}
    calibrated = {"statistics": "calibrated"}
    table = {
        "FAVOR+": FavorPlusConfig(**favor),
        "FAVOR# SADERF": FavorSharpConfig(**favor),
        "FAVOR# dense": dense,
        "FAVOR# dense, calibrated": dense.replace(**calibrated),
        "LARA": LaraConfig(num_landmarks=64, window_size=0),
        "LARA, 256 landmarks": LaraConfig(num_landmarks=256, window_size=0),
        "LARA as published, parameter-free": LaraConfig(conventions="published", proposal_map="none"),
        "EVA as published, parameter-free": EvaConfig(
            conventions="published", proposal_map="none", proposals="mean", num_chunks=64, **window
        ),
        "EVA, 64 chunks": EvaConfig(num_chunks=64, **window),
        "EVA, 128 chunks": EvaConfig(num_chunks=128, **window),
        "EVA, 128 chunks, overlap": EvaConfig(num_chunks=128, **sliding),
        "FAVOR+, window": FavorPlusConfig(num_features=256, **window),
        "LARA, window": LaraConfig(num_landmarks=64, **window),
        "FAVOR# SADERF, window": FavorSharpConfig(num_features=256, **window),
        "FAVOR# dense, window": dense.replace(**window),
        "FAVOR# dense, overlap": dense.replace(**sliding),
        "FAVOR# dense, window, 32 heavy keys": dense.replace(num_heavy_keys=32, **window),
        "FAVOR# SADERF, overlap, 32 heavy keys": FavorSharpConfig(num_features=256, num_heavy_keys=32, **sliding),
        "FAVOR# dense, overlap, 32 heavy keys": dense.replace(num_heavy_keys=32, **sliding),
        "FAVOR# dense, 64 features, overlap, 32 heavy keys": dense.replace(
            num_features=64, num_heavy_keys=32, **sliding
        ),
        "FAVOR# dense, calibrated, overlap, 32 heavy keys": dense.replace(num_heavy_keys=32, **sliding, **calibrated),
        "LARA, overlap, 32 heavy keys": LaraConfig(num_landmarks=64, num_heavy_keys=32, **sliding),
    }
    return table


def main(
    text: Annotated[list[Path] | None, typer.Option(help="Files to measure on; the licence by default.")] = None,
    calibration_text: Annotated[list[Path] | None, typer.Option(help="Other files, for calibrated rows.")] = None,
    model: Annotated[Path | None, typer.Option(help="A BERT checkpoint; MiniLM-L6 by default.")] = None,
    length: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    only: Annotated[str, typer.Option(help="Only rows of the table whose name contains this.")] = "",
    seeds: Annotated[int, typer.Option(help="Average over so many seeds of the random directions.")] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Print the table."""
    torch.manual_seed(0)
    bert, tokenizer = minilm.load(model)
    batches = minilm.rows(tokenizer, text or [minilm.LICENCE], length)
    other = minilm.rows(tokenizer, calibration_text or sorted(DOCS.glob("*.md")), length)
    results = {}
    chosen = {name: config for name, config in settings().items() if only.lower() in name.lower()}
    for name, config in track(chosen.items(), description="Comparing with softmax"):
        errors: list[list[float]] = []
        cosines: list[float] = []
        for seed in range(seeds):
            converted = hf_linattn.convert(bert, config.replace(seed=seed), copy=True)
            if getattr(config, "statistics", None) == "calibrated":
                hf_linattn.calibrate(converted, other)
            report = hf_linattn.compare(converted, batches)
            errors.append([layer.error for layer in report.layers])
            cosines.append(report.hidden_cosine)
        uniform = [layer.uniform_error for layer in report.layers]
        mean = [sum(column) / seeds for column in zip(*errors, strict=True)]
        results[name] = {"layer_errors": mean, "cosine": sum(cosines) / seeds, "settings": config.to_dict()}
    table = ["| attention | error of layers 0 .. | cosine |", "|---|---|---|"]
    table.append(f"| uniform attention | {' '.join(f'{e:.2f}' for e in uniform)} | |")
    for name, found in results.items():
        table.append(f"| {name} | {' '.join(f'{e:.2f}' for e in found['layer_errors'])} | {found['cosine']:.3f} |")
    console = Console()
    console.print(Markdown("\n".join(table)))
    console.print(f"{len(batches)} rows of {length} tokens, {seeds} seed(s)")
    if out:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        content = {"versions": versions, "rows": len(batches), "length": length, "seeds": seeds, "results": results}
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
