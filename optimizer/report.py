"""One value that holds everything a run found out, as JSON, Markdown and terminal rows."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgewise.optimizer.comparison import Difference
from edgewise.optimizer.emit_ort import OrtFiles
from edgewise.optimizer.files import make_folder, tensors, write_folder, write_text
from edgewise.optimizer.layers import LayerNoise
from edgewise.optimizer.pictures import Pictures
from edgewise.optimizer.pipeline import StepReport
from edgewise.optimizer.profiling import ProfileReport
from edgewise.optimizer.sensitivity import NodeSensitivity
from edgewise.passes.graph import opset
from edgewise.runtime.latency import LatencyReport
from edgewise.training.options import History


@dataclass(frozen=True)
class ModelFacts:
    """What a model weighs. `bytes` is the file with its external data, `parameters` counts numbers."""

    path: str
    sha256: str
    bytes: int
    nodes: int
    parameters: int
    opset: int


def facts_of(model: ir.Model, path: Path, sha256: str, size: int) -> ModelFacts:
    """Count what is in `model`, which was read from or written to `path`."""
    return ModelFacts(
        path=str(path),
        sha256=sha256,
        bytes=size,
        nodes=sum(1 for _ in model.graph.all_nodes()),
        parameters=sum(tensor.size for _, tensor in tensors(model)),
        opset=opset(model),
    )


@dataclass(frozen=True)
class Score:
    """The user's metric on `samples` held against the bound: after >= before - allowed."""

    metric: str
    before: float
    after: float
    allowed: float
    samples: int


@dataclass(frozen=True)
class Candidate:
    """A model that could have been written: what it weighs, how fast it is, and what became of it.

    `speedup` is the input's latency over this one's, with a 95 % interval; None if not measured.
    """

    name: str
    bytes: int
    speedup: float | None
    low: float | None
    high: float | None
    chosen: bool
    why: str


@dataclass(frozen=True)
class Amount:
    """An amount of pruning that was tried: what is left, and how well it does.

    `budget` and `macs` are shares of the input's. `score` is that of the recovered model, `int8_score` that
    of the int8 form that is quickly found, where int8 is wanted; where such a form of the whole model breaks
    the bound, without what it costs there. `speedup` is over the input in float, of the form that is wanted;
    None where it was not measured.
    """

    budget: float
    macs: float
    parameters: int
    bytes: int
    score: float
    int8_score: float | None
    keeps_bound: bool
    speedup: float | None = None

    @property
    def worst(self) -> float:
        """The lower one of the scores."""
        return self.score if self.int8_score is None else min(self.score, self.int8_score)


def best_amount(amounts: Sequence[Amount], objective: str) -> Amount:
    """Of amounts that keep the bound the one that the objective asks for; of others that of best score."""
    able = [a for a in amounts if a.keeps_bound]
    if not able:
        return max(amounts, key=lambda a: a.worst)
    if objective == "size":
        return min(able, key=lambda a: (a.bytes, a.budget))
    if any(a.speedup is None for a in able):
        return min(able, key=lambda a: a.budget)
    return min(able, key=lambda a: (a.bytes if objective == "balanced" else 1) / (a.speedup or 1))


@dataclass(frozen=True)
class Report:
    """A whole run: what came in, every step, what was measured, what was written and why.

    `changes` are what was asked for and done to the input before all else; `ort` is what was written beside.
    """

    version: str
    input: ModelFacts
    output: ModelFacts
    recipe: Mapping[str, Any]
    steps: tuple[StepReport, ...]
    differences: tuple[Difference, ...]
    score: Score | None
    candidates: tuple[Candidate, ...]
    latency: LatencyReport | None
    table: str | None = None
    notes: tuple[str, ...] = field(default=())
    layers: tuple[LayerNoise, ...] = ()
    profiles: ProfileReport | None = None
    changes: tuple[str, ...] = ()
    ort: OrtFiles | None = None
    sensitivity: tuple[NodeSensitivity, ...] = ()
    floats: Mapping[str, str] = field(default_factory=dict)
    """Nodes of an int8 model that stay in float, by first output, and why."""
    amounts: tuple[Amount, ...] = ()
    """What was tried of pruning."""
    history: History | None = None
    """How what was left after pruning learned."""
    images: Pictures | None = None
    """What the model draws before and after, where it draws."""

    @property
    def chosen(self) -> str:
        """Name of the candidate that was written."""
        return next(c.name for c in self.candidates if c.chosen)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; infinities become None."""
        own = {"latency": self.latency, "profiles": self.profiles, "ort": self.ort, "images": self.images}
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in own}
        data |= {name: None if value is None else value.to_dict() for name, value in own.items()}
        values: dict[str, Any] = plain(data)
        return values

    def to_markdown(self) -> str:
        """The report as a page of tables."""
        parts = [
            "# edgewise report\n",
            table(("", "input", "output"), summary_rows(self)),
            *("\n## Changed as asked\n\n" if self.changes else ""),
            *(f"- {change}\n" for change in self.changes),
            "\n## Steps\n",
            table(STEP_COLUMNS, step_rows(self.steps)),
            "\n## Candidates\n",
            table(CANDIDATE_COLUMNS, candidate_rows(self.candidates)),
        ]
        if self.latency is not None:
            parts += ["\n## Latency\n", table(LATENCY_COLUMNS, latency_rows(self.latency))]
        if self.amounts:
            parts += ["\n## Amounts of pruning\n", table(AMOUNT_COLUMNS, amount_rows(self.amounts))]
        if self.differences:
            parts += ["\n## Outputs against the input model\n", *(f"- {d}\n" for d in self.differences)]
        if self.sensitivity:
            parts += ["\n## What int8 costs, node by node\n"]
            parts += [table(SENSITIVITY_COLUMNS, sensitivity_rows(self.sensitivity))]
        if self.floats:
            parts += ["\n## Left in float\n", table(("node", "why"), list(self.floats.items()))]
        if self.notes:
            parts += ["\n## Notes\n", *(f"- {note}\n" for note in self.notes)]
        parts += ["\n## Recipe\n\n```json\n", json.dumps(plain(self.recipe), indent=2), "\n```\n"]
        return "".join(parts)


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write `report.json`, `report.md` and what pictures there are into `folder`, over an earlier run's."""
    make_folder(folder)
    for name, content in ({} if report.images is None else report.images.files).items():
        with write_folder(folder / name, force=True) as scratch:
            (scratch / name).write_bytes(content)
    text = json.dumps(report.to_dict(), indent=2)
    return (
        write_text(folder / "report.json", text + "\n", force=True),
        write_text(folder / "report.md", report.to_markdown(), force=True),
    )


def plain(value: Any) -> Any:
    """Dataclasses, mappings and tuples as dicts and lists; what JSON cannot say as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


Row = tuple[str, ...]

STEP_COLUMNS = (
    "step",
    "status",
    "edits",
    "error",
    "nodes",
    "weights",
    "time",
    "refused or rolled back because",
)
CANDIDATE_COLUMNS = ("candidate", "size", "speed-up", "95 % interval", "written", "why")
AMOUNT_COLUMNS = (
    "MACs left",
    "parameters",
    "weights",
    "speed-up",
    "score",
    "in int8",
    "bound kept",
)
SENSITIVITY_COLUMNS = ("node", "operator", "noise of the signal", "runs as")
LATENCY_COLUMNS = ("model", "median ms", "95 % interval", "p90", "p99", "min", "load ms", "peak MB", "runs")


def table(columns: Sequence[str], rows: Iterable[Row]) -> str:
    """A Markdown table."""
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def amount_rows(amounts: Iterable[Amount]) -> list[Row]:
    """A row an amount of pruning that was tried."""
    return [
        (
            f"{a.macs:.1%}",
            f"{a.parameters:,}",
            size_text(a.bytes),
            "" if a.speedup is None else f"{a.speedup:.2f}x",
            f"{a.score:.4f}",
            "" if a.int8_score is None else f"{a.int8_score:.4f}",
            "yes" if a.keeps_bound else "no",
        )
        for a in amounts
    ]


def summary_rows(report: Report) -> list[Row]:
    """What changed from input to output, a row a quantity."""
    before, after = report.input, report.output
    rows: list[Row] = [
        ("file", before.path, after.path),
        ("size", size_text(before.bytes), f"{size_text(after.bytes)} ({after.bytes / before.bytes:.0%})"),
        ("parameters", f"{before.parameters:,}", f"{after.parameters:,}"),
        ("nodes", str(before.nodes), str(after.nodes)),
    ]
    if report.score is not None:
        score = report.score
        rows.append((f"{score.metric} on {score.samples}", f"{score.before:.4f}", f"{score.after:.4f}"))
    if report.latency is not None:
        by_name = {m.name: m for m in report.latency.models}
        pair = [by_name.get(name) for name in ("input", report.chosen)]
        rows.append(("median latency", *(_median_text(m) for m in pair)))
    return rows


def _median_text(model: Any) -> str:
    if model is None or model.failed:
        return "not measured"
    return f"{model.median_ms:.3f} ms [{model.low_ms:.3f}, {model.high_ms:.3f}]"


def step_rows(steps: Iterable[StepReport]) -> list[Row]:
    """A row a step."""
    return [
        (
            s.step,
            s.status,
            str(s.edits),
            "" if s.error is None else f"{s.error:.1e}",
            str(s.nodes),
            size_text(s.bytes),
            f"{s.seconds:.2f} s",
            s.reason or ", ".join(f"{reason} ({n})" for reason, n in s.refused.items()),
        )
        for s in steps
    ]


def candidate_rows(candidates: Iterable[Candidate]) -> list[Row]:
    """A row a candidate."""
    return [
        (
            c.name,
            size_text(c.bytes),
            "" if c.speedup is None else f"{c.speedup:.2f}x",
            "" if c.low is None or c.high is None else f"[{c.low:.2f}, {c.high:.2f}]",
            "yes" if c.chosen else "",
            c.why,
        )
        for c in candidates
    ]


def sensitivity_rows(found: Iterable[NodeSensitivity]) -> list[Row]:
    """A row a node that adds noise in int8, the noisiest first."""
    noisy = [n for n in sorted(found, key=lambda n: n.snr_db) if math.isfinite(n.snr_db)]
    return [(n.output, n.op_type, f"{-n.snr_db:.1f} dB", n.form) for n in noisy]


def latency_rows(report: LatencyReport) -> list[Row]:
    """A row a model; one that failed says why instead."""
    return [
        (m.name, "failed", m.failed, "", "", "", "", "", "")
        if m.failed
        else (
            m.name,
            f"{m.median_ms:.3f}",
            f"[{m.low_ms:.3f}, {m.high_ms:.3f}]",
            f"{m.p90_ms:.3f}",
            f"{m.p99_ms:.3f}",
            f"{m.min_ms:.3f}",
            f"{m.load_ms:.0f}",
            f"{m.peak_mb:.0f}",
            str(m.runs),
        )
        for m in report.models
    ]


def size_text(size: int) -> str:
    """Bytes as a person reads them, in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} B"
