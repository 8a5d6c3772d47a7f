"""How close generated images are to real ones, as a distance of their features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from edgewise.calibration.data import Samples, from_arrays, open_samples
from edgewise.optimizer import files
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Evaluator, TensorSpec, input_specs

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]

PREFIX = "frechet"
_BATCH = 64


@dataclass(frozen=True)
class Moments:
    """Mean (features,) and covariance (features, features) of the features of a set of images."""

    mean: Array
    covariance: Array

    @classmethod
    def of(cls, features: Array) -> Moments:
        """Of features (samples, features); a covariance of few samples is shrunk towards a sphere.

        The oracle approximating shrinkage (Y. Chen et al. 2010, IEEE Trans. Signal Processing 58(10)): none
        where samples abound, and never a singular matrix.
        """
        count, size = features.shape
        if count < 2:
            raise InputError("a Frechet distance needs at least two samples on either side")
        mean = features.mean(axis=0)
        centred = features - mean
        sampled = centred.T @ centred / count
        trace, energy = float(np.trace(sampled)), float(np.sum(sampled**2))
        known = energy - trace**2 / size
        wanted = (1 - 2 / size) * energy + trace**2
        share = min(1.0, wanted / ((count + 1 - 2 / size) * known)) if known > 0 else 1.0
        sphere = np.eye(size) * trace / size
        return cls(mean, (1 - share) * sampled + share * sphere)


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in squared units of the features; 0 for equals.

    The trace of the root is taken of the symmetric C1^(1/2) C2 C1^(1/2), which has the same eigenvalues.
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second.covariance @ root).clip(0)).sum()
    apart = float(np.sum((first.mean - second.mean) ** 2))
    spread = float(np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross)
    return max(apart + spread, 0.0)  # rounding may go below


@dataclass(frozen=True)
class Frechet:
    """Minus the Frechet distance of generated from real images, over the features that a network gives them.

    `frechet:FEATURES.onnx,REAL` names it: a network with one input that takes the generator's images as they
    are, and whose first output is features, not classes (M. Heusel et al. 2017, arXiv 1706.08500); and real
    images in the generator's size and range: whatever `--data` takes. Maps of features count by their means.
    """

    features: str
    real: str

    @classmethod
    def named(cls, name: str) -> Frechet:
        """Of `frechet:FEATURES.onnx,REAL`."""
        features, _, real = name.removeprefix(PREFIX).removeprefix(":").rpartition(",")
        if not features or not real:
            raise InputError(
                f"metric {name!r} is not of the form {PREFIX}:FEATURES.onnx,REAL: "
                "a network that gives images features, and real images"
            )
        return cls(features, real)

    def __call__(self, outputs: Outputs, _: Outputs, __: Array | None) -> float:
        return -self.distance(next(iter(outputs.values())))

    def distance(self, images: Array) -> float:
        """Of images as the generator gives them from the real ones."""
        spec = self._extractor.spec
        if images.ndim != len(spec.shape) or images.dtype != spec.dtype:
            raise InputError(
                f"{self.features} takes {spec.dtype} of {len(spec.shape)} axes, "
                f"not the generator's {images.dtype} of {images.ndim}"
            )
        if not np.isfinite(images).all():
            raise EdgewiseError("the images hold NaN or infinity")
        generated = self._extractor.moments(from_arrays({spec.name: images}, [spec]))
        return frechet_distance(generated, self._real_moments)

    @cached_property
    def _extractor(self) -> _Extractor:
        return _Extractor.of(self.features)

    @cached_property
    def _real_moments(self) -> Moments:
        return self._extractor.moments(open_samples(self.real, [self._extractor.spec]))


@dataclass(frozen=True)
class _Extractor:
    """A network that gives features to what goes into its one input."""

    evaluator: Evaluator
    spec: TensorSpec

    @classmethod
    def of(cls, path: str) -> _Extractor:
        model = files.load(path)
        specs = input_specs(model)
        if len(specs) != 1:
            raise InputError(f"{path} takes {len(specs)} inputs: features are of one, the images")
        return cls(Evaluator(model), specs[0])

    def moments(self, samples: Samples) -> Moments:
        """Of the features of all samples."""
        found = [next(iter(self.evaluator.run(feed).values())) for feed in samples.batches(_BATCH)]
        features = np.concatenate(found).astype(np.float64)
        if features.ndim < 2 or not np.isfinite(features).all():
            raise InputError("features are finite numbers, a row a sample: the first output is none")
        return Moments.of(features.reshape(*features.shape[:2], -1).mean(axis=2))
