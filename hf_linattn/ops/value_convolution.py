"""A depthwise convolution of the values beside attention, for the patches of an image.

Attention through a few slots gives neighbouring queries nearly the same output; a convolution of the values gives back
what differs between neighbours. It is added to the output, `o + DWC(v)`.

Source: Han et al. 2023, arXiv:2308.00442, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .inputs import check_grid

SIZE = 3  # of the convolution, in patches


def value_convolution(
    value: Tensor, weight: Tensor, *, grid: tuple[int, int] | None, num_global_tokens: int = 0
) -> Tensor:
    """The depthwise 3 x 3 convolution of the values over the grid of patches, zeros beyond its border.

    Args:
        value: `[batch, heads, tokens, head_dim]`.
        weight: `[heads, head_dim, 3, 3]`, a filter for each channel of each head.
        grid: Height and width in patches of the tokens after the global ones.
        num_global_tokens: Leading tokens, which are no patches: 0 for them, and they enter nothing.
    Returns: `[batch, heads, tokens, head_dim]`, in at least float32.
    Raises: InputError without a grid, or with one that does not fit.
    Cost: O(tokens * head_dim) time and memory.
    """
    if grid is None:
        raise InputError(
            "A convolution of the values needs the patches of an image; got grid=None. Convert with"
            " value_convolution=False, or pass the grid of the image (which a converted ViT does by itself if"
            f" num_global_tokens, here {num_global_tokens}, is the number of tokens before the patches)."
        )
    check_grid(value.shape[2] - num_global_tokens, grid, None)
    wide = torch.promote_types(value.dtype, torch.float32)
    heads, head_dim = value.shape[1], value.shape[-1]
    with torch.autocast(value.device.type, enabled=False):
        image = value[:, :, num_global_tokens:].to(wide).mT.unflatten(-1, grid).flatten(1, 2)
        filters = weight.to(wide).flatten(0, 1).unsqueeze(1)
        mixed = F.conv2d(image, filters, padding=SIZE // 2, groups=heads * head_dim)
    return F.pad(mixed.unflatten(1, (heads, head_dim)).flatten(-2).mT, (0, 0, num_global_tokens, 0))
