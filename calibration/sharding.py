"""Calibration in portions, by this process, by several or by a cluster: always to the same table."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import pickle
import signal
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from edgewise.calibration.collect import Collector, Progress
from edgewise.calibration.data import Samples
from edgewise.calibration.table import CalibrationTable
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.machine import usable_cores
from edgewise.runtime.session import serialize, weight_bytes

Positions = npt.NDArray[np.int64]

_ATTEMPTS = 3  # at one portion, before it is given up
_LARGEST_PORTION = 32  # samples: what a death costs, and how often progress is heard
_PORTIONS = 4  # of each worker at least, so that no one waits long for the last one
_PROTOBUF_LIMIT = 2**31 * 0.9


@dataclass(frozen=True)
class Task:
    """What a worker is to observe. It answers with what it has after `seconds`."""

    model: ir.Model
    samples: Samples
    values: tuple[str, ...]
    threads: int | None
    memory: int
    seconds: float = math.inf

    def shared_by(self, workers: int) -> Task:
        """The task of one of so many workers on one machine: its part of the threads and of the memory."""
        threads = self.threads or len(usable_cores())
        return dataclasses.replace(
            self, threads=max(1, threads // workers), memory=max(1, self.memory // workers)
        )

    def packed(self) -> bytes:
        """The task as it is sent to a worker. Raises `InputError` where that cannot be."""
        if weight_bytes(self.model) > _PROTOBUF_LIMIT:
            raise InputError("a model of 2 GB or more cannot be sent to workers: calibrate without them")
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["samples"] = dataclasses.replace(self.samples, labels=None)
        try:
            return pickle.dumps(fields | {"model": serialize(self.model)})
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(
                f"the samples cannot be sent to workers ({error}): name a file, a folder or a function"
            ) from error

    @classmethod
    def unpacked(cls, data: bytes) -> Task:
        """The task of `packed`."""
        fields = pickle.loads(data)
        return cls(**fields | {"model": ir.from_proto(onnx.ModelProto.FromString(fields["model"]))})


class Observer:
    """A worker: it holds the model and answers for the portions of samples it is given."""

    def __init__(self, packed: bytes) -> None:
        self._task = Task.unpacked(packed)
        self._collector = _collector(self._task)

    def answer(self, positions: Positions) -> CalibrationTable | EdgewiseError:
        """The table of the samples at `positions`, or of the first of them; or what is wrong with them."""
        samples = self._task.samples.take(positions)
        try:
            return self._collector.collect(samples, seconds=self._task.seconds)
        except EdgewiseError as error:
            return error


def _collector(task: Task) -> Collector:
    return Collector(task.model, task.values, threads=task.threads, memory=task.memory)


@dataclass(frozen=True)
class Death:
    """A worker that gave no answer, and why. Another has taken its place."""

    why: str


Answer = CalibrationTable | EdgewiseError | Death


class Crew(Protocol):
    """`size` workers, by number. Each is sent one portion at a time and answers to it."""

    size: int

    def send(self, worker: int, positions: Positions) -> None: ...

    def receive(self) -> tuple[int, Answer]: ...

    def close(self) -> None: ...


OpenCrew = Callable[[Task, Progress], Crew]
"""Makes a crew for a task. It may tell of samples that are done before it answers for their portion."""


class Alone:
    """The crew of those who need none: this process, which works when it is asked for the answer."""

    size = 1

    def __init__(self, task: Task, progress: Progress) -> None:
        self._task = task
        self._collector = _collector(task)
        self._progress = progress
        self._positions = np.empty(0, np.int64)

    def send(self, worker: int, positions: Positions) -> None:
        self._positions = positions

    def receive(self) -> tuple[int, Answer]:
        samples = self._task.samples.take(self._positions)
        table = self._collector.collect(samples, seconds=self._task.seconds, progress=self._progress)
        return 0, table

    def close(self) -> None:
        """Nothing is open."""


class Processes:
    """Workers on this machine, each a process that is spawned, with its share of threads and memory."""

    def __init__(self, task: Task, size: int) -> None:
        self.size = size
        self._packed = task.shared_by(size).packed()
        self._context = multiprocessing.get_context("spawn")
        self._workers = [self._start() for _ in range(size)]
        self._busy: set[int] = set()

    def _start(self) -> tuple[Any, Connection]:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(there, self._packed), daemon=True)
        process.start()
        there.close()  # so that its end is noticed here
        return process, here

    def send(self, worker: int, positions: Positions) -> None:
        self._busy.add(worker)
        try:
            self._workers[worker][1].send(positions)
        except OSError:  # it has died, which `receive` will find
            return

    def receive(self) -> tuple[int, Answer]:
        ready = wait([self._workers[worker][1] for worker in self._busy])
        number = next(n for n in sorted(self._busy) if self._workers[n][1] in ready)
        self._busy.discard(number)
        process, connection = self._workers[number]
        try:
            return number, connection.recv()
        except (EOFError, OSError):
            connection.close()
            process.join()
            self._workers[number] = self._start()
            return number, Death(_exit_text(process.exitcode))

    def close(self) -> None:
        """End all workers."""
        for process, connection in self._workers:
            connection.close()
            process.terminate()
            process.join()


def _serve(connection: Connection, packed: bytes) -> None:
    """The life of a worker process: it ends when nobody is there to ask or to hear."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the one who started it
    observer = Observer(packed)
    try:
        while True:
            connection.send(observer.answer(connection.recv()))
    except (EOFError, OSError):
        return


def _exit_text(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "killed, perhaps for want of memory: give a lower --memory or fewer --workers"
    return f"exit code {code}"


def observe(crew: Crew, todo: Positions, absorb: Callable[[Positions, CalibrationTable], None]) -> None:
    """Have the crew observe the samples at `todo`; `absorb` hears of every part that is done, with its table.

    A portion whose worker dies goes to the next one. Raises `EdgewiseError` where that has happened
    `_ATTEMPTS` times, and what a worker answers with.
    """
    waiting = deque(_portions(todo, crew.size))
    at_work: dict[int, Positions] = {}
    deaths: Counter[int] = Counter()
    while waiting or at_work:
        for worker in range(crew.size):
            if waiting and worker not in at_work:
                at_work[worker] = waiting.popleft()
                crew.send(worker, at_work[worker])
        worker, answer = crew.receive()
        positions = at_work.pop(worker)
        if isinstance(answer, EdgewiseError):
            raise answer
        if isinstance(answer, Death):
            deaths[int(positions[0])] += 1
            _check_deaths(deaths[int(positions[0])], worker, positions, answer)
            rest = positions
        else:
            absorb(positions[: answer.samples], answer)
            rest = positions[answer.samples :]
        if rest.size:
            waiting.appendleft(rest)


def _portions(todo: Positions, workers: int) -> Sequence[Positions]:
    """One for a single worker, several for each of many; samples that lie side by side stay so."""
    if workers == 1 or todo.size == 0:
        return [todo] if todo.size else []
    size = min(_LARGEST_PORTION, math.ceil(todo.size / (_PORTIONS * workers)))
    return np.array_split(todo, math.ceil(todo.size / size))


def _check_deaths(deaths: int, worker: int, positions: Positions, death: Death) -> None:
    if deaths >= _ATTEMPTS:
        raise EdgewiseError(
            f"worker {worker + 1} died ({death.why}), the last of {deaths} that did on samples "
            f"{positions[0]} to {positions[-1]}; what is done is kept: run the same command again"
        )
