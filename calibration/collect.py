"""Run the float model on samples and sketch the values a plan needs."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, reduce
from itertools import chain
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from edgewise.calibration.sketch import Accumulator, Sketch
from edgewise.calibration.table import CalibrationTable
from edgewise.passes.fingerprint import fingerprint
from edgewise.passes.graph import static_shape
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
        self._evaluators: list[Evaluator] = []

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
            futures = [pool.submit(_sketch, queue, fed, self._evaluators) for _ in range(self._workers)]
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
        sizes = _sizes(self._model, names, feed)
        self._workers = max(1, min(self._threads, _MOST_WORKERS, self._memory // max(sum(sizes.values()), 1)))
        self._evaluators = [
            Evaluator(_tapped(self._model, group), outputs=group, threads=self._threads // self._workers)
            for group in _groups(names, sizes, self._memory)
        ]


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


def _sketch(queue: _Queue, fed: Sequence[str], evaluators: Sequence[Evaluator]) -> dict[str, Sketch]:
    """One worker: the values of whatever samples it gets hold of, for sketches merge in any way."""
    accumulators: dict[str, Accumulator] = {}
    try:
        for feed in queue:
            for name, array in chain(((name, feed[name]) for name in fed), _outputs(evaluators, feed)):
                if isinstance(array, np.ndarray) and array.dtype.kind == "f":
                    accumulators.setdefault(name, Accumulator()).add(array)
    finally:  # a failure stops the others
        queue.close()
    return {name: accumulator.sketch() for name, accumulator in accumulators.items()}


def _outputs(evaluators: Sequence[Evaluator], feed: Feed) -> Iterator[tuple[str, Any]]:
    """Every value of one sample; those of one evaluator are in memory together."""
    for evaluator in evaluators:
        yield from evaluator.run(feed).items()


def _tapped(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """What of the model computes these values, with nothing else as output, so that the rest stays fused."""
    part = model.clone()
    produced = {v.name: v for node in part.graph for v in node.outputs}
    if unknown := [name for name in names if name not in produced]:
        raise InputError(f"the model's main graph computes no value named {unknown[0]!r}")
    part.graph.outputs[:] = [produced[name] for name in names]
    RemoveUnusedNodesPass()(part)
    return part


def _groups(names: Sequence[str], sizes: Mapping[str, int], memory: int) -> list[list[str]]:
    """The names in order, cut where the next value would pass the bound. A value alone may pass it."""
    groups: list[list[str]] = []
    room = 0
    for name in names:
        if not groups or sizes[name] > room:
            groups.append([])
            room = memory
        groups[-1].append(name)
        room -= sizes[name]
    return groups


def _sizes(model: ir.Model, names: Sequence[str], feed: Feed) -> dict[str, int]:
    """Bytes of each value for samples like `feed`; those of unknown shape count as the largest known one."""
    shapes = _static_shapes(model, names)
    if len(shapes) < len(names):
        fixed = model.clone()
        for value in fixed.graph.inputs:
            if (array := feed.get(value.name or "")) is not None:
                value.shape = ir.Shape(array.shape)
        shapes = _static_shapes(ShapeInferencePass()(fixed).model, names)
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    return dict.fromkeys(names, max(sizes.values(), default=0)) | sizes


def _static_shapes(model: ir.Model, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    wanted = set(names)
    shapes = {v.name: static_shape(v) for node in model.graph for v in node.outputs if v.name in wanted}
    return {name: shape for name, shape in shapes.items() if name is not None and shape is not None}
