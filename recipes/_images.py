"""Images and labels of a classification task: reading, decoding, resizing, and the pixels that a model takes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedConfig, PreTrainedModel, TrainingArguments, ViTImageProcessor
from transformers.utils import is_torchvision_available

from _common import RecipeError, find_column
from _data import SPLITS, Data, DataArguments, column_names, is_stream, read_splits
from _labels import Labels
from _models import load_processor
from _text import LABEL_NAMES
from _training import ModelArguments, NewModelArguments

logger = logging.getLogger("hf_linattn.recipes")

IMAGE_NAMES = ("image", "img")
IMAGE_FORMATS = {".parquet": "parquet"}
# Modes of Pillow with 8 bits a channel that become RGB or grey without surprise, and those that do if asked for.
USUAL_MODES = ("RGB", "L", "1", "P", "LA", "PA", "RGBA", "RGBX", "La", "RGBa")
CONVERTIBLE_MODES = ("CMYK", "YCbCr", "LAB", "HSV")
STORED_BYTES = 16 * 2**30  # of all splits together: more is decoded when it is needed


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
        wrong = [mode for mode in self.modes if mode not in (*USUAL_MODES, *CONVERTIBLE_MODES)]
        if wrong:
            raise RecipeError(f"--convert_modes must be of {', '.join(CONVERTIBLE_MODES)}; got {wrong[0]!r}.")
        if self.image_size is not None:
            _ = self.size

    @property
    def modes(self) -> list[str]:
        """Modes of the images that are converted."""
        return [*USUAL_MODES, *filter(None, (mode.strip() for mode in (self.convert_modes or "").split(",")))]

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
    label: str


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
                split: image_folder(path, split, args.streaming and split == "train", names)
                for split, path in folders.items()
            }
    splits = read_splits(args, training, given, formats=IMAGE_FORMATS)
    names = column_names(next(iter(splits.values())))
    columns = ImageColumns(
        find_column(names, args.image_column, IMAGE_NAMES, "image_column"),
        find_column(names, args.label_column, LABEL_NAMES, "label_column"),
    )
    for split, data in splits.items():
        for name in (columns.image, columns.label):
            if name not in column_names(data):
                raise RecipeError(f"The {split} data has no column {name!r}; its columns: {column_names(data)}.")
        splits[split] = encoded_images(data.select_columns([columns.image, columns.label]), columns.image)
    return splits, columns


def class_folders(folders: Mapping[str, str]) -> list[str]:
    """The names of the folders in the first of `folders` (split -> path): labels, the same in every split."""
    found: dict[str, list[str]] = {}
    for split, path in folders.items():
        _check_folder(path, split)
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


def image_folder(path: str, split: str, streaming: bool = False, labels: Sequence[str] | None = None) -> Data:
    """The images of a folder; with `labels`, those of folders of these names, which become a column `label`."""
    _check_folder(path, split)
    options = {"data_files": f"{path}/**", "split": "train", "drop_labels": labels is None, "streaming": streaming}
    if labels is not None:
        label = datasets.ClassLabel(names=list(labels))
        options["features"] = datasets.Features({"image": datasets.Image(), "label": label})
    try:
        return datasets.load_dataset("imagefolder", **options)
    except (datasets.exceptions.DatasetGenerationError, FileNotFoundError, ValueError) as error:
        raise RecipeError(f"--{split}_dir {path!r} cannot be read as images: {error.__cause__ or error}") from error


def _check_folder(path: str, split: str) -> None:
    if not Path(path).is_dir():
        raise RecipeError(f"--{split}_dir must be a folder of images; {path!r} is none.")


def encoded_images(data: Data, column: str) -> Data:
    """A column of images as it is stored: decoding comes later, where a broken one can be named."""
    try:
        return data.cast_column(column, datasets.Image(decode=False))
    except (pa.ArrowException, TypeError) as error:
        raise RecipeError(f"Column {column!r} does not hold images: {error}") from error


# -- the image processor ----------------------------------------------------------------------------------------------
def load_image_processor(args: ModelArguments, config: PreTrainedConfig, size: tuple[int, int]) -> Any:
    """The image processor of the model, for images of its size (height, width); of a model from scratch a new one."""
    if args.tokenizer_name is None and isinstance(args, NewModelArguments) and args.model_name_or_path is None:
        grey = {} if config.num_channels == 3 else {"image_mean": [0.5], "image_std": [0.5]}
        make = ViTImageProcessor if is_torchvision_available() else _pillow_processor()
        return make(size={"height": size[0], "width": size[1]}, **grey)
    processor = load_processor(AutoImageProcessor, args)
    values = processor.to_dict()
    target = {"height": size[0], "width": size[1]}
    if values.get("do_center_crop"):  # the image around the crop keeps its share
        old, crop = values["size"], values["crop_size"]
        ratio = size[0] / crop["height"]
        values |= {"crop_size": target, "size": {name: round(side * ratio) for name, side in old.items() if side}}
    else:
        values |= {"size": target, "do_resize": True}
    return type(processor).from_dict(values)


def _pillow_processor() -> Any:
    from transformers import ViTImageProcessorPil

    return ViTImageProcessorPil


def image_size_of(model: PreTrainedModel) -> tuple[int, int]:
    """Height and width of the images that a model takes."""
    size = getattr(model.config, "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, Sequence) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise RecipeError(f"The config of {type(model).__name__} says no image_size. Models like ViT have one.")


# -- pixels -----------------------------------------------------------------------------------------------------------
class PixelReader:
    """From encoded images to pixels `[channels, height, width]` of the model's size, as bytes.

    Args:
        split: For messages.
        modes: Of images that are converted.
    """

    def __init__(
        self,
        processor: Any,
        config: PreTrainedConfig,
        column: str,
        labels: Labels,
        split: str,
        modes: Sequence[str],
    ) -> None:
        self.processor = processor
        self.mode = "RGB" if config.num_channels == 3 else "L"
        self.column = column
        self.labels = labels
        self.split = split
        self.modes = modes

    def __call__(self, rows: dict[str, list[Any]], places: Sequence[int]) -> dict[str, list[Any]]:
        images = [self._decode(value, place) for value, place in zip(rows[self.column], places, strict=True)]
        # Rescaling and normalising wait for the batch: 8 bits are a quarter of the memory.
        options = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
        pixels = self.processor(images, input_data_format=None, **options)["pixel_values"]
        labels = self.labels.encode(rows[self.labels.column])
        return {"pixels": [self._bytes(image) for image in pixels], "label": labels}

    def _decode(self, value: Any, place: int) -> Image.Image:
        where = f"Row {place} of the {self.split} data" + (f" ({value['path']})" if value and value["path"] else "")
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

    @staticmethod
    def _bytes(pixels: np.ndarray) -> bytes:
        return np.ascontiguousarray(pixels, dtype=np.uint8).tobytes()


def read_pixels(
    splits: Mapping[str, Data],
    column: str,
    labels: Labels,
    processor: Any,
    config: PreTrainedConfig,
    size: tuple[int, int],
    args: ImageArguments,
    training: TrainingArguments,
) -> dict[str, Data]:
    """Every split with the columns `pixels` and `label`: stored, where that does not take too much, else when read."""
    tell_modes(splits, column)
    rows = sum(len(data) for data in splits.values() if not is_stream(data))
    stores = args.store_pixels
    if stores is None:
        stores = rows * config.num_channels * size[0] * size[1] <= STORED_BYTES
    found: dict[str, Data] = {}
    with training.main_process_first(desc="reading the images"):
        for split, data in splits.items():
            read = PixelReader(processor, config, column, labels, split, args.modes)
            options = {"batched": True, "with_indices": True, "remove_columns": column_names(data)}
            if is_stream(data):
                found[split] = data.map(read, **options)
            elif stores:
                schema = datasets.Features({"pixels": datasets.Value("binary"), "label": datasets.Value("int64")})
                found[split] = data.map(read, features=schema, desc=f"Reading {split} images", **options)
            else:
                found[split] = data.add_column("row", list(range(len(data)))).with_transform(WhenRead(read))
    return found


@dataclass
class WhenRead:
    """Reads pixels of rows that have their number in the column `row`."""

    read: PixelReader

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return self.read(rows, rows["row"])


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
    def of(cls, processor: Any, channels: int, size: tuple[int, int]) -> PixelCollator:
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (0.0, 1.0)
        if processor.do_normalize:
            mean, std = processor.image_mean, processor.image_std

        def spread(z: Any) -> list[float]:
            return [float(v) for v in (z if np.iterable(z) else [z] * channels)]

        return cls((channels, *size), factor, spread(mean), spread(std))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        joined = bytearray().join(row["pixels"] for row in rows)
        pixels = torch.frombuffer(joined, dtype=torch.uint8).view(len(rows), *self.shape)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        values = (pixels * self.factor - mean) / std
        return {"pixel_values": values, "labels": torch.tensor([row["label"] for row in rows])}
