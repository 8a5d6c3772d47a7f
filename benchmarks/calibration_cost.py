"""Time and memory of calibration, beside plain inference and onnxruntime's own calibrators.

    python benchmarks/calibration_cost.py [MODEL.onnx | NETWORK ...] [--few 16] [--many 256] [--alone]

Without arguments: three models of the corpus that EDGEWISE_CORPUS names, and ResNet-50 with seeded weights; a
NETWORK is one of `architectures.py`. Models go through the exact
passes first, as they do before they are quantized. Every figure comes from a process of its own, on the
same seeded samples. `x plain` is the time until the ranges are known over that of
running the model on the same samples, sessions opened in both; the figure after it, in brackets, is the
same of processor time, which other processes disturb less. Peak memory is that of the whole process.
onnxruntime's histogram calibrators keep all values of all samples; they are run with few samples and with
twice as many, to show what a sample costs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from edgewise.calibration.collect import collect
from edgewise.calibration.plan import observed_values
from edgewise.calibration.ranges import METHODS
from edgewise.calibration.target import target_of
from edgewise.passes import EXACT_CHAIN, parse
from edgewise.runtime.evaluate import Evaluator, Feed, TensorSpec, input_specs
from edgewise.runtime.worker import resident_bytes

DEFAULTS = ("squeezenet_fp32", "mnv2_100_224_tfqat_fp32", "cifar_resnet56")
SEEDED = "resnet50"
PEERS = ("MinMax", "Entropy", "Percentile")
_REPEATS = 3
_DISTINCT = 8  # samples; more would cost time to draw, which is not what is measured


def feeds(specs: tuple[TensorSpec, ...], count: int) -> Iterator[Feed]:
    """Standard normal inputs, a row each."""
    rng = np.random.default_rng(0)
    shapes = {s.name: [d if isinstance(d, int) else 1 for d in s.shape] for s in specs}
    drawn = [
        {s.name: rng.standard_normal(shapes[s.name]).astype(s.dtype) for s in specs} for _ in range(_DISTINCT)
    ]
    return itertools.islice(itertools.cycle(drawn), count)


class Reader:
    """Samples as onnxruntime's calibrators ask for them."""

    def __init__(self, samples: Iterator[Feed]) -> None:
        self._samples = samples

    def get_next(self) -> Feed | None:
        return next(self._samples, None)


def run_plain(path: Path, samples: Iterator[Feed]) -> None:
    evaluator = Evaluator(path)
    for feed in samples:
        evaluator.run(feed)


def run_edgewise(path: Path, samples: Iterator[Feed], method: str) -> None:
    model = ir.load(path)
    collect(model, samples, observed_values(model, target=target_of("cpu"))).ranges(method)


def run_peer(path: Path, samples: Iterator[Feed], method: str) -> None:
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    ops = sorted({*QDQRegistry, *QLinearOpsRegistry})
    with tempfile.TemporaryDirectory() as folder:
        calibrator = create_calibrator(
            path, ops, str(Path(folder) / "augmented.onnx"), CalibrationMethod[method]
        )
        calibrator.collect_data(Reader(samples))
        calibrator.compute_data()


def child(path: Path, tool: str, method: str, count: int) -> None:
    """One measurement, written as JSON: seconds, processor seconds and peak megabytes."""
    samples = feeds(input_specs(ir.load(path)), count)
    first = next(samples)  # drawn before the clock starts
    samples = itertools.chain([first], samples)
    start, start_cpu = time.perf_counter(), time.process_time()
    if tool == "plain":
        run_plain(path, samples)
    else:
        (run_edgewise if tool == "edgewise" else run_peer)(path, samples, method)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    print(json.dumps([seconds, cpu_seconds, resident_bytes()[1] / 2**20]))


class Cost(NamedTuple):
    """What a run took."""

    seconds: float
    cpu_seconds: float
    megabytes: float

    def over(self, other: Cost) -> str:
        return f"{self.seconds / other.seconds:5.2f} ({self.cpu_seconds / other.cpu_seconds:5.2f}) x plain"


def measure(path: Path, tool: str, method: str, count: int) -> Cost:
    """The least time and the largest memory of some runs: what other processes add to either is noise."""
    command = [sys.executable, __file__, str(path), "--child", tool, method, str(count)]
    texts = [
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout for _ in range(_REPEATS)
    ]
    runs = [json.loads(text.splitlines()[-1]) for text in texts]  # the line after what the peers print
    seconds, cpu_seconds, megabytes = zip(*runs, strict=True)
    return Cost(min(seconds), min(cpu_seconds), max(megabytes))


def prepared(path: Path, folder: Path) -> Path:
    """The model after the exact passes, in `folder`."""
    model = ir.load(path)
    for spec in EXACT_CHAIN:
        parse(spec).apply(model)
    ir.save(model, folder / path.name)
    return folder / path.name


def compare(path: Path, few: int, many: int, *, alone: bool) -> None:
    print(f"\n{path.stem}")
    plain = {count: measure(path, "plain", "", count) for count in (few, 2 * few, many)}
    runs = [("plain", "", many)]
    runs += [("edgewise", method, many) for method in METHODS]
    runs += [
        ("onnxruntime", method, many if method == "MinMax" else 2 * few) for method in PEERS if not alone
    ]
    for tool, method, more in runs:
        small, large = measure(path, tool, method, few), measure(path, tool, method, more)
        print(
            f"  {tool:12}{method:11} {small.over(plain[few])} at {few:3}, "
            f"{large.over(plain[more])} at {more:3};  {small.megabytes:6.0f} MB at {few:3}, "
            f"{large.megabytes:6.0f} at {more:3} ({large.megabytes / small.megabytes:.2f} x)",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*")
    parser.add_argument("--few", type=int, default=16)
    parser.add_argument("--many", type=int, default=256)
    parser.add_argument("--alone", action="store_true", help="without onnxruntime's calibrators")
    parser.add_argument("--child", nargs=3, metavar=("TOOL", "METHOD", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        tool, method, count = options.child
        child(Path(options.models[0]), tool, method, int(count))
        return
    corpus = os.environ.get("EDGEWISE_CORPUS")
    if not options.models and corpus is None:
        parser.error("name models, or let EDGEWISE_CORPUS name the folder of the corpus")
    names = options.models or [
        *(str(Path(str(corpus), "models", f"{name}.onnx")) for name in DEFAULTS),
        SEEDED,
    ]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(name) if name.endswith(".onnx") else seeded(name, Path(folder, "seeded"))
            compare(prepared(path, Path(folder)), options.few, options.many, alone=options.alone)


def seeded(name: str, folder: Path) -> Path:
    """The file of a network of `architectures.py`."""
    from architectures import exported  # brings torch, whose memory must not count

    return exported(name, "none", folder)


if __name__ == "__main__":
    main()
