"""Run the float model on samples and sketch the values a plan needs."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, reduce
from itertools import chain

import numpy as np
import onnx_ir as ir

from edgewise.calibration.sketch import Accumulator, Sketch
from edgewise.calibration.table import CalibrationTable
from edgewise.calibration.taps import open_taps, sizes_on, values_of
from edgewise.passes.fingerprint import fingerprint
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Evaluator, Feed
from edgewise.runtime.machine import usable_cores

MEMORY = 1 << 30
"""Bytes of values that are held at once, if nothing else is asked for."""

Progress = Callable[[int], None]

_MOST_WORKERS = 8  # beyond that they wait for Python's lock


def collect(
    model: ir.Model,
    samples: Iterable[Feed],
    values: Sequence[str],
    *,
    threads: int | None = None,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> CalibrationTable:
    """Sketch the named `values` of `model` over all `samples`, which are read once, one at a time.

    See `Collector` for the options. Raises `InputError` on a value the model does not compute, on a
    sample that does not fit, and where there are no samples.
    """
    return Collector(model, values, threads=threads, memory=memory).collect(samples, progress=progress)


class Collector:
    """A model that is made ready once and observed on samples as often as wanted.

    `values` are inputs of the model or outputs of nodes of its main graph; those that hold no floats are
    left out of the table. `threads` (default: one a core) work on different samples as far as the values
    of those fit in `memory` bytes, by their shapes; where those of one sample do not, the model is run
    once for each group of values that does.
    """

    def __init__(
        self, model: ir.Model, values: Sequence[str], *, threads: int | None = None, memory: int = MEMORY
    ) -> None:
        self._model = model
        self._names = list(dict.fromkeys(values))
        self._threads = threads or len(usable_cores())
        self._memory = memory
        self._workers = 0
        self._taps: list[Evaluator] = []

    def collect(
        self,
        samples: Iterable[Feed],
        *,
        seconds: float = math.inf,
        progress: Progress | None = None,
    ) -> CalibrationTable:
        """Sketch the values over `samples`, or over as many of the first as `seconds` (one at least) allow.

        `progress` hears the number of samples done, one call at a time but from any thread.
        """
        stream = iter(samples)
        first = next(stream, None)
        if first is None:
            raise InputError("no samples to calibrate with")
        self._open(first)
        fed = [name for name in self._names if name in first]
        queue = _Queue(chain([first], stream), progress, time.monotonic() + seconds)
        with ThreadPoolExecutor(self._workers) as pool:
            futures = [pool.submit(_sketch, queue, fed, self._taps) for _ in range(self._workers)]
            try:
                parts = [future.result() for future in futures]
            finally:  # an interrupt must not wait for all samples
                queue.close()
        found = [name for name in self._names if any(name in part for part in parts)]
        sketches = {name: reduce(Sketch.merge, (p[name] for p in parts if name in p)) for name in found}
        return CalibrationTable(self.fingerprint, queue.done, sketches)

    @cached_property
    def fingerprint(self) -> str:
        """That of the model."""
        return fingerprint(self._model)

    def _open(self, feed: Feed) -> None:
        """Find out how many workers there is memory for, and what they run on every sample."""
        if self._workers:
            return
        names = [name for name in self._names if name not in feed]
        sizes = sizes_on(self._model, names, feed)
        self._workers = max(1, min(self._threads, _MOST_WORKERS, self._memory // max(sum(sizes.values()), 1)))
        self._taps = open_taps(self._model, sizes, self._memory, self._threads // self._workers)


class _Queue:
    """Hands samples to the workers, one at a time, until they or the time are used up or a worker fails."""

    def __init__(self, samples: Iterator[Feed], progress: Progress | None, end: float) -> None:
        self._samples = samples
        self._progress = progress
        self._end = end
        self._given = 0
        self._lock = threading.Lock()
        self.done = 0

    def __iter__(self) -> Iterator[Feed]:
        while (feed := self._next()) is not None:
            yield feed
            with self._lock:
                self.done += 1
                if self._progress is not None:
                    self._progress(self.done)

    def _next(self) -> Feed | None:
        with self._lock:
            if self._given and time.monotonic() > self._end:
                return None
            self._given += 1
            return next(self._samples, None)

    def close(self) -> None:
        """Let the workers find no more samples."""
        with self._lock:
            self._samples = iter(())


def _sketch(queue: _Queue, fed: Sequence[str], taps: Sequence[Evaluator]) -> dict[str, Sketch]:
    """One worker: the values of whatever samples it gets hold of, for sketches merge in any way."""
    accumulators: dict[str, Accumulator] = {}
    try:
        for feed in queue:
            for name, array in chain(((name, feed[name]) for name in fed), values_of(taps, feed)):
                if isinstance(array, np.ndarray) and array.dtype.kind == "f":
                    accumulators.setdefault(name, Accumulator()).add(array)
    finally:  # a failure stops the others
        queue.close()
    return {name: accumulator.sketch() for name, accumulator in accumulators.items()}
