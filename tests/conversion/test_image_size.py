"""`set_image_size`: images of another resolution, with positions that are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BERT, VIT, vit_config
from transformers import AutoModelForImageClassification, ViTForMaskedImageModeling

import hf_linattn
from hf_linattn import set_image_size
from hf_linattn.errors import ConfigError, UnsupportedError

OLD, NEW = 24, 40  # pixels; patches of 4


def images(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


def model_of(kind: str | None) -> Any:
    model = VIT.build().eval()
    return model if kind is None else hf_linattn.convert(model, VIT.settings(kind))


@torch.no_grad()
def outputs(model: Any, pixels: torch.Tensor, **options: Any) -> torch.Tensor:
    return model(pixel_values=pixels, **options).logits


@pytest.mark.parametrize("size", [NEW, (NEW, NEW), 16, (32, 20)], ids=str)
@pytest.mark.parametrize("kind", [None, "eva"])
def test_stored_positions_are_those_of_every_call(kind: str | None, size: Any, tmp_path: Path) -> None:
    model = model_of(kind)
    height, width = (size, size) if isinstance(size, int) else size
    pixels = images(height, width)
    expected = outputs(model, pixels, interpolate_pos_encoding=True)
    table = model.base_model.embeddings.position_embeddings
    cls = table[:, :1].detach().clone()
    assert set_image_size(model, size) is model
    assert model.base_model.embeddings.position_embeddings is table
    assert torch.equal(table[:, :1], cls)
    assert model.config.image_size == (height if height == width else (height, width))
    torch.testing.assert_close(outputs(model, pixels), expected)
    with pytest.raises(ValueError, match=r"doesn't match model|Input image size"):
        outputs(model, images(OLD, OLD))

    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(again, pixels), expected)
    if kind is not None:  # and back
        torch.testing.assert_close(hf_linattn.revert(again).config.image_size, model.config.image_size)


def test_the_same_size_changes_nothing() -> None:
    model = model_of(None)
    before = model.base_model.embeddings.position_embeddings.detach().clone()
    set_image_size(model, OLD)
    assert torch.equal(model.base_model.embeddings.position_embeddings, before)


def test_from_a_size_that_is_not_square() -> None:
    model = VIT.stock(vit_config(image_size=(16, 32))).eval()
    table = model.base_model.embeddings.position_embeddings
    with torch.no_grad():  # a ramp down the rows stays one
        table[:, 1:] = torch.arange(4.0).repeat_interleave(8)[None, :, None]
    set_image_size(model, (32, 32))
    rows = table[0, 1:].detach().unflatten(0, (8, 8))
    assert torch.allclose(rows, rows[:, :1].expand_as(rows))
    assert bool((rows[1:, 0, 0] > rows[:-1, 0, 0]).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_gradients_stay(dtype: torch.dtype) -> None:
    model = ViTForMaskedImageModeling(vit_config()).to(dtype)
    table = model.base_model.embeddings.position_embeddings
    table.requires_grad_(False)
    with torch.inference_mode():
        set_image_size(model, NEW)
    assert (table.dtype, table.requires_grad, table.shape[1]) == (dtype, False, 101)
    model(pixel_values=images(NEW, NEW).to(dtype)).reconstruction.sum().backward()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (25, "must be a multiple of the patch size, 4 x 4 pixels; got 25. Near it: 24 x 24"),
        ((24, 1), "Near it: 24 x 4"),
        (0, "must be a number of pixels"),
        (-4, "must be a number of pixels"),
        (True, "must be a number of pixels"),
        ("24", "must be a number of pixels"),
        ((24, 24, 24), "must be a number of pixels"),
    ],
)
def test_impossible_sizes(size: Any, message: str) -> None:
    model = model_of(None)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        set_image_size(model, size)
    outputs(model, images(OLD, OLD))


def test_what_cannot_be_resized() -> None:
    with pytest.raises(UnsupportedError, match="architecture 'vit'; got model_type 'bert'"):
        set_image_size(BERT.build(), NEW)
    with torch.device("meta"):
        model = VIT.build()
    with pytest.raises(UnsupportedError, match="meta device"):
        set_image_size(model, NEW)
    model = model_of(None)
    model.config.image_size = NEW
    with pytest.raises(UnsupportedError, match="the whole table of positions"):
        set_image_size(model, OLD)
