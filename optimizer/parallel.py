"""Independent pieces of one job: in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import onnx
import onnx_ir as ir

from edgewise.calibration.cluster import connected
from edgewise.runtime.errors import EdgewiseError
from edgewise.runtime.session import serialize

Work = Callable[[bytes, float], bytes]
"""A function of a module: what all pieces share, and which piece it is."""


class _Pickler(pickle.Pickler):
    """Knows models, and views of dicts, which pickle does not."""

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, ir.Model):
            return _model, (serialize(value),)
        if isinstance(value, MappingProxyType):
            return _view, (dict(value),)
        return NotImplemented


def _model(data: bytes) -> ir.Model:
    return ir.from_proto(onnx.ModelProto.FromString(data))


def _view(value: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(value)


def pack(value: object) -> bytes:
    """A value of dataclasses, arrays and models, for another process of this program, or for later."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


def unpack(data: bytes) -> Any:
    """What `pack` was given."""
    return pickle.loads(data)


Map = Callable[[Sequence[float]], list[bytes]]


@contextmanager
def workers_for(work: Work, shared: bytes, workers: int, ray: str | None) -> Iterator[Map]:
    """A map of `work` over pieces by that many processes at once, or by actors of the Ray cluster at `ray`.

    Answers come in the order of the pieces. Raises `EdgewiseError` where a worker dies.
    """
    if ray is not None:
        with connected(ray) as cluster:
            task, packed = cluster.remote(work), cluster.put(shared)
            yield lambda pieces: list(cluster.get([task.remote(packed, piece) for piece in pieces]))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupts) as pool:

        def by_processes(pieces: Sequence[float]) -> list[bytes]:
            try:
                return list(pool.map(work, [shared] * len(pieces), pieces))
            except BrokenProcessPool as error:
                raise EdgewiseError(
                    "a worker died, for want of memory perhaps: give fewer --workers"
                ) from error

        try:
            yield by_processes
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.terminate()  # nobody waits for minutes of training that nobody wants
            raise


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the one who started it
