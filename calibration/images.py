"""From image files to what a vision model takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgewise.runtime.errors import InputError

Array = npt.NDArray[Any]
Size = int | tuple[int, int]

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

_CHOICES = {"channels": ("rgb", "bgr", "gray"), "layout": ("nchw", "nhwc")}
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes an array, in this order. The defaults leave pixels as they are, 0..255.

    resize     pixels of the shorter side, or (height, width) exactly; bilinear
    crop       side of a square, or (height, width), cut from the center
    channels   their order: rgb, bgr or gray
    scale      pixels are divided by it
    mean, std  subtracted, then divided by: one number, or one a channel in the order of `channels`
    layout     nchw or nhwc

    Raises `InputError` on values that make no sense. `parse` and `str` are inverse to each other, and so
    are `from_dict` and `to_dict`.
    """

    resize: Size | None = None
    crop: Size | None = None
    channels: str = "rgb"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str = "nchw"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"preprocess: {name} is one of {', '.join(allowed)}")
        for name in ("mean", "std"):
            if (given := len(getattr(self, name))) not in (1, self.depth):
                raise InputError(f"preprocess: {name} has {given} numbers for {self.depth} channels")
        if not all(n > 0 for size in (self.resize, self.crop) if size is not None for n in _pair(size)):
            raise InputError("preprocess: resize and crop must be above zero")
        if not np.isfinite(self.mean).all() or not all(0 < s < np.inf for s in (self.scale, *self.std)):
            raise InputError("preprocess: mean must be finite, scale and std above zero")

    @property
    def depth(self) -> int:
        """The number of channels."""
        return 1 if self.channels == "gray" else 3

    @classmethod
    def parse(cls, text: str) -> Preprocess:
        """Read e.g. `resize=256,crop=224,scale=255,mean=0.485/0.456/0.406,std=0.229/0.224/0.225`."""
        options: dict[str, object] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            name, equals, value = (p.strip() for p in part.partition("="))
            if not equals or name in options:
                raise InputError(f"preprocess: expected each option once, as name=value, at {part!r}")
            options[name] = value
        return cls.from_dict(options)

    @classmethod
    def from_dict(cls, options: Mapping[str, object]) -> Preprocess:
        """Build from texts, numbers and lists, as a recipe holds them."""
        values: dict[str, Any] = {}
        for name, value in options.items():
            if name not in _READERS:
                raise InputError(f"preprocess has no option {name!r}, only {', '.join(_READERS)}")
            try:
                values[name] = _READERS[name](value)
            except (TypeError, ValueError):
                raise InputError(f"preprocess: {name} cannot be {value!r}") from None
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The options that are not at their default, as plain numbers, texts and lists."""
        values = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}
        plain = {name: value for name, (value, default) in values.items() if value != default}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in plain.items()}

    def __str__(self) -> str:
        separator = {"resize": "x", "crop": "x", "mean": "/", "std": "/"}
        texts = {
            name: separator[name].join(map(str, value)) if isinstance(value, list) else str(value)
            for name, value in self.to_dict().items()
        }
        return ",".join(f"{name}={text}" for name, text in texts.items())

    def pixels(self, layout: str) -> Preprocess:
        """The same cut of the image as raw pixels in `layout`, for a model that normalizes them itself."""
        return dataclasses.replace(self, scale=1.0, mean=(0.0,), std=(1.0,), layout=layout)

    def load(self, path: Path) -> Array:
        """The image as float32, without a batch axis: (C, H, W), or (H, W, C) for nhwc."""
        try:
            with Image.open(path) as image:
                pixels = image.convert("L" if self.depth == 1 else "RGB")
        except _UNREADABLE as error:
            raise InputError(f"{path} cannot be read as an image: replace or remove it") from error
        array = np.asarray(self._cut(pixels, path), np.float32)
        array = array[..., None] if self.depth == 1 else array
        array = array[..., ::-1] if self.channels == "bgr" else array
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        array = (array / np.float32(self.scale) - mean) / std
        return array if self.layout == "nhwc" else array.transpose(2, 0, 1)

    def _cut(self, image: Image.Image, path: Path) -> Image.Image:
        if self.resize is not None:
            height, width = _resized(image.height, image.width, self.resize)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        if self.crop is None:
            return image
        height, width = _pair(self.crop)
        if height > image.height or width > image.width:
            size = f"{image.height}x{image.width}"
            raise InputError(f"{path} is {size}, less than the crop: give a larger resize")
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)
        return image.crop((left, top, left + width, top + height))


class Images:
    """Preprocessed images as rows of an array that is never held as a whole."""

    def __init__(self, paths: Sequence[Path], preprocess: Preprocess, dtype: np.dtype[Any]) -> None:
        self._paths = paths
        self._preprocess = preprocess
        self.dtype = dtype
        self.shape = (len(paths), *preprocess.load(paths[0]).shape)

    def __getitem__(self, rows: slice | EllipsisType) -> Array:
        paths = self._paths if rows is ... else self._paths[rows]
        images = [self._preprocess.load(path) for path in paths]
        if len({image.shape for image in images}) > 1:
            raise InputError(f"images of different size cannot share a batch: {paths[0]} (give a crop)")
        stack = np.stack(images)
        return np.rint(stack).astype(self.dtype) if self.dtype.kind in "iu" else stack


def find_images(folder: Path) -> tuple[list[Path], list[int] | None]:
    """The images of a folder, sorted, or those of its sub-folders with the sub-folder's index as label.

    Sub-folders are classes in sorted order, and one without an image keeps its index.
    """
    flat = _images_in(folder)
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    labelled = [(path, label) for label, sub in enumerate(classes) for path in _images_in(sub)]
    if flat and labelled:
        raise InputError(f"{folder} holds images beside sub-folders of images: keep one or the other")
    return (flat, None) if flat else ([p for p, _ in labelled], [label for _, label in labelled])


def _images_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def _resized(height: int, width: int, size: Size) -> tuple[int, int]:
    """The new height and width; the longer side is rounded down, as torchvision does."""
    if isinstance(size, tuple):
        return size
    shorter = min(height, width)
    return height * size // shorter, width * size // shorter


def _pair(size: Size) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def _read_size(value: object) -> Size:
    numbers = tuple(int(p) for p in _parts(value, "x"))
    if len(numbers) == 1:
        return numbers[0]
    height, width = numbers
    return height, width


def _read_numbers(value: object) -> tuple[float, ...]:
    return tuple(float(p) for p in _parts(value, "/"))


def _parts(value: Any, separator: str) -> Sequence[Any]:
    if isinstance(value, str):
        return value.lower().split(separator)
    return value if isinstance(value, list | tuple) else [value]


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "resize": _read_size,
    "crop": _read_size,
    "channels": str,
    "scale": float,
    "mean": _read_numbers,
    "std": _read_numbers,
    "layout": str,
}
