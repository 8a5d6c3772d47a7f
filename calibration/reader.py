"""Beside onnxruntime's own quantizer: its readers as samples, our samples and tables for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from edgewise.calibration.data import Samples, from_function
from edgewise.calibration.ranges import grid_of
from edgewise.calibration.table import CalibrationTable
from edgewise.runtime.evaluate import Feed, TensorSpec


class CalibrationDataReader(Protocol):
    """What `onnxruntime.quantization.CalibrationDataReader` promises: feeds, then None.

    Many have a method `rewind` as well, after which they begin again.
    """

    def get_next(self) -> Feed | None: ...


def from_reader(reader: CalibrationDataReader, specs: Sequence[TensorSpec]) -> Samples:
    """What `reader` gives as samples for the inputs `specs`: a row each where the model's batch is open.

    Samples are read more than once: a reader that has `rewind` is rewound, what one without gives is kept.
    Raises `InputError` on feeds that do not fit the model, and on a reader that gives none.
    """
    rewind: Callable[[], object] | None = getattr(reader, "rewind", None)
    if rewind is None:
        kept = list(iter(reader.get_next, None))
        return from_function(lambda: kept, specs, type(reader).__name__)

    def again() -> Iterator[Feed]:
        rewind()
        return iter(reader.get_next, None)

    return from_function(again, specs, type(reader).__name__)


class SampleReader:
    """Samples as onnxruntime's tools ask for them."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self.rewind()

    def rewind(self) -> None:
        """Begin again."""
        self._feeds = iter(self._samples)

    def get_next(self) -> Feed | None:
        """The next sample; None after the last one."""
        return next(self._feeds, None)

    def __len__(self) -> int:
        return len(self._samples)


def tensor_overrides(
    table: CalibrationTable, method: str = "minmax", *, dtype: str = "uint8"
) -> dict[str, list[dict[str, Any]]]:
    """The ranges of `table` as the extra option "TensorQuantOverrides" of onnxruntime's `quantize_static`.

    Every value of the table gets the scale and the zero point of its range by `method`, in `dtype` ("uint8",
    or "int8" with zero point 0). `quantize_static` asks for a reader all the same: one sample is enough, for
    what it finds counts only for values that the table has not. In format QDQ a Relu or Clip stands for the
    value before it: take the table of the model that goes in. Raises `InputError` on an unknown method.
    """
    from onnxruntime.quantization import QuantType

    kind = QuantType.QUInt8 if dtype == "uint8" else QuantType.QInt8
    overrides = {}
    for name, (low, high) in table.ranges(method, symmetric=dtype == "int8").items():
        scale, zero_point = grid_of(low, high, dtype)
        arrays = {"scale": np.array(scale, np.float32), "zero_point": np.array(zero_point, dtype)}
        overrides[name] = [{"quant_type": kind, **arrays}]
    return overrides
