"""The formats besides static int8: size, speed and noise of the same model in each.

EDGEWISE_CORPUS=... python benchmarks/formats.py FOLDER [NAME ...] [--threads 1] [--max-seconds 20]

Every model goes through the exact passes first. Noise is that of all float outputs together over real
samples (signal over noise in dB, the worst output; states that a model hands on are outputs), speed comes
from one paired run of all files. The transformer has seeded weights and is exported into FOLDER once.
"""

from __future__ import annotations

import argparse
import math
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
from architectures import exported
from corpus import Array, classifiers, folder
from rich.console import Console
from rich.table import Table

from edgewise.optimizer import files
from edgewise.optimizer.pipeline import Reference, run_passes
from edgewise.optimizer.recipe import Recipe
from edgewise.passes import parse
from edgewise.passes.base import PassError
from edgewise.runtime.conditions import Conditions
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Evaluator, Feed, input_specs
from edgewise.runtime.latency import measure

FORMATS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "dynamic int8": ("quantize-dynamic",),
        "int4 in blocks": ("quantize-weights{bits: 4, block: 32}",),
        "int8 in blocks": ("quantize-weights{bits: 8, block: 32}",),
        "int8 stored": ("store-weights{bits: 8}",),
        "float16 stored": ("store-weights{bits: 16}",),
        "float16": ("convert-floats{to: float16}",),
        "bfloat16": ("convert-floats{to: bfloat16, provider: cpu}",),
    }
)
"""The passes that make each format of a model that has been through the exact ones."""

COLUMNS = ("model", "format", "edits", "KB", "of float", "SNR dB", "ms", "x float", "interval")
_SAMPLES = 32
_WINDOW, _CONTEXT, _STEP, _FRAME = 512, 64, 128, 512


@dataclass(frozen=True)
class Case:
    """A model, and feeds of what it is made for. The first feed is the one that is timed."""

    name: str
    path: Callable[[Path], Path]
    feeds: Callable[[ir.Model], Sequence[Feed]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-seconds", type=float, default=20.0)
    parser.add_argument("--only", default="", help="formats with this in their name")
    options = parser.parse_args()
    table = Table(*COLUMNS, title="formats")
    for case in CASES:
        if not options.names or case.name in options.names:
            for row in rows(case, options):
                table.add_row(*row)
            table.add_section()
    Console(width=160).print(table)


def rows(case: Case, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """A row for each format, the float file first; the reasons where a pass does nothing."""
    options.folder.mkdir(parents=True, exist_ok=True)
    model = files.load(case.path(options.folder))
    feeds = case.feeds(model)
    model, _ = run_passes(model, Recipe().chain, Reference(model, feeds[:1]))
    paths = {"float32": files.save(model, options.folder / f"{case.name}.float32.onnx", force=True)}
    notes = {"float32": ""}
    for name, specs in FORMATS.items():
        if options.only in name:
            made, notes[name] = converted(model, specs)
            if made is not None:
                file = f"{case.name}.{name.replace(', ', ' ').replace(' ', '-')}.onnx"
                paths[name] = files.save(made, options.folder / file, force=True)
    noise = {name: snr(paths["float32"], path, feeds) for name, path in paths.items()}
    running = {name: path for name, path in paths.items() if not isinstance(noise[name], str)}
    report = measure(
        running,
        feed=feeds[0],
        conditions=Conditions(threads=options.threads),
        max_seconds=options.max_seconds,
    )
    ratios = {r.name: f"{r.speedup:.2f} | {r.low:.2f} - {r.high:.2f}" for r in report.ratios}
    times = {m.name: f"{m.median_ms:.3f}" for m in report.models}
    whole = files.file_bytes(paths["float32"])
    return [
        _row(case.name, name, notes[name], paths.get(name), whole, noise, times, ratios) for name in notes
    ]


def _row(
    case: str,
    name: str,
    note: str,
    path: Path | None,
    whole: int,
    noise: Mapping[str, float | str],
    times: Mapping[str, str],
    ratios: Mapping[str, str],
) -> tuple[str, ...]:
    if path is None:
        return (case, name, note)
    size, quality = files.file_bytes(path), noise[name]
    decibel = quality if isinstance(quality, str) else f"{quality:.1f}"
    speed, _, interval = ratios.get(name, "").partition(" | ")
    kilobytes, share = f"{size / 1024:,.0f}", f"{size / whole:.2f}"
    return (case, name, note, kilobytes, share, decibel, times.get(name, ""), speed, interval)


def converted(model: ir.Model, specs: Sequence[str]) -> tuple[ir.Model | None, str]:
    """The model after the passes of a format and how much they edited, or None and why they did nothing."""
    copy, edits, refused = model.clone(), 0, {}
    try:
        for spec in specs:
            outcome = parse(spec).apply(copy)
            edits, refused = outcome.edits, dict(outcome.refused)
    except PassError as error:
        return None, str(error)
    reasons = ", ".join(f"{reason} ({count})" for reason, count in refused.items())
    return (copy, str(edits)) if edits else (None, reasons or "nothing to do")


def snr(original: Path, path: Path, feeds: Sequence[Feed]) -> float | str:
    """Signal over noise in dB of the worst float output, or why the file does not run."""
    try:
        before, after = Evaluator(original), Evaluator(path)
        pairs = [(before.run(feed), after.run(feed)) for feed in feeds]
    except InputError as error:
        return str(error)[:60]
    names = [name for name in before.outputs if pairs[0][0][name].dtype.kind == "f"]
    return min(_decibel([(x[name], y[name]) for x, y in pairs]) for name in names)


def _decibel(pairs: Sequence[tuple[Array, Array]]) -> float:
    signal = sum(float(np.square(x, dtype=np.float64).sum()) for x, _ in pairs)
    noise = sum(float(np.square(x.astype(np.float64) - y).sum()) for x, y in pairs)
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def speech() -> Array:
    """All recordings in a row: 16 kHz, -1 .. 1."""
    parts = []
    for path in sorted((folder() / "data" / "speech").glob("*.wav")):
        with wave.open(str(path)) as file:
            parts.append(np.frombuffer(file.readframes(file.getnframes()), np.int16))
    return np.concatenate(parts).astype(np.float32) / 2**15


def voice_windows(model: ir.Model) -> list[Feed]:
    """Windows of speech with the samples before them, each with the state that the one before left."""
    sound, run = speech(), Evaluator(model)
    state, rate, feeds = np.zeros((2, 1, 128), np.float32), np.array(16000, np.int64), []
    for start in range(_CONTEXT, _CONTEXT + _SAMPLES * _WINDOW, _WINDOW):
        feeds.append({"input": sound[None, start - _CONTEXT : start + _WINDOW], "state": state, "sr": rate})
        state = run.run(feeds[-1])["stateN"]
    return feeds


def spectra(model: ir.Model) -> list[Feed]:
    """Magnitudes of frames of speech, each with the state that the frame before left."""
    sound, run = speech(), Evaluator(model)
    frame, state = (spec.name for spec in input_specs(model))
    states, feeds = np.zeros((1, 2, 128, 2), np.float32), []
    for start in range(0, _SAMPLES * _STEP, _STEP):
        magnitude = np.abs(np.fft.rfft(sound[start : start + _FRAME])).astype(np.float32)
        feeds.append({frame: magnitude[None, None], state: states})
        states = run.run(feeds[-1])[run.outputs[1]]
    return feeds


def texts(model: ir.Model) -> list[Feed]:
    """First and last 1024 bytes of the files of this project."""
    (spec,) = input_specs(model)
    paths = sorted(Path(__file__).parents[1].glob("*/*.py"))[:_SAMPLES]
    contents = (path.read_bytes() for path in paths)
    rows_ = [np.frombuffer(c[:1024] + c[-1024:], np.uint8) for c in contents if len(c) >= 1024]
    return [{spec.name: row[None].astype(np.int32)} for row in rows_]


def normal(model: ir.Model) -> list[Feed]:
    """Seeded normal numbers, a batch of one."""
    rng, (spec,) = np.random.default_rng(0), input_specs(model)
    shape = tuple(size if isinstance(size, int) else 1 for size in spec.shape)
    return [{spec.name: rng.standard_normal(shape).astype(np.float32)} for _ in range(4)]


def images(model: ir.Model) -> list[Feed]:
    """Photographs that the classifier of that name was made for."""
    (spec,), (found,) = input_specs(model), [c for c in classifiers() if c.name == "squeezenet_fp32"]
    return [{spec.name: image} for image in found.test().every(40)]


def corpus(name: str) -> Callable[[Path], Path]:
    return lambda _: folder() / "models" / f"{name}.onnx"


CASES = (
    Case("magika_v3_3", corpus("magika_v3_3"), texts),
    Case("dtln_1", corpus("dtln_1"), spectra),
    Case("silero_vad", corpus("silero_vad"), voice_windows),
    Case("mlperftiny_ad_autoencoder", corpus("mlperftiny_ad_autoencoder"), normal),
    Case("squeezenet_fp32", corpus("squeezenet_fp32"), images),
    Case("encoder", lambda made: exported("encoder", "none", made), normal),
)


if __name__ == "__main__":
    main()
