"""How far the outputs of two models are apart on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgewise.calibration.noise import decibels

Array = npt.NDArray[Any]
Outputs = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """One output of two models, over all samples compared.

    `relative` is the largest absolute difference over the largest absolute value expected, or the share of
    integers or strings that differ; infinite where shapes, types or the places of NaN differ.
    `snr_db` is the signal-to-noise ratio, `cosine` the similarity of the flattened outputs, and
    `agreement` the share of rows with the same arg max along the last axis (None for rank below 2).
    """

    output: str
    relative: float
    absolute: float
    snr_db: float
    cosine: float
    agreement: float | None

    def __str__(self) -> str:
        rows = "" if self.agreement is None else f", same arg max in {self.agreement:.2%}"
        return f"{self.output}: relative {self.relative:.2e}, {self.snr_db:.1f} dB{rows}"


def differences(expected: Sequence[Outputs], actual: Sequence[Outputs]) -> tuple[Difference, ...]:
    """Compare two runs over the same samples, output by output; names are those of `expected`."""
    if not expected:
        return ()
    return tuple(
        _difference(name, [e[name] for e in expected], [a.get(name) for a in actual]) for name in expected[0]
    )


def relative(expected: Any, actual: Any) -> float:
    """Largest absolute difference over the largest absolute value expected; infinite if incomparable.

    Of what is no float, the share of elements that differ.
    """
    if isinstance(expected, list | dict):  # ONNX sequences and maps
        return _nested(expected, actual)
    expected, actual = np.asarray(expected), np.asarray(actual)
    if not _comparable(expected, actual):
        return np.inf
    if expected.size == 0:
        return 0.0
    if not np.issubdtype(expected.dtype, np.number) or np.issubdtype(expected.dtype, np.integer):
        return float(np.mean(expected != actual))
    e, a = _wide(expected), _wide(actual)
    finite = np.isfinite(e)
    if not np.array_equal(e[~finite], a[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
        return np.inf
    gap = np.abs(e[finite] - a[finite]).max(initial=0.0)
    scale = np.abs(e[finite]).max(initial=0.0)
    return float(gap / scale) if scale > 0 else float(gap)


def _nested(expected: Any, actual: Any) -> float:
    if type(expected) is not type(actual) or len(expected) != len(actual):
        return np.inf
    if isinstance(expected, dict):
        if expected.keys() != actual.keys():
            return np.inf
        expected, actual = list(expected.values()), [actual[k] for k in expected]
    return max((relative(e, a) for e, a in zip(expected, actual, strict=True)), default=0.0)


def _comparable(expected: Any, actual: Any) -> bool:
    arrays = isinstance(expected, np.ndarray) and isinstance(actual, np.ndarray)
    return arrays and expected.shape == actual.shape and expected.dtype == actual.dtype


def _wide(array: Array) -> Array:
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def _difference(name: str, expected: list[Any], actual: list[Any]) -> Difference:
    pairs = list(zip(expected, actual, strict=True))
    ratio = max(relative(e, a) for e, a in pairs)
    if not all(_comparable(e, a) and e.dtype.kind in "fiu" for e, a in pairs):
        if ratio == 0:
            return Difference(name, 0.0, 0.0, np.inf, 1.0, None)
        return Difference(name, ratio, np.inf, -np.inf, 0.0, None)
    e = np.concatenate([_wide(e).ravel() for e, _ in pairs])
    a = np.concatenate([_wide(a).ravel() for _, a in pairs])
    both = np.isfinite(e) | np.isfinite(a)  # where neither is, `ratio` has compared them
    e, a = e[both], a[both]
    noise, signal = float(np.sum((e - a) ** 2)), float(np.sum(e**2))
    norms = float(np.linalg.norm(e) * np.linalg.norm(a))
    return Difference(
        output=name,
        relative=ratio,
        absolute=float(np.abs(e - a).max(initial=0.0)),
        snr_db=decibels(signal, noise),
        cosine=float(e @ a / norms) if norms > 0 else float(noise == 0),
        agreement=agreement([e for e, _ in pairs], [a for _, a in pairs]),
    )


def agreement(expected: Sequence[Array], actual: Sequence[Array]) -> float | None:
    """Share of rows whose largest entry along the last axis is at the same place."""
    if any(e.ndim < 2 or e.shape[-1] < 2 for e in expected):
        return None
    same = [e.argmax(-1) == a.argmax(-1) for e, a in zip(expected, actual, strict=True)]
    return float(np.mean(np.concatenate([s.ravel() for s in same])))
