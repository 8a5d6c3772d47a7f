"""The sections of the page that tell how fast models are, where they ran and on what."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from edgewise.optimizer.benchmarking import AgainstBaseline, Benchmark
from edgewise.optimizer.page import charts
from edgewise.optimizer.page.blocks import (
    Block,
    Cell,
    Drawing,
    Fold,
    Headline,
    Row,
    Section,
    Table,
    cells,
    facts,
    lines,
    section,
    table,
)
from edgewise.optimizer.page.text import count_text, digits, interval, milliseconds, percent, times
from edgewise.optimizer.report import size_text
from edgewise.runtime.conditions import Conditions
from edgewise.runtime.latency import LatencyReport, ModelLatency, Ratio
from edgewise.runtime.machine import Machine
from edgewise.runtime.session import Grant

TONES: Mapping[str, str] = {"faster": "good", "slower": "bad", "no difference": ""}
_PLAIN = 1.2  # below a fifth faster, per cent say more than a factor
_VARIED = ("batch", "threads", "concurrency", "provider")
_AXES = {"batch": "batch size", "threads": "threads", "concurrency": "runs at once", "provider": "provider"}


def speed_words(speedup: float, verdict: str) -> str:
    """A speed-up as one says it: "2.40× faster", "3 % slower", "as fast"."""
    if verdict == "no difference":
        return "as fast"
    word, factor = ("faster", speedup) if speedup >= 1 else ("slower", 1 / speedup)
    if factor >= _PLAIN:
        return f"{times(factor)} {word}"
    share = 100 * (factor - 1) if speedup >= 1 else 100 * (1 / speedup - 1)
    return f"{digits(share, 2)} % {word}"


def against_text(ratio: Ratio) -> str:
    """A ratio as a sentence."""
    link = "as" if ratio.verdict == "no difference" else "than"
    return f"{ratio.name} is {speed_words(ratio.speedup, ratio.verdict)} {link} {ratio.baseline}"


def measured(report: LatencyReport) -> tuple[ModelLatency, ...]:
    """The models that did not fail."""
    return tuple(m for m in report.models if not m.failed)


def leading(report: LatencyReport) -> Ratio | None:
    """The ratio to speak of: that of the model which is sure to be the fastest."""
    return max(report.ratios, key=lambda r: r.low, default=None)


def ratio_headline(report: LatencyReport, ratio: Ratio, where: str = "") -> Headline:
    """How many times as fast, and from what to what."""
    medians = {m.name: milliseconds(m.median_ms) for m in report.models}
    interval = f"95 % interval {digits(ratio.low)} to {digits(ratio.high)}"
    return Headline(
        f"Speed of {ratio.name}",
        speed_words(ratio.speedup, ratio.verdict),
        f"{medians[ratio.baseline]} → {medians[ratio.name]}{where}; {interval}",
        TONES[ratio.verdict],
    )


def failure_lines(report: LatencyReport) -> tuple[str, ...]:
    """A line for every model that could not be measured."""
    return tuple(f"{m.name} failed: {m.failed}" for m in report.models if m.failed)


def latency_blocks(report: LatencyReport, tints: Mapping[str, str]) -> tuple[Block | None, ...]:
    """Distributions, ratios and the numbers of one measurement."""
    models = [m for m in measured(report) if m.quantiles_ms]
    drawn = charts.distributions(models, _distribution_title(report), tints) if models else None
    ratio = leading(report)
    ratios = None if ratio is None else charts.ratios(report, _ratio_title(report, ratio), tints)
    return (
        None if drawn is None else Drawing(drawn),
        None if ratios is None else Drawing(ratios),
        *_numbers(report, tints),
    )


def _distribution_title(report: LatencyReport) -> str:
    models, ratio = measured(report), leading(report)
    if ratio is None or len(models) < 2:
        return f"Half of all runs of {models[0].name} take {milliseconds(models[0].median_ms)} or less"
    medians = {m.name: milliseconds(m.median_ms) for m in models}
    return f"{ratio.name} takes {medians[ratio.name]} where {ratio.baseline} takes {medians[ratio.baseline]}"


def _ratio_title(report: LatencyReport, ratio: Ratio) -> str:
    if len(report.ratios) > 1 and all(r.verdict != "faster" for r in report.ratios):
        return f"Nothing is faster than {ratio.baseline}"
    sentence = against_text(ratio)
    return sentence[0].upper() + sentence[1:] if ratio.name[:1].isupper() else sentence


def conditions_text(report: LatencyReport) -> str:
    """How it was measured and why it ended."""
    spinning = "" if report.conditions.spinning else ", threads sleep between runs"
    noise = "" if report.noise_floor is None else f" The noise floor was {percent(report.noise_floor, 1)}."
    return (
        f"Measured on {report.conditions}{spinning}, with {report.inputs}. "
        f"{report.launches} launch{'es' * (report.launches != 1)} of fresh processes in "
        f"{digits(report.seconds, 2)} s; stopped because: {report.stopped_because}.{noise}"
    )


_LATENCY_COLUMNS = ("model", "median ms", "95 % interval", "p90", "p99", "min", "per second", "runs")
_COST_COLUMNS = ("model", "load ms", "first run ms", "MB loaded", "MB at the peak", "file")


def latency_table(report: LatencyReport, tints: Mapping[str, str]) -> Table:
    """A row a model; what failed says why."""
    return table(_LATENCY_COLUMNS, [_latency_row(m, tints) for m in report.models])


def _latency_row(m: ModelLatency, tints: Mapping[str, str]) -> Row:
    name = Cell(m.name, "strong", swatch=tints.get(m.name, ""))
    if m.failed:
        return Row((name, Cell("failed", "bad"), *[Cell("")] * (len(_LATENCY_COLUMNS) - 2)), (m.failed,))
    numbers = (
        digits(m.median_ms),
        interval(m.low_ms, m.high_ms),
        *map(digits, (m.p90_ms, m.p99_ms, m.min_ms, m.per_second)),
        f"{m.runs:,}",
    )
    return Row((name, Cell(numbers[0], "strong"), *map(Cell, numbers[1:])))


def cost_table(report: LatencyReport, tints: Mapping[str, str]) -> Table:
    """What loading takes, and memory: a row a model."""
    rows = [
        cells(
            Cell(m.name, "strong", swatch=tints.get(m.name, "")),
            *map(digits, (m.load_ms, m.first_ms, m.loaded_mb, m.peak_mb)),
            size_text(m.file_bytes),
        )
        for m in measured(report)
    ]
    return table(_COST_COLUMNS, rows)


# Sweeps


def sweep_section(benchmark: Benchmark, tints: Mapping[str, str]) -> tuple[Section, ...]:
    """All conditions in one figure and one table, the numbers of each folded below."""
    reports = benchmark.reports
    if len(reports) < 2:
        return ()
    details = tuple(
        Fold(
            f"All numbers on {report.conditions}", tuple(b for b in _numbers(report, tints) if b is not None)
        )
        for report in reports
        if measured(report)
    )
    return section(
        "conditions",
        "Under all conditions",
        _sweep_drawing(reports, tints),
        _sweep_table(reports, tints),
        *details,
    )


def _numbers(report: LatencyReport, tints: Mapping[str, str]) -> tuple[Block | None, ...]:
    """Two tables, of time and of what else it takes, and how they were measured."""
    costs = cost_table(report, tints) if measured(report) else None
    return (latency_table(report, tints), costs, lines([conditions_text(report)]))


def _sweep_drawing(reports: Sequence[LatencyReport], tints: Mapping[str, str]) -> Drawing | None:
    values = {name: list(dict.fromkeys(_value(r.conditions, name) for r in reports)) for name in _VARIED}
    axis = max(_VARIED, key=lambda name: len(values[name]))
    names = [m.name for m in reports[0].models]
    groups: dict[tuple[str, ...], list[LatencyReport]] = {}
    others = [name for name in _VARIED if name != axis and len(values[name]) > 1]
    for report in reports:
        groups.setdefault(tuple(_phrase(report.conditions, n) for n in others), []).append(report)
    series = [
        charts.Series(", ".join((name, *group)), tints[name], i % 4, _along(found, axis, values[axis], name))
        for i, (group, found) in enumerate(groups.items())
        for name in names
    ]
    series = [s for s in series if any(m is not None for m in s.models)]
    if not series or len(values[axis]) < 2:
        return None
    return Drawing(charts.sweep(_AXES[axis], values[axis], series, _sweep_title(reports)))


def _value(conditions: Conditions, name: str) -> str:
    value = getattr(conditions, name)
    return "all cores" if value is None else str(value)


def _phrase(conditions: Conditions, name: str) -> str:
    value = _value(conditions, name)
    if name == "provider" or value == "all cores":
        return value
    noun = {"batch": f"batch {value}", "threads": count_text(int(value), "thread")}
    return noun.get(name, f"{value} at once")


def _along(
    reports: Sequence[LatencyReport], axis: str, values: Sequence[str], name: str
) -> tuple[ModelLatency | None, ...]:
    """The model's measurements in the order of the axis; None where there is none."""
    found = {_value(r.conditions, axis): m for r in reports for m in measured(r) if m.name == name}
    return tuple(found.get(value) for value in values)


def _sweep_title(reports: Sequence[LatencyReport]) -> str:
    best = max(
        ((m.per_second, m.name, r.conditions) for r in reports for m in measured(r)), key=lambda b: b[0]
    )
    return f"Most throughput: {best[1]} on {best[2]}, {digits(best[0])} samples per second"


def _sweep_table(reports: Sequence[LatencyReport], tints: Mapping[str, str]) -> Table:
    columns = ("conditions", "model", "median ms", "per second", "speed-up", "95 % interval")
    varied = [n for n in _VARIED if len({_value(r.conditions, n) for r in reports}) > 1]
    rows = [row for report in reports for row in _sweep_rows(report, varied, tints)]
    return table(columns, rows, left=(0, 1))


def _sweep_rows(report: LatencyReport, varied: Sequence[str], tints: Mapping[str, str]) -> Iterator[Row]:
    ratios = {r.name: r for r in report.ratios}
    conditions = ", ".join(_phrase(report.conditions, name) for name in varied)
    for i, m in enumerate(report.models):
        where = Cell(conditions if i == 0 else "", "quiet")
        name = Cell(m.name, "strong", swatch=tints.get(m.name, ""))
        if m.failed:
            yield Row((where, name, Cell("failed", "bad"), *[Cell("")] * 3), (m.failed,))
            continue
        ratio = ratios.get(m.name)
        yield Row(
            (
                where,
                name,
                Cell(digits(m.median_ms), "strong"),
                Cell(digits(m.per_second)),
                Cell("" if ratio is None else times(ratio.speedup), "strong"),
                Cell("") if ratio is None else Cell(interval(ratio.low, ratio.high), TONES[ratio.verdict]),
            )
        )


# Against an earlier result


def baseline_section(benchmark: Benchmark) -> tuple[Section, ...]:
    """What changed since an earlier measurement."""
    rows = [row for comparison in benchmark.comparisons for row in _change_rows(comparison)]
    doubts = dict.fromkeys(doubt for c in benchmark.comparisons for doubt in c.doubts)
    columns = ("conditions", "model", "speed-up", "95 % interval", "verdict", "compared by")
    return section(
        "baseline",
        "Against the baseline",
        table(columns, rows, left=(0, 1, 4, 5)) if rows else None,
        lines([f"The machines differ: {doubt}" for doubt in doubts], "warn"),
    )


def _change_rows(comparison: AgainstBaseline) -> Iterator[Row]:
    for change in comparison.changes:
        yield Row(
            (
                Cell(str(comparison.conditions), "quiet"),
                Cell(change.name, "strong"),
                Cell(times(change.speedup), "strong"),
                Cell(interval(change.low, change.high)),
                Cell(
                    speed_words(change.speedup, change.verdict)
                    if change.verdict != "no difference"
                    else change.verdict,
                    TONES[change.verdict],
                ),
                Cell("its time" if change.reference is None else f"its ratio to {change.reference}", "quiet"),
            )
        )


# Where it ran


def where_section(*blocks: Block | None) -> tuple[Section, ...]:
    """Which provider took what."""
    return section("providers", "Where it ran", *blocks)


def grant_table(reports: Sequence[LatencyReport]) -> Table | None:
    """How many nodes each execution provider took of each model; one row for what is the same everywhere."""
    found = {
        (m.name, m.grant.provider, str(m.grant)): m.grant
        for report in reports
        for m in report.models
        if m.grant is not None and (m.grant.assigned or not m.grant.complete)
    }
    rows = [
        Row(
            (
                Cell(name, "strong"),
                Cell(asked),
                Cell(_granted(grant), "good" if grant.complete else "warn"),
                Cell(", ".join(f"{provider} {n}" for provider, n in grant.assigned.items())),
                Cell(", ".join(f"{op} {n}" for op, n in grant.elsewhere.items())),
            )
        )
        for (name, asked, _), grant in found.items()
    ]
    if not rows:
        return None
    columns: tuple[str, ...] = ("model", "asked", "granted", "nodes per provider", "not taken")
    if all(grant.complete for grant in found.values()):
        rows = [dataclasses.replace(row, cells=row.cells[:-1]) for row in rows]
        columns = columns[:-1]
    return table(columns, rows, left=range(len(columns)))


def _granted(grant: Grant) -> str:
    if grant.complete:
        return "all nodes"
    return "in part" if grant.assigned else "not known"


def machine_section(machine: Machine, inputs: str = "") -> tuple[Section, ...]:
    """What was measured on."""
    limit = None if machine.cpu_limit is None else f", limited to {digits(machine.cpu_limit)} cores of time"
    return section(
        "machine",
        "The machine",
        facts(
            [
                ("processor", machine.cpu),
                (
                    "cores",
                    f"{machine.physical_cores} physical, {machine.logical_cores} logical, "
                    f"{machine.usable_cores} usable{limit or ''}",
                ),
                ("instruction sets", f"{machine.architecture}: {', '.join(machine.isa)}".rstrip(": ")),
                ("8-bit products", "saturate in 16 bits (no VNNI)" if machine.int8_saturates else ""),
                ("frequency governor", machine.governor),
                ("memory", f"{digits(machine.memory_gb)} GB"),
                *(("accelerator", gpu) for gpu in machine.gpus),
                ("system", f"{machine.os}, Python {machine.python}"),
                ("onnxruntime", f"{machine.onnxruntime} ({', '.join(machine.distributions) or 'own build'})"),
                ("providers", ", ".join(machine.providers)),
                ("inputs", inputs),
            ]
        ),
    )
