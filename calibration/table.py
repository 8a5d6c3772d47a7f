"""What calibration found: a sketch for every observed value, bound to the model it was taken from."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.calibration.ranges import Range, range_of
from edgewise.calibration.sketch import Sketch
from edgewise.passes.fingerprint import fingerprint
from edgewise.runtime.errors import InputError

Array = npt.NDArray[Any]

_VERSION = 2
_SCALARS = {
    "count": np.int64,
    "minimum": np.float64,
    "maximum": np.float64,
    "nans": np.int64,
    "infs": np.int64,
    "arrays": np.int64,
}
_SUMS = ("lows", "highs")  # of any size: hexadecimal text
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class CalibrationTable:
    """Sketches by value name, the number of samples behind them, and the model's fingerprint.

    Tables of the same model and values merge: the result is bit-identical to that of one run over all
    the samples, in any order.
    """

    fingerprint: str
    samples: int
    sketches: Mapping[str, Sketch] = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sketches", MappingProxyType(dict(self.sketches)))

    def __reduce__(self) -> tuple[Any, ...]:
        return CalibrationTable, (self.fingerprint, self.samples, dict(self.sketches))

    def merge(self, other: CalibrationTable) -> CalibrationTable:
        """The table of both sets of samples. Raises `InputError` if models or values differ."""
        if self.fingerprint != other.fingerprint:
            raise InputError("the calibration tables are of different models and cannot be merged")
        if self.sketches.keys() != other.sketches.keys():
            name = sorted(self.sketches.keys() ^ other.sketches.keys())[0]
            raise InputError(f"only one of the calibration tables holds value {name!r}: calibrate again")
        merged = {name: sketch + other.sketches[name] for name, sketch in self.sketches.items()}
        return CalibrationTable(self.fingerprint, self.samples + other.samples, merged)

    def ranges(
        self, method: str = "minmax", *, bits: int = 8, symmetric: bool = False, percentile: float = 99.99
    ) -> dict[str, Range]:
        """The range (low, high) of every value, by `edgewise.calibration.ranges.range_of`."""
        return {
            name: range_of(sketch, method, bits=bits, symmetric=symmetric, percentile=percentile)
            for name, sketch in self.sketches.items()
        }

    def check(self, model: ir.Model) -> None:
        """Raise `InputError` if the table was not taken from `model`."""
        if fingerprint(model) != self.fingerprint:
            raise InputError("the calibration table belongs to another model: calibrate this one")

    @property
    def digest(self) -> str:
        """SHA-256 of all that the table holds: equal tables have equal digests."""
        sha = hashlib.sha256()
        for name, array in sorted(self._arrays().items()):
            sha.update(f"{name}:{array.dtype.str}:{array.shape};".encode())
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()

    def save(self, path: str | os.PathLike[str], more: Mapping[str, Array] | None = None) -> Path:
        """Write an .npz file, complete or not at all; a file that exists is replaced.

        `more` are arrays that stand beside those of the table, which `load` does not read. Raises
        `InputError` if `path` cannot be written.
        """
        path = Path(path)
        try:
            with tempfile.TemporaryDirectory(prefix=".edgewise-", dir=path.parent) as folder:
                part = Path(folder) / "table.npz"
                np.savez_compressed(part, allow_pickle=False, **self._arrays(), **(more or {}))
                part.replace(path)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
        return path

    def _arrays(self) -> dict[str, Array]:
        sketches = list(self.sketches.values())
        scalars = {k: np.array([getattr(s, k) for s in sketches], t) for k, t in _SCALARS.items()}
        sums = {k: np.array([f"{getattr(s, k):x}" for s in sketches], np.str_) for k in _SUMS}
        return {
            "version": np.array(_VERSION),
            "fingerprint": np.array(self.fingerprint),
            "samples": np.array(self.samples),
            "names": np.array(list(self.sketches), dtype=np.str_),
            "sizes": np.array([s.bins.size for s in sketches], np.int64),
            "bins": np.concatenate([np.empty(0, np.uint16), *(s.bins for s in sketches)]),
            "counts": np.concatenate([np.empty(0, np.int64), *(s.counts for s in sketches)]),
            **scalars,
            **sums,
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationTable:
        """Read what `save` wrote. Raises `InputError` on a file that is missing, damaged or another's."""
        if not Path(path).is_file():
            raise InputError(f"{path}: no such calibration table")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                version = int(arrays["version"])
                if version == _VERSION:
                    return cls._from_arrays(dict(arrays))
        except _UNREADABLE as error:
            raise InputError(f"{path} is no calibration table, or a damaged one: calibrate again") from error
        raise InputError(f"{path} has format {version}, this edgewise reads {_VERSION}: calibrate again")

    @classmethod
    def _from_arrays(cls, arrays: Mapping[str, Array]) -> CalibrationTable:
        ends = np.cumsum(arrays["sizes"], dtype=np.int64)
        if not (ends[-1:] == len(arrays["bins"])).all() or len(arrays["bins"]) != len(arrays["counts"]):
            raise ValueError("bins, counts and their sizes do not fit together")
        bins = np.split(arrays["bins"].astype(np.uint16, casting="safe"), ends)[:-1]
        counts = np.split(arrays["counts"].astype(np.int64, casting="safe"), ends)[:-1]
        columns = [arrays[key].tolist() for key in _SCALARS]
        columns += [[int(text, 16) for text in arrays[key].tolist()] for key in _SUMS]
        sketches = {
            name: Sketch(b, c, *scalars)
            for name, b, c, *scalars in zip(arrays["names"].tolist(), bins, counts, *columns, strict=True)
        }
        if len(sketches) < len(bins) or not all(map(_is_whole, sketches.values())):
            raise ValueError("the sketches contradict themselves")
        return cls(str(arrays["fingerprint"]), int(arrays["samples"]), sketches)


def _is_whole(sketch: Sketch) -> bool:
    """Whether the numbers of a sketch could be those of some elements."""
    s = sketch
    if min(s.count, s.nans, s.infs, s.arrays) < 0 or int(s.counts.sum()) > s.count:
        return False
    if s.count == 0:
        return s.minimum == math.inf and s.maximum == -math.inf
    ascending = bool((np.diff(s.bins.astype(np.int64)) > 0).all())
    return ascending and bool((s.counts > 0).all()) and -math.inf < s.minimum <= s.maximum < math.inf
