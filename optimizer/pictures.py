"""Images that a model draws, beside those that the original draws for the same inputs."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from PIL import Image

from edgewise.calibration.data import Samples
from edgewise.optimizer.frechet import Frechet
from edgewise.optimizer.image_metrics import CAP_DB, image_range, planes, psnr, ssim
from edgewise.optimizer.metrics import run_all

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]

COLUMNS, ROWS = 8, 5
_LEAST = 8  # pixels of height and width: below, nobody sees anything
_GAP = 2


@dataclass(frozen=True)
class Pictures:
    """Grids of images before and after as PNG files, and how alike they are.

    `psnr` in dB and `ssim` are of all `samples`, more than the grids `show`. `frechet` are the distances
    from real images before and after, and of other real images as what could be reached, where known.
    """

    shown: int
    samples: int
    psnr: float
    ssim: float
    before: bytes = field(repr=False)
    after: bytes = field(repr=False)
    frechet: tuple[float, float, float | None] | None = None

    @property
    def findings(self) -> tuple[str, ...]:
        """How alike the images are, in sentences."""
        same = self.psnr >= CAP_DB - 0.5
        likeness = (
            f"{self.samples} images are the same as before but for rounding"
            if same
            else f"{self.samples} images have a PSNR of {self.psnr:.1f} dB against those before, "
            f"{_seen(self.psnr)}, and an SSIM of {self.ssim:.4f}"
        )
        if self.frechet is None:
            return (likeness,)
        before, after, floor = self.frechet
        least = "" if floor is None else f" (other real images: {floor:.2f})"
        return likeness, f"Frechet distance from real images: {before:.2f} before, {after:.2f} after{least}"

    @property
    def files(self) -> Mapping[str, bytes]:
        """The grids under the names they have beside a report."""
        return {"images-before.png": self.before, "images-after.png": self.after}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; the grids by name."""
        numbers = {name: getattr(self, name) for name in ("shown", "samples", "psnr", "ssim")}
        distances = None if self.frechet is None else list(self.frechet)
        return {**numbers, "frechet": distances, "files": list(self.files)}


def pictures(
    original: ir.Model,
    model: ir.Model,
    samples: Samples,
    *,
    frechet: Frechet | None = None,
    floor: float | None = None,
    threads: int | None = None,
) -> Pictures | None:
    """What both models draw for the samples; None where the original's first float output is no image.

    An image has 1, 3 or 4 channels, at least 8x8 pixels, and values that fill [0, 1], [-1, 1] or [0, 255].
    `floor` is the Frechet distance of other real images.
    """
    expected, actual = (run_all(m, samples, threads=threads) for m in (original, model))
    name = _image_output(expected)
    ends = None if name is None else image_range(expected[name])
    if name is None or ends is None:
        return None
    before, after = {name: expected[name]}, {name: actual[name]}
    distances = None
    if frechet is not None:
        distances = (frechet.distance(before[name]), frechet.distance(after[name]), floor)
    return Pictures(
        shown=min(COLUMNS * ROWS, len(before[name])),
        samples=len(before[name]),
        psnr=psnr(after, before, None),
        ssim=ssim(after, before, None),
        before=grid(before[name], ends),
        after=grid(after[name], ends),
        frechet=distances,
    )


def can_draw(model: ir.Model) -> bool:
    """Whether the shape of the first float output is that of images; False where it is not known."""
    floats = (v for v in model.graph.outputs if v.dtype is not None and v.dtype.is_floating_point())
    output = next(floats, None)
    if output is None or output.shape is None or output.shape.rank() != 4:
        return False
    return bool({1, 3, 4} & {output.shape[1], output.shape[-1]})


def _image_output(outputs: Outputs) -> str | None:
    name = next((n for n, output in outputs.items() if output.dtype.kind == "f"), None)
    if name is None or outputs[name].ndim != 4 or not np.isfinite(outputs[name]).all():
        return None
    if not {1, 3, 4} & {outputs[name].shape[1], outputs[name].shape[-1]}:
        return None
    return name if min(planes(outputs[name][:1]).shape[-2:]) >= _LEAST else None


def grid(images: Array, ends: tuple[float, float]) -> bytes:
    """The first images in rows, as a PNG file; `ends` are the darkest and the brightest value."""
    dark, bright = ends
    pixels = (planes(images[: COLUMNS * ROWS]) - dark) / (bright - dark)
    tiles = np.round(255 * pixels.clip(0, 1)).astype(np.uint8).transpose(0, 2, 3, 1)
    if tiles.shape[3] != 4:
        tiles = np.pad(tiles, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=255)
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    # What lies between the images, and after the last, is transparent.
    tiles = np.pad(tiles, ((0, rows * columns - len(tiles)), (0, _GAP), (0, _GAP), (0, 0)))
    _, height, width, channels = tiles.shape
    sheet = tiles.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    sheet = sheet.reshape(rows * height, columns * width, channels)[:-_GAP, :-_GAP]
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "PNG", optimize=True)
    return file.getvalue()


def _seen(decibels: float) -> str:
    """What people see of such a difference; 30 and 40 dB are the usual marks of good and of excellent."""
    if decibels >= 40:
        return "a difference that nobody sees"
    return f"a difference that {'is hard to see' if decibels >= 30 else 'can be seen'}"
