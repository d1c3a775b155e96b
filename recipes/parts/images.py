"""Images with labels: which files or folders, how large, and the image processor of the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from transformers import (
    AutoImageProcessor,
    PreTrainedModel,
    TrainingArguments,
    ViTImageProcessor,
    ViTImageProcessorPil,
)
from transformers.utils import is_torchvision_available

from hf_linattn.data.files import IMAGE_FORMATS, check_folder, column_names, find_column, load_images
from hf_linattn.data.rows import EIGHT_BIT_MODES, IMAGE_NAMES

from .common import RecipeError
from .data import SPLITS, Data, DataArguments, read_splits
from .labels import find_label_column, without_missing_labels
from .models import is_new, load_processor
from .text import LABEL_NAMES
from .training import ModelArguments

logger = logging.getLogger("hf_linattn.recipes")

# Modes of Pillow, besides the usual ones, that become RGB or grey if asked for.
CONVERTIBLE_MODES = ("CMYK", "YCbCr", "LAB", "HSV")


@dataclass
class ImageArguments(DataArguments):
    """Which images, and how they are read."""

    train_file: str | None = field(default=None, metadata={"help": "parquet"})
    validation_file: str | None = field(default=None, metadata={"help": "parquet"})
    test_file: str | None = field(default=None, metadata={"help": "parquet; for --do_predict"})
    train_dir: str | None = field(default=None, metadata={"help": "A folder with a folder of images for each label"})
    validation_dir: str | None = field(default=None, metadata={"help": "The same"})
    test_dir: str | None = field(default=None, metadata={"help": "The same; for --do_predict"})
    image_column: str | None = field(
        default=None, metadata={"help": f"Default: the first of {', '.join(IMAGE_NAMES)}"}
    )
    label_column: str | None = field(
        default=None, metadata={"help": f"Default: the first of {', '.join(LABEL_NAMES)}"}
    )
    image_size: str | None = field(
        default=None,
        metadata={"help": "Pixels, for example 384 or 384x512 (height x width); positions of a ViT are interpolated"},
    )
    store_pixels: bool | None = field(
        default=None,
        metadata={
            "help": "Decode every image once and keep its pixels on disk (default: if they take at most 16 GiB)"
        },
    )
    convert_modes: str | None = field(
        default=None,
        metadata={"help": f"Also convert images of these modes, which stop a run: {', '.join(CONVERTIBLE_MODES)}"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [mode for mode in self.modes if mode not in (*EIGHT_BIT_MODES, *CONVERTIBLE_MODES)]
        if wrong:
            raise RecipeError(f"--convert_modes must be of {', '.join(CONVERTIBLE_MODES)}; got {wrong[0]!r}.")
        if self.image_size is not None:
            _ = self.size

    @property
    def modes(self) -> list[str]:
        """Modes of the images that are converted."""
        return [*EIGHT_BIT_MODES, *filter(None, (mode.strip() for mode in (self.convert_modes or "").split(",")))]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width that `--image_size` asks for."""
        assert self.image_size is not None
        sides = str(self.image_size).lower().split("x")
        if len(sides) > 2 or not all(side.strip().isdecimal() and int(side) > 0 for side in sides):
            raise RecipeError(f"--image_size must look like '384' or '384x512'; got {self.image_size!r}.")
        return int(sides[0]), int(sides[-1])


# -- reading ----------------------------------------------------------------------------------------------------------
@dataclass
class ImageColumns:
    image: str
    label: str | None


def read_images(args: ImageArguments, training: TrainingArguments) -> tuple[dict[str, Data], ImageColumns]:
    """The splits that the run needs, with encoded images."""
    folders = {split: path for split in SPLITS if (path := getattr(args, f"{split}_dir"))}
    given = None
    if folders:
        if args.dataset_name or any(getattr(args, f"{split}_file") for split in SPLITS):
            raise RecipeError("Give folders of images, files or --dataset_name, not several of them.")
        with training.main_process_first(desc="reading the folders"):
            names = class_folders(folders)
            given = {
                split: load_images(path, f"--{split}_dir", names, streaming=args.streaming and split == "train")
                for split, path in folders.items()
            }
    splits = read_splits(args, training, given=given, formats=IMAGE_FORMATS)
    names = column_names(next(iter(splits.values())))
    columns = ImageColumns(
        find_column(names, args.image_column, IMAGE_NAMES, "image_column"),
        find_label_column(splits, args.label_column, LABEL_NAMES),
    )
    if columns.image == columns.label:
        raise RecipeError(
            f"Column {columns.image!r} cannot hold both images and labels: --image_column, --label_column."
        )
    for split, data in splits.items():
        present = [name for name in (columns.image, columns.label) if name in column_names(data)]
        for name in filter(None, (columns.image, columns.label)):
            if name not in present and (name, split) != (columns.label, "test"):
                raise RecipeError(f"The {split} data has no column {name!r}; its columns: {column_names(data)}.")
        splits[split] = encoded_images(data.select_columns(present), columns.image)
    return without_missing_labels(splits, columns.label), columns


def class_folders(folders: Mapping[str, str]) -> list[str]:
    """The names of the folders in the first of `folders` (split -> path): labels, the same in every split."""
    found: dict[str, list[str]] = {}
    for split, path in folders.items():
        check_folder(path, f"--{split}_dir")
        found[split] = sorted(each.name for each in Path(path).iterdir() if each.is_dir())
    first = next(iter(found))
    for split, names in found.items():
        if strange := sorted(set(names) - set(found[first])):
            raise RecipeError(f"--{split}_dir has a folder {strange[0]!r}, which --{first}_dir does not have.")
    if len(found[first]) < 2:
        raise RecipeError(
            f"--{first}_dir must hold a folder of images for each label, at least two; {folders[first]!r} has "
            f"{found[first] or 'none'}."
        )
    return found[first]


def encoded_images(data: Data, column: str) -> Data:
    """A column of images as it is stored: decoding comes later, where a broken one can be named."""
    try:
        return data.cast_column(column, datasets.Image(decode=False))
    except (pa.ArrowException, TypeError) as error:
        raise RecipeError(f"Column {column!r} does not hold images: {error}") from error


# -- the image processor ----------------------------------------------------------------------------------------------
def load_image_processor(args: ModelArguments, model: PreTrainedModel) -> Any:
    """The image processor of a checkpoint, of a model from scratch a new one; it resizes to the model's size."""
    height, width = image_size_of(model)
    size = {"height": height, "width": width}
    if args.tokenizer_name is None and is_new(args):
        channels = model.config.num_channels
        make = ViTImageProcessor if is_torchvision_available() else ViTImageProcessorPil
        return make(size=size, image_mean=[0.5] * channels, image_std=[0.5] * channels)
    processor = load_processor(AutoImageProcessor, args)
    values = processor.to_dict()
    if values.get("do_center_crop"):  # the image around the crop keeps its share
        ratio = height / values["crop_size"]["height"]
        values |= {"crop_size": size, "size": {name: round(v * ratio) for name, v in values["size"].items() if v}}
    else:
        values |= {"size": size, "do_resize": True}
    return type(processor).from_dict(values)


def image_size_of(model: PreTrainedModel) -> tuple[int, int]:
    """Height and width of the images that a model takes."""
    size = getattr(model.config, "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, Sequence) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise RecipeError(f"The config of {type(model).__name__} says no image_size. Models like ViT have one.")
