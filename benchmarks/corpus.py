"""The trained classifiers of the corpus with their data, prepared as each was trained to see it.

EDGEWISE_CORPUS names the folder. Images are read when they are asked for, one at a time.
"""

from __future__ import annotations

import gzip
import io
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[Any]
Pixels = Callable[[], Array]

_CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Labelled:
    """Images as functions that read them (uint8, height x width x channels), a label for each, and what
    to do to the pixels of one to make it the model's input."""

    images: Sequence[Pixels] = field(repr=False)
    labels: Array = field(repr=False)
    prepare: Callable[[Array], Array] = field(repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Array]:
        return (np.ascontiguousarray(self.prepare(read())[None], np.float32) for read in self.images)

    def every(self, step: int) -> Labelled:
        """Every `step`-th image: labels that are sorted stay evenly spread."""
        return Labelled(self.images[::step], self.labels[::step], self.prepare)

    def halves(self) -> tuple[Labelled, Labelled]:
        """The images in even and in odd places."""
        rest = Labelled(self.images[1:], self.labels[1:], self.prepare)
        return self.every(2), rest.every(2)


@dataclass(frozen=True)
class Classifier:
    """A model file, the data it was not calibrated with, and the data it may be. `note` is a caveat."""

    name: str
    path: Path
    test: Callable[[], Labelled]
    calibration: Callable[[], Labelled]
    first_class: int = 0  # the index of class 0 in the model's output
    note: str = ""


def folder() -> Path:
    """Where the corpus is; leaves the program with a word if that is not known."""
    if "EDGEWISE_CORPUS" not in os.environ:
        raise SystemExit("set EDGEWISE_CORPUS to the folder of real models and data")
    return Path(os.environ["EDGEWISE_CORPUS"])


def classifiers() -> tuple[Classifier, ...]:
    """Every trained classifier with labelled data."""
    root = folder()
    data, models = root / "data", root / "models"

    def imagenet(name: str, prepare: Callable[[Array], Array], size: int, **more: Any) -> Classifier:
        return Classifier(
            name,
            models / f"{name}.onnx",
            lambda: _imagenet_validation(data / "imagenet_val1300", size, prepare),
            lambda: _imagenet_samples(data / "imagenet_sample1000", size, prepare),
            **more,
        )

    def cifar(name: str, prepare: Callable[[Array], Array]) -> Classifier:
        return Classifier(
            name,
            models / f"{name}.onnx",
            lambda: _cifar(data / "cifar10" / "test_first500_per_class.zip", prepare),
            lambda: _cifar(data / "cifar10" / "train_calib_200_per_class.zip", prepare),
        )

    imagenet_mean = normalized([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    grid = "weights on an 8-bit grid"
    return (
        imagenet("squeezenet_fp32", _caffe, 224),
        imagenet("mnv1_050_160_tf_fp32", _minus_one_to_one, 160, first_class=1, note=grid),
        imagenet("mnv2_100_224_tfqat_fp32", _minus_one_to_one, 224, first_class=1, note=grid),
        cifar("cifar_resnet20", imagenet_mean),
        cifar("cifar_resnet56", imagenet_mean),
        cifar("winml_cifar_imageclassifier", normalized([0.5] * 3, [0.5] * 3)),
        cifar("mlperftiny_ic_resnet8", lambda x: x),
        Classifier(
            "mlperftiny_vww_mobilenetv1_025",
            models / "mlperftiny_vww_mobilenetv1_025.onnx",
            lambda: _persons(data / "coco128", slice(32, None)),
            lambda: _persons(data / "coco128", slice(0, 32)),
        ),
        Classifier(
            "mnist_cntk",
            models / "mnist_cntk.onnx",
            lambda: _digits(data / "mnist", slice(1000, None)),
            lambda: _digits(data / "mnist", slice(0, 1000)),
        ),
    )


def normalized(mean: Sequence[float], deviation: Sequence[float]) -> Callable[[Array], Array]:
    """0..255, channels last -> (x / 255 - mean) / deviation, channels first."""
    m, d = np.array(mean, np.float32), np.array(deviation, np.float32)
    return lambda x: ((x.astype(np.float32) / 255 - m) / d).transpose(2, 0, 1)


def _caffe(x: Array) -> Array:
    return (x[..., ::-1].astype(np.float32) - np.array([104, 117, 123], np.float32)).transpose(2, 0, 1)


def _minus_one_to_one(x: Array) -> Array:
    return x.astype(np.float32) / 127.5 - 1


def _decoded(source: Path | io.BytesIO) -> Image.Image:
    with Image.open(source) as image:
        return image.convert("RGB")


def _pixels(image: Image.Image) -> Array:
    return np.asarray(image)


def _imagenet_validation(root: Path, size: int, prepare: Callable[[Array], Array]) -> Labelled:
    """Images already squashed to 227 x 227; small models see the central seven eighths."""
    rows = [line.rsplit(", ", 1) for line in (root / "dataset.txt").read_text().splitlines()]

    def reader(path: Path) -> Pixels:
        return lambda: _pixels(_central(_decoded(path), size if size >= 200 else 199, size))

    return Labelled([reader(root / p) for p, _ in rows], np.array([int(y) for _, y in rows]), prepare)


def _imagenet_samples(root: Path, size: int, prepare: Callable[[Array], Array]) -> Labelled:
    """Full-size images, their shorter side scaled to the size / 0.875."""

    def reader(path: Path) -> Pixels:
        return lambda: _pixels(_central(_scaled(_decoded(path), round(size / 0.875)), size, size))

    paths = sorted(root.glob("*.JPEG"))
    return Labelled([reader(p) for p in paths], np.full(len(paths), -1), prepare)


def _scaled(image: Image.Image, shorter: int) -> Image.Image:
    factor = shorter / min(image.size)
    width, height = (max(shorter, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _central(image: Image.Image, side: int, size: int) -> Image.Image:
    left, top = ((length - side) // 2 for length in image.size)
    cropped = image.crop((left, top, left + side, top + side))
    return cropped if side == size else cropped.resize((size, size), Image.Resampling.BILINEAR)


def _cifar(archive: Path, prepare: Callable[[Array], Array]) -> Labelled:
    with zipfile.ZipFile(archive) as file:
        names = sorted(n for n in file.namelist() if not n.endswith("/"))
        stored = [file.read(n) for n in names]

    def reader(content: bytes) -> Pixels:
        return lambda: _pixels(_decoded(io.BytesIO(content)))

    labels = np.array([_CIFAR_CLASSES.index(n.split("/")[0]) for n in names])
    return Labelled([reader(c) for c in stored], labels, prepare)


def _persons(root: Path, part: slice) -> Labelled:
    """Is a person (class 0 of COCO) in the image?"""
    paths = sorted((root / "images").glob("*/*.jpg"))[part]

    def reader(path: Path) -> Pixels:
        return lambda: _pixels(_decoded(path).resize((96, 96), Image.Resampling.BILINEAR))

    def person(path: Path) -> bool:
        label = root / "object_detection" / "labels" / path.parent.name / f"{path.stem}.txt"
        return label.exists() and any(row.split()[0] == "0" for row in label.read_text().splitlines())

    return Labelled(
        [reader(p) for p in paths],
        np.array([int(person(p)) for p in paths]),
        lambda x: x.astype(np.float32) / 255,
    )


def _digits(root: Path, part: slice) -> Labelled:
    images = _idx(root / "t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28, 1)[part]
    labels = _idx(root / "t10k-labels-idx1-ubyte.gz", 8)[part]
    return Labelled([lambda x=x: x for x in images], labels, lambda x: x.transpose(2, 0, 1))


def _idx(path: Path, header: int) -> Array:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)
