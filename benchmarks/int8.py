"""Static int8 on the corpus' trained classifiers: accuracy, size and latency beside onnxruntime's own.

EDGEWISE_CORPUS=... python benchmarks/int8.py [--method minmax] [--samples 64] [--target cpu] [NAME ...]

Rivals: `quantize_static`, QDQ, u8 activations, s8 weights per channel, MinMax, the same samples, on the
same model after the exact passes; with all 8 bits and with reduce_range. Accuracy is taken on data that
nothing was calibrated with; latency in one paired run of all files.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from corpus import Array, Classifier, Labelled, classifiers
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from rich.console import Console
from rich.table import Table

from edgewise.calibration.collect import collect
from edgewise.calibration.plan import QuantOptions, observed_values, plan
from edgewise.calibration.target import target_of
from edgewise.optimizer import files
from edgewise.optimizer.pipeline import Reference, run_passes
from edgewise.optimizer.recipe import Recipe
from edgewise.passes.insert_qdq import InsertQdq
from edgewise.runtime.conditions import Conditions
from edgewise.runtime.errors import EdgewiseError
from edgewise.runtime.evaluate import Evaluator, input_specs
from edgewise.runtime.foreign import foreign_code
from edgewise.runtime.latency import measure

COLUMNS = ("model", "file", "seconds", "KB", "top-1 %", "drop", "agrees %", "ms", "x float", "interval")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--method", default="minmax")
    parser.add_argument("--samples", type=int, default=64, help="images to calibrate with")
    parser.add_argument("--images", type=int, default=1000, help="images to judge by, at most")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-seconds", type=float, default=20.0)
    parser.add_argument("--no-latency", action="store_true")
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    table = Table(*COLUMNS, title=f"int8 by {options.method}, {options.samples} samples")
    for classifier in classifiers():
        if not options.names or classifier.name in options.names:
            for row in rows(classifier, options):
                table.add_row(*row)
            table.add_section()
    Console(width=150).print(table)


@dataclass(frozen=True)
class Result:
    """One file and how long it took to make."""

    path: Path
    seconds: float


def rows(classifier: Classifier, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """A row for each way of making an int8 file, the float file first."""
    calibration, test = classifier.calibration(), classifier.test()
    samples = list(calibration.every(max(1, len(calibration) // options.samples)))
    test = test.every(-(-len(test) // options.images))
    with tempfile.TemporaryDirectory() as folder:
        made = make(classifier.path, samples, Path(folder), options)
        results = {name: result for name, result in made.items() if isinstance(result, Result)}
        classes = {name: answers(result.path, test) for name, result in results.items()}
        speed = {} if options.no_latency else race(results, samples[0], options)
        for name, result in made.items():
            if isinstance(result, Result):
                accuracy = quality(classes[name] - classifier.first_class, classes["float"], test, classifier)
                size = f"{files.file_bytes(result.path) / 1024:,.0f}"
                yield (classifier.name, name, f"{result.seconds:.1f}", size, *accuracy, *speed.get(name, ()))
            else:
                yield (classifier.name, name, result)


def make(
    path: Path, samples: list[Array], folder: Path, options: argparse.Namespace
) -> dict[str, Result | str]:
    """Every file by name; the reason where a rival fails."""
    model = files.load(path)
    feed = {input_of(model): samples[0]}
    model, _ = run_passes(model, Recipe().chain, Reference(model, [feed]))
    source = files.save(model, folder / "float.onnx")
    ways: Mapping[str, Callable[[Path], None]] = {
        "edgewise": lambda out: edgewise(model, samples, out, options),
        "quantize_static": lambda out: static(source, samples, out, reduce_range=False),
        "... reduce_range": lambda out: static(source, samples, out, reduce_range=True),
    }
    made: dict[str, Result | str] = {"float": Result(source, 0.0)}
    for number, (name, way) in enumerate(ways.items()):
        made[name] = (timed if name == "edgewise" else tried)(way, folder / f"{number}.onnx")
    return made


def timed(way: Callable[[Path], None], out: Path) -> Result:
    start = time.perf_counter()
    way(out)
    return Result(out, time.perf_counter() - start)


def tried(way: Callable[[Path], None], out: Path) -> Result | str:
    """A rival's result; what it raises, whatever that is, is one too. A failure of ours is raised."""
    try:
        with foreign_code("failed"):
            return timed(way, out)
    except EdgewiseError as error:
        return str(error)[:80]


def edgewise(model: ir.Model, samples: list[Array], out: Path, options: argparse.Namespace) -> None:
    target, choice = target_of(options.target), QuantOptions(method=options.method)
    name = input_of(model)
    values = observed_values(model, choice, target)
    table = collect(model, ({name: sample} for sample in samples), values, threads=options.threads)
    quantized = model.clone()
    InsertQdq(plan(model, table, choice, target)).apply(quantized)
    files.save(quantized, out)


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, samples: list[Array]) -> None:
        self._feeds = iter([{name: sample} for sample in samples])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)


def static(source: Path, samples: list[Array], out: Path, *, reduce_range: bool) -> None:
    quantize_static(
        source,
        out,
        Reader(input_of(files.load(source)), samples),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=reduce_range,
    )


def answers(path: Path, test: Labelled) -> Array:
    """The index of the highest score for every image."""
    evaluator, name = Evaluator(path), input_of(files.load(path))
    return np.array([next(iter(evaluator.run({name: x}).values())).argmax() for x in test])


def quality(said: Array, reference: Array, test: Labelled, classifier: Classifier) -> tuple[str, ...]:
    """Top-1, what it is below the float file's, and how often both say the same."""
    truth = reference - classifier.first_class
    top1, before = (said == test.labels).mean(), (truth == test.labels).mean()
    return f"{top1 * 100:.2f}", f"{(before - top1) * 100:+.2f}", f"{(said == truth).mean() * 100:.2f}"


def input_of(model: ir.Model) -> str:
    return input_specs(model)[0].name


def race(
    results: Mapping[str, Result], sample: Array, options: argparse.Namespace
) -> dict[str, tuple[str, ...]]:
    """Median and speed-up over float of every file, in one paired run."""
    paths = {name: result.path for name, result in results.items()}
    feed = {input_of(files.load(paths["float"])): sample}
    report = measure(
        paths, feed=feed, conditions=Conditions(threads=options.threads), max_seconds=options.max_seconds
    )
    ratios: dict[str, Any] = {r.name: r for r in report.ratios}
    return {
        m.name: (f"{m.median_ms:.3f}",)
        + ((f"{r.speedup:.2f}", f"{r.low:.2f} - {r.high:.2f}") if (r := ratios.get(m.name)) else ("", ""))
        for m in report.models
    }


if __name__ == "__main__":
    main()
