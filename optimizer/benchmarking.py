"""Latency under every combination of conditions asked for, and against an earlier result."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgewise.calibration.data import Preprocess, Samples
from edgewise.optimizer import files
from edgewise.optimizer.inputs import as_samples, feed_of
from edgewise.optimizer.pipeline import Progress, no_progress
from edgewise.runtime.baseline import Change, changes
from edgewise.runtime.conditions import Conditions
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Feed, input_specs
from edgewise.runtime.latency import LatencyReport, measure
from edgewise.runtime.session import check_provider

ModelPath = str | os.PathLike[str]


@dataclass(frozen=True)
class AgainstBaseline:
    """One report held against an earlier one under the same conditions.

    `doubts` are the differences between the machines, then and now, that make the comparison weaker.
    """

    conditions: Conditions
    changes: tuple[Change, ...]
    doubts: tuple[str, ...]


@dataclass(frozen=True)
class Benchmark:
    """The latency of the same models under different conditions, a report for each."""

    reports: tuple[LatencyReport, ...]
    comparisons: tuple[AgainstBaseline, ...] = ()

    @property
    def failures(self) -> tuple[str, ...]:
        """A line for every model that could not be measured."""
        return tuple(
            f"{model.path} failed on {report.conditions}: {model.failed}"
            for report in self.reports
            for model in report.models
            if model.failed
        )

    def slower(self, limit: float) -> tuple[str, ...]:
        """A line for every model that is slower by more than `limit`, a share: than in the earlier result it
        was compared with, or without one than the first model."""
        if self.comparisons:
            return tuple(
                f"{change.name} is {change.slowdown:.1%} slower than in the baseline ({held.conditions})"
                for held in self.comparisons
                for change in held.changes
                if change.verdict == "slower" and change.slowdown > limit
            )
        return tuple(
            f"{ratio.name} is {1 / ratio.speedup - 1:.1%} slower than {ratio.baseline} ({report.conditions})"
            for report in self.reports
            for ratio in report.ratios
            if ratio.verdict == "slower" and 1 / ratio.speedup - 1 > limit
        )

    def against(self, earlier: Benchmark) -> Benchmark:
        """This result with its comparison to an earlier one; `InputError` if they have nothing in common."""
        pairs = [(old, new) for new in self.reports for old in earlier.reports if _alike(old, new)]
        found = tuple(
            AgainstBaseline(new.conditions, changes(old, new), old.machine.differences(new.machine))
            for old, new in pairs
        )
        if not any(comparison.changes for comparison in found):
            raise InputError(
                "the baseline has none of these models under these conditions: measure it with the same "
                f"options and file names ({_contents(earlier)})"
            )
        return dataclasses.replace(self, comparisons=found)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "reports": [report.to_dict() for report in self.reports],
            "comparisons": [dataclasses.asdict(comparison) for comparison in self.comparisons],
        }

    @classmethod
    def load(cls, path: ModelPath) -> Benchmark:
        """The reports that `--json` wrote; `InputError` on any other file."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(tuple(LatencyReport.from_dict(report) for report in data["reports"]))
        except OSError as error:
            raise InputError(f"baseline {path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"baseline {path} is no result of this version's `edgewise bench --json`: {error!r}"
            ) from error


def _alike(old: LatencyReport, new: LatencyReport) -> bool:
    """Cores may differ: they are chosen by the machine."""
    return dataclasses.replace(old.conditions, cores=new.conditions.cores, strict=new.conditions.strict) == (
        new.conditions
    )


def _contents(benchmark: Benchmark) -> str:
    return "; ".join(f"{', '.join(m.name for m in r.models)} on {r.conditions}" for r in benchmark.reports)


def benchmark(
    models: Sequence[ModelPath],
    *,
    conditions: Conditions | None = None,
    data: str | Samples | None = None,
    preprocess: Preprocess | None = None,
    precision: float = 0.01,
    max_seconds: float = 10.0,
    timeout: float = 120.0,
    seed: int = 0,
    progress: Progress = no_progress,
) -> LatencyReport:
    """Measure the latency of .onnx files on the same samples, against the first of them.

    Without `data` the inputs are seeded. Times are in milliseconds; `precision` is the relative half
    width of the intervals that ends the measurement before `max_seconds`, `timeout` the longest a model
    may take to answer. A model that does not run is reported as failed, with the cause, and the others
    are measured. Raises `InputError` if no file can be read or the inputs cannot be had, `ProviderError`
    where the provider is not there.
    """
    result = sweep(
        models,
        [conditions or Conditions()],
        data=data,
        preprocess=preprocess,
        precision=precision,
        max_seconds=max_seconds,
        timeout=timeout,
        seed=seed,
        progress=progress,
    )
    return result.reports[0]


def sweep(
    models: Sequence[ModelPath],
    grid: Sequence[Conditions],
    *,
    data: str | Samples | None = None,
    preprocess: Preprocess | None = None,
    precision: float = 0.01,
    max_seconds: float = 10.0,
    timeout: float = 120.0,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Benchmark:
    """`benchmark` under each of the conditions, of which all have to be possible before it starts."""
    named = names_of([Path(model) for model in models])
    for conditions in grid:
        check_provider(conditions.provider)
    loaded = _readable(named)
    samples = as_samples(data, next(iter(loaded.values())), preprocess, seed)
    feeds = {size: _feeds(loaded, samples, size, seed) for size in {c.batch for c in grid}}
    origin = f"random, seed {seed}" if samples is None else samples.source
    reports = []
    for i, conditions in enumerate(grid):
        stage = "benchmark" if len(grid) == 1 else f"benchmark {i + 1}/{len(grid)}: {conditions}"
        report = measure(
            named,
            feeds=feeds[conditions.batch],
            conditions=conditions,
            precision=precision,
            max_seconds=max_seconds,
            timeout=timeout,
            seed=seed,
            progress=partial(_tick, progress, stage),
        )
        reports.append(dataclasses.replace(report, inputs=f"{report.inputs} ({origin})"))
    return Benchmark(tuple(reports))


def _tick(progress: Progress, stage: str, share: float) -> None:
    progress(stage, round(100 * share), 100)


def grid_of(
    providers: Sequence[str],
    threads: Sequence[int | None],
    batches: Sequence[int],
    concurrencies: Sequence[int],
    **common: Any,
) -> tuple[Conditions, ...]:
    """Every combination, the last of them changing fastest; `common` holds what does not change."""
    combinations = itertools.product(providers, threads, batches, concurrencies)
    return tuple(
        Conditions(provider=p, threads=t, batch=b, concurrency=c, **common) for p, t, b, c in combinations
    )


def names_of(paths: Sequence[Path]) -> Mapping[str, Path]:
    """A short name for each file: its stem, with its folder where stems collide, numbered where those do."""
    stems = [path.stem for path in paths]
    texts = [p.stem if stems.count(p.stem) == 1 else f"{p.absolute().parent.name}/{p.stem}" for p in paths]
    return {
        t if texts.count(t) == 1 else f"{t} #{texts[: i + 1].count(t)}": p
        for i, (t, p) in enumerate(zip(texts, paths, strict=True))
    }


def _readable(named: Mapping[str, Path]) -> dict[str, ir.Model]:
    """The models by name, without those of which the report will say what is wrong with them.

    Raises `InputError` where a file does not exist, or where no model can be read.
    """
    models, problems = {}, []
    for name, path in named.items():
        try:
            models[name] = files.load(path)
        except InputError as problem:
            if not path.is_file():
                raise
            problems.append(problem)
    if not models:
        raise problems[0]
    return models


def _feeds(models: Mapping[str, ir.Model], samples: Samples | None, batch: int, seed: int) -> dict[str, Feed]:
    """What every model gets: the same, but for seeded inputs where a model takes others than the first."""
    first = next(iter(models.values()))
    common, wanted = feed_of(first, samples, batch, seed), input_specs(first)
    return {
        name: common
        if samples is not None or input_specs(model) == wanted
        else feed_of(model, None, batch, seed)
        for name, model in models.items()
    }
