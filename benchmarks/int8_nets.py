"""The nets that int8 is measured on, with inputs to calibrate by and others to judge by.

All models of the corpus, on data like what they were trained for wherever the corpus holds any, and
well-known architectures with seeded weights.
"""

from __future__ import annotations

import dataclasses
import os
import wave
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import architectures
import corpus
import generators
import numpy as np
from corpus import Array, Labelled, classifiers
from PIL import Image

from edgewise.calibration.data import Samples, from_arrays, open_samples
from edgewise.optimizer import files
from edgewise.runtime.evaluate import Feed, TensorSpec, input_specs

CALIBRATE, JUDGE = "calibrate", "judge"
Source = Callable[[str], Iterable[Mapping[str, Array]]]
"""Inputs by name, one run of the model at a time: those of `CALIBRATE`, or those of `JUDGE`."""

SEEDED = MappingProxyType(
    {
        "resnet50": "ResNet-50",
        "mobilenet_v2": "MobileNetV2",
        "efficientnet": "SE + SiLU (EfficientNet-B0)",
        "densenet121": "DenseNet-121",
        "shufflenet_v2": "ShuffleNetV2",
        "yolo": "C2f (YOLOv8-n's layout)",
        "encoder": "encoder, 6 layers",
        "dcgan": "DCGAN generator",
    }
)


@dataclass(frozen=True)
class Net:
    """A model file, and where its inputs come from; seeded ones where there is no `source`."""

    name: str
    path: Path
    source: Source | None = field(default=None, repr=False)
    title: str = ""

    def feeds(self, part: str, count: int) -> list[Feed]:
        """Up to `count` inputs of a part, as the model takes them."""
        if self.source is None:
            seed = 0 if part == CALIBRATE else 1_000_000
            return list(open_samples(f"random:{count}", self.specs, seed=seed))
        dtypes = {spec.name: spec.dtype for spec in self.specs}
        found = islice(self.source(part), count)
        return [{name: np.asarray(a, dtypes[name]) for name, a in feed.items()} for feed in found]

    def samples(self, part: str, count: int) -> Samples:
        """The same, as edgewise takes them."""
        return as_samples(self.path, self.feeds(part, count))

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return input_specs(files.load(self.path))


def as_samples(path: Path, feeds: list[Feed]) -> Samples:
    """Inputs of one run each, in a stack."""
    stacked = {name: np.stack([feed[name] for feed in feeds]) for name in feeds[0]}
    return from_arrays(stacked, input_specs(files.load(path)))


def nets(folder: Path) -> Iterator[tuple[str, Callable[[], Net]]]:
    """Every net by name; seeded ones are exported into `folder` when they are asked for."""
    for path in sorted((corpus.folder() / "models").glob("*.onnx")):
        yield path.stem, partial(trained, path)
    for name in SEEDED:
        yield name, partial(seeded, name, folder)


def trained(path: Path) -> Net:
    """A model of the corpus."""
    return Net(path.stem, path, sources().get(path.stem))


def seeded(name: str, folder: Path) -> Net:
    """An architecture with seeded weights; those that see images see photographs."""
    if name == "dcgan":
        path = folder / "dcgan.onnx"
        return Net(name, path if path.exists() else files.save(generators.dcgan(), path), title=SEEDED[name])
    path = architectures.exported(name, "none", folder)
    sample = architectures.ARCHITECTURES[name].sample
    source = _photos(path, sample[1:], _imagenet) if len(sample) == 3 else None
    return Net(name, path, source, SEEDED[name])


@cache
def sources() -> Mapping[str, Source]:
    """The inputs of the corpus' models; of the others nothing fitting is at hand."""
    models = corpus.folder() / "models"
    labelled: dict[str, Source] = {
        c.name: _images(c.path, {CALIBRATE: c.calibration, JUDGE: c.test}) for c in classifiers()
    }
    images: dict[str, Source] = {
        name: _photos(models / f"{name}.onnx", size, prepare) for name, (size, prepare) in _PHOTOS.items()
    }
    return labelled | images | {"magika_v3_3": _texts, "silero_vad": _voice, "dtln_1": _spectra}


def _images(path: Path, parts: Mapping[str, Callable[[], Labelled]]) -> Source:
    """Images, evenly spread over those there are; the only input of a model takes them."""

    def read(part: str) -> Iterator[Mapping[str, Array]]:
        name = input_specs(files.load(path))[0].name
        labelled = parts[part]()
        order = np.random.default_rng(0).permutation(len(labelled))
        shuffled = dataclasses.replace(labelled, images=[labelled.images[i] for i in order])
        return ({name: image} for image in shuffled)

    return read


Prepare = Callable[[Array], Array]


def _photos(path: Path, size: tuple[int, ...], prepare: Prepare) -> Source:
    """Photographs of the corpus at a size of its own: 0..255, channels last -> what the model takes."""
    net = next(c for c in classifiers() if c.name == "squeezenet_fp32")
    height, width = size

    def resized(pixels: Array) -> Array:
        return prepare(np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)))

    def part(read: Callable[[], Labelled]) -> Callable[[], Labelled]:
        return lambda: dataclasses.replace(read(), prepare=resized)

    return _images(path, {CALIBRATE: part(net.calibration), JUDGE: part(net.test)})


_imagenet = corpus.normalized([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_centered = corpus.normalized([0.5] * 3, [0.5] * 3)


def _channels_last(x: Array) -> Array:
    return x.astype(np.float32) / 127.5 - 1


def _caffe(x: Array) -> Array:
    return (x[..., ::-1].astype(np.float32) - np.array([104, 117, 123], np.float32)).transpose(2, 0, 1)


def _faces(x: Array) -> Array:
    return ((x.astype(np.float32) - 127) / 128).transpose(2, 0, 1)


def _luminance(x: Array) -> Array:
    return (x.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255)[None]


_PHOTOS: Mapping[str, tuple[tuple[int, int], Prepare]] = MappingProxyType(
    {
        "deeplabv3_mnv2_dm05_fp32": ((513, 513), _channels_last),
        "mnv1_025_128_tf_fp32": ((128, 128), _channels_last),
        "mnv1_050_160_tf_qdq": ((160, 160), lambda x: x),
        "ppocr_v2_cls": ((48, 192), _centered),
        "ppocr_v4_det": ((320, 320), _imagenet),
        "squeezenet_fp16": ((224, 224), _caffe),
        "superres_core": ((224, 224), _luminance),
        "ultraface_rfb_320": ((240, 320), _faces),
    }
)


def _texts(part: str) -> Iterator[Mapping[str, Array]]:
    """The first and the last 1,024 bytes of the files that Python and numpy consist of."""
    found = [p for package in (os, np) for p in sorted(Path(str(package.__file__)).parent.glob("*/*.*"))]
    large = [p for p in found if p.is_file() and p.stat().st_size >= 2048]
    half = large[::2] if part == CALIBRATE else large[1::2]
    for index in np.random.default_rng(0).permutation(len(half)):
        content = half[index].read_bytes()
        yield {"bytes": np.frombuffer(content[:1024] + content[-1024:], np.uint8)[None]}


def _clips(part: str) -> Iterator[Array]:
    """Speech, 16,000 numbers a second."""
    paths = sorted((corpus.folder() / "data" / "speech").glob("*.wav"))
    for path in paths[::2] if part == CALIBRATE else paths[1::2]:
        with wave.open(str(path)) as clip:
            yield np.frombuffer(clip.readframes(clip.getnframes()), np.int16).astype(np.float32) / 32768


def _frames(part: str, length: int) -> Iterator[Array]:
    """Stretches of speech in no order, none of them silent."""
    cut = [clip[i : i + length] for clip in _clips(part) for i in range(0, len(clip) - length, length)]
    loud = [frame for frame in cut if np.abs(frame).max() > 0.01]
    return (loud[i][None] for i in np.random.default_rng(0).permutation(len(loud)))


def _voice(part: str) -> Iterator[Mapping[str, Array]]:
    state, rate = np.zeros((2, 1, 128)), np.array(16000)
    return ({"input": frame, "state": state, "sr": rate} for frame in _frames(part, 576))


def _spectra(part: str) -> Iterator[Mapping[str, Array]]:
    state = np.zeros((1, 2, 128, 2))
    return ({"input_2": np.abs(np.fft.rfft(frame))[None], "input_3": state} for frame in _frames(part, 512))
