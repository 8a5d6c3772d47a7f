"""What onnxruntime records of the nodes it executes: when each began and how long it took."""

from __future__ import annotations

import json
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Feed
from edgewise.runtime.session import first_line, import_onnxruntime, runtime_errors

if TYPE_CHECKING:
    import onnxruntime

Event = Mapping[str, Any]
"""An entry of onnxruntime's profile: `name`, `ts` and `dur` in microseconds, `args`."""

_WARM_UP_RUNS = 3
_USUAL_RUNS = 30
_FEWEST_RUNS = 3
_SECONDS = 4.0
_WARM_UP_SHARE = 0.25  # of the seconds
_NODE_EVENT = "_kernel_time"
_WITH_BODIES = frozenset({"If", "Loop", "Scan"})
_WEIGHTS_FILE = "session.optimized_model_external_initializers_file_name"


@dataclass(frozen=True)
class Trace:
    """The events of all runs, and of each run after the warm-up the event of the whole."""

    events: Sequence[Event]
    runs: Sequence[Event]

    def calls(self) -> Iterator[tuple[int, str, Event, float]]:
        """For each call of a node: the run it was in, the node's name, the event, and the microseconds it
        took without the nodes in its bodies."""
        calls = sorted((e for e in self.events if e["name"].endswith(_NODE_EVENT)), key=_start)
        inner = _time_of_bodies(calls)
        starts = [run["ts"] for run in self.runs]
        for i, call in enumerate(calls):
            run = bisect_right(starts, call["ts"]) - 1
            if run >= 0:
                yield run, call["name"].removesuffix(_NODE_EVENT), call, call["dur"] - inner[i]


def _time_of_bodies(calls: Sequence[Event]) -> Counter[int]:
    """For each call, by its index, the time of the calls directly within it."""
    inner: Counter[int] = Counter()
    around: list[int] = []
    for i, call in enumerate(calls):
        while around and _end(calls[around[-1]]) <= call["ts"]:
            around.pop()
        if around:
            inner[around[-1]] += call["dur"]
        if call["args"]["op_name"] in _WITH_BODIES:
            around.append(i)
    return inner


def _start(event: Event) -> tuple[int, int]:
    """Sorts events by time, and those that hold others before what they hold."""
    return event["ts"], -event["dur"]


def _end(event: Event) -> int:
    end: int = event["ts"] + event["dur"]
    return end


def tracing(
    session: onnxruntime.InferenceSession, path: Path, folder: Path, executed: Path | None
) -> onnxruntime.InferenceSession:
    """A session like `session`, of the file at `path`, that records events into `folder`.

    It saves the graph that it executes to `executed`, unless the provider turns out not to allow that.
    """
    options = session.get_session_options()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "events")
    create = import_onnxruntime().InferenceSession
    providers = [(name, session.get_provider_options().get(name, {})) for name in session.get_providers()]
    if executed is not None:
        options.optimized_model_filepath = str(executed)
        options.add_session_config_entry(_WEIGHTS_FILE, f"{executed.stem}.data")
        try:
            return create(path, options, providers=providers, enable_fallback=0)
        except runtime_errors():
            options.optimized_model_filepath = ""
    return create(path, options, providers=providers, enable_fallback=0)


def record(session: onnxruntime.InferenceSession, feed: Feed, runs: int | None = None) -> Trace:
    """Run a session of `tracing` on `feed`, `runs` times after a warm-up, and end its recording.

    Without `runs`, as often as a few seconds allow, and at least three times. Raises `InputError` where
    the model does not run.
    """
    outputs = [o.name for o in session.get_outputs()]
    try:
        warm_up = _repeat(session, outputs, feed, 1, _WARM_UP_RUNS, _SECONDS * _WARM_UP_SHARE)
        fewest, most = (_FEWEST_RUNS, _USUAL_RUNS) if runs is None else (runs, runs)
        _repeat(session, outputs, feed, fewest, most, _SECONDS)
    except runtime_errors() as error:
        raise InputError(f"the model does not run on these inputs: {first_line(error)}") from error
    events: list[Event] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    wholes = sorted((e for e in events if e["name"] == "model_run"), key=_start)
    return Trace(events, wholes[warm_up:])


def _repeat(
    session: onnxruntime.InferenceSession,
    outputs: list[str],
    feed: Feed,
    fewest: int,
    most: int,
    seconds: float,
) -> int:
    """Run at least `fewest` times, then until `most` times or `seconds` are reached: how often it ran."""
    begin, done = time.monotonic(), 0
    while done < fewest or (done < most and time.monotonic() - begin < seconds):
        session.run(outputs, dict(feed))
        done += 1
    return done
