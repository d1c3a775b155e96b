"""How close each kind is to softmax attention on pretrained weights, without any training.

    python experiments/zero_shot.py --seeds 3             # the table of docs/fidelity.md
    python experiments/zero_shot.py --text book.txt --length 512 --only heavy

Per layer the relative error of the attention output on the inputs that the layer has under softmax, and end to end the
cosine between the mean-pooled embeddings of both models. Calibrated rows take their statistics from other text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import minilm
import torch
import typer
from rich.progress import track

import hf_linattn
from hf_linattn import EvaConfig, FavorPlusConfig, FavorSharpConfig, LaraConfig
from hf_linattn.bench.environment import write_experiment
from hf_linattn.bench.report import markdown_table


def settings() -> dict[str, Any]:
    """Name -> settings: windows of 64 tokens, at most 256 slots (features, landmarks or chunks, and heavy keys)."""
    sharp, lara = FavorSharpConfig(num_features=256), LaraConfig(num_landmarks=64)
    dense = sharp.replace(variant="dense")
    bases = {
        "FAVOR+": FavorPlusConfig(num_features=256),
        "FAVOR# SADERF": sharp,
        "FAVOR# dense": dense,
        "FAVOR# dense, calibrated": dense.replace(statistics="calibrated"),
        "LARA": lara,
        "LARA, calibrated proposals": lara.replace(proposal_source="calibrated"),
    }
    window, overlap = {"window_size": 64}, {"window_size": 64, "overlap_window": True}
    heavy = {"num_heavy_keys": 32}
    made = {}
    for extra in ({"window_size": 0}, window, overlap, window | heavy, overlap | heavy):
        words = [
            word for word, field in (("overlap", "overlap_window"), ("heavy keys", "num_heavy_keys")) if field in extra
        ]
        for name, config in bases.items():
            features = {"num_features": 224} if "heavy keys" in words and "FAVOR" in name else {}
            window_word = ["window"] if extra["window_size"] and "overlap" not in words else []
            made[", ".join([name, *window_word, *words])] = config.replace(**extra, **features)
    few = dense.replace(num_features=64, **overlap, **heavy)
    published = {"conventions": "published", "proposal_map": "none"}
    return {
        **made,
        "FAVOR# dense, 64 features, overlap, heavy keys": few,
        "LARA as published, without maps": LaraConfig(**published),
        "EVA as published, without maps": EvaConfig(**published, num_chunks=64, **window),
        "EVA, 64 chunks": EvaConfig(num_chunks=64, **window),
        "EVA, 128 chunks": EvaConfig(num_chunks=128, **window),
        "EVA, 128 chunks, overlap": EvaConfig(num_chunks=128, **overlap),
    }


def main(
    text: Annotated[list[Path] | None, typer.Option(help="Files to measure on; the licence by default.")] = None,
    calibration_text: Annotated[
        list[Path] | None, typer.Option(help="Other files to calibrate on; film reviews by default.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="A BERT checkpoint; MiniLM-L6 by default.")] = None,
    length: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    only: Annotated[str, typer.Option(help="Only rows of the table whose name contains this.")] = "",
    seeds: Annotated[int, typer.Option(help="Average over so many seeds of the random directions.")] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Print the table."""
    torch.manual_seed(0)
    bert, tokenizer = minilm.load(model)
    chosen = {name: config for name, config in settings().items() if only.lower() in name.lower()}
    if not chosen or seeds < 1:
        raise typer.BadParameter(f"Nothing to measure: no row contains {only!r}, or --seeds is {seeds}.")
    read = lambda files: [file.read_text(encoding="utf-8") for file in files]  # noqa: E731
    batches = minilm.rows(tokenizer, read(text or [minilm.LICENCE]), length)
    other = minilm.rows(tokenizer, read(calibration_text) if calibration_text else [minilm.reviews()], length)
    results, lines = {}, []
    for name, config in track(chosen.items(), description="Comparing with softmax"):
        reports = []
        for seed in range(seeds):
            converted = hf_linattn.convert(bert, config.replace(seed=seed), copy=True)
            if hf_linattn.needs_calibration(converted):
                hf_linattn.calibrate(converted, other)
            reports.append(hf_linattn.compare(converted, batches))
        layers = zip(*(report.layers for report in reports), strict=True)
        mean = [sum(layer.error for layer in column) / seeds for column in layers]
        cosine = sum(report.hidden_cosine for report in reports) / seeds
        results[name] = {"layer_errors": mean, "cosine": cosine, "settings": config.to_dict()}
        lines.append([name, " ".join(f"{error:.2f}" for error in mean), f"{cosine:.3f}"])
    uniform = " ".join(f"{layer.uniform_error:.2f}" for layer in reports[0].layers)
    print(
        markdown_table((["attention", "error of layers 0 ..", "cosine"], [["uniform attention", uniform, ""], *lines]))
    )
    print(f"{len(batches)} rows of {length} tokens, {seeds} seed(s)")
    if out:
        write_experiment(out, {"rows": len(batches), "length": length, "seeds": seeds, "results": results})


if __name__ == "__main__":
    typer.run(main)
