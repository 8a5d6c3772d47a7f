"""onnxruntime's own static int8, one setting for the whole model, in a Python environment of its own.

    PYTHON -P benchmarks/uniform_int8.py REQUEST.json

makes a file by each recipe that the request names, from the same samples, and prints a line of JSON for
each: its file and seconds, or the reason of its failure. A recipe is `quantize_static` after
`quant_pre_process`, as onnxruntime's guide has it; `DEFAULTS` is `quantize_static` with nothing but samples.
The environment needs onnxruntime, onnx and sympy.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

Array = npt.NDArray[Any]
Feed = Mapping[str, Array]

DEFAULTS = "defaults"

_TYPES = MappingProxyType({"u8": QuantType.QUInt8, "s8": QuantType.QInt8})
_FORMATS = MappingProxyType({"QDQ": QuantFormat.QDQ, "QOperator": QuantFormat.QOperator})


@dataclass(frozen=True)
class Uniform:
    """One setting for every node: `types` are those of activations and weights, u8s8 for example."""

    format: str
    types: str
    per_channel: bool
    reduce_range: bool
    method: str = "MinMax"

    def __str__(self) -> str:
        grain = "channel" if self.per_channel else "tensor"
        words = [self.format, self.types, grain, *(["7 bits"] if self.reduce_range else [])]
        return " ".join([*words, *([self.method] if self.method != "MinMax" else [])])

    def make(self, source: Path, reader: CalibrationDataReader, out: Path, cache: Path) -> None:
        quantize_static(
            source,
            out,
            reader,
            quant_format=_FORMATS[self.format],
            activation_type=_TYPES[self.types[:2]],
            weight_type=_TYPES[self.types[2:]],
            per_channel=self.per_channel,
            reduce_range=self.reduce_range,
            calibrate_method=CalibrationMethod[self.method],
            calibration_cache_path=cache,
        )


_PAIRS = ("u8s8", "s8s8", "u8u8")

FOR_SPEED = tuple(Uniform(*choice) for choice in product(_FORMATS, _PAIRS, (True, False), (False, True)))
"""Whatever may decide how fast the file is."""

FOR_ACCURACY = (
    *(recipe for recipe in FOR_SPEED if recipe.format == "QDQ"),
    *(
        Uniform("QDQ", types, True, types == "u8s8", method)
        for types, method in product(("u8s8", "u8u8"), ("Percentile", "Entropy"))
    ),
)
"""Whatever may decide how good its answers are; the two formats hold the same numbers."""

_RECIPES = MappingProxyType({str(recipe): recipe for recipe in (*FOR_SPEED, *FOR_ACCURACY)})


@dataclass(frozen=True)
class Attempt:
    """What became of a recipe: a file and the seconds it took, or the line in which it failed."""

    recipe: str
    path: Path
    seconds: float = 0.0
    failure: str = ""


def attempts(
    python: str, source: Path, feeds: Sequence[Feed], recipes: Sequence[str], folder: Path
) -> tuple[Attempt, ...]:
    """Every recipe in the environment of `python`, each in a process of its own.

    Files go to `folder`, which is emptied before: onnxruntime would use the ranges it finds there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    samples, request = folder / "samples.npz", folder / "request.json"
    np.savez(samples, **{f"{i:05d}{name}": a for i, feed in enumerate(feeds) for name, a in feed.items()})
    request.write_text(json.dumps([str(source.resolve()), str(samples), list(recipes)]))
    command = [python, "-P", __file__, str(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    made = {line["recipe"]: Attempt(**{**line, "path": Path(line["path"])}) for line in lines}
    why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return tuple(made.get(name, Attempt(name, folder, failure=why)) for name in recipes)


def version(python: str) -> str:
    """onnxruntime's version in the environment of `python`."""
    code = "import importlib.metadata as m; print(m.version('onnxruntime'))"
    return subprocess.run(
        [python, "-P", "-c", code], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """The samples, read one at a time from where `attempts` put them."""

    def __init__(self, samples: Path) -> None:
        self._file = np.load(samples, allow_pickle=False)
        self._feeds = self._read()

    def _read(self) -> Iterator[Feed]:
        keys = sorted(self._file.files)
        for number in sorted({key[:5] for key in keys}):
            yield {key[5:]: self._file[key] for key in keys if key[:5] == number}

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def make_one(name: str, source: Path, prepared: Path, samples: Path, out: Path) -> float:
    """Make the file of a recipe; the seconds it took."""
    logging.getLogger().setLevel(logging.ERROR)
    start = time.perf_counter()
    if name == DEFAULTS:
        quantize_static(source, out, Reader(samples))
    else:
        recipe = _RECIPES[name]
        cache = out.parent / f"{recipe.method}.json"  # ranges depend on the method alone
        recipe.make(prepared, Reader(samples), out, cache)
    return time.perf_counter() - start


def prepare(source: Path, out: Path, *, shapes: bool) -> float:
    """onnxruntime's own preparation; the seconds it took."""
    start = time.perf_counter()
    quant_pre_process(source, out, auto_merge=True, skip_symbolic_shape=not shapes)
    return time.perf_counter() - start


def apart(work: Callable[..., float], *given: Any, **options: Any) -> tuple[float, str]:
    """Seconds, or why it failed: in a process of its own, which may raise whatever it likes, or crash."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        future = pool.submit(work, *given, **options)
        if (error := future.exception()) is None:
            return future.result(), ""
    lines = str(error).strip().splitlines() or [""]
    return 0.0, f"{type(error).__name__}: {lines[0]}"[:200]


def main() -> None:
    request = Path(sys.argv[1])
    source_name, samples_name, names = json.loads(request.read_text())
    source, samples = Path(source_name), Path(samples_name)
    prepared = request.parent / "prepared.onnx"
    before, failure = apart(prepare, source, prepared, shapes=True)
    if failure:  # what the error of a model whose shapes are not to be inferred advises
        before, failure = apart(prepare, source, prepared, shapes=False)
    for number, name in enumerate(names):
        out = request.parent / f"{number}.onnx"
        start = source if failure else prepared
        seconds, why = apart(make_one, name, source, start, samples, out)
        total = seconds if name == DEFAULTS else before + seconds
        print(json.dumps({**asdict(Attempt(name, out, total, why)), "path": str(out)}), flush=True)


if __name__ == "__main__":
    main()
