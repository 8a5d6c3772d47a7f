"""How close images are to those that the original gives for the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgewise.runtime.errors import EdgewiseError, InputError

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]

CAP_DB = 100.0
"""The PSNR of images that are the same, or differ by no more than rounding: 1e-5 of the range."""

_CHANNELS = (1, 3, 4)
_RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))
_SLACK = 0.1  # of a range: networks without a last Tanh or Sigmoid overshoot a little
_FILLED = 0.25  # of a range, at least, by images that are in it
_WINDOW, _SIGMA = 11, 1.5


def psnr(outputs: Outputs, original: Outputs, _: Array | None) -> float:
    """Peak signal-to-noise in dB of the images against the original's on the same inputs, their mean.

    10 log10(range^2 / mean squared error) of an image, no more than 100 dB, so that an original has a score
    against itself: a bound of 30 dB is a drop of 70. The range is [0, 1], [-1, 1] or [0, 255], whichever the
    original's values fill, else from their smallest to their largest. Of an output that is no image every
    sample is one.
    """
    expected, actual = _first_floats(outputs, original)
    error = np.square(expected - actual).reshape(len(expected), -1).mean(axis=1)
    ratio = error / dynamic_range(expected) ** 2
    return float(np.mean(-10 * np.log10(ratio.clip(10 ** (-CAP_DB / 10)))))


def ssim(outputs: Outputs, original: Outputs, _: Array | None) -> float:
    """Structural similarity of the images with the original's on the same inputs, their mean: 1 is the same.

    With a Gaussian window of 11 pixels, standard deviation 1.5, where it lies inside the image (Z. Wang et
    al. 2004, IEEE Trans. Image Processing 13(4)); images below 11 pixels get the largest odd window that
    fits. Every channel counts alike. The range is as of `psnr`.
    """
    expected, actual = (planes(images) for images in _first_floats(outputs, original))
    peak = dynamic_range(expected)
    small, tiny = (0.03 * peak) ** 2, (0.01 * peak) ** 2
    blur = _Blur.of(*expected.shape[-2:])
    mean_e, mean_a = blur(expected), blur(actual)
    variance_e = blur(expected**2) - mean_e**2
    variance_a = blur(actual**2) - mean_a**2
    covariance = blur(expected * actual) - mean_e * mean_a
    likeness = (2 * mean_e * mean_a + tiny) * (2 * covariance + small)
    return float(np.mean(likeness / ((mean_e**2 + mean_a**2 + tiny) * (variance_e + variance_a + small))))


@dataclass(frozen=True)
class _Blur:
    """A Gaussian window over height and width, each as a matrix: (outputs, pixels)."""

    rows: Array
    columns: Array

    @classmethod
    def of(cls, height: int, width: int) -> _Blur:
        size = min(_WINDOW, height, width)
        size -= 1 - size % 2
        offsets = np.arange(size) - size // 2
        window = np.exp(-(offsets**2) / (2 * _SIGMA**2))
        return cls(*(_banded(window / window.sum(), pixels) for pixels in (height, width)))

    def __call__(self, images: Array) -> Array:
        blurred: Array = self.rows @ images @ self.columns.T
        return blurred


def _banded(window: Array, pixels: int) -> Array:
    """Row i is the window from pixel i on."""
    matrix = np.zeros((pixels - len(window) + 1, pixels))
    first = np.arange(len(matrix))[:, None]
    matrix[first, first + np.arange(len(window))] = window
    return matrix


def planes(images: Array) -> Array:
    """Images of any usual layout as float64 (samples, channels, height, width)."""
    values = images.astype(np.float64)
    if values.ndim == 3:
        return values[:, None]
    if values.ndim == 4 and values.shape[1] in _CHANNELS:
        return values
    if values.ndim == 4 and values.shape[-1] in _CHANNELS:
        return np.moveaxis(values, -1, 1)
    shape = "x".join(map(str, images.shape))
    raise InputError(
        f"an output of shape {shape} holds no images of 1, 3 or 4 channels: use psnr or fidelity"
    )


def dynamic_range(images: Array) -> float:
    """Largest minus smallest value that such images can have; 1 where they are all the same."""
    low, high = image_range(images) or (float(images.min()), float(images.max()))
    return high - low or 1.0


def image_range(images: Array) -> tuple[float, float] | None:
    """[0, 1], [-1, 1] or [0, 255], whichever the values lie in and fill; None where they fill none."""
    least, most = float(images.min()), float(images.max())
    for low, high in _RANGES:
        span = high - low
        inside = low - _SLACK * span <= least and most <= high + _SLACK * span
        if inside and most - least >= _FILLED * span:
            return low, high
    return None


def _first_floats(outputs: Outputs, original: Outputs) -> tuple[Array, Array]:
    """The first float output of the original, and the same of the other model, as float64."""
    name = next((n for n, output in original.items() if output.dtype.kind == "f"), None)
    if name is None:
        raise InputError("an image metric needs an output of floats: use equality, or a metric of your own")
    expected, actual = original[name].astype(np.float64), outputs[name].astype(np.float64)
    if not np.isfinite(expected).all():
        raise InputError(f"output {name!r} of the original holds NaN or infinity: it has no image quality")
    if not np.isfinite(actual).all():
        raise EdgewiseError("outputs hold NaN or infinity where the original's do not")
    return expected, actual
