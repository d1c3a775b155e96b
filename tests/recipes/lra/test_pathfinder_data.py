"""Pathfinder images: labels that a search in the picture finds again, balanced, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from lra.pathfinder import CLEARANCE, GAP, MARGIN, Pathfinder, render
from parts.common import RecipeError

LENGTHS = (6, 9, 14)
SCALE = 8  # pixels of the picture that is searched, to one of the image


def joined(curves: list[np.ndarray], dots: np.ndarray) -> bool:
    """Whether dashes lead from one dot to the other, over gaps of up to 1.2 times those of a curve."""
    no_dots = np.full((1, 2), -99.0)  # they would join what they touch
    picture = np.asarray(render([SCALE * curve for curve in curves], no_dots, 32 * SCALE, scale=1)) > 0
    near = ndimage.distance_transform_edt(~picture) <= 1.2 * GAP * SCALE / 2
    parts, _ = ndimage.label(near)
    first, second = (parts[tuple(np.round(SCALE * dot[::-1]).astype(int))] for dot in dots)
    return bool(first == second != 0)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_search_in_the_picture_finds_the_label(length: int) -> None:
    task = Pathfinder(contour_length=length)
    for index in range(10):
        for label in (0, 1):
            curves, dots = task.draw_curves(np.random.default_rng([index, label]), label)
            assert joined(curves, dots) == bool(label)


def test_a_dot_on_another_curve_changes_the_answer() -> None:
    curves, _ = Pathfinder().draw_curves(np.random.default_rng(0), 1)
    ends = [curve[[0, -1], [0, 1]] for curve in curves]
    assert joined(curves, ends[0])
    assert not joined(curves, np.stack([ends[0][0], ends[1][0]]))
    broken = [np.delete(curves[0], 5, axis=0), *curves[1:]]
    assert not joined(broken, ends[0])


def dense(curve: np.ndarray) -> np.ndarray:
    """Points on the dashes of a curve `[dashes, 21, 2]`."""
    steps = np.linspace(0, 1, 21)[:, None]
    return curve[:, None, 0] + steps * (curve[:, None, 1] - curve[:, None, 0])


def test_curves_keep_their_distance() -> None:
    for seed in range(10):
        curves, _ = Pathfinder().draw_curves(np.random.default_rng(seed), 0)
        assert [len(curve) for curve in curves[:2]] == [14, 14]
        assert {len(curve) for curve in curves[2:]} <= {4}
        named = [(number, dash, points) for number, c in enumerate(curves) for dash, points in enumerate(dense(c))]
        for one, dash, points in named:
            assert points.min() >= MARGIN
            assert points.max() <= 32 - MARGIN
            for other, its_dash, its_points in named:
                if (one, dash) < (other, its_dash) and not (one == other and its_dash == dash + 1):
                    apart = np.linalg.norm(points[:, None] - its_points[None], axis=-1).min()
                    assert apart > CLEARANCE - 0.1 > GAP
        for curve in curves:
            np.testing.assert_allclose(np.linalg.norm(curve[1:, 0] - curve[:-1, 1], axis=-1), GAP)


def test_labels_are_balanced_and_follow_from_seed_and_index() -> None:
    task = Pathfinder(contour_length=6)
    rows = [task.row(1, index) for index in range(24)]
    labels = [label for _, label in rows]
    assert all(set(pair) == {0, 1} for pair in zip(labels[::2], labels[1::2], strict=True))
    assert 2 < sum(labels[::2]) < 10  # in random order
    again, other = task.row(1, 7), task.row(2, 7)
    assert again[0].tobytes() == rows[7][0].tobytes()
    assert again[1] == rows[7][1]
    assert other[0].tobytes() != rows[7][0].tobytes()
    assert len({image.tobytes() for image, _ in rows}) == 24


def test_images_are_grey_with_two_dots() -> None:
    image, _ = Pathfinder().row(0, 0)
    assert (image.mode, image.size) == ("L", (32, 32))
    _, dots = ndimage.label(np.asarray(image) == 255)
    assert dots == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 16}, "size must be at least 24"),
        ({"contour_length": 30}, "contour_length from 3 to 16"),
        ({"distractors": -1}, "distractors must be at least 0; got -1"),
    ],
)
def test_settings_without_images_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Pathfinder(**settings)
