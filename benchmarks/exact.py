"""The exact chain on real models, onnx's light models and exported networks: what it changes, what it costs.

EDGEWISE_CORPUS=... python benchmarks/exact.py [--latency] [--rivals PYTHON] [--time]
                                                [--folder FOLDER] [NAME ...]

`--rivals` names the Python of an environment with onnxslim, onnxsim, onnxscript and onnxruntime; their
results are judged by the same code, on the same inputs, as those of the chain. `--time` runs graphs of some
1,500 nodes instead. Nodes are those of all graphs and functions. Weights that are written as nodes stand
apart: Constant, and ConstantOfShape of a constant shape, of which runtimes make initializers on loading.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import long_graph
import onnx
import onnx_ir as ir
import rivals
from rich.console import Console
from rich.table import Table

from edgewise.optimizer import files
from edgewise.optimizer.optimization import save_stamped, stamp_of
from edgewise.optimizer.pipeline import Reference, StepReport, run_passes
from edgewise.optimizer.probe import probe_feeds
from edgewise.optimizer.recipe import Recipe
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Feed
from edgewise.runtime.latency import measure

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import zoo

COLUMNS = ("model", "nodes", "parameters", "kB", "error", "s", "rolled back", "speed-up")
EDGEWISE = "edgewise"
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
REPEATS = 3


@dataclass(frozen=True)
class Subject:
    """A model and the inputs that everybody's result is judged on."""

    name: str
    path: Path
    model: ir.Model
    feeds: tuple[Feed, ...]


@dataclass(frozen=True)
class Result:
    """What a tool made of a model; `failure` says why there is nothing, or nothing that runs."""

    nodes: int = 0
    constants: int = 0
    kilobytes: float = 0.0
    seconds: float = 0.0
    error: float = 0.0
    failure: str = ""

    def __str__(self) -> str:
        if self.failure:
            return f"BAD: {self.failure[:60]}"
        weights = f" +{self.constants}" if self.constants else ""
        return f"{self.nodes}{weights}  {self.kilobytes:,.0f} kB  {self.seconds:.1f} s  {self.error:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--latency", action="store_true", help="measure each result against its input")
    parser.add_argument("--max-seconds", type=float, default=10.0)
    parser.add_argument("--rivals", metavar="PYTHON", help="the peers' results beside ours")
    parser.add_argument("--folder", type=Path, help="keeps exported networks and what was made of all")
    parser.add_argument("--time", action="store_true", help="graphs of some 1,500 nodes, against onnxslim")
    options = parser.parse_args()
    if "EDGEWISE_CORPUS" not in os.environ:
        raise SystemExit("set EDGEWISE_CORPUS to the folder of real models")
    with tempfile.TemporaryDirectory() as scratch:
        (timing if options.time else quality)(options.folder or Path(scratch), options)


def quality(folder: Path, options: argparse.Namespace) -> None:
    """What the chain does to each model and, with `--rivals`, what the peers do."""
    table = Table(*COLUMNS, title="exact chain, input -> output")
    beside = Table("model", "nodes", EDGEWISE, *rivals.RIVALS, "fewest nodes", title=_BESIDE)
    for subject in subjects(folder, options.names):
        reference = Reference(subject.model, subject.feeds)
        ours, row = chain(subject, reference, folder, options)
        table.add_row(*row)
        print(subject.name, "|", " | ".join(row[1:]), flush=True)  # a long run shows where it is
        if options.rivals:
            found = {EDGEWISE: ours} | {
                rival: peer(subject, reference, rival, folder, options.rivals) for rival in rivals.RIVALS
            }
            before = str(sum(count(subject.model)))
            beside.add_row(subject.name, before, *map(str, found.values()), fewest(found))
            print(*(f"    {name}: {result}" for name, result in found.items()), sep="\n", flush=True)
    console = Console(width=200)
    console.print(table)
    if options.rivals:
        console.print(beside)


_BESIDE = "nodes + weights written as nodes, file, seconds (ours: every step checked on inputs), error"


def subjects(folder: Path, names: Sequence[str]) -> Iterator[Subject]:
    """Every model asked for, or all."""
    for path in zoo.corpus_models():
        if not names or path.stem in names:
            model = files.load(path)
            yield Subject(path.stem, path, model, (zoo.feed_of(path.stem, model),))
    for path in sorted(LIGHT.glob("*.onnx")):
        if not names or path.stem in names:
            yield guessed(path.stem, path)
    import architectures  # brings torch
    import transformer_nets

    small = architectures.Plan(width=0.25, pixels=64)  # in channels and pixels, not in nodes
    for name in architectures.ARCHITECTURES:
        if not names or name in names:
            yield guessed(name, architectures.exported(name, "none", folder, small))
    for name in transformer_nets.MODELS:
        if not names or name in names:
            yield guessed(name, transformer_nets.exported(name, folder))


def guessed(name: str, path: Path) -> Subject:
    """A model with inputs of plausible shape."""
    model = files.load(path)
    return Subject(name, path, model, probe_feeds(model, None))


def chain(
    subject: Subject, reference: Reference, folder: Path, options: argparse.Namespace
) -> tuple[Result, tuple[str, ...]]:
    """Run the chain on one model, write it, and compare what was written."""
    model = subject.model
    start = time.perf_counter()
    after, steps = run_passes(model, Recipe().chain, reference)
    seconds = time.perf_counter() - start
    stamp = stamp_of(Recipe(), files.sha256(subject.path), None)  # the file as `edgewise optimize` writes it
    out = save_stamped(after, stamp, folder / f"{subject.name}.{EDGEWISE}.onnx", force=True)
    result = judged(out, reference, seconds)
    speed = ratio(subject.path, out, subject.feeds[0], options) if options.latency else ""
    return result, (
        subject.name,
        f"{sum(count(model))} -> {result.nodes} +{result.constants}",
        f"{parameters(model):,} -> {parameters(after):,}",
        f"{files.file_bytes(subject.path) / 1024:,.0f} -> {result.kilobytes:,.0f}",
        f"{result.error:.1e}",
        f"{seconds:.1f}",
        rolled_back(steps),
        speed,
    )


def peer(subject: Subject, reference: Reference, rival: str, folder: Path, python: str) -> Result:
    """Run a peer on the file and judge what it wrote."""
    out = folder / f"{subject.name}.{rival}.onnx"
    made = rivals.attempt(python, rival, subject.path, out)
    return Result(failure=made.failure) if made.failure else judged(out, reference, made.seconds)


def judged(path: Path, reference: Reference, seconds: float) -> Result:
    """Count what a file holds and hold its outputs against the original's."""
    try:
        model = files.load(path)
        error = reference.error_of(model)
    except InputError as failure:
        return Result(failure=str(failure))
    wrong = "" if error <= reference.tolerance else f"outputs are {error:.0e} off"
    return Result(*count(model), files.file_bytes(path) / 1024, seconds, error, wrong)


def fewest(found: dict[str, Result]) -> str:
    """Who has the fewest nodes, of those whose result is right."""
    sound = {name: result.nodes for name, result in found.items() if not result.failure}
    return ", ".join(name for name, nodes in sound.items() if nodes == min(sound.values()))


def count(model: ir.Model) -> tuple[int, int]:
    """Nodes of all graphs and functions: those that work, and weights written as nodes."""
    graphs = [model.graph, *(f.graph for f in model.functions.values())]
    weights = [_is_weight(node) for graph in graphs for node in graph.all_nodes()]
    return len(weights) - sum(weights), sum(weights)


def _is_weight(node: ir.Node) -> bool:
    if node.op_type != "ConstantOfShape" or node.domain != "":
        return node.op_type == "Constant" and node.domain == ""
    shape = node.inputs[0]
    producer = None if shape is None else shape.producer()
    return shape is not None and (
        shape.is_initializer() if producer is None else producer.op_type == "Constant"
    )


def timing(folder: Path, options: argparse.Namespace) -> None:
    """Wall time of the chain on long graphs, alone and with every step checked, and of the peers' calls."""
    columns = (
        "model",
        "nodes",
        "edgewise, unchecked",
        "edgewise",
        *(rivals.RIVALS if options.rivals else ()),
    )
    table = Table(*columns, title=f"seconds, best of {REPEATS}")
    for path in (
        files.save(long_graph.build(), folder / "long.onnx", force=True),
        LIGHT / "light_densenet121.onnx",
    ):
        subject = guessed(path.stem, path)
        unchecked = min(chain_seconds(subject, ()) for _ in range(REPEATS))
        checked = min(chain_seconds(subject, subject.feeds) for _ in range(REPEATS))
        table.add_row(
            subject.name,
            str(sum(count(subject.model))),
            f"{unchecked:.2f}",
            f"{checked:.2f}",
            *(peer_seconds(subject, rival, folder, options.rivals) for rival in columns[4:]),
        )
    Console(width=150).print(table)


def chain_seconds(subject: Subject, feeds: Sequence[Feed]) -> float:
    """Of `run_passes`; the original's own outputs count too where steps are held to them."""
    start = time.perf_counter()
    run_passes(subject.model, Recipe().chain, Reference(subject.model, feeds))
    return time.perf_counter() - start


def peer_seconds(subject: Subject, rival: str, folder: Path, python: str) -> str:
    made = [rivals.attempt(python, rival, subject.path, folder / "out.onnx") for _ in range(REPEATS)]
    failures = [attempt.failure for attempt in made if attempt.failure]
    return failures[0] if failures else f"{min(attempt.seconds for attempt in made):.2f}"


def ratio(before: Path, after: Path, feed: Feed, options: argparse.Namespace) -> str:
    report = measure({"input": before, "exact": after}, feed=feed, max_seconds=options.max_seconds)
    return "".join(f"{r.speedup:.2f} [{r.low:.2f}, {r.high:.2f}] {r.verdict}" for r in report.ratios)


def parameters(model: ir.Model) -> int:
    tensors = (v.const_value for g in model.graphs() for v in g.initializers.values())
    return sum(t.size for t in tensors if t is not None)


def rolled_back(steps: tuple[StepReport, ...]) -> str:
    return ", ".join(f"{s.step} ({s.reason})" for s in steps if s.status == "rolled back")


if __name__ == "__main__":
    main()
