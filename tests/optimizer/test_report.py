"""One value as JSON, as Markdown and as rows: nothing is lost, nothing is invalid."""

from __future__ import annotations

import json
import math
from pathlib import Path

import onnx_ir as ir
import pytest

from edgewise.optimizer import files
from edgewise.optimizer.comparison import Difference
from edgewise.optimizer.pipeline import StepReport
from edgewise.optimizer.recipe import Recipe
from edgewise.optimizer.report import (
    Candidate,
    Report,
    Score,
    facts_of,
    latency_rows,
    size_text,
    summary_rows,
    table,
    write_report,
)
from edgewise.runtime.conditions import Conditions
from edgewise.runtime.errors import InputError
from edgewise.runtime.latency import LatencyReport, ModelLatency, Ratio
from edgewise.runtime.machine import describe


def measured(name: str, size: int, ms: float) -> ModelLatency:
    return ModelLatency(
        name=name,
        path=f"{name}.onnx",
        file_bytes=size,
        median_ms=ms,
        low_ms=0.9 * ms,
        high_ms=1.1 * ms,
        p90_ms=1.5 * ms,
        p99_ms=2 * ms,
        min_ms=0.8 * ms,
        runs=100,
        load_ms=10.0,
        first_ms=3.0,
        loaded_mb=40.0,
        peak_mb=50.0,
    )


LATENCY = LatencyReport(
    machine=describe(),
    conditions=Conditions(threads=1, cores=(0,)),
    inputs="1 sample",
    models=(
        measured("input", 1000, 2.0),
        measured("int8", 300, 1.0),
        ModelLatency("bad", "c.onnx", 300, failed="crashed | badly"),
    ),
    ratios=(Ratio("int8", "input", 2.0, 1.9, 2.1, "faster"),),
    noise_floor=0.01,
    launches=3,
    seconds=4.0,
    stopped_because="precise",
)


@pytest.fixture
def report(model: ir.Model) -> Report:
    facts = facts_of(model, Path("a.onnx"), "ab" * 32, 1000)
    return Report(
        version="1.2.3",
        input=facts,
        output=facts_of(model, Path("b.onnx"), "cd" * 32, 300),
        recipe=Recipe().model_dump(mode="json"),
        steps=(
            StepReport("fuse-pad", "exact", "applied", 3, {"a | b": 2}, 1e-7, None, 0.1, 10, 900),
            StepReport("prune", "exact", "rolled back", reason="outputs differ"),
        ),
        differences=(Difference("scores", math.inf, 0.0, math.inf, 1.0, None),),
        score=Score("top1", 0.9, 0.89, 0.01, 500),
        candidates=(
            Candidate("input", 1000, None, None, None, False, ""),
            Candidate("int8", 300, 2.0, 1.9, 2.1, True, "faster"),
        ),
        latency=LATENCY,
        table="ef" * 32,
        notes=("something to know",),
    )


def test_facts_count_what_is_there(model: ir.Model) -> None:
    facts = facts_of(model, Path("a.onnx"), "ab", 1000)
    assert facts.nodes == 7
    assert facts.parameters == 16 * 3 * 9 + 16 * 5 + 5 * 16 + 5
    assert facts.opset == 17


def test_json_is_json(report: Report) -> None:
    text = json.dumps(report.to_dict(), allow_nan=False)  # an infinity would raise
    data = json.loads(text)
    assert data["input"]["sha256"] == "ab" * 32
    assert data["steps"][0]["refused"] == {"a | b": 2}
    assert data["differences"][0]["relative"] is None
    assert data["score"] == {"metric": "top1", "before": 0.9, "after": 0.89, "allowed": 0.01, "samples": 500}
    assert data["latency"]["models"][2]["failed"] == "crashed | badly"
    assert data["latency"]["models"][2]["median_ms"] is None
    assert data["recipe"]["version"] == 1


def test_markdown_tells_everything(report: Report) -> None:
    page = report.to_markdown()
    for text in (
        "a.onnx",
        "b.onnx",
        "fuse-pad",
        "outputs differ",
        "2.00x",
        "top1 on 500",
        "0.8900",
        "something to know",
        "crashed",
        "drop-identity",
    ):
        assert text in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert rows
    # Within a table all rows have the same number of cells, whatever a text holds.
    steps = page.split("## Steps")[1].split("##")[0].strip().splitlines()
    assert len({line.replace("\\|", "").count("|") for line in steps}) == 1


def test_a_cell_cannot_break_its_table() -> None:
    text = table(("a", "b"), [("x | y", "line one\nline two")])
    assert len(text.splitlines()) == 3
    assert "x \\| y" in text


def test_summary(report: Report) -> None:
    rows = {name: (before, after) for name, before, after in summary_rows(report)}
    assert rows["size"] == ("1.00 kB", "300 B (30%)")
    assert rows["median latency"] == ("2.000 ms [1.800, 2.200]", "1.000 ms [0.900, 1.100]")
    assert rows["top1 on 500"] == ("0.9000", "0.8900")


def test_latency_rows_have_one_length(report: Report) -> None:
    assert report.latency is not None
    assert len({len(row) for row in latency_rows(report.latency)}) == 1


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (1_500_000, "1.50 MB"), (2_000_000_000, "2.00 GB")],
)
def test_sizes(size: int, text: str) -> None:
    assert size_text(size) == text


def test_written_and_written_again(report: Report, tmp_path: Path) -> None:
    for _ in range(2):
        data, page = write_report(report, tmp_path / "deep" / "report")
    assert json.loads(data.read_text())["version"] == "1.2.3"
    assert page.read_text().startswith("# edgewise report")
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.json", "report.md"]


def test_a_report_folder_that_is_a_file(report: Report, tmp_path: Path) -> None:
    (tmp_path / "report").write_text("")
    with pytest.raises(InputError, match="report"):
        write_report(report, tmp_path / "report")


def test_the_hash_is_of_the_file(model_path: Path) -> None:
    import hashlib

    assert files.sha256(model_path) == hashlib.sha256(model_path.read_bytes()).hexdigest()
