"""Pathfinder: are two dots the ends of one dashed curve, or of two?

Our own generator of the task of Linsley et al. 2018 and Kim et al. 2020, with the sizes of Long Range Arena's
Pathfinder32: 32 x 32 grey pixels, dashes 2 pixels long with gaps of 1, two curves of 14 dashes, shorter ones that
distract, dots of radius 1.5. It differs in how curves bend and in that curves keep `CLEARANCE` from each other and
from themselves, so that a dash and its successor are always closer than any other two: every label can be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from parts.common import RecipeError

# Pixels. Dashes have round ends, so one is 2 long and the black gap to the next 1.
DASH, GAP, THICKNESS = 1.2, 1.8, 0.8
CLEARANCE = 3.0  # between the middle lines of two curves
MARGIN = 2.0  # between a curve and the edge of the image
DOT_RADIUS = 1.5
DOT_DISTANCE = 6.0  # at least, between the two dots
TURN = 0.9  # radians, at most, from one dash to the next
CURVE_GREY, DOT_GREY = 190, 255
WALKS, TURNS = 5, 16  # tries of a curve and of each of its dashes


@dataclass(frozen=True)
class Pathfinder:
    """Which images are drawn.

    Args:
        size: Pixels of a side.
        contour_length: Dashes of each of the two long curves: 6, 9 or 14 in Long Range Arena, which reports 14.
        distractors: Short curves, a third as long; where there is no room there are fewer.
    """

    size: int = 32
    contour_length: int = 14
    distractors: int = 5

    def __post_init__(self) -> None:
        if self.size < 24 or not 3 <= self.contour_length <= self.size * self.size // 64:
            raise RecipeError(
                f"size must be at least 24 and contour_length from 3 to {max(self.size, 24) ** 2 // 64} (size^2 / 64: "
                f"longer curves find no room); got {self.size} and {self.contour_length}."
            )
        if self.distractors < 0:
            raise RecipeError(f"distractors must be at least 0; got {self.distractors}.")

    def row(self, seed: int, index: int) -> tuple[Image.Image, int]:
        """One image and its label (1: one curve joins the dots), a function of seed and index.

        Rows 2 k and 2 k + 1 have both labels, in random order.
        """
        order = int(np.random.default_rng([seed, index // 2, 2]).integers(2))
        label = order ^ index % 2
        curves, dots = self.draw_curves(np.random.default_rng([seed, index // 2, index % 2]), label)
        return render(curves, dots, self.size), label

    def draw_curves(self, rng: np.random.Generator, label: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The curves of an image, the two long ones first, and its two dots.

        Returns: For every curve the ends of its dashes, `[dashes, 2 ends, 2 coordinates]`; dots `[2, 2]`. In pixels.
        """
        while True:
            curves: list[np.ndarray] = []
            for dashes in (self.contour_length, self.contour_length):
                curve = self._curve(rng, dashes, curves)
                if curve is None:
                    break
                curves.append(curve)
            if len(curves) < 2:
                continue
            dots = _dots(rng, curves, label)
            if np.linalg.norm(dots[0] - dots[1]) < DOT_DISTANCE:
                continue
            for _ in range(self.distractors):
                curve = self._curve(rng, max(2, self.contour_length // 3), curves)
                if curve is not None:
                    curves.append(curve)
            return curves, dots

    def _curve(self, rng: np.random.Generator, dashes: int, others: Sequence[np.ndarray]) -> np.ndarray | None:
        """One more curve beside the others; None where no room for it was found."""
        taken = _points(np.concatenate(others)).reshape(-1, 2) if others else np.empty((0, 2))
        for _ in range(WALKS):
            curve = self._walk(rng, dashes, taken)
            if curve is not None:
                return curve
        return None

    def _walk(self, rng: np.random.Generator, dashes: int, taken: np.ndarray) -> np.ndarray | None:
        """A random walk of dashes that avoids the points taken and itself; None where it got stuck."""
        drawn: list[np.ndarray] = []
        angle = 0.0
        for _ in range(dashes):
            if not drawn:
                angles = rng.uniform(0, 2 * np.pi, size=TURNS)
                begins = rng.uniform(MARGIN, self.size - MARGIN, size=(TURNS, 2))
            else:
                angles = angle + rng.uniform(-TURN, TURN, size=TURNS)
                begins = drawn[-1][1] + GAP * _heading(angles)
            choices = np.stack([begins, begins + DASH * _heading(angles)], axis=1)
            avoid = np.concatenate([taken, *map(_points, drawn[:-1])])
            free = (choices.min((1, 2)) >= MARGIN) & (choices.max((1, 2)) <= self.size - MARGIN)
            if len(avoid):
                apart = _points(choices)[:, :, None] - avoid
                free &= (apart**2).sum(-1).min((1, 2)) >= CLEARANCE**2
            if not free.any():
                return None
            first = int(free.argmax())
            angle = float(angles[first])
            drawn.append(choices[first])
        return np.stack(drawn)


def _heading(angles: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def _dots(rng: np.random.Generator, curves: Sequence[np.ndarray], label: int) -> np.ndarray:
    """Both ends of one of the two long curves (label 1), or one end of each."""
    ends = np.stack([[curve[0, 0], curve[-1, 1]] for curve in curves[:2]])
    if label:
        return ends[rng.integers(2)]
    return ends[[0, 1], rng.integers(2, size=2)]


def _points(dashes: np.ndarray) -> np.ndarray:
    """Both ends and the middle of dashes `[..., 2 ends, 2]`: `[..., 3, 2]`."""
    return np.stack([dashes[..., 0, :], dashes.mean(-2), dashes[..., 1, :]], axis=-2)


def render(curves: Sequence[np.ndarray], dots: np.ndarray, size: int, scale: int = 4) -> Image.Image:
    """The image of curves and dots, drawn `scale` times as large and averaged."""
    image = Image.new("L", (size * scale, size * scale))
    draw = ImageDraw.Draw(image)
    for start, end in (scale * np.concatenate(curves)).tolist():
        draw.line((*start, *end), fill=CURVE_GREY, width=round(THICKNESS * scale))
        for point in (start, end):
            _disc(draw, point, THICKNESS / 2 * scale, CURVE_GREY)
    for point in (scale * dots).tolist():
        _disc(draw, point, DOT_RADIUS * scale, DOT_GREY)
    return image.resize((size, size), Image.Resampling.BOX)


def _disc(draw: ImageDraw.ImageDraw, point: Sequence[float], radius: float, grey: int) -> None:
    x, y = point
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=grey)
