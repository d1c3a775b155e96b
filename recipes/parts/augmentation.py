"""What is done to images while a model trains: tensor operations on the pixels that the image processor makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from .common import RecipeError
from .training import RecipeTrainer

# Share of the image that random erasing blanks, and the sides of what it blanks and of random crops (height / width).
ERASED_AREA, ERASED_RATIO, CROP_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3), (3 / 4, 4 / 3)
PROBABILITIES = ("horizontal_flip", "random_erasing")


@dataclass
class AugmentationArguments:
    """How training images vary. Nothing of it touches evaluation."""

    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability that an image is mirrored"})
    crop_padding: int = field(
        default=0, metadata={"help": "Pixels of padding around an image, of which a random crop is taken (CIFAR: 4)"}
    )
    min_crop_area: float = field(
        default=1.0, metadata={"help": "Least share of the image in a random crop, resized back (ImageNet: 0.08)"}
    )
    random_erasing: float = field(
        default=0.0, metadata={"help": "Probability that a random rectangle of an image is blanked (DeiT: 0.25)"}
    )
    mixup_alpha: float = field(
        default=0.0,
        metadata={"help": "Mix pairs of images; their shares are drawn from Beta(alpha, alpha) (DeiT: 0.8)"},
    )
    cutmix_alpha: float = field(
        default=0.0, metadata={"help": "Paste a rectangle of another image; beside mixup every second batch (DeiT: 1)"}
    )

    def __post_init__(self) -> None:
        for name in PROBABILITIES:
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"--{name} must be a probability, from 0 to 1; got {getattr(self, name)}.")
        if not 0 < self.min_crop_area <= 1:
            raise RecipeError(f"--min_crop_area must be above 0 and at most 1; got {self.min_crop_area}.")
        for name in ("crop_padding", "mixup_alpha", "cutmix_alpha"):
            if getattr(self, name) < 0:
                raise RecipeError(f"--{name} must not be negative; got {getattr(self, name)}.")


# -- one image at a time ----------------------------------------------------------------------------------------------
def flip(pixels: Tensor, probability: float, random: np.random.Generator) -> Tensor:
    """Mirror some of the images `[batch, channels, height, width]`, left to right."""
    chosen = _on(random.random(len(pixels)) < probability, pixels)
    return torch.where(chosen[:, None, None, None], pixels.flip(-1), pixels)


def crop_padded(pixels: Tensor, padding: int, random: np.random.Generator) -> Tensor:
    """Shift every image by up to `padding` pixels each way; 0, the mean colour of the processor, comes in."""
    batch, _, height, width = pixels.shape
    top, left = (_on(random.integers(0, 2 * padding + 1, batch), pixels) for _ in range(2))
    rows = top[:, None] + torch.arange(height, device=pixels.device)
    columns = left[:, None] + torch.arange(width, device=pixels.device)
    padded = F.pad(pixels, (padding,) * 4).movedim(1, -1)
    images = torch.arange(batch, device=pixels.device)[:, None, None]
    return padded[images, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


def crop_resized(pixels: Tensor, min_area: float, random: np.random.Generator) -> Tensor:
    """A random part of every image, resized to the whole (bilinear)."""
    batch, _, height, width = pixels.shape
    tall, wide = _rectangles(batch, (min_area, 1.0), CROP_RATIO, height / width, random)
    # In the coordinates of affine_grid, from -1 to 1.
    across, down = ((1 - side) * random.uniform(-1, 1, batch) for side in (wide, tall))
    zero = np.zeros(batch)
    maps = np.stack([np.stack([wide, zero, across], 1), np.stack([zero, tall, down], 1)], 1)
    grid = F.affine_grid(_on(maps, pixels).to(pixels.dtype), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def erase(pixels: Tensor, probability: float, random: np.random.Generator) -> Tensor:
    """Blank a random rectangle of some of the images.

    Source: Zhong et al. 2017, arXiv:1708.04896; what is blanked gets 0, the mean colour of the processor.
    """
    batch, _, height, width = pixels.shape
    chosen = random.random(batch) < probability
    inside = _boxes(*_rectangles(batch, ERASED_AREA, ERASED_RATIO, height / width, random), pixels, random)
    return pixels.masked_fill((inside & _on(chosen, pixels)[:, None, None])[:, None], 0)


# -- pairs of images --------------------------------------------------------------------------------------------------
def mix(pixels: Tensor, targets: Tensor, alpha: float, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2017, arXiv:1710.09412): images and targets `[batch, labels]`, with one share a batch."""
    share, partner = float(random.beta(alpha, alpha)), _on(random.permutation(len(pixels)), pixels)
    return _blend(pixels, pixels[partner], share), _blend(targets, targets[partner], share)


def cut_and_paste(pixels: Tensor, targets: Tensor, alpha: float, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """CutMix (Yun et al. 2019, arXiv:1905.04899): a rectangle of another image, targets by the area that it takes."""
    partner = _on(random.permutation(len(pixels)), pixels)
    side = np.full(1, np.sqrt(1 - random.beta(alpha, alpha)))
    inside = _boxes(side, side, pixels, random)
    share = float(1 - inside.float().mean())
    return torch.where(inside[:, None], pixels[partner], pixels), _blend(targets, targets[partner], share)


def _blend(ours: Tensor, theirs: Tensor, share: float) -> Tensor:
    return share * ours + (1 - share) * theirs


def _rectangles(
    batch: int, area: tuple[float, float], ratio: tuple[float, float], shape: float, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Height and width of random rectangles, as shares of those of the image; `shape` is its height over its width."""
    areas = random.uniform(*area, batch)
    ratios = np.exp(random.uniform(np.log(ratio[0]), np.log(ratio[1]), batch)) / shape
    return np.minimum(np.sqrt(areas * ratios), 1), np.minimum(np.sqrt(areas / ratios), 1)


def _boxes(tall: np.ndarray, wide: np.ndarray, pixels: Tensor, random: np.random.Generator) -> Tensor:
    """Which pixels `[boxes, height, width]` are inside of rectangles at random places."""
    inside = []
    for share, size in ((tall, pixels.shape[-2]), (wide, pixels.shape[-1])):
        length = np.rint(share * size).astype(int)
        first = _on(random.integers(0, size - length + 1), pixels)[:, None]
        place = torch.arange(size, device=pixels.device)
        inside.append((place >= first) & (place < first + _on(length, pixels)[:, None]))
    return inside[0][:, :, None] & inside[1][:, None, :]


def _on(values: np.ndarray, pixels: Tensor) -> Tensor:
    return torch.from_numpy(values).to(pixels.device)


# -- a batch ----------------------------------------------------------------------------------------------------------
def augment(
    batch: dict[str, Any],
    args: AugmentationArguments,
    num_labels: int,
    label_smoothing: float,
    random: np.random.Generator,
) -> dict[str, Any]:
    """A training batch as the flags say. Mixed images have targets `[batch, labels]` in place of labels `[batch]`."""
    pixels, labels = batch["pixel_values"], batch["labels"]
    if args.min_crop_area < 1:
        pixels = crop_resized(pixels, args.min_crop_area, random)
    if args.crop_padding:
        pixels = crop_padded(pixels, args.crop_padding, random)
    if args.horizontal_flip:
        pixels = flip(pixels, args.horizontal_flip, random)
    if args.random_erasing:
        pixels = erase(pixels, args.random_erasing, random)
    if args.mixup_alpha or args.cutmix_alpha:
        targets = F.one_hot(labels, num_labels).to(pixels.dtype)
        targets = _blend(targets, torch.full_like(targets, 1 / num_labels), 1 - label_smoothing)
        pastes = args.cutmix_alpha and (not args.mixup_alpha or random.random() < 0.5)
        way, alpha = (cut_and_paste, args.cutmix_alpha) if pastes else (mix, args.mixup_alpha)
        pixels, labels = way(pixels, targets, alpha, random)
    return {**batch, "pixel_values": pixels, "labels": labels}


class AugmentingTrainer(RecipeTrainer):
    """A Trainer that changes every batch that it trains on.

    What is drawn follows from the seed, the step, the batch within the step and the process alone: a resumed run sees
    the images of an undisturbed one, and no two processes draw the same.
    """

    def __init__(self, *, augment: Callable[[dict[str, Any], np.random.Generator], dict[str, Any]], **kwargs: Any):
        super().__init__(**kwargs)
        self.augment = augment
        self._place = (-1, 0)  # step, batch within the step

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        step, batch = self._place
        self._place = (step, batch + 1) if step == self.state.global_step else (self.state.global_step, 0)
        random = np.random.default_rng([self.args.seed, *self._place, self.args.process_index])
        return super().training_step(model, self.augment(self._prepare_inputs(inputs), random), *args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.get("labels")
        if labels is None or not labels.is_floating_point():
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = F.cross_entropy(outputs.logits.float(), labels.float())
        return (loss, outputs) if return_outputs else loss


def trainer_with(args: AugmentationArguments, model: PreTrainedModel, label_smoothing: float) -> Any:
    """What makes the Trainer of a run."""
    change = partial(augment, args=args, num_labels=model.config.num_labels, label_smoothing=label_smoothing)
    return partial(AugmentingTrainer, augment=lambda batch, random: change(batch, random=random))
