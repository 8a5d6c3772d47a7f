"""Measure how long models take, so that the answer can be trusted.

Launches of fresh processes are repeated until the ratios to the first model are known as precisely
as asked for, or the time is spent. In every launch the first model runs a second time, against
itself: what differs there is noise, and no verdict is passed on less.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgewise.runtime import statistics
from edgewise.runtime.conditions import Conditions
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Array, Feed
from edgewise.runtime.machine import Machine, describe
from edgewise.runtime.rounds import Record, Setup, launch
from edgewise.runtime.session import Grant, check_provider
from edgewise.runtime.statistics import Interval, Verdict

Progress = Callable[[float], None]
"""Called now and then with the share of the time that is spent, 0 to 1."""

_FEWEST_LAUNCHES = 3
_WORTH_SECONDS = 0.5  # a launch that can play for less tells nothing
_FINISH_SECONDS = 0.7  # for the last round, to describe the machine and to sum up
_PERCENT = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class ModelLatency:
    """What one model takes. Times in milliseconds, memory in megabytes (10^6 bytes).

    `low_ms` to `high_ms` is the bootstrap 95 % interval of the median, `quantiles_ms` holds the 0th to
    the 100th percentile of all runs. `per_second` is the throughput in samples: with one run at a time
    what the median implies, else as measured. Loading time, time of the first run and memory are medians
    over the launches; memory is that of the whole process, after loading and at its peak. `grant` says
    which execution provider took how many nodes. `sha256` is that of the file, without the files that
    hold weights outside of it. Where `failed` names a cause, the measured numbers are NaN.
    """

    name: str
    path: str
    file_bytes: int
    sha256: str = ""
    median_ms: float = math.nan
    low_ms: float = math.nan
    high_ms: float = math.nan
    p90_ms: float = math.nan
    p99_ms: float = math.nan
    min_ms: float = math.nan
    quantiles_ms: tuple[float, ...] = ()
    runs: int = 0
    per_second: float = math.nan
    load_ms: float = math.nan
    first_ms: float = math.nan
    loaded_mb: float = math.nan
    peak_mb: float = math.nan
    grant: Grant | None = None
    failed: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them: NaN becomes None."""
        data = {k: None if v != v else v for k, v in dataclasses.asdict(self).items()}
        return {**data, "quantiles_ms": list(self.quantiles_ms)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelLatency:
        """What `to_dict` wrote."""
        numbers = {f.name for f in dataclasses.fields(cls) if f.default is math.nan}
        fields: dict[str, Any] = {k: math.nan if v is None and k in numbers else v for k, v in data.items()}
        fields["quantiles_ms"] = tuple(data["quantiles_ms"])
        fields["grant"] = None if data["grant"] is None else Grant(**data["grant"])
        return cls(**fields)


@dataclass(frozen=True)
class Ratio:
    """A model against the first: speedup = baseline time / this model's time, with its 95 % interval."""

    name: str
    baseline: str
    speedup: float
    low: float
    high: float
    verdict: Verdict


@dataclass(frozen=True)
class LatencyReport:
    """The outcome of one measurement, and what it depends on."""

    machine: Machine
    conditions: Conditions
    inputs: str
    """Names, types and shapes of what was fed, and whether it was random."""
    models: tuple[ModelLatency, ...]
    ratios: tuple[Ratio, ...]
    noise_floor: float | None
    """How far two processes of the first model lie from their mean, relatively; None if not measured."""
    launches: int
    seconds: float
    stopped_because: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "machine": self.machine.to_dict(),
            "conditions": self.conditions.to_dict(),
            "models": [model.to_dict() for model in self.models],
            "ratios": [dataclasses.asdict(ratio) for ratio in self.ratios],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyReport:
        """The report that `to_dict` wrote."""
        parts = {
            "machine": Machine.from_dict(data["machine"]),
            "conditions": Conditions.from_dict(data["conditions"]),
            "models": tuple(ModelLatency.from_dict(model) for model in data["models"]),
            "ratios": tuple(Ratio(**ratio) for ratio in data["ratios"]),
        }
        return cls(**{**data, **parts})


def measure(
    models: Mapping[str, Path],
    *,
    feed: Feed | None = None,
    feeds: Mapping[str, Feed] | None = None,
    conditions: Conditions | None = None,
    precision: float = 0.01,
    max_seconds: float = 10.0,
    timeout: float = 120.0,
    seed: int = 0,
    self_check: bool = True,
    progress: Progress | None = None,
) -> LatencyReport:
    """Measure `models` (name -> file) against the first of them.

    `feed` goes to every model that has none of its own in `feeds` (by name); without it each gets seeded
    inputs of plausible values, with one for every dynamic dimension. With `threads` in the conditions the
    processes are pinned to as many cores. `precision` is the relative half width of the ratios' intervals
    that ends the run before `max_seconds`; one launch is always finished. `timeout` is the longest a
    process may take to answer, in seconds. `self_check` measures the first model against itself and lets
    the verdicts respect the outcome.

    A model that cannot be loaded or run is reported as failed and the others are measured; if it is
    the first, there are no ratios. Raises `ProviderError` where the provider is not to be had, and
    `InputError` on arguments without sense.
    """
    _check(models, precision=precision, max_seconds=max_seconds, timeout=timeout)
    conditions = (conditions or Conditions()).pinned()
    check_provider(conditions.provider)
    begin = time.monotonic()
    own = feeds or {}
    contest = _Contest.of({n: Record(Path(p), own.get(n, feed)) for n, p in models.items()}, self_check)
    with tempfile.TemporaryDirectory(prefix="edgewise-") as folder:
        setup = Setup(Path(folder), conditions, timeout, seed)
        launches, reason = _repeat(contest, setup, begin, max_seconds, precision, progress)
    inputs = dict.fromkeys(_inputs_text(record, seed) for record in contest.alive())
    return LatencyReport(
        machine=describe(),
        conditions=conditions,
        inputs="; ".join(inputs),
        models=tuple(_summary(name, record, conditions) for name, record in contest.records.items()),
        ratios=contest.ratios(),
        noise_floor=contest.noise_floor(),
        launches=launches,
        seconds=time.monotonic() - begin,
        stopped_because=reason,
    )


def _inputs_text(record: Record, seed: int) -> str:
    return record.inputs if record.feed is not None else f"{record.inputs} (random, seed {seed})"


def _check(models: Mapping[str, Path], **positive: float) -> None:
    if not models:
        raise InputError("no model to measure")
    for name, value in positive.items():
        if not value > 0:
            raise InputError(f"{name} must be above 0, not {value:g}")


def _repeat(
    contest: _Contest,
    setup: Setup,
    begin: float,
    max_seconds: float,
    precision: float,
    progress: Progress | None,
) -> tuple[int, str]:
    """Launch until the intervals are narrow or another launch would take too long: how often, and why."""

    def spent() -> float:
        return time.monotonic() - begin

    def tick() -> None:
        if progress is not None:
            progress(min(1.0, spent() / max_seconds))

    rng = np.random.default_rng(setup.seed)
    deadline = begin + max_seconds - _FINISH_SECONDS
    preparation, launches = 0.0, 0
    while True:
        seconds = launch(contest.next_up(launches), setup, deadline=deadline, rng=rng, tick=tick)
        launches += 1
        preparation = max(preparation, seconds)
        if all(record.failed for record in contest.records.values()):
            return launches, "every model failed"
        if launches >= _FEWEST_LAUNCHES and contest.widest() <= precision:
            return launches, "precision reached"
        if time.monotonic() + preparation + _WORTH_SECONDS > deadline:
            return launches, "time spent"


@dataclass(frozen=True)
class _Contest:
    """The models of one measurement, and the first one's twin: the same file in a second process."""

    records: Mapping[str, Record]
    twin: Record | None

    @classmethod
    def of(cls, records: Mapping[str, Record], self_check: bool) -> _Contest:
        first = next(iter(records.values()))
        return cls(records, Record(first.path, first.feed) if self_check and len(records) > 1 else None)

    def alive(self) -> list[Record]:
        everyone = (*self.records.values(), self.twin)
        return [r for r in everyone if r is not None and r.failed is None]

    def next_up(self, launches: int) -> list[Record]:
        """Those alive, another one first in every launch: who starts first is at an advantage."""
        alive = self.alive()
        first = launches % len(alive)
        return alive[first:] + alive[:first]

    def ratios(self) -> tuple[Ratio, ...]:
        """One for each model but the first that did not fail; none where the first did."""
        floor = self.noise_floor() or 0.0
        baseline = next(iter(self.records))
        return tuple(
            Ratio(name, baseline, i.value, i.low, i.high, statistics.verdict(i, floor))
            for name, i in self._speedups()
        )

    def _speedups(self) -> Iterator[tuple[str, Interval]]:
        (_, baseline), *others = self.records.items()
        if baseline.failed:
            return
        times = _logs(baseline)
        if twins := self._twins():
            times = [mine - difference / 2 for mine, difference in zip(times, twins, strict=True)]
        for name, record in others:
            if not record.failed:
                gains = [mine - theirs for mine, theirs in zip(times, _logs(record), strict=True)]
                yield name, statistics.speedup(gains, twins)

    def _twins(self) -> list[Array]:
        """For each launch, log(the first model's time / its twin's time) of each round."""
        baseline = next(iter(self.records.values()))
        if self.twin is None or self.twin.failed or baseline.failed:
            return []
        return [mine - other for mine, other in zip(_logs(baseline), _logs(self.twin), strict=True)]

    def noise_floor(self) -> float | None:
        twins = self._twins()
        return statistics.noise_floor(twins) if twins else None

    def widest(self) -> float:
        """The largest relative half width of what is asked for: the ratios, or else the medians."""
        widths = [interval.half_width for _, interval in self._speedups()]
        return max(widths or [_median(r).half_width for r in self.records.values() if not r.failed])


def _logs(record: Record) -> list[Array]:
    """For each launch, the logarithm of the time in each round."""
    return [np.log(blocks).mean(axis=1) for blocks in record.rounds]


def _median(record: Record) -> Interval:
    return statistics.bootstrap_median([blocks.ravel() for blocks in record.rounds])


def _summary(name: str, record: Record, conditions: Conditions) -> ModelLatency:
    size, digest = _file_bytes(record), _sha256(record.path)
    if record.failed is not None:
        return ModelLatency(name, str(record.path), size, digest, grant=record.grant, failed=record.failed)
    runs, median = np.concatenate(record.runs), _median(record)
    per_second = float(np.median(record.throughput)) if record.throughput else 1 / median.value
    return ModelLatency(
        name=name,
        path=str(record.path),
        file_bytes=size,
        sha256=digest,
        median_ms=_ms(median.value),
        low_ms=_ms(median.low),
        high_ms=_ms(median.high),
        p90_ms=_ms(np.quantile(runs, 0.90)),
        p99_ms=_ms(np.quantile(runs, 0.99)),
        min_ms=_ms(runs.min()),
        quantiles_ms=tuple(_ms(q) for q in np.quantile(runs, _PERCENT)),
        runs=len(runs),
        per_second=per_second * conditions.batch,
        load_ms=_ms(np.median(record.load)),
        first_ms=_ms(np.median(record.first)),
        loaded_mb=float(np.median(record.loaded)) / 1e6,
        peak_mb=float(np.median(record.peak)) / 1e6,
        grant=record.grant,
    )


def _ms(seconds: float | np.floating[Any]) -> float:
    return float(seconds) * 1e3


def _sha256(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_bytes(record: Record) -> int:
    """The size on disk, the files that hold the weights outside the model's included."""
    size = record.path.stat().st_size if record.path.is_file() else 0
    if record.failed or record.path.suffix == ".ort":
        return size
    model = onnx.load(record.path, load_external_data=False)
    entries = (entry for tensor in _tensors(model.graph) for entry in tensor.external_data)
    outside = {record.path.parent / str(entry.value) for entry in entries if entry.key == "location"}
    return size + sum(path.stat().st_size for path in outside)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The tensors that may lie in a file of their own: initializers, attributes, those in bodies."""
    yield from graph.initializer
    for attribute in (a for node in graph.node for a in node.attribute):
        if attribute.HasField("t"):
            yield attribute.t
        if attribute.HasField("g"):
            yield from _tensors(attribute.g)
