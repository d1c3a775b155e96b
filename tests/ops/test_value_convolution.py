"""The depthwise convolution of the values: against loops, gradients, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same, inputs, random
from torch import Tensor

from hf_linattn.errors import InputError
from hf_linattn.ops.value_convolution import value_convolution

HEADS, DIM = 2, 4


def by_hand(value: Tensor, weight: Tensor, grid: tuple[int, int], count: int) -> Tensor:
    (height, width), output = grid, torch.zeros_like(value)
    image = value[:, :, count:].unflatten(2, grid)
    for row in range(height):
        for column in range(width):
            for down in range(-1, 2):
                for right in range(-1, 2):
                    if 0 <= row + down < height and 0 <= column + right < width:
                        place = count + row * width + column
                        seen = image[:, :, row + down, column + right]
                        output[:, :, place] += seen * weight[:, :, down + 1, right + 1]
    return output


@pytest.mark.parametrize("grid", [(4, 6), (1, 5), (2, 2)])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_is_a_sum_over_neighbours(grid: tuple[int, int], count: int) -> None:
    value, weight = inputs(grid[0] * grid[1] + count)[2], random(HEADS, DIM, 3, 3)
    ours = value_convolution(value, weight, grid=grid, num_global_tokens=count)
    assert_same(ours, by_hand(value, weight, grid, count))
    assert not ours[:, :, :count].any()


def test_gradients() -> None:
    value, weight = inputs(7, batch=1)[2].requires_grad_(), random(HEADS, DIM, 3, 3).requires_grad_()
    torch.autograd.gradcheck(
        lambda v, w: value_convolution(v, w, grid=(2, 3), num_global_tokens=1), (value, weight), fast_mode=True
    )


@pytest.mark.parametrize(("grid", "message"), [(None, "value_convolution=False"), ((2, 4), "2 x 4 patches")])
def test_needs_the_grid_of_the_image(grid: tuple[int, int] | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        value_convolution(inputs(7)[2], random(HEADS, DIM, 3, 3), grid=grid, num_global_tokens=1)
