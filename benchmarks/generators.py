"""Static int8 on networks that grow images: ConvTranspose as it is, and split into Conv and a shuffle.

python benchmarks/generators.py [--max-seconds 20] [--samples 32] [--target cpu] [dcgan] [vae]

No int8 kernel takes a ConvTranspose, so a DCGAN as it is has nothing to quantize.
A DCGAN generator and a decoder of a variational autoencoder, 64 x 64 pixels out, of realistic widths with
seeded weights, calibrated and judged on different random latents. Rival: `quantize_static`, QDQ, u8
activations, s8 weights per channel, MinMax, the same latents, on the same float file. Speed is relative to
that file, in one paired run of all files; SNR is that of the images against its own.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from rich.console import Console
from rich.table import Table

from edgewise.calibration.collect import collect
from edgewise.calibration.plan import QuantOptions, observed_values, plan
from edgewise.calibration.target import target_of
from edgewise.optimizer import files
from edgewise.optimizer.comparison import differences
from edgewise.optimizer.pipeline import Reference, run_passes
from edgewise.passes import EXACT_CHAIN, parse
from edgewise.passes.insert_qdq import InsertQdq
from edgewise.runtime.conditions import Conditions
from edgewise.runtime.evaluate import Evaluator, Feed
from edgewise.runtime.latency import measure

Array = npt.NDArray[np.float32]

SPLIT = "split-conv-transpose"
SPLIT_LAST = "split-conv-transpose{channels_last: true}"
LATENT = "z"
COLUMNS = ("model", "file", "nodes", "KB", "ms", "x float", "interval", "SNR dB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--samples", type=int, default=32, help="latents to calibrate with, and to judge by")
    parser.add_argument("--method", default="minmax")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-seconds", type=float, default=20.0)
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    table = Table(*COLUMNS, title=f"generators in int8, {options.samples} latents")
    for name, build in MODELS.items():
        if not options.names or name in options.names:
            for row in rows(name, build(), options):
                table.add_row(*row)
            table.add_section()
    Console(width=130).print(table)


class Weights:
    """Seeded weights by name; every layer keeps the variance of what it reads."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self.arrays: dict[str, Array] = {}

    def layer(self, name: str, shape: Sequence[int], taps: float) -> str:
        """A weight for outputs that sum `taps` products each."""
        self.arrays[name] = (self._rng.standard_normal(shape) * np.sqrt(2 / taps)).astype(np.float32)
        return name

    def norm(self, name: str, channels: int) -> str:
        """Scale, shift, mean and variance of a trained batch normalization."""
        drawn = {
            "scale": self._rng.normal(1, 0.1, channels),
            "shift": self._rng.normal(0, 0.1, channels),
            "mean": self._rng.normal(0, 0.1, channels),
            "var": self._rng.uniform(0.8, 1.2, channels),
        }
        self.arrays |= {f"{name}_{role}": array.astype(np.float32) for role, array in drawn.items()}
        return ", ".join(f"{name}_{role}" for role in drawn)


def dcgan() -> ir.Model:
    """The generator of Radford et al. 2015 (DCGAN), 100 numbers to 3 x 64 x 64, 64 filters at the end."""
    weights, widths, body, value = Weights(), (100, 512, 256, 128, 64, 3), [], LATENT
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        w = weights.layer(f"w{i}", (inputs, outputs, 4, 4), inputs * (4 if i else 1))
        grows = "strides = [2, 2], pads = [1, 1, 1, 1]" if i else "strides = [1, 1]"
        body.append(f"c{i} = ConvTranspose<{grows}>({value}, {w})")
        if outputs > 3:
            norm = weights.norm(f"n{i}", outputs)
            body.append(f"b{i} = BatchNormalization(c{i}, {norm}) r{i} = Relu(b{i})")
        value = f"r{i}"
    body.append(f"y = Tanh(c{len(widths) - 2})")
    return built(f"float[N, 100, 1, 1] {LATENT}", body, weights)


def vae() -> ir.Model:
    """A decoder of 128 numbers to 3 x 64 x 64, each stage twice the size of the one before."""
    weights, widths, value = Weights(), (256, 128, 64, 32), "s"
    project = weights.layer("w", (128, 256 * 8 * 8), 128)
    body = [f"g = Gemm({LATENT}, {project}) f = Relu(g) s = Reshape(f, image)"]
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        w = weights.layer(f"w{i}", (inputs, outputs, 3, 3), inputs * 9 / 4)
        b = weights.layer(f"b{i}", (outputs,), 100)
        grows = "strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 1]"
        body.append(f"c{i} = ConvTranspose<{grows}>({value}, {w}, {b}) r{i} = Relu(c{i})")
        value = f"r{i}"
    last = weights.layer("last", (3, widths[-1], 3, 3), widths[-1] * 9)
    body.append(f"o = Conv<pads = [1, 1, 1, 1]>({value}, {last}) y = Sigmoid(o)")
    return built(f"float[N, 128] {LATENT}", body, weights, image=np.array([-1, 256, 8, 8]))


def built(latent: str, body: Sequence[str], weights: Weights, **shapes: npt.NDArray[np.int64]) -> ir.Model:
    text = f"generator ({latent}) => (float[N, 3, 64, 64] y) {{ {' '.join(body)} }}"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 16]> {text}')
    held = {**weights.arrays, **shapes}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in held.items())
    onnx.checker.check_model(model, full_check=True)
    return ir.from_proto(model)


MODELS: Mapping[str, Callable[[], ir.Model]] = MappingProxyType({"dcgan": dcgan, "vae": vae})


def rows(name: str, model: ir.Model, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """A row for each file, the float file first."""
    calibration, judges = (latents(model, options.samples, seed) for seed in (0, 1))
    with tempfile.TemporaryDirectory() as folder:
        made = make(model, calibration, Path(folder), options)
        report = measure(
            made,
            feed=judges[0],
            conditions=Conditions(threads=options.threads),
            max_seconds=options.max_seconds,
        )
        ratios = {r.name: (f"{r.speedup:.2f}", f"{r.low:.2f} - {r.high:.2f}") for r in report.ratios}
        images = {key: [Evaluator(path).run(feed) for feed in judges] for key, path in made.items()}
        nodes = {key: str(len(files.load(path).graph)) for key, path in made.items()}
    table = []
    for found in report.models:
        (difference,) = differences(images["float"], images[found.name])
        noise = "" if found.name == "float" else f"{difference.snr_db:.1f}"
        size, time = f"{found.file_bytes / 1024:,.0f}", f"{found.median_ms:.3f}"
        table.append(
            (name, found.name, nodes[found.name], size, time, *ratios.get(found.name, ("", "")), noise)
        )
    return table


def latents(model: ir.Model, count: int, seed: int) -> list[Feed]:
    rng = np.random.default_rng(seed)
    shape = [d if isinstance(d, int) else 1 for d in model.graph.inputs[0].shape or ()]
    return [{LATENT: rng.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def make(
    model: ir.Model, samples: Sequence[Feed], folder: Path, options: argparse.Namespace
) -> dict[str, Path]:
    """Every file by name. The passes are held to the outputs of the model they are given."""
    reference = Reference(model, samples[:1])

    def after(*specs: str) -> ir.Model:
        result, steps = run_passes(model, [parse(s) for s in (*EXACT_CHAIN, *specs)], reference, strict=True)
        if broken := [step for step in steps if step.status == "rolled back"]:
            raise SystemExit(f"{broken[0].step}: {broken[0].reason}")
        return result

    exact, split, last = after(), after(SPLIT), after(SPLIT_LAST)
    variants = {
        "float": exact,
        "float, split": split,
        "float, split channels last": last,
        "int8": quantized(exact, samples, options),
        "int8, split": quantized(split, samples, options),
        "int8, split channels last": quantized(last, samples, options),
    }
    paths = {name: files.save(m, folder / f"{i}.onnx") for i, (name, m) in enumerate(variants.items())}
    paths["quantize_static"] = static(paths["float"], samples, folder / "static.onnx")
    paths["quantize_static, split"] = static(paths["float, split"], samples, folder / "static_split.onnx")
    return paths


def quantized(model: ir.Model, samples: Sequence[Feed], options: argparse.Namespace) -> ir.Model:
    target, choice = target_of(options.target), QuantOptions(method=options.method)
    table = collect(model, samples, observed_values(model, choice, target), threads=options.threads)
    result = model.clone()
    InsertQdq(plan(model, table, choice, target)).apply(result)
    return result


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, samples: Sequence[Feed]) -> None:
        self._feeds = iter(samples)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def static(source: Path, samples: Sequence[Feed], out: Path) -> Path:
    quantize_static(
        source,
        out,
        Reader(samples),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    return out


if __name__ == "__main__":
    main()
