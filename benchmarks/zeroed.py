"""How much of a network leaves when half of all its filters are zero, no ratio given.

python benchmarks/zeroed.py FOLDER [NAME ...] [--schemes SCHEME,...] [--rivals PYTHON] [--latency]

For every network of `architectures.py`, kept in FOLDER, zeroed in each way that makes a difference to it:
parameters before and after the default chain, the share removed beside what is aimed at, the largest
difference of any output relative to its largest value (batches of one and of three, three seeds, onnxruntime
without its own graph optimizations on either side), and the seconds that the chain takes with every step
checked. `--rivals` names the Python of an environment with onnxslim and onnxsim, which get the same files in
the same run. `--latency` measures each result against its input.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir
import rivals
from architectures import ARCHITECTURES, SCHEMES, TRANSFORMERS, Plan, exported
from rich.console import Console
from rich.table import Table

from edgewise.optimizer import files
from edgewise.optimizer.comparison import relative
from edgewise.optimizer.pipeline import Reference, StepReport, run_passes
from edgewise.optimizer.probe import probe_feeds
from edgewise.optimizer.recipe import Recipe
from edgewise.runtime.conditions import Conditions
from edgewise.runtime.evaluate import Evaluator, Feed, input_specs, seeded_feed
from edgewise.runtime.latency import measure

AIMS: Mapping[str, int] = MappingProxyType({"resnet18": 70, "mobilenet_v2": 60})
AIM = 55
"""Percent of all parameters to be removed where layers that belong together are zeroed together."""

PEERS = ("onnxslim", "onnxsim")
SEEDS, BATCHES = range(3), (1, 3)
COLUMNS = (
    "network",
    "zeroed",
    "parameters",
    "removed %",
    "aim",
    "error",
    "seconds",
    "rolled back",
    "speed-up",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ARCHITECTURES))
    parser.add_argument("--schemes", default=",".join(SCHEMES[1:]), help=f"of {', '.join(SCHEMES)}")
    parser.add_argument("--rivals", metavar="PYTHON", help="an environment with onnxslim and onnxsim")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-seconds", type=float, default=15.0)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--depth", type=float, default=1.0)
    options = parser.parse_args()
    peers = PEERS if options.rivals else ()
    beside = [f"{peer}: removed %, error, s" for peer in peers]
    table = Table(*COLUMNS, *beside, title="half of all filters zero")
    for name in options.names or ARCHITECTURES:
        for scheme in options.schemes.split(","):
            if scheme == "coupled-width" and name not in TRANSFORMERS:
                continue  # the same as coupled
            path = exported(name, scheme, options.folder, Plan(options.width, options.depth))
            row = (name, scheme, *ours(path, aim(name, scheme), options), *theirs(path, options))
            table.add_row(*row)
            print(" | ".join(row), flush=True)  # a long run shows where it is
    Console(width=220).print(table)


def aim(name: str, scheme: str) -> str:
    """The percent to reach, if there is one; of a transformer whose own width stays half is all there is."""
    whole = "coupled-width" if name in TRANSFORMERS else "coupled"
    return f"{AIMS.get(name, AIM)}" if scheme == whole else ""


def ours(path: Path, wanted: str, options: argparse.Namespace) -> tuple[str, ...]:
    """Run the default chain on a file, write the result, read it again and judge it."""
    model = files.load(path)
    start = time.perf_counter()
    after, steps = run_passes(model, Recipe().chain, Reference(model, probe_feeds(model, None)))
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        out = files.save(after, Path(folder) / path.name)
        gain = speed_up(path, out, options) if options.latency else ""
        written = files.load(out)
        return (
            f"{parameters(model):,} -> {parameters(written):,}",
            f"{removed(model, written):.1f}",
            wanted,
            f"{error(model, written):.1e}",
            f"{seconds:.1f}",
            rolled_back(steps),
            gain,
        )


def theirs(path: Path, options: argparse.Namespace) -> Iterator[str]:
    """What each peer makes of the same file."""
    if not options.rivals:
        return
    model = files.load(path)
    for peer in PEERS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / path.name
            attempt = rivals.attempt(options.rivals, peer, path, out)
            if attempt.failure:
                yield attempt.failure[:60]
                continue
            written = files.load(out)
            found = removed(model, written), error(model, written), attempt.seconds
        yield "{:.1f}, {:.1e}, {:.1f}".format(*found)


def removed(before: ir.Model, after: ir.Model) -> float:
    """Percent of the parameters that are gone."""
    return 100 * (1 - parameters(after) / parameters(before))


def parameters(model: ir.Model) -> int:
    """Numbers in the model's floating-point tensors, initializers and constants."""
    return sum(t.size for _, t in files.tensors(model) if t.dtype.is_floating_point())


def error(before: ir.Model, after: ir.Model) -> float:
    """The largest relative difference of any output, over all seeds and batch sizes."""
    one, other = Evaluator(before, optimize=False), Evaluator(after, optimize=False)
    return max(
        max(relative(expected, actual[name]) for name, expected in one.run(feed).items())
        for feed in feeds(before)
        for actual in [other.run(feed)]
    )


def feeds(model: ir.Model) -> Iterator[Feed]:
    specs = input_specs(model)
    return (seeded_feed(specs, seed, batch) for seed in SEEDS for batch in BATCHES)


def rolled_back(steps: tuple[StepReport, ...]) -> str:
    return ", ".join(f"{s.step} ({s.reason})" for s in steps if s.status == "rolled back")


def speed_up(before: Path, after: Path, options: argparse.Namespace) -> str:
    """Median time of the input over that of the result, one sample, in one paired run."""
    report = measure(
        {"input": before, "exact": after},
        feed=seeded_feed(input_specs(files.load(before)), 0, 1),
        conditions=Conditions(threads=options.threads),
        max_seconds=options.max_seconds,
    )
    return "".join(f"{r.speedup:.2f} [{r.low:.2f}, {r.high:.2f}] {r.verdict}" for r in report.ratios)


if __name__ == "__main__":
    main()
