"""The exact chain on every model of the corpus: what it does, what it changes, what it costs.

EDGEWISE_CORPUS=... python benchmarks/exact.py [--latency] [NAME ...]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edgewise.optimizer import files
from edgewise.optimizer.optimization import save_stamped, stamp_of
from edgewise.optimizer.pipeline import Reference, StepReport, run_passes
from edgewise.optimizer.recipe import Recipe
from edgewise.runtime.latency import measure

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import zoo

COLUMNS = ("model", "nodes", "parameters", "file", "error", "seconds", "rolled back", "speed-up")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--latency", action="store_true", help="measure each result against its input")
    parser.add_argument("--max-seconds", type=float, default=10.0)
    options = parser.parse_args()
    if "EDGEWISE_CORPUS" not in os.environ:
        raise SystemExit("set EDGEWISE_CORPUS to the folder of real models")
    table = Table(*COLUMNS, title="exact chain, input -> output")
    for path in zoo.corpus_models():
        if not options.names or path.stem in options.names:
            table.add_row(*row(path, options))
    Console(width=150).print(table)


def row(path: Path, options: argparse.Namespace) -> tuple[str, ...]:
    """Run the chain on one model, write it, and compare what was written."""
    model = files.load(path)
    feed = zoo.feed_of(path.stem, model)
    reference = Reference(model, [feed])
    start = time.perf_counter()
    after, steps = run_passes(model, Recipe().chain, reference)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        stamp = stamp_of(Recipe(), files.sha256(path), None)  # the file as `edgewise optimize` writes it
        out = save_stamped(after, stamp, Path(folder) / path.name)
        error = reference.error_of(files.load(out))
        speed = ratio(path, out, feed, options) if options.latency else ""
        size = f"{files.file_bytes(path):,} -> {files.file_bytes(out):,}"
    return (
        path.stem,
        f"{nodes(model)} -> {nodes(after)}",
        f"{parameters(model):,} -> {parameters(after):,}",
        size,
        f"{error:.1e}",
        f"{seconds:.1f}",
        rolled_back(steps),
        speed,
    )


def ratio(before: Path, after: Path, feed: zoo.Feed, options: argparse.Namespace) -> str:
    report = measure({"input": before, "exact": after}, feed=feed, max_seconds=options.max_seconds)
    return "".join(f"{r.speedup:.2f} [{r.low:.2f}, {r.high:.2f}] {r.verdict}" for r in report.ratios)


def nodes(model: zoo.ir.Model) -> int:
    return sum(1 for _ in model.graph.all_nodes())


def parameters(model: zoo.ir.Model) -> int:
    tensors = (v.const_value for g in model.graphs() for v in g.initializers.values())
    return sum(t.size for t in tensors if t is not None)


def rolled_back(steps: tuple[StepReport, ...]) -> str:
    return ", ".join(f"{s.step} ({s.reason})" for s in steps if s.status == "rolled back")


if __name__ == "__main__":
    main()
