"""How close each kind is to softmax attention on pretrained weights, without any training.

    python experiments/zero_shot.py --seeds 3             # the table of docs/fidelity.md
    python experiments/zero_shot.py --text book.txt --length 512 --only heavy

Per layer the relative error of the attention output on the inputs that the layer has under softmax, and end to end the
cosine between the mean-pooled embeddings of both models. Calibrated rows take their statistics from other text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import shared
import torch
import typer
from rich.progress import track
from torch import Tensor

import hf_linattn
from hf_linattn import EvaConfig, FavorPlusConfig, FavorSharpConfig, LaraConfig
from hf_linattn.bench.environment import write_experiment


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
    made = {name: config.replace(window_size=0) for name, config in bases.items()}
    for name, config in bases.items():
        few = config.replace(num_features=224) if "FAVOR" in name else config
        made[f"{name}, window"] = config.replace(**window)
        made[f"{name}, overlap"] = config.replace(**overlap)
        made[f"{name}, window, heavy keys"] = few.replace(**window, **heavy)
        made[f"{name}, overlap, heavy keys"] = few.replace(**overlap, **heavy)
    published = {"conventions": "published", "proposal_map": "none"}
    return {
        **made,
        "FAVOR# dense, 64 features, overlap, heavy keys": dense.replace(num_features=64, **overlap, **heavy),
        "LARA as published, without maps": LaraConfig(**published),
        "EVA as published, without maps": EvaConfig(**published, num_chunks=64, **window),
        "EVA, 64 chunks": EvaConfig(num_chunks=64, **window),
        "EVA, 128 chunks": EvaConfig(num_chunks=128, **window),
        "EVA, 128 chunks, overlap": EvaConfig(num_chunks=128, **overlap),
    }


def batches(tokenizer: Any, paths: list[Path], length: int) -> list[dict[str, Tensor]]:
    """Consecutive full rows of `length` tokens, [CLS] and [SEP] included, one per batch."""
    rows = shared.rows_of(shared.read_tokens(tokenizer, paths), length - 2)
    ids = shared.with_ends(tokenizer, rows)
    return [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]


def line(name: str, errors: list[float], cosine: float | None = None) -> dict[str, Any]:
    shown = [f"{error:.2f}" for error in errors]
    return {"attention": name, "error of layers 0 ..": shown, "cosine": cosine and round(cosine, 3)}


def main(
    text: Annotated[list[Path] | None, typer.Option(help="Files to measure on; the licence by default.")] = None,
    calibration_text: Annotated[
        list[Path] | None, typer.Option(help="Other files to calibrate on; film reviews by default.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="A BERT checkpoint; MiniLM-L6 by default.")] = None,
    length: Annotated[int, typer.Option(min=3, help="Tokens per row.")] = 512,
    only: Annotated[str, typer.Option(help="Only rows of the table whose name contains this.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Average over so many seeds of the random directions.")] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Print the table."""
    torch.manual_seed(0)
    bert, tokenizer = shared.encoder(model)
    chosen = {name: config for name, config in settings().items() if only.lower() in name.lower()}
    if not chosen:
        raise typer.BadParameter(f"Nothing to measure: no row contains {only!r}.")
    measured = batches(tokenizer, text or [shared.LICENCE], length)
    calibrated = batches(tokenizer, calibration_text or [shared.REVIEWS], length)
    results, rows = {}, []
    for name, config in track(chosen.items(), description="Comparing with softmax"):
        models = (shared.converted(bert, config.replace(seed=seed), calibrated) for seed in range(seeds))
        reports = [hf_linattn.compare(made, measured) for made in models]
        columns = list(zip(*(report.layers for report in reports), strict=True))
        errors = [sum(layer.error for layer in column) / seeds for column in columns]
        cosine = sum(report.hidden_cosine for report in reports) / seeds
        results[name] = {"layer_errors": errors, "cosine": cosine, "settings": config.to_dict()}
        rows.append(line(name, errors, cosine))
    rows.insert(0, line("uniform attention", [layers[0].uniform_error for layers in columns]))
    shared.print_table("Without training", rows, f"{len(measured)} rows of {length} tokens, {seeds} seed(s)")
    if out:
        write_experiment(out, {"rows": len(measured), "length": length, "seeds": seeds, "results": results})


if __name__ == "__main__":
    typer.run(main)
