"""Fine-tune a ViT on image classification, or train one from scratch, with softmax or any linear attention.

Runs with plain `python` or with `accelerate launch`, on Hub names or local files and folders:

    python recipes/image_classification.py --model_name_or_path google/vit-base-patch16-224 --attention eva \\
        --train_dir photos/train --validation_dir photos/dev --image_size 384 \\
        --do_train --do_eval --eval_strategy epoch --num_train_epochs 3 --output_dir runs/eva

From scratch, with random weights:

    python recipes/image_classification.py --model_type vit --attention eva \\
        --config_overrides hidden_size=192,num_attention_heads=3,intermediate_size=768,image_size=32,patch_size=4 \\
        --train_file train.parquet --validation_file test.parquet --crop_padding 4 --mixup_alpha 0.8 \\
        --do_train --do_eval --max_steps 2000 --output_dir runs/scratch

Images vary while the model trains (mirrored by default); Pillow is enough, torchvision is not needed. Every
`TrainingArguments` flag works. A run that was cut short goes on from its last complete checkpoint when it is started
again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score
from torch import Tensor
from transformers import AutoModelForImageClassification, EvalPrediction, TrainerCallback

import hf_linattn
from parts.augmentation import AugmentationArguments, trainer_with
from parts.common import RecipeError, run
from parts.finetuning import Flags, Scores, Task, fine_tune, read_flags
from parts.images import ImageArguments, image_size_of, load_image_processor, read_images
from parts.labels import read_labels
from parts.models import convert, load_config, load_model
from parts.pixels import PixelCollator, read_pixels
from parts.training import NewModelArguments

logger = logging.getLogger("hf_linattn.recipes")

TOP = 5  # top-5 accuracy, of tasks with more labels than that


@dataclass
class Arguments(AugmentationArguments, ImageArguments):
    """Which images and labels, how they are read, and how training images vary."""

    def __post_init__(self) -> None:
        AugmentationArguments.__post_init__(self)
        ImageArguments.__post_init__(self)


ARGUMENTS = Arguments  # of the data, also of evaluate_checkpoint.py


def prepare(flags: Flags) -> Task:
    """Read data and model; map labels to the model's outputs; decode and resize the images."""
    splits, columns = read_images(flags.data, flags.training)
    config = load_config(flags.model)
    labels = read_labels(splits, columns.label, config, trains=flags.training.do_train)
    if labels.is_regression:
        raise RecipeError(
            f"Column {columns.label!r} must hold class labels (whole numbers or text); it holds numbers."
        )
    options = {"config": config, "ignore_mismatched_sizes": labels.new_head}
    model = load_model(AutoModelForImageClassification, flags.model, **options)
    if flags.data.image_size is not None:
        hf_linattn.set_image_size(model, flags.data.size)
    model = convert(model, flags.attention, flags.adaptation)

    processor = load_image_processor(flags.model, model)
    num_labels = model.config.num_labels
    return Task(
        model=model,
        processor=processor,
        data=read_pixels(splits, columns, labels, processor, model, flags.data, flags.training),
        collate=PixelCollator.of(processor, model),
        score=lambda split, prediction: score(prediction),
        show=lambda best: [labels.name(each) for each in best[:, 0]],
        main_metric="accuracy",
        keep=lambda logits, labels: best_outputs(logits, num_labels),
        facts={"image_size": image_size_of(model), "labels": labels.to_dict(), **asdict(columns)},
        trainer=trainer_with(flags.data, model, flags.training.label_smoothing_factor),
    )


def best_outputs(logits: Tensor, num_labels: int) -> Tensor:
    """The labels with the highest logits, the highest first: all that the metrics need."""
    return logits.topk(TOP if num_labels > TOP else 1).indices


def score(prediction: EvalPrediction) -> Scores:
    """Accuracy, and top-5 accuracy where there are more than five labels."""
    best, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    metrics = {"accuracy": float(accuracy_score(labels, best[:, 0]))}
    if best.shape[1] == TOP:
        metrics["top5_accuracy"] = float((best == labels[:, None]).any(1).mean())
    return Scores(metrics, (best[:, 0] == labels).astype(float))


def main(
    argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = (), quiet: bool = False
) -> dict[str, Any]:
    """Run the recipe; arguments and result of `fine_tune`."""
    flags = read_flags(ARGUMENTS, argv, __doc__, quiet, NewModelArguments)
    return fine_tune(Path(__file__).stem, flags, prepare(flags), callbacks, quiet)


if __name__ == "__main__":
    run(main)
