"""What x86 processors without VNNI lose of int8 files, before and after `portable`, on trained classifiers.

EDGEWISE_CORPUS=... python benchmarks/portable.py [--samples 64] [--images 1000] [--emulate 0] [NAME ...]

Every file is judged twice, on images that nothing was calibrated with: in the arithmetic of VNNI (the same
weights stored as unsigned integers take kernels that add in 32 bits on every processor) and without. The
latter is this processor's own where it has no VNNI; with `--emulate N`, and elsewhere, the first N images
are run in emulated integers. Rivals: `quantize_static`, QDQ, u8 activations, s8 weights per channel,
MinMax, the same samples, with all 8 bits and with reduce_range.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from corpus import Array, Classifier, Labelled, classifiers
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from rich.console import Console
from rich.table import Table

from edgewise.calibration.collect import collect
from edgewise.calibration.emulation import Emulator
from edgewise.calibration.plan import QuantOptions, observed_values, plan
from edgewise.calibration.saturation import portable, saturation, unsigned_weights
from edgewise.calibration.target import X86
from edgewise.optimizer import files
from edgewise.optimizer.pipeline import Reference, run_passes
from edgewise.optimizer.recipe import Recipe
from edgewise.passes.graph import constant_of
from edgewise.passes.insert_qdq import InsertQdq
from edgewise.passes.quant_plan import QuantPlan
from edgewise.runtime.evaluate import Evaluator, input_specs

COLUMNS = ("model", "file", "channels widened", "VNNI top-1 %", "dB", "no VNNI top-1 %", "dB", "lost", "s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--samples", type=int, default=64, help="images to calibrate with")
    parser.add_argument("--images", type=int, default=1000, help="images to judge by, at most")
    parser.add_argument("--emulate", type=int, default=0, help="judge by so many images in emulated integers")
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    if not options.emulate and not saturates_here():
        options.emulate = 100
    table = Table(*COLUMNS, title="x86 with and without VNNI")
    for classifier in classifiers():
        if not options.names or classifier.name in options.names:
            for row in rows(classifier, options):
                table.add_row(*row)
            table.add_section()
    Console(width=150).print(table)


def saturates_here() -> bool:
    """Whether this processor's kernels for u8 x s8 add two products in 16 bits."""
    weight = ir.tensor(np.full((2, 1), 127, np.int8), name="w")
    graph = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["": 17]> g (uint8[1, 2] x, int8[2, 1] w) => (int32[1, 1] y)
        { y = MatMulInteger (x, w) }"""
    )
    feed = {"x": np.full((1, 2), 255, np.uint8), "w": weight.numpy()}
    return int(Evaluator(graph).run(feed)["y"][0, 0]) != 2 * 255 * 127


def rows(classifier: Classifier, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """The float model, then every int8 file."""
    calibration, test = classifier.calibration(), classifier.test()
    samples = list(calibration.every(max(1, len(calibration) // options.samples)))
    images = options.emulate or options.images
    test = test.every(-(-len(test) // images))
    original = files.load(classifier.path)
    name = input_specs(original)[0].name
    model, _ = run_passes(original, Recipe().chain, Reference(original, [{name: samples[0]}]))
    expected = scores(Evaluator(model), name, test)
    judge = _Judge(classifier, test, expected)
    yield (classifier.name, "float", "", judge.top1(expected), "", "", "", "", "")
    for label, (quantized, twin, widened, seconds) in made(model, name, samples).items():
        vnni = scores(Evaluator(twin), name, test)
        other = scores(Emulator(quantized) if options.emulate else Evaluator(quantized), name, test)
        lost = judge.share(vnni) - judge.share(other)
        figures = (judge.top1(vnni), judge.decibels(vnni), judge.top1(other), judge.decibels(other))
        yield (classifier.name, label, widened, *figures, f"{lost * 100:+.2f}", f"{seconds:.1f}")


Made = tuple[ir.Model, ir.Model, str, float]


def made(model: ir.Model, name: str, samples: list[Array]) -> dict[str, Made]:
    """Every int8 file, its twin with unsigned weights, the channels widened, the seconds that took."""
    choice = QuantOptions()
    feeds = [{name: sample} for sample in samples]
    table = collect(model, feeds, observed_values(model, choice, X86))
    full = plan(model, table, choice, replace(X86, saturates=False))
    start = time.perf_counter()
    report = saturation(model, full, feeds)
    seconds = time.perf_counter() - start
    risky, channels = (sum(getattr(n, key) for n in report.nodes) for key in ("at_risk", "channels"))
    return {
        "all 8 bits": own(model, full, "", 0.0),
        "portable": own(model, portable(full, report), f"{risky} of {channels}", seconds),
        "every pair safe": own(model, plan(model, table, choice, X86), "", 0.0),
        "quantize_static": rival(model, samples, reduce_range=False),
        "... reduce_range": rival(model, samples, reduce_range=True),
    }


def own(model: ir.Model, plan: QuantPlan, widened: str, seconds: float) -> Made:
    quantized, twin = model.clone(), model.clone()
    InsertQdq(plan).apply(quantized)
    InsertQdq(unsigned_weights(plan, model)).apply(twin)
    return quantized, twin, widened, seconds


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """The samples, as `quantize_static` asks for them."""

    def __init__(self, name: str, samples: list[Array]) -> None:
        self._feeds = iter([{name: sample} for sample in samples])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)


def rival(model: ir.Model, samples: list[Array], *, reduce_range: bool) -> Made:
    with tempfile.TemporaryDirectory() as folder:
        source, result = (Path(folder) / f"{name}.onnx" for name in ("float", "int8"))
        start = time.perf_counter()
        quantize_static(
            files.save(model, source),
            result,
            Reader(input_specs(model)[0].name, samples),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=reduce_range,
        )
        seconds = time.perf_counter() - start
        return files.load(result), unsigned(files.load(result)), "", seconds


def unsigned(model: ir.Model) -> ir.Model:
    """A file with its int8 constants, and their zero points, stored as uint8."""
    for node in [n for n in model.graph if n.op_type == "DequantizeLinear"]:
        for value in (node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None):
            array = constant_of(value)
            if value is not None and array is not None and array.dtype == np.int8:
                value.const_value = ir.tensor(
                    (array.astype(np.int16) + 128).astype(np.uint8), name=value.name
                )
                value.type = ir.TensorType(ir.DataType.UINT8)
    return model


class _Judge:
    """What scores are worth."""

    def __init__(self, classifier: Classifier, test: Labelled, expected: Array) -> None:
        self._first, self._labels, self._expected = classifier.first_class, test.labels, expected

    def share(self, found: Array) -> float:
        return float((found.argmax(1) - self._first == self._labels).mean())

    def top1(self, found: Array) -> str:
        return f"{self.share(found) * 100:.2f}"

    def decibels(self, found: Array) -> str:
        noise = np.square(self._expected - found, dtype=np.float64).sum()
        return f"{10 * np.log10(np.square(self._expected, dtype=np.float64).sum() / noise):.2f}"


def scores(runner: Any, name: str, test: Iterable[Array]) -> Array:
    """The first output for every image, one row each."""
    return np.stack([next(iter(runner.run({name: x}).values())).ravel() for x in test])


if __name__ == "__main__":
    main()
