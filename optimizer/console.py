"""What people see: tables on stdout that fit 80 columns, and progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import singledispatch
from typing import Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from edgewise.optimizer.benchmarking import Benchmark
from edgewise.optimizer.comparison import Difference
from edgewise.optimizer.demo import DemoReport
from edgewise.optimizer.emit_ort import OrtFiles
from edgewise.optimizer.inspection import Inspection, PassList, Tensor
from edgewise.optimizer.jobs import CalibrationReport, Comparison
from edgewise.optimizer.pipeline import Progress, StepReport
from edgewise.optimizer.plan_files import PlanReport
from edgewise.optimizer.profile_view import profile_view
from edgewise.optimizer.profiling import ProfileReport
from edgewise.optimizer.recipe import Recipe
from edgewise.optimizer.report import (
    AMOUNT_COLUMNS,
    Amount,
    Candidate,
    Report,
    amount_rows,
    size_text,
    summary_rows,
)
from edgewise.optimizer.torch_export import ExportReport
from edgewise.passes.prune_channels import ChannelCount
from edgewise.runtime.latency import LatencyReport, ModelLatency, Ratio
from edgewise.training.options import History

_STATUS_STYLES = {"applied": "green", "left out": "dim", "rolled back": "yellow", "no change": "dim"}
_VERDICT_STYLES = {"faster": "green", "slower": "red"}
_REASONS_SHOWN = 4
_CONDITIONS = {"provider": "provider", "threads": "threads", "batch": "batch", "concurrency": "at once"}


class Answer(Protocol):
    """The result of a command: shown to people by `show`, given to machines as `to_dict`."""

    def to_dict(self) -> dict[str, Any]: ...


def show(answer: Answer) -> None:
    """Print a result on stdout."""
    Console(highlight=False).print(view(answer))


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A `Progress` that draws on stderr if that is a terminal, and leaves nothing behind."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bars(
        *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bars:
        task = bars.add_task("", total=None)

        def progress(stage: str, done: int, total: int) -> None:
            bars.update(task, description=stage, completed=done, total=total or None)

        yield progress


@singledispatch
def view(answer: Answer) -> RenderableType:
    """What to print for a result."""
    raise TypeError(f"no view of {type(answer).__name__}")


@view.register
def _(report: Report) -> RenderableType:
    parts: list[RenderableType] = [
        _table(("", "input", "output"), summary_rows(report), folds=(1, 2)),
        *([_facts(("as asked", change) for change in report.changes)] if report.changes else []),
        _steps(report.steps),
        *_amounts(report.amounts),
        *_learned(report.history),
        *([_candidates(report.candidates)] if report.latency is not None else []),
        *_outputs(report.differences),
        *_ort(report.ort),
        *_notes(report.notes),
    ]
    return Group(*parts)


def _ort(ort: OrtFiles | None) -> list[RenderableType]:
    """What was written in onnxruntime's own format."""
    if ort is None:
        return []
    size = f"written: {ort.model}, {size_text(ort.bytes)}, error {ort.error:.0e}"
    return [Text(text, overflow="fold") for text in (size, f"written: {ort.operators}")]


@view.register
def _(report: PlanReport) -> RenderableType:
    head, *rows = report.plan.rows()
    plan, target = report.plan, report.plan.target
    return Group(
        Text(f"{len(plan.quantized)} of {len(plan.nodes)} nodes in int8 for {target}", style="bold"),
        _table(head, rows, right=(3,), folds=(0, 5)),
        Text(f"written: {report.path}", overflow="fold"),
        *_notes(report.notes),
    )


@view.register
def _(demo: DemoReport) -> RenderableType:
    written = (demo.exported, demo.samples, demo.output, demo.report_folder)
    return Group(
        view(demo.report),
        *(Text(finding, style="bold") for finding in demo.findings),
        *(Text(f"written: {path}", overflow="fold") for path in written),
    )


@view.register
def _(benchmark: Benchmark) -> RenderableType:
    reports = benchmark.reports
    parts = [view(reports[0])] if len(reports) == 1 else _sweep(reports)
    return Group(*parts, *_baseline(benchmark))


@view.register
def _(report: ExportReport) -> RenderableType:
    rows = [
        ("file", f"{report.path}, {size_text(report.bytes)}, opset {report.opset}"),
        *(("input", f"{s.name}: {s.dtype} [{', '.join(map(str, s.shape))}]") for s in report.inputs),
        *(("output", name) for name in report.outputs),
        *(("compared", f"{_shapes_text(c.shapes)}: error {c.error:.0e}") for c in report.checks),
        ("time", f"{report.seconds:.1f} s"),
    ]
    return Group(_facts(rows), *_notes(report.notes))


def _shapes_text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())


@view.register
def _(report: LatencyReport) -> RenderableType:
    return Group(
        *_where(report, str(report.conditions)),
        _latencies(report),
        *(_ratio_line(ratio) for ratio in report.ratios),
        *_warnings(report),
        *_end(report),
    )


def _where(report: LatencyReport, conditions: str) -> list[RenderableType]:
    machine = report.machine
    cores = f"{machine.usable_cores} of {machine.logical_cores} cores"
    facts = [", ".join(machine.isa), cores, f"onnxruntime {machine.onnxruntime}", *machine.gpus]
    return [
        Text(f"{machine.cpu}, {conditions}", style="bold"),
        Text("; ".join(filter(None, facts)), style="dim"),
    ]


def _warnings(report: LatencyReport) -> list[RenderableType]:
    """What must not be missed: models that failed, and where nodes ran if not simply on the CPU."""
    granted = [(m.name, m.grant) for m in report.models if m.grant and not m.failed]
    partial = [(name, grant) for name, grant in granted if not grant.complete]
    whole = [(n, g) for n, g in granted if g.complete and report.conditions.provider != "cpu"]
    return [
        *(Text(f"{name} runs in part: {grant}", style="bold yellow") for name, grant in partial),
        *(Text(f"{name}: {grant}", style="dim") for name, grant in whole),
        *(Text(f"{m.name} failed: {m.failed}", style="red") for m in report.models if m.failed),
    ]


def _end(report: LatencyReport) -> list[RenderableType]:
    floor = report.noise_floor
    noise = "" if floor is None else f"; the same file twice: {2 * floor:.1%} apart"
    stop = f"stopped after {report.seconds:.0f} s and {report.launches} launches: {report.stopped_because}"
    return [Text(f"inputs: {report.inputs}", style="dim"), Text(f"{stop}{noise}", style="dim")]


def _sweep(reports: Sequence[LatencyReport]) -> list[RenderableType]:
    """One table for all combinations of conditions, with a column for each that is not the same in all."""
    varied = [c for c in _CONDITIONS if len({getattr(r.conditions, c) for r in reports}) > 1]
    titles = (*(_CONDITIONS[c] for c in varied), "model", "median ms", "samples/s", "speed-up")
    table = _table(titles, (), right=range(len(varied) + 1, len(titles)), folds=(len(varied),))
    for report in reports:
        ratios = {ratio.name: ratio for ratio in report.ratios}
        for i, m in enumerate(m for m in report.models if not m.failed):
            conditions = ("" if i else str(getattr(report.conditions, c) or "all") for c in varied)
            median = f"{_short(m.median_ms)} {_within(m)}"
            table.add_row(
                *conditions, m.name, median, _short(m.per_second), _speedup_text(ratios.get(m.name))
            )
    warnings = {str(w): w for report in reports for w in _warnings(report)}
    inputs = Text(f"inputs: {reports[0].inputs}", style="dim")
    return [*_where(reports[0], "each combination in a run of its own"), table, *warnings.values(), inputs]


def _speedup_text(ratio: Ratio | None) -> Text:
    if ratio is None:
        return Text()
    text = f"{ratio.speedup:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
    return Text(text, _VERDICT_STYLES.get(ratio.verdict, ""))


def _baseline(benchmark: Benchmark) -> Iterator[RenderableType]:
    for comparison in benchmark.comparisons:
        yield Text(f"against the baseline, {comparison.conditions}", style="bold")
        for change in comparison.changes:
            by = "" if change.reference is None else f" (both relative to {change.reference})"
            interval = f"{change.speedup:.3f}x [{change.low:.3f}, {change.high:.3f}]"
            style = _VERDICT_STYLES.get(change.verdict, "")
            yield Text(f"  {change.name}: {interval}, {change.verdict}{by}", style=style)
        for doubt in comparison.doubts:
            yield Text(f"  not the same machine as then: {doubt}", style="yellow")


@view.register
def _(comparison: Comparison) -> RenderableType:
    title = f"{comparison.second} against {comparison.first}, {comparison.inputs}"
    parts = [Text(title, style="bold", overflow="fold"), *_outputs(comparison.differences)]
    if (score := comparison.score) is not None:
        parts.append(
            Text(f"{score.metric} on {score.samples} samples: {score.before:.4f} -> {score.after:.4f}")
        )
    return Group(*parts, *_notes(comparison.notes))


@view.register
def _(report: ProfileReport) -> RenderableType:
    return profile_view(report)


@view.register
def _(report: CalibrationReport) -> RenderableType:
    rows = [
        ("table", report.path),
        ("model", report.model),
        ("samples", f"{report.samples} from {report.source}"),
        ("values", f"{report.values} observed in {report.seconds:.1f} s"),
        ("digest", report.digest),
    ]
    return Group(_facts(rows), *_notes(report.notes))


@view.register
def _(answer: PassList) -> RenderableType:
    parts: list[RenderableType] = []
    for facts in answer.passes:
        options = "".join(f", {name}: {default}" for name, default in facts.options.items())
        parts.append(Text.assemble((facts.name, "bold"), (f"  {facts.contract}{options}", "dim")))
        parts.append(Padding(Text(facts.about), (0, 0, 0, 4)))
    return Group(*parts)


@view.register
def _(facts: Inspection) -> RenderableType:
    opsets = ", ".join(f"{domain or 'onnx'} {version}" for domain, version in facts.opsets.items())
    rows: list[tuple[str, str]] = [
        ("file", facts.path),
        ("size", f"{size_text(facts.bytes)}, {facts.parameters:,} parameters"),
        ("weights compressed", size_text(facts.compressed_bytes)),
        ("format", f"IR {facts.ir_version}, opset {opsets}"),
        ("producer", facts.producer),
        ("sha256", facts.sha256),
        *(("input", _tensor_text(t)) for t in facts.inputs),
        *(("output", _tensor_text(t)) for t in facts.outputs),
        ("MACs", _macs_text(facts)),
        ("operators", _counts_text(facts.operators)),
        *_finding_rows(facts),
        *(("edgewise", _metadata_text(*item)) for item in facts.metadata.items()),
    ]
    return _facts(row for row in rows if row[1])


def _facts(rows: Iterable[tuple[str, str]]) -> RenderableType:
    """A name and what is known under it, a row each; a name that goes on is not repeated."""
    before, shown = "", []
    for name, text in rows:
        shown.append(("" if name == before else name, text))
        before = name
    return _table(("", ""), shown, folds=(1,), header=False)


def _finding_rows(facts: Inspection) -> list[tuple[str, str]]:
    return [
        *(("channels", _channels_text(count)) for count in facts.channels),
        ("int8", _counts_text(facts.int8) or "nothing can be"),
        *(("not int8", f"{reason} ({n})") for reason, n in facts.not_int8.items()),
    ]


def _metadata_text(key: str, value: str) -> str:
    """What edgewise wrote into a model; of a recipe only what is not as in the default one."""
    if key != "recipe":
        return f"{key}: {value}"
    default = Recipe().model_dump(mode="json")
    try:
        changed = {k: v for k, v in json.loads(value).items() if default.get(k) != v}
    except (ValueError, AttributeError):
        return f"{key}: {value}"
    return f"{key}: {json.dumps(changed) if changed else 'the default one'}"


def _channels_text(count: ChannelCount) -> str:
    kinds = ((count.zero, "zero"), (count.constant, "constant"), (count.unread, "unread"))
    found = ", ".join(f"{n} {kind}" for n, kind in kinds if n)
    return f"{count.value}: {found} of {count.channels}, {count.removable} can leave"


def _table(
    columns: Sequence[str],
    rows: Iterable[Sequence[RenderableType]],
    *,
    right: Sequence[int] = (),
    folds: Sequence[int] = (),
    header: bool = True,
) -> Table:
    """A table whose columns in `right` are numbers and whose columns in `folds` may break anywhere."""
    table = Table(
        box=SIMPLE_HEAD if header else None, show_header=header, padding=(0, 1), collapse_padding=True
    )
    for i, column in enumerate(columns):
        table.add_column(
            column,
            justify="right" if i in right else "left",
            overflow="fold",
            no_wrap=i not in folds,
            style="bold" if i == 0 else "",
        )
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def _steps(steps: Iterable[StepReport]) -> RenderableType:
    """A row a step that did something; below, what was refused or rolled back, and what found nothing."""
    columns = ("step", "edits", "nodes", "weights", "error", "time")
    table = _table(columns, (), right=range(1, len(columns)), folds=(0,))
    remarks: list[RenderableType] = []
    idle: dict[str, None] = {}
    for step in steps:
        remarks += _remarks(step)
        if step.status == "no change":
            idle[step.step] = None
            continue
        table.add_row(
            step.step,
            Text(str(step.edits) if step.status == "applied" else step.status, _STATUS_STYLES[step.status]),
            str(step.nodes or ""),
            size_text(step.bytes) if step.bytes else "",
            "" if step.error is None else f"{step.error:.0e}",
            f"{step.seconds:.2f} s",
        )
    if idle:
        remarks.append(Padding(Text(f"nothing to do for {_others(len(idle))}", style="dim"), (0, 0, 0, 2)))
    return Group(*([table] if table.rows else []), *remarks)


def _others(count: int) -> str:
    return f"{count} other pass{'' if count == 1 else 'es'}"


def _remarks(step: StepReport) -> Iterator[RenderableType]:
    if step.remark:
        style = _STATUS_STYLES[step.status]
        yield Padding(Text(f"{step.step}: {step.remark}", style=style), (0, 0, 0, 2))
    refused = sorted(step.refused.items(), key=lambda item: -item[1])
    for reason, count in refused[:_REASONS_SHOWN]:
        yield Padding(Text(f"{step.step} refused {count}x: {reason}", style="dim"), (0, 0, 0, 2))


def _amounts(amounts: Sequence[Amount]) -> list[RenderableType]:
    """A row an amount of pruning that was tried."""
    if not amounts:
        return []
    return [_table(AMOUNT_COLUMNS, amount_rows(amounts), right=range(len(AMOUNT_COLUMNS) - 1))]


def _learned(history: History | None) -> list[RenderableType]:
    """How a training went, in a line."""
    if history is None or not history.epochs:
        return []
    start, best, last = history.start, history.best, history.epochs[-1]
    losses = f"held-back loss {start.held_back:.3g} -> {best.held_back:.3g}"
    scores = f"score {start.score:.4f} -> {best.score:.4f}"
    epochs = f"best epoch {best.number} of {last.number}, {history.seconds:.0f} s; {history.ended}"
    return [Text(f"learned: {losses}, {scores}; {epochs}")]


def _candidates(candidates: Iterable[Candidate]) -> RenderableType:
    rows = [
        (
            f"{'-> ' if c.chosen else '   '}{c.name}",
            size_text(c.bytes),
            "" if c.speedup is None else f"{c.speedup:.2f}x",
            "" if c.low is None or c.high is None else f"{c.low:.2f} .. {c.high:.2f}",
            c.why,
        )
        for c in candidates
    ]
    return _table(("   candidate", "size", "speed-up", "95 %", ""), rows, right=(1, 2, 3), folds=(4,))


def _latencies(report: LatencyReport) -> RenderableType:
    columns = ["model", "median ms", "95 %", "p90", "p99", "first", "load", "peak MB", "file"]
    rows = [
        [
            m.name,
            _short(m.median_ms),
            _within(m),
            _short(m.p90_ms),
            _short(m.p99_ms),
            f"{m.first_ms:.1f}",
            f"{m.load_ms:.0f}",
            f"{m.peak_mb:.0f}",
            size_text(m.file_bytes),
        ]
        for m in report.models
        if not m.failed
    ]
    if report.conditions.batch > 1 or report.conditions.concurrency > 1:
        columns.append("samples/s")
        for row, m in zip(rows, (m for m in report.models if not m.failed), strict=True):
            row.append(_short(m.per_second))
    return _table(columns, rows, right=range(1, len(columns)), folds=(0,))


def _within(model: ModelLatency) -> str:
    """How far the median's interval reaches, the longer side of it."""
    reach = max(model.high_ms / model.median_ms, model.median_ms / model.low_ms) - 1
    return f"\N{PLUS-MINUS SIGN}{reach:.1%}"


def _short(number: float) -> str:
    """Four digits, as many as are ever known of a latency."""
    return f"{number:.4g}" if number < 1000 else f"{number:.0f}"


def _ratio_line(ratio: Ratio) -> Text:
    interval = f"[{ratio.low:.3f}, {ratio.high:.3f}]"
    text = f"{ratio.name} against {ratio.baseline}: {ratio.speedup:.3f}x {interval}, {ratio.verdict}"
    return Text(text, style=_VERDICT_STYLES.get(ratio.verdict, ""))


def _outputs(differences: Iterable[Difference]) -> list[RenderableType]:
    rows = [
        (
            d.output,
            f"{d.relative:.1e}",
            f"{d.absolute:.1e}",
            f"{d.snr_db:.1f} dB",
            f"{d.cosine:.5f}",
            "" if d.agreement is None else f"{d.agreement:.2%}",
        )
        for d in differences
    ]
    columns = ("output", "relative", "absolute", "signal/noise", "cosine", "same arg max")
    return [_table(columns, rows, right=range(1, len(columns)), folds=(0,))] if rows else []


def _notes(notes: Iterable[str]) -> list[RenderableType]:
    return [Text(f"note: {note}", style="cyan") for note in notes]


def _tensor_text(tensor: Tensor) -> str:
    return f"{tensor.name}: {tensor.dtype} [{', '.join(map(str, tensor.shape))}]"


def _macs_text(facts: Inspection) -> str:
    macs = facts.macs
    assumed = f", with {', '.join(macs.counted_as_one)} counted as 1" if macs.counted_as_one else ""
    unknown = f", without {macs.unknown} nodes of unknown shape" if macs.unknown else ""
    return f"{macs.total:,}{assumed}{unknown}"


def _counts_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items())
