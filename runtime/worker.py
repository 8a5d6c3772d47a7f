"""The process that holds one model and does nothing else: `python -m edgewise.runtime.worker`.

It answers requests, a line of JSON each, on its standard input and output. `isolated.py` is the
other end. What onnxruntime or a custom op prints goes to standard error, out of the answers' way.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from edgewise.runtime.errors import EdgewiseError
from edgewise.runtime.session import (
    ProviderError,
    first_line,
    grant_of,
    import_onnxruntime,
    open_session,
    runtime_errors,
)

if TYPE_CHECKING:
    import onnxruntime

Request = dict[str, Any]
Reply = dict[str, Any]

_WINDOW_SECONDS = 0.02
_WINDOW_RUNS = 3
_STILL_WARMING = 0.97  # a window this much faster than the best before it
_CALM_WINDOWS = 2
_WARM_UP_SECONDS = 1.5
_PR_SET_PDEATHSIG = 1
_MEMORY = {"cuda": "cuda", "tensorrt": "cuda", "dml": "dml"}  # the others compute in the host's


class Worker:
    """A session, its input and the commands on it, in the order `open`, `start`, `block` or `load`."""

    def __init__(self) -> None:
        self._session: onnxruntime.InferenceSession | None = None
        self._make_run: Callable[[], Callable[[], object]] = lambda: lambda: None
        self._run: Callable[[], object] = lambda: None
        self._memory: str | None = None

    def open(self, request: Request) -> Reply:
        """Load the model; say what that took, which inputs it wants, and what runs where."""
        _pin(request["cores"])
        provider = request["provider"]
        bound = provider in _MEMORY if request["io_binding"] is None else request["io_binding"]
        self._memory = _MEMORY.get(provider, "cpu") if bound else None
        start = time.perf_counter()
        self._session = open_session(
            request["model"],
            provider=provider,
            threads=request["threads"],
            inter_op_threads=request["inter_op_threads"],
            spinning=request["spinning"],
            record_assignment=True,
        )
        seconds = time.perf_counter() - start
        inputs = [(i.name, i.type, i.shape) for i in self._session.get_inputs()]
        grant = dataclasses.asdict(grant_of(self._session, provider))
        return {"load": seconds, "loaded": resident_bytes()[0], "inputs": inputs, "grant": grant}

    def start(self, request: Request) -> Reply:
        """Run the model for the first time, and then until it is warm."""
        session = self._session
        if session is None:
            raise EdgewiseError("no model is open")
        feed = _read_feed(request["feed"], request["inputs"])
        outputs = [o.name for o in session.get_outputs()]
        if self._memory is None or any(a.dtype.kind == "U" for a in feed.values()):  # text is not bound
            self._make_run = lambda: lambda: session.run(outputs, feed)
        else:
            memory = self._memory
            self._make_run = lambda: bound_run(session, feed, outputs, memory)
        self._run = self._make_run()
        first = _seconds(self._run)
        gc.collect()
        gc.disable()
        return {"first": first, "steady": warm_up(self._run), "peak": resident_bytes()[1]}

    def block(self, request: Request) -> Reply:
        """Run `lead` times untimed, then `count` times: the seconds of each."""
        for _ in range(request["lead"]):
            self._run()
        return {"times": [_seconds(self._run) for _ in range(request["count"])]}

    def load(self, request: Request) -> Reply:
        """Keep `concurrency` runs under way for about `seconds`: how many ended, and in what time."""
        runs = [self._make_run() for _ in range(request["concurrency"])]
        begin = time.perf_counter()
        with ThreadPoolExecutor(len(runs)) as pool:
            counts = list(pool.map(lambda run: _runs_until(begin + request["seconds"], run), runs))
        return {"runs": sum(counts), "seconds": time.perf_counter() - begin}

    def profile(self, request: Request) -> Reply:
        """Where the time of a model goes; needs no `open`."""
        from edgewise.runtime.profile import profile  # brings onnx-ir, which a latency needs not

        _trace_alone(request["cores"])
        inputs = request["inputs"]
        found = profile(
            Path(request["model"]),
            None if inputs is None else _read_feed(request["feed"], inputs),
            provider=request["provider"],
            threads=request["threads"],
            runs=request["runs"],
            seed=request["seed"],
        )
        return {"profile": found.to_dict()}

    def peaks(self, request: Request) -> Reply:
        """How fast the machine is at best; needs no `open`."""
        from edgewise.runtime.peaks import measure_peaks

        _trace_alone(request["cores"])
        return {"peaks": measure_peaks(request["provider"], request["threads"]).to_dict()}


def _trace_alone(cores: list[int]) -> None:
    """Pin this process, and let CUDA's calls return when their work is done: else a node's time is that
    of its launch, and its work shows in the time of whichever node waits for it."""
    _pin(cores)
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"


def bound_run(
    session: onnxruntime.InferenceSession, feed: Mapping[str, Any], outputs: list[str], memory: str
) -> Callable[[], object]:
    """A run whose inputs and outputs stay in the device's `memory`: nothing is copied from or to the host."""
    values = import_onnxruntime().OrtValue
    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_ortvalue_input(name, values.ortvalue_from_numpy(array, memory))
    for name in outputs:
        binding.bind_output(name, memory)
    return lambda: session.run_with_iobinding(binding)


def _runs_until(end: float, run: Callable[[], object]) -> int:
    runs = 0
    while time.perf_counter() < end:
        run()
        runs += 1
    return runs


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def warm_up(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Run until the median of a window of runs has stopped falling; the last window's median, in seconds."""
    deadline = clock() + _WARM_UP_SECONDS
    best, calm = float("inf"), 0
    while True:
        median = statistics.median(_window(run, clock))
        calm = 0 if median < best * _STILL_WARMING else calm + 1
        best = min(best, median)
        if calm == _CALM_WINDOWS or clock() >= deadline:
            return median


def _window(run: Callable[[], object], clock: Callable[[], float]) -> Iterator[float]:
    """The seconds of each run, for as many runs and as long as a median needs."""
    runs, begin = 0, clock()
    end = begin
    while runs < _WINDOW_RUNS or end - begin < _WINDOW_SECONDS:
        start = clock()
        run()
        end = clock()
        runs += 1
        yield end - start


def resident_bytes() -> tuple[int, int]:
    """Memory resident now, and at its peak since this program began."""
    status = Path("/proc/self/status")
    if not status.exists():
        import psutil

        memory = psutil.Process().memory_info()
        return memory.rss, getattr(memory, "peak_wset", memory.rss)
    # Not getrusage: its peak includes that of the process that started this one.
    kilobytes = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+)", status.read_text(), re.MULTILINE))
    return int(kilobytes["VmRSS"]) * 1024, int(kilobytes["VmHWM"]) * 1024


def _pin(cores: list[int]) -> None:
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def _read_feed(path: str, inputs: list[str]) -> dict[str, Any]:
    """The arrays were saved by position: an input may have any name."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[f"arr_{i}"] for i, name in enumerate(inputs)}


def _answer(worker: Worker, request: Request) -> Reply:
    """The reply, or why there is none; anything unforeseen ends the process with its traceback."""
    commands = {"open": worker.open, "start": worker.start, "block": worker.block, "load": worker.load}
    commands |= {"profile": worker.profile, "peaks": worker.peaks}
    command = commands[request["command"]]
    try:
        return command(request)
    except ProviderError as error:
        return {"error": str(error), "provider": True}
    except (EdgewiseError, OSError) as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "out of memory"}
    except runtime_errors() as error:
        return {"error": f"the model does not run on these inputs: {first_line(error)}"}


def _die_with_parent() -> None:
    """A worker is stopped while it waits, and a stopped process would not see its parent end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _private_stdout() -> TextIO:
    """The pipe to the parent, with the place of standard output taken by standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _send(replies: TextIO, reply: Reply) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def main() -> None:
    """Serve requests until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers itself
    _die_with_parent()
    replies = _private_stdout()
    import_onnxruntime()
    _send(replies, {"ready": True})
    worker = Worker()
    for line in sys.stdin:
        _send(replies, _answer(worker, json.loads(line)))


if __name__ == "__main__":
    main()
