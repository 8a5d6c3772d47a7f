"""Pruning, everything that is promised of it, beside Torch-Pruning and onnxsim.

    EDGEWISE_CORPUS=... python benchmarks/prune.py [--rivals-python PYTHON] [--rows ROW,...] [--samples 2000]
        [--threads 1] [--max-seconds 30] [--json FILE [--resume]] [--folder FOLDER] [NAME ...]

    reach       parameters removed when every width is halved
    accuracy    top-1 at half the MACs, without labels
    scores      top-1 at half the MACs by the score that chooses the channels
    latency     speed at half the MACs and after a slight cut, in float and int8
    int8        pruned and in int8 at once, beside int8 alone
    generators  speed of image generators whose images stay what they are

`--rivals-python`, or EDGEWISE_RIVALS, names the Python of an environment with torch-pruning, onnxsim and
what edgewise's exporter needs: `pip install -c constraints.txt ".[torch]" torch-pruning onnxsim`. Without
one there are edgewise's figures alone. Rivals get the same nets and the same samples. Nobody gets labels,
but in row int8, whose bound is one on top-1: by half of the test images; the others judge.
Names choose nets. What is found is written to `--json` as it comes; with `--resume` only what is missing
there, or failed, is done. Ctrl-C shows what there is.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

from corpus import Classifier, classifiers
from int8_jobs import Job, Ledger, Row, Setting
from int8_nets import Net, seeded, trained
from prune_accuracy import MOST, accuracy_rows, accuracy_summary, score_rows, score_summary
from prune_generators import GENERATORS, generator_rows, generator_summary
from prune_latency import (
    RESNETS,
    latency_rows,
    latency_summary,
    resnet18,
    together_rows,
    together_summary,
)
from prune_reach import GOALS, reach_rows, reach_summary

from edgewise.runtime.machine import describe

Work = tuple[str, Callable[[], Sequence[Row]]]


def main() -> None:
    options = arguments()
    logging.getLogger().setLevel(logging.ERROR)
    if not options.rivals_python:
        print("no --rivals-python: rivals are left out", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        setting = Setting(
            options.rivals_python,
            folder,
            samples=options.samples,
            threads=options.threads,
            max_seconds=options.max_seconds,
        )
        ledger = Ledger(options.json, conditions(setting), resume=options.resume)
        chosen = [(row, PARTS[row]) for row in options.rows.split(",")]
        try:
            for row, part in chosen:
                ledger.run(Job(row, name, run) for name, run in part.jobs(options.names, setting))
        except KeyboardInterrupt:
            print("interrupted: this is what there is", flush=True)
        for row, part in chosen:
            ledger.show(row, part.title, part.summary)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--rivals-python", metavar="PYTHON", default=os.environ.get("EDGEWISE_RIVALS", ""))
    parser.add_argument("--rows", default=",".join(PARTS))
    parser.add_argument("--samples", type=int, default=2000, help="inputs without labels to prune by")
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
        "torch": importlib.metadata.version("torch"),
        "rivals": setting.rivals or "none",
        "threads": str(setting.threads),
        "samples": str(setting.samples),
    }


@dataclass(frozen=True)
class Part:
    """One row of what is to be reached: its figures by name, and what they come to."""

    title: str
    jobs: Callable[[Collection[str], Setting], Iterator[Work]]
    summary: Callable[[Sequence[Row]], list[str]]


def reach_jobs(names: Collection[str], setting: Setting) -> Iterator[Work]:
    for name in GOALS:
        if not names or name in names:
            yield name, partial(reach_rows, name, setting)


ClassifierRows = Callable[[Classifier, Net, Setting], Sequence[Row]]


def classifier_jobs(
    rows: ClassifierRows, among: Collection[str], names: Collection[str], setting: Setting
) -> Iterator[Work]:
    """Those of the trained classifiers that were asked for; all of them, or where only some count, those."""
    for c in classifiers():
        if (not names or c.name in names) and (not among or c.name in among):
            yield c.name, lambda c=c: rows(c, trained(c.path), setting)  # type: ignore[misc]


def latency_jobs(names: Collection[str], setting: Setting) -> Iterator[Work]:
    paths = {c.name: c.path for c in classifiers()}
    for name in RESNETS:
        if not names or name in names:
            yield name, lambda name=name: latency_rows(_resnet(name, paths, setting), setting)  # type: ignore[misc]


def _resnet(name: str, paths: Mapping[str, Path], setting: Setting) -> Net:
    if name in paths:
        return trained(paths[name])
    return resnet18(setting.folder) if name == "resnet18" else seeded(name, setting.folder)


def generator_jobs(names: Collection[str], setting: Setting) -> Iterator[Work]:
    for name in GENERATORS:
        if not names or name in names:
            yield name, partial(generator_rows, name, setting)


PARTS: Mapping[str, Part] = MappingProxyType(
    {
        "reach": Part("every width halved", reach_jobs, reach_summary),
        "accuracy": Part(
            "top-1 at half the MACs, no labels",
            partial(classifier_jobs, accuracy_rows, tuple(MOST)),
            accuracy_summary,
        ),
        "scores": Part(
            "top-1 at half the MACs by the score",
            partial(classifier_jobs, score_rows, ()),
            score_summary,
        ),
        "latency": Part("speed at half the MACs", latency_jobs, latency_summary),
        "int8": Part(
            "pruned and int8, one point of top-1 to spend",
            partial(classifier_jobs, together_rows, ()),
            together_summary,
        ),
        "generators": Part("image generators at 30 dB", generator_jobs, generator_summary),
    }
)


if __name__ == "__main__":
    main()
