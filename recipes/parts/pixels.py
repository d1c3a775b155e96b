"""From encoded images to the pixels that a model takes: decoded and resized once, normalised batch by batch."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, TrainingArguments

from hf_linattn.data.files import column_names

from .common import RecipeError
from .data import Data, is_stream
from .images import CONVERTIBLE_MODES, ImageArguments, ImageColumns, image_size_of
from .labels import Labels

logger = logging.getLogger("hf_linattn.recipes")

STORED_BYTES = 16 * 2**30  # of all splits together: more is decoded when it is needed


@dataclass
class PixelReader:
    """From encoded images to pixels `[channels, height, width]` of the model's size, as bytes.

    Args:
        mode: Of the images that the model takes, a name of Pillow's.
        modes: Of images that are converted to it.
        split: For messages.
        image_column, label_column: Where they are; a test set may have no labels.
    """

    processor: Any
    mode: str
    modes: Sequence[str]
    labels: Labels
    split: str
    image_column: str
    label_column: str | None

    def __call__(self, rows: dict[str, list[Any]], places: Sequence[int] | None = None) -> dict[str, list[Any]]:
        values = rows[self.image_column]
        numbers = [None] * len(values) if places is None else places
        images = [self._decode(value, number) for value, number in zip(values, numbers, strict=True)]
        # Rescaling and normalising wait for the batch: 8 bits are a quarter of the memory.
        options = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
        pixels = self.processor(images, input_data_format=None, **options)["pixel_values"]
        read = {"pixel_values": [np.ascontiguousarray(image, dtype=np.uint8).tobytes() for image in pixels]}
        if self.label_column in rows:
            read["label"] = self.labels.encode(rows[self.label_column])
        return read

    def _decode(self, value: Any, number: int | None) -> Image.Image:
        where = f"{'An image' if number is None else f'Row {number}'} of the {self.split} data"
        where += f" ({value['path']})" if value and value["path"] else ""
        if value is None:
            raise RecipeError(f"{where} has no image.")
        try:
            image = datasets.Image().decode_example(value)
        except Exception as error:  # readers of images raise all sorts of things about garbage
            raise RecipeError(f"{where} cannot be read as an image: {error}") from error
        if image.mode == self.mode:
            return image
        if image.mode not in self.modes:
            wanted = "colours" if self.mode == "RGB" else "grey"
            advice = (
                f"--convert_modes {image.mode} converts it."
                if image.mode in CONVERTIBLE_MODES
                else "Its values do not fit into 8 bits: convert it as its maker meant it."
            )
            raise RecipeError(
                f"{where} is an image of mode {image.mode!r}; the model takes {wanted} of 8 bits. {advice}"
            )
        return image.convert(self.mode)


def read_pixels(
    splits: Mapping[str, Data],
    columns: ImageColumns,
    labels: Labels,
    processor: Any,
    model: PreTrainedModel,
    args: ImageArguments,
    training: TrainingArguments,
) -> dict[str, Data]:
    """Every split with the columns `pixel_values` and `label`: stored, where that is not too much, else when read."""
    tell_modes(splits, columns.image)
    channels, (height, width) = model.config.num_channels, image_size_of(model)
    rows = sum(len(data) for data in splits.values() if not is_stream(data))
    stores = args.store_pixels
    if stores is None:
        stores = rows * channels * height * width <= STORED_BYTES
    mode = "RGB" if channels == 3 else "L"
    found: dict[str, Data] = {}
    with training.main_process_first(desc="reading the images"):
        for split, data in splits.items():
            if not is_stream(data) and not stores:
                # Trainer leaves out columns that the model does not take, by name.
                names = {columns.image: "pixel_values", columns.label: "label"}
                data = data.rename_columns({old: new for old, new in names.items() if old in data.column_names})
                found[split] = data.with_transform(
                    PixelReader(processor, mode, args.modes, labels, split, "pixel_values", "label")
                )
                continue
            read = PixelReader(processor, mode, args.modes, labels, split, columns.image, columns.label)
            bar = {} if is_stream(data) else {"desc": f"Reading {split} images"}
            options = {"batched": True, "with_indices": True, "remove_columns": column_names(data)}
            found[split] = data.map(read, **options, **bar)
    return found


def tell_modes(splits: Mapping[str, Data], column: str, sample: int = 100) -> None:
    """How many of the first images of each split have to be converted, in the log."""
    for split, data in splits.items():
        modes: Counter[str] = Counter()
        for row in data.take(sample):
            try:
                modes[datasets.Image().decode_example(row[column]).mode] += 1
            except Exception:  # told later, with its row
                continue
        logger.info("%s images: %s", split, ", ".join(f"{count} {mode}" for mode, count in modes.most_common()))


@dataclass
class PixelCollator:
    """From rows of pixels to inputs of the model, rescaled and normalised as its image processor does it."""

    shape: tuple[int, int, int]
    factor: float
    mean: Sequence[float]
    std: Sequence[float]

    @classmethod
    def of(cls, processor: Any, model: PreTrainedModel) -> PixelCollator:
        channels = model.config.num_channels
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (0.0, 1.0)
        if processor.do_normalize:
            mean, std = processor.image_mean, processor.image_std

        def spread(z: Any) -> list[float]:
            return [float(v) for v in (z if np.iterable(z) else [z] * channels)]

        return cls((channels, *image_size_of(model)), factor, spread(mean), spread(std))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        joined = bytearray().join(row["pixel_values"] for row in rows)
        pixels = torch.frombuffer(joined, dtype=torch.uint8).view(len(rows), *self.shape)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        values = (pixels * self.factor - mean) / std
        labels = {"labels": torch.tensor([row["label"] for row in rows])} if "label" in rows[0] else {}
        return {"pixel_values": values, **labels}
