"""Calibration on a Ray cluster: the workers are actors, wherever Ray has room for them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from edgewise.calibration.sharding import Alone, Answer, Death, Observer, OpenCrew, Positions, Processes, Task
from edgewise.runtime.errors import EdgewiseError, InputError

LOCAL = "local"
"""The address of a cluster that is started here for the run."""


class Cluster:
    """Workers that are Ray actors, one a processor unless `size` says otherwise.

    `address` is that of a running cluster (`auto`: the one this machine belongs to), or `local`. Each worker
    runs with the task's threads, 1 by default, and asks Ray for as many processors; those of one machine
    share the memory bound. Every machine needs edgewise installed, and the samples at the path they have
    here. Raises `EdgewiseError` where Ray is not installed, `InputError` where no cluster answers.
    """

    def __init__(self, task: Task, size: int | None, address: str) -> None:
        self._ray = _import_ray()
        self._started = not self._ray.is_initialized()
        _connect(self._ray, address)
        threads = task.threads or 1
        machines = max(1, sum(1 for node in self._ray.nodes() if node["Alive"]))
        room = int(self._ray.cluster_resources().get("CPU", 1)) // threads
        self.size = max(1, min(size or room, len(task.samples)))
        share = math.ceil(self.size / machines)
        mine = dataclasses.replace(task, threads=threads, memory=max(1, task.memory // share))
        self._packed = self._ray.put(mine.packed())
        self._actor = self._ray.remote(Observer).options(num_cpus=threads)
        self._workers = [self._start() for _ in range(self.size)]
        self._answers: dict[Any, int] = {}

    def _start(self) -> Any:
        return self._actor.remote(self._packed)

    def send(self, worker: int, positions: Positions) -> None:
        self._answers[self._workers[worker].answer.remote(positions)] = worker

    def receive(self) -> tuple[int, Answer]:
        (ready,), _ = self._ray.wait(list(self._answers), num_returns=1)
        worker = self._answers.pop(ready)
        try:
            return worker, self._ray.get(ready)
        except self._ray.exceptions.RayActorError as error:
            self._workers[worker] = self._start()
            return worker, Death(str(error).splitlines()[0])

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        for worker in self._workers:
            self._ray.kill(worker)
        if self._started:
            self._ray.shutdown()


@contextmanager
def connected(address: str) -> Iterator[ModuleType]:
    """Ray, connected to the cluster at `address`; one that was started here ends here.

    Raises `EdgewiseError` where Ray is not installed, `InputError` where no cluster answers.
    """
    ray = _import_ray()
    started = not ray.is_initialized()
    _connect(ray, address)
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


def _import_ray() -> ModuleType:
    try:
        ray = import_module("ray")
    except ModuleNotFoundError as error:
        raise EdgewiseError("Ray is not installed: pip install 'edgewise[ray]'") from error
    return ray


def _connect(ray: ModuleType, address: str) -> None:
    if ray.is_initialized():
        return
    try:
        ray.init(address, include_dashboard=None if address != LOCAL else False, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise InputError(f"no Ray cluster answers at {address!r}: {str(error).splitlines()[0]}") from error


def crew_of(workers: int | None = None, ray: str | None = None) -> OpenCrew:
    """This process, `workers` processes, or as many actors of the Ray cluster at the address `ray`."""
    if ray is not None:
        return lambda task, _: Cluster(task, workers, ray)
    if workers is None or workers == 1:
        return Alone
    return lambda task, _: Processes(task, min(workers, len(task.samples)))
