"""A calibration table on its way: kept beside the output, so that an interrupted run can go on."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.calibration.collect import Progress
from edgewise.calibration.data import Samples
from edgewise.calibration.sharding import Alone, OpenCrew, Positions, Task, observe
from edgewise.calibration.table import CalibrationTable
from edgewise.passes.fingerprint import fingerprint
from edgewise.runtime.errors import InputError

Array = npt.NDArray[Any]

EVERY = 10.0
"""Seconds between two writings: what an interruption costs at most."""

_FIRST = 4  # samples that tell others apart
_DONE, _ORIGIN = "part.done", "part.origin"


@dataclass(frozen=True)
class Origin:
    """What a table is made of: the model, the values observed, and the samples, as digests."""

    model: str
    values: str
    samples: str

    @classmethod
    def of(cls, model: ir.Model, values: Sequence[str], samples: Samples) -> Origin:
        """Of the samples their source, their number and the first ones count."""
        sha = hashlib.sha256(f"{samples.source};{len(samples)};".encode())
        for feed in islice(samples, _FIRST):
            for name, array in sorted(feed.items()):
                sha.update(f"{name}:{array.dtype}:{array.shape};".encode())
                sha.update(repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())
        return cls(
            fingerprint(model), hashlib.sha256("\0".join(values).encode()).hexdigest(), sha.hexdigest()
        )

    def difference(self, other: Origin) -> str:
        """What is not the same; empty if nothing is."""
        if self.model != other.model:
            return "another model"
        return "" if self == other else "other samples" if self.values == other.values else "other values"


@dataclass(frozen=True)
class Partial:
    """`table` is of the samples that are `done` (one flag a sample), None before the first one."""

    origin: Origin
    done: Array = field(repr=False)
    table: CalibrationTable | None = None

    @property
    def todo(self) -> Positions:
        """The positions of the other samples."""
        return np.flatnonzero(~self.done)

    def plus(self, positions: Positions, table: CalibrationTable) -> Partial:
        """With the samples at `positions`, of which `table` is."""
        done = self.done.copy()
        done[positions] = True
        return replace(self, done=done, table=table if self.table is None else self.table.merge(table))

    def save(self, path: Path) -> None:
        """Write the table, if there is one, with what else is known; complete or not at all."""
        if self.table is not None:
            self.table.save(path, {_DONE: self.done, _ORIGIN: np.array(astuple(self.origin))})

    @classmethod
    def load(cls, path: Path) -> Partial:
        """Read what `save` wrote. Raises `InputError` on anything else."""
        table = CalibrationTable.load(path)
        with np.load(path, allow_pickle=False) as arrays:
            if _DONE not in arrays or _ORIGIN not in arrays:
                raise InputError(f"{path} is a calibration table, but no part of one")
            partial = cls(Origin(*arrays[_ORIGIN].tolist()), arrays[_DONE], table)
        if partial.done.sum() != table.samples:
            raise InputError(f"{path} is damaged")
        return partial


class Keeper:
    """Keeps the partial table of a run up to date, and in `path` (where there is one) if the run is long."""

    def __init__(
        self, path: Path | None, origin: Origin, count: int, every: float, progress: Progress | None
    ) -> None:
        self.partial = Partial(origin, np.zeros(count, bool))
        self.notes: tuple[str, ...] = ()
        self._path, self._every, self._progress = path, every, progress
        self._saved = time.monotonic()
        self._unsaved = False
        if path is not None and path.exists():
            self._resume(path)

    def _resume(self, path: Path) -> None:
        try:
            found = Partial.load(path)
        except InputError as error:
            self.notes = (f"started over: {error}",)
            return
        if difference := self.partial.origin.difference(found.origin):
            self.notes = (f"started over: {path} is of {difference}",)
            return
        self.partial = found
        self.notes = (f"went on from {path}: it held {found.done.sum()} of {found.done.size} samples",)

    def heard(self, more: int) -> None:
        """Tell of samples that are done beyond those of the partial table."""
        if self._progress is not None:
            self._progress(int(self.partial.done.sum()) + more)

    def absorb(self, positions: Positions, table: CalibrationTable) -> None:
        """Add what was observed; write it down if the last time was long ago."""
        self.partial = self.partial.plus(positions, table)
        self._unsaved = True
        self.heard(0)
        if time.monotonic() - self._saved >= self._every:
            self.save()

    def save(self) -> None:
        """Write down what is not yet."""
        if self._path is not None and self._unsaved:
            self.partial.save(self._path)
            self._saved, self._unsaved = time.monotonic(), False


def collect_to(
    output: Path,
    task: Task,
    open_crew: OpenCrew = Alone,
    *,
    every: float = EVERY,
    progress: Progress | None = None,
) -> tuple[CalibrationTable, tuple[str, ...]]:
    """Observe all samples of `task` with the crew that `open_crew` makes and write the table to `output`.

    What is done is kept in `output` + ".part" meanwhile, see `collect_in`.
    """
    path = output.with_name(f"{output.name}.part")
    table, notes = collect_in(path, task, open_crew, every=every, progress=progress)
    table.save(output)
    path.unlink(missing_ok=True)
    return table, notes


def collect_in(
    path: Path,
    task: Task,
    open_crew: OpenCrew = Alone,
    *,
    every: float = EVERY,
    progress: Progress | None = None,
) -> tuple[CalibrationTable, tuple[str, ...]]:
    """Observe all samples of `task` and leave what was seen in `path`, for the caller to remove.

    It is written every so many seconds, when it is interrupted, and at the end; the same call then goes on
    from there and ends with the same table, bit by bit. A file of another model or of other samples is
    left out of account: the notes that come with the table tell.
    """
    origin = Origin.of(task.model, task.values, task.samples)
    keeper = Keeper(path, origin, len(task.samples), every, progress)
    if keeper.partial.todo.size:
        crew = open_crew(replace(task, seconds=every), keeper.heard)
        with closing(crew):
            try:
                observe(crew, keeper.partial.todo, keeper.absorb)
            finally:  # also of an interrupt: what is done is not lost
                keeper.save()
    table = keeper.partial.table
    if table is None:
        raise InputError("no samples to calibrate with")
    return table, keeper.notes


@contextmanager
def kept_beside(
    output: Path, what: str = "table", *, after: type[BaseException] = KeyboardInterrupt
) -> Iterator[Path]:
    """Where a job that writes `output` keeps its table, or its folder of `what`.

    Only a job that ends by `after` leaves it behind, for the next one to go on from.
    """
    path = output.with_name(f"{output.name}.{what}.part")
    done = True
    try:
        yield path
    except after:
        done = False
        raise
    finally:
        if done:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
