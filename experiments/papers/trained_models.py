"""What the papers say of trained models, on the small variants of their experiments.

    python experiments/papers/trained_models.py small_vit --out small_vit.json
    python experiments/papers/trained_models.py small_glue --model minilm --seeds 0,1 --out small_glue.json

Every kind of attention has the same rows, steps and seed, and a process of its own. The data files have the names that
stand in the configuration (`recipes/configs/papers`) or below, relative to the working directory. Runs that have
finished are not repeated.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import paper_tools
import torch
import typer
from paper_tools import Claim, Estimate, below, estimate

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
sys.path.append(str(RECIPES))


@dataclass(frozen=True)
class Experiment:
    """A recipe, under several kinds of attention.

    Args:
        config: YAML file in recipes/configs/papers.
        data: Flags of the data that the configuration does not give, for training and evaluation.
        scored: Flags of the data that evaluation needs.
        kinds: Flags of every kind.
        model: The flag that `--model` is given to; None without one.
        claims: (where, the claim, the better kind, the other one).
    """

    recipe: str
    config: str
    data: list[str]
    scored: list[str]
    kinds: dict[str, list[str]]
    model: str | None
    claims: list[tuple[str, str, str, str]]


def published(**settings: Any) -> list[str]:
    return ["--attention_config", json.dumps({"conventions": "published", **settings})]


IMAGES = ["--train_file", "cifar10/train.parquet", "--validation_file", "cifar10/test.parquet"]
RANDOM = ["--num_features", "64", "--window_size", "0"]
SADERF = [*RANDOM, "--attention_config", '{"variant": "saderf"}']
METRICS = {"image_classification": "accuracy", "text_classification": "accuracy", "language_modeling": "nats a token"}
EXPERIMENTS = {
    "small_vit": Experiment(
        recipe="image_classification",
        config="small_vit.yaml",
        data=IMAGES,
        scored=[],
        kinds={
            "softmax": [],
            "favor_plus": ["--window_size", "0", "--num_features", "24"],
            "favor_sharp": ["--window_size", "0", "--num_features", "24"],
            "lara": ["--num_landmarks", "16", *published(mixing="key", alpha_coeff=2.0)],
            "eva": ["--window_size", "4", *published(num_chunks=16, relative_position="table")],
        },
        model=None,
        claims=[
            ("LARA, ImageNet", "A ViT from scratch is better with LARA than with FAVOR+", "lara", "favor_plus"),
            ("EVA, ImageNet", "A ViT from scratch is better with EVA than with LARA", "eva", "lara"),
            ("EVA, ImageNet", "A ViT from scratch is as good with EVA as with softmax or better", "eva", "softmax"),
        ],
    ),
    "small_glue": Experiment(
        recipe="text_classification",
        config="favor_sharp/glue_small.yaml",
        data=["--validation_file", "sst2/validation.parquet"],
        scored=["--task_name", "sst2", "--max_length", "64"],
        kinds={"softmax": [], "favor_plus": RANDOM, "favor_sharp": SADERF},
        model="--model_name_or_path",
        claims=[("FAVOR#, GLUE", "FAVOR# is better than FAVOR+ (sentences of SST-2)", "favor_sharp", "favor_plus")],
    ),
    "small_plays": Experiment(
        recipe="language_modeling",
        config="performer/lm1b_pretrained_small.yaml",
        data=["--validation_file", "tinyshakespeare/test.parquet"],
        scored=["--max_length", "256"],
        kinds={"softmax": [], "favor_plus": RANDOM, "favor_sharp": RANDOM},
        model="--model_name_or_path",
        claims=[
            ("FAVOR#, text", "FAVOR# is better than FAVOR+ (a GPT-2 on plays)", "favor_sharp", "favor_plus"),
            ("FAVOR+, LM1B", "With a Transformer's weights FAVOR+ is soon as good", "favor_plus", "softmax"),
        ],
    ),
}


def train(experiment: Experiment, kind: str, seed: int, model: str | None, output: Path) -> None:
    """One run of the recipe; one that had finished is left alone."""
    command = [sys.executable, str(RECIPES / f"{experiment.recipe}.py")]
    command += ["--config", str(RECIPES / "configs" / "papers" / experiment.config), *experiment.data]
    command += ["--attention", kind, *experiment.kinds[kind], "--seed", str(seed), "--output_dir", str(output)]
    command += [experiment.model, model] if experiment.model and model else []
    subprocess.run([*command, "--disable_tqdm", "true"], check=True)


def score(experiment: Experiment, checkpoint: Path) -> dict[str, Any]:
    """Metrics of a trained model and the score of every row."""
    import evaluate_checkpoint

    flags = ["--model_name_or_path", str(checkpoint), "--task", experiment.recipe, "--split", "validation"]
    flags += ["--repeats", "0", "--batch_size", "50", *experiment.data[-2:], *experiment.scored]
    args, data, _ = evaluate_checkpoint.read_flags(flags)
    return evaluate_checkpoint.measure(args, data, str(checkpoint), False, "")


def better(found: dict[str, Any], other: dict[str, Any]) -> tuple[Estimate, str]:
    """By how much the first is better, row by row, and whether that is certain."""
    first, second = (torch.tensor(each["scores"], dtype=torch.float64) for each in (found, other))
    if found["main_metric"] == "nll":  # the smaller the better
        first, second = -first, -second
    return estimate(first - second), below(second, first)


def main(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(EXPERIMENTS)}.")],
    model: Annotated[str | None, typer.Option(help="The pretrained model, or the tokenizer of a new one.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0",
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
    finished: Annotated[
        bool, typer.Option("--finished", help="Train nothing: compare the runs that are there.")
    ] = False,
    out: paper_tools.Out = None,
) -> None:
    """Train and compare."""
    if name not in EXPERIMENTS:
        paper_tools.fail(f"The experiment must be one of {list(EXPERIMENTS)}; got {name!r}.")
    experiment = EXPERIMENTS[name]
    if (model is None) != (experiment.model is None):
        paper_tools.fail(f"--model is {'not used in' if model else 'needed for'} {name}.")
    torch.set_num_threads(1)
    found: dict[tuple[str, int], dict[str, Any]] = {}
    chosen = paper_tools.numbers(seeds, "--seeds", 2**31)
    for seed in chosen:
        for kind in experiment.kinds:
            folder = runs / name / f"{kind}-{seed}"
            if not finished:
                train(experiment, kind, seed, model, folder)
            if (folder / "results.json").exists():
                found[kind, seed] = score(experiment, folder)
    rows = [
        {
            "attention": kind,
            "seed": seed,
            **{metric: each[metric] for metric in each["metrics"]},
            "rows": each["rows"],
            **(
                {"better than softmax by": better(each, found["softmax", seed])[0]}
                if ("softmax", seed) in found
                else {}
            ),
        }
        for (kind, seed), each in found.items()
    ]
    claims = []
    for source, claim, first, second in experiment.claims:
        both = [seed for seed in chosen if {(first, seed), (second, seed)} <= set(found)]
        compared = [better(found[first, seed], found[second, seed]) for seed in both]
        differences = ", ".join(str(difference) for difference, _ in compared)
        figure = f"{METRICS[experiment.recipe]} better by {differences} (row by row, for each seed)"
        claims.append(Claim.judged(source, claim, figure, [answer for _, answer in compared]))
    paper_tools.finish(out, {"experiment": name, "config": experiment.config}, rows, claims)


if __name__ == "__main__":
    typer.run(main)
