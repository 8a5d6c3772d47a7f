"""A model in a process of its own, seen from the process that measures it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import numpy as np
import psutil

from edgewise.runtime.evaluate import Feed
from edgewise.runtime.session import ProviderError

_MODULE = "edgewise.runtime.worker"
_WATCH_SECONDS = 0.2
_START_SECONDS = 60.0  # a short timeout is meant for the model, not for a slow disk


class WorkerFailed(Exception):  # noqa: N818 - an outcome that is reported, not an error of the caller
    """The model could not be loaded or run; the text is the cause, in one line."""


class IsolatedModel:
    """A worker process, started at once and at rest whenever it is not answering.

    At rest it is suspended, so that threads that spin for their next task do not take the cores
    from the model that is being measured. Leaving the context ends the process.
    """

    def __init__(self, log: Path, *, threads: int | None, timeout: float) -> None:
        """`log` takes what the process writes to standard error; `timeout` is in seconds, for one answer."""
        self._log, self._timeout = log, timeout
        self._deadline, self._hung, self._closed = math.inf, False, threading.Event()
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
                encoding="utf-8",
            )
        self._requests = cast(IO[str], self._process.stdin)
        self._replies = cast(IO[str], self._process.stdout)
        self._handle = psutil.Process(self._process.pid)
        threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> IsolatedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._process.kill()
        self._process.wait()
        for pipe in (self._requests, self._replies):
            with contextlib.suppress(OSError):  # what is left in the buffer of a dead process's pipe
                pipe.close()

    def wait_until_ready(self) -> None:
        """Wait for the imports to end, and put the process to rest."""
        self._receive(max(self._timeout, _START_SECONDS))

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Wake the process, have it do one command, and put it back to rest.

        Raises `WorkerFailed` with the cause, `ProviderError` where the provider is not to be had.
        """
        try:
            self._handle.resume()
            self._requests.write(json.dumps({"command": command, **arguments}) + "\n")
            self._requests.flush()
        except (OSError, psutil.Error):
            raise WorkerFailed(self._cause_of_death()) from None
        reply = self._receive(self._timeout)
        if reply.get("provider"):
            raise ProviderError(reply["error"])
        if "error" in reply:
            raise WorkerFailed(reply["error"])
        return reply

    def _watch(self) -> None:
        """End a process that does not answer in time; then `_receive` reads the end of its pipe.

        One thread looks at the clock now and then: a timer for every answer would cost more than
        the answer of a small model.
        """
        while not self._closed.wait(_WATCH_SECONDS):
            if time.monotonic() > self._deadline:
                self._hung = True
                self._process.kill()
                return

    def _receive(self, seconds: float) -> dict[str, Any]:
        """The next reply, within `seconds`; then the process is suspended."""
        self._deadline = time.monotonic() + seconds
        line = self._replies.readline()
        self._deadline = math.inf
        if self._hung:
            raise WorkerFailed(f"no answer within {seconds:g} s: it hangs, or needs a longer timeout")
        if not line:
            raise WorkerFailed(self._cause_of_death())
        with contextlib.suppress(psutil.Error):  # dead by now: the next request will find out why
            self._handle.suspend()
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _cause_of_death(self) -> str:
        """Why the process ended on its own: its signal, or the last line it wrote."""
        code = self._process.wait()
        if code < 0:
            name = signal.Signals(-code).name
            hint = ", as when the system is out of memory" if name == "SIGKILL" else ""
            return f"onnxruntime crashed with {name}{hint}"
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f"the process ended with exit code {code}: {lines[-1] if lines else 'without a word'}"


def save_feed(feed: Feed, folder: Path) -> Path:
    """The arrays by position, as a worker reads them; without a pickle, so strings get a fixed width."""
    path = folder / "feed.npz"
    plain = [np.asarray(a, np.str_) if np.asarray(a).dtype == np.object_ else a for a in feed.values()]
    np.savez(path, *plain)
    return path
