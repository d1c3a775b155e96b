"""What is done to training images: tensor operations with random numbers of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from parts.augmentation import (
    AugmentationArguments,
    augment,
    crop_padded,
    crop_resized,
    cut_and_paste,
    erase,
    flip,
    mix,
)
from parts.common import RecipeError

BATCH, HEIGHT, WIDTH = 16, 10, 14


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def pixels() -> torch.Tensor:
    """Every pixel has a value of its own, above 0."""
    count = BATCH * 3 * HEIGHT * WIDTH
    return torch.arange(1, count + 1, dtype=torch.float32).view(BATCH, 3, HEIGHT, WIDTH)


def test_flip(pixels: torch.Tensor) -> None:
    assert torch.equal(flip(pixels, 1.0, random()), pixels.flip(-1))
    assert torch.equal(flip(pixels, 0.0, random()), pixels)
    some = flip(pixels, 0.5, random())
    mirrored = (some == pixels.flip(-1)).flatten(1).all(1)
    assert bool((mirrored ^ (some == pixels).flatten(1).all(1)).all())
    assert 0 < int(mirrored.sum()) < BATCH


def test_a_padded_crop_is_a_shift(pixels: torch.Tensor) -> None:
    found = crop_padded(pixels, 2, random())
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2))
    shifts = set()
    for i in range(BATCH):
        places = [(top, left) for top in range(5) for left in range(5)]
        same = [p for p in places if torch.equal(found[i], padded[i, :, p[0] : p[0] + HEIGHT, p[1] : p[1] + WIDTH])]
        assert len(same) == 1
        shifts.update(same)
    assert len(shifts) > 5


def test_a_resized_crop_is_a_part_of_the_image(pixels: torch.Tensor) -> None:
    assert torch.allclose(crop_resized(torch.full_like(pixels, 3.0), 0.1, random()), torch.tensor(3.0))
    # Along a ramp from 0 to 1 the crop covers a part of the range, sometimes a small one.
    ramp = torch.linspace(0, 1, WIDTH).expand(BATCH, 1, HEIGHT, WIDTH)
    found = crop_resized(ramp, 0.1, random())
    covered = found.flatten(1).amax(1) - found.flatten(1).amin(1)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert 0.2 < float(covered.min()) < 0.7
    assert float(covered.max()) > 0.8


def test_erasing_blanks_a_rectangle(pixels: torch.Tensor) -> None:
    assert torch.equal(erase(pixels, 0.0, random()), pixels)
    found = erase(pixels, 1.0, random())
    blank = (found == 0).all(1)
    assert torch.equal(found, pixels.masked_fill(blank[:, None], 0))
    for each in blank:
        rows, columns = each.any(1), each.any(0)
        assert torch.equal(each, rows[:, None] & columns)  # a rectangle
        assert 0 < float(each.float().mean()) < 0.45
    assert len({int(each.sum()) for each in blank}) > 5


def one_hot() -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.arange(BATCH) % 5, 5).float()


def test_mixup_blends_images_and_targets_alike(pixels: torch.Tensor) -> None:
    found, targets = mix(pixels, one_hot(), 1.0, random(1))
    share = random(1).beta(1.0, 1.0)
    assert 0.05 < share < 0.95
    generator = random(1)
    generator.beta(1.0, 1.0)
    partner = generator.permutation(BATCH)
    assert torch.allclose(found, share * pixels + (1 - share) * pixels[partner], rtol=1e-5)
    assert torch.allclose(targets, share * one_hot() + (1 - share) * one_hot()[partner])


def test_cutmix_counts_the_pixels_that_it_pastes(pixels: torch.Tensor) -> None:
    for seed in range(5):
        found, targets = cut_and_paste(pixels, one_hot(), 1.0, random(seed))
        kept = (found == pixels).all(1)
        # Every other pixel stands where it stood in one other image: values are numbered through.
        size = 3 * HEIGHT * WIDTH
        assert torch.equal((found - 1) % size, (pixels - 1) % size)
        moved = kept.flatten(1).all(1).logical_not()
        share = float(kept[moved][0].float().mean()) if bool(moved.any()) else 1.0
        own = (targets * one_hot()).sum(1)
        assert bool((own >= share - 1e-5).all())
        assert torch.allclose(targets.sum(1), torch.ones(BATCH))


def batch(pixels: torch.Tensor) -> dict[str, Any]:
    return {"pixel_values": pixels, "labels": torch.arange(BATCH) % 5}


def test_nothing_is_changed_unless_asked_for(pixels: torch.Tensor) -> None:
    found = augment(batch(pixels), AugmentationArguments(horizontal_flip=0.0), 5, 0.1, random())
    assert torch.equal(found["pixel_values"], pixels)
    assert torch.equal(found["labels"], batch(pixels)["labels"])


def test_targets_of_mixed_images_are_smoothed(pixels: torch.Tensor) -> None:
    targets = augment(batch(pixels), AugmentationArguments(mixup_alpha=0.5), 5, 0.1, random())["labels"]
    assert torch.allclose(targets.sum(1), torch.ones(BATCH))
    assert float(targets.min()) == pytest.approx(0.02)


def test_what_is_drawn_follows_from_the_generator_alone(pixels: torch.Tensor) -> None:
    everything = AugmentationArguments(0.5, 2, 0.3, 0.5, 0.8, 1.0)
    torch.manual_seed(1)
    one = augment(batch(pixels), everything, 5, 0.1, random(3))["pixel_values"]
    torch.manual_seed(2)
    assert torch.equal(one, augment(batch(pixels), everything, 5, 0.1, random(3))["pixel_values"])
    assert not torch.equal(one, augment(batch(pixels), everything, 5, 0.1, random(4))["pixel_values"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"horizontal_flip": 1.5}, "--horizontal_flip must be a probability"),
        ({"random_erasing": -0.1}, "--random_erasing must be a probability"),
        ({"min_crop_area": 0.0}, "--min_crop_area must be above 0"),
        ({"crop_padding": -1}, "--crop_padding must not be negative"),
        ({"mixup_alpha": -1.0}, "--mixup_alpha must not be negative"),
    ],
)
def test_impossible_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        AugmentationArguments(**wrong)
