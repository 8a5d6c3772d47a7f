"""Static int8, everything that is promised of it, beside onnxruntime's own recipes.

    EDGEWISE_CORPUS=... python benchmarks/int8.py [--rivals PYTHON] [--rows a,b,c,d,e,f] [--samples 128]
        [--threads 1] [--max-seconds 30] [--images 1000] [--json FILE [--resume]] [--folder FOLDER] [NAME ...]

    a   latency against float, of all models of the corpus and of architectures with seeded weights
    b   top-1 of the trained classifiers
    c   the same after channels were rescaled so that coarse int8 breaks down
    d   time and memory of calibration
    e   what the file loses on a CPU without VNNI
    f   seconds of the whole command

`--rivals` names the Python of an environment with onnxruntime, onnx and sympy. Rivals get the same samples
and the same original file. Names choose models. What is found is written to `--json` as it comes; with
`--resume` only what is missing there, or failed, is done. Ctrl-C shows what there is.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import collapse
import uniform_int8
from corpus import classifiers
from int8_accuracy import accuracy_rows, accuracy_summary, collapse_rows, collapse_summary
from int8_costs import (
    calibration_rows,
    calibration_summary,
    command_rows,
    portable_rows,
    portable_summary,
)
from int8_jobs import Job, Ledger, Row, Setting
from int8_latency import latency_rows, latency_summary
from int8_nets import Net, nets

from edgewise.runtime.machine import describe

_CALIBRATED = ("mnv2_100_224_tfqat_fp32", "squeezenet_fp32", "cifar_resnet56", "resnet50")
_COMMANDED = ("mnv2_100_224_tfqat_fp32",)


def main() -> None:
    options = arguments()
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        setting = Setting(
            options.rivals, folder, options.samples, options.images, options.threads, options.max_seconds
        )
        ledger = Ledger(options.json, conditions(setting), resume=options.resume)
        chosen = [(letter, PARTS[letter]) for letter in options.rows.split(",")]
        try:
            for letter, part in chosen:
                ledger.run(Job(letter, name, run) for name, run in part.jobs(options.names, setting))
        except KeyboardInterrupt:
            print("interrupted: this is what there is", flush=True)
        for letter, part in chosen:
            ledger.show(letter, part.title, part.summary)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--rivals", metavar="PYTHON", default=sys.executable)
    parser.add_argument("--rows", default=",".join(PARTS))
    parser.add_argument("--samples", type=int, default=128, help="inputs to calibrate with")
    parser.add_argument("--images", type=int, default=1000, help="labelled images to judge by, at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-seconds", type=float, default=30.0, help="of every paired run")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--folder", type=Path, help="keeps exported nets and what was made of all")
    options = parser.parse_args()
    if unknown := set(options.rows.split(",")) - PARTS.keys():
        parser.error(f"no row {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    return options


def conditions(setting: Setting) -> dict[str, str]:
    """What the figures depend on beside the code."""
    return {
        "machine": str(describe()),
        "onnxruntime": importlib.metadata.version("onnxruntime"),
        "the rivals' onnxruntime": uniform_int8.version(setting.rivals),
        "threads": str(setting.threads),
        "samples": str(setting.samples),
    }


Work = tuple[str, Callable[[], Sequence[Row]]]


@dataclass(frozen=True)
class Part:
    """One row of what is to be reached: its figures by name, and what they come to."""

    title: str
    jobs: Callable[[Collection[str], Setting], Iterator[Work]]
    summary: Callable[[Sequence[Row]], list[str]] = lambda rows: []


def wanted(
    names: Collection[str], setting: Setting, among: Collection[str] = ()
) -> Iterator[tuple[str, Callable[[], Net]]]:
    """The nets that were asked for, or all, and of these only some where only some count."""
    for name, make in nets(setting.folder):
        if (not names or name in names) and (not among or name in among):
            yield name, make


def on_net(
    rows: Callable[[Net, Setting], Sequence[Row]], make: Callable[[], Net], setting: Setting
) -> Sequence[Row]:
    return rows(make(), setting)


def latency_jobs(names: Collection[str], setting: Setting) -> Iterator[Work]:
    for name, make in wanted(names, setting):
        yield name, partial(on_net, latency_rows, make, setting)


def accuracy_jobs(names: Collection[str], setting: Setting) -> Iterator[Work]:
    labelled = {classifier.name: classifier for classifier in classifiers()}
    for name, make in wanted(names, setting, labelled):
        yield name, partial(on_net, partial(accuracy_rows, labelled[name]), make, setting)


def collapse_jobs(names: Collection[str], setting: Setting) -> Iterator[Work]:
    for c in classifiers():
        if c.name in (names or collapse.NAMES):
            yield c.name, partial(collapse_rows, c, setting)


def portable_jobs(names: Collection[str], setting: Setting) -> Iterator[Work]:
    for c in classifiers():
        if not names or c.name in names:
            yield c.name, partial(portable_rows, c, setting)


def calibration_jobs(names: Collection[str], setting: Setting) -> Iterator[Work]:
    for name, make in wanted(names, setting, _CALIBRATED):
        yield name, partial(on_net, calibration_rows, make, setting)


def command_jobs(names: Collection[str], setting: Setting) -> Iterator[Work]:
    for name, make in wanted(names, setting, _COMMANDED):
        yield name, partial(on_net, command_rows, make, setting)


PARTS: Mapping[str, Part] = MappingProxyType(
    {
        "a": Part("latency against float", latency_jobs, latency_summary),
        "b": Part("top-1 of trained classifiers", accuracy_jobs, accuracy_summary),
        "c": Part("top-1 after channels were rescaled", collapse_jobs, collapse_summary),
        "d": Part("calibration over plain inference, and its memory", calibration_jobs, calibration_summary),
        "e": Part("top-1 on x86 with and without VNNI", portable_jobs, portable_summary),
        "f": Part("the whole command, 64 samples, all cores", command_jobs),
    }
)


if __name__ == "__main__":
    main()
