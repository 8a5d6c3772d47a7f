"""The pruned files that are compared, edgewise's and Torch-Pruning's, and what is left in them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import prune_rival
from corpus import Classifier, Labelled
from int8_jobs import Row, Setting
from int8_nets import CALIBRATE, Net
from prune_rival import Request
from zeroed import parameters

from edgewise.calibration.data import Samples, from_arrays
from edgewise.optimizer import files, prune, quantize
from edgewise.optimizer.choice import Objective
from edgewise.optimizer.inspection import count_macs
from edgewise.optimizer.recipe import Format, Prune, Quantize, Recipe
from edgewise.runtime.errors import EdgewiseError
from edgewise.runtime.evaluate import input_specs
from edgewise.runtime.foreign import foreign_code

HALF = 0.5
"""The share of the MACs that stays."""


@dataclass(frozen=True)
class Made:
    """A file and the seconds it took, or the line in which it failed."""

    path: Path
    seconds: float = 0.0
    failure: str = ""


def ours(
    net: Net,
    setting: Setting,
    name: str,
    *,
    int8: bool = False,
    form: Format = "auto",
    short_names: bool = False,
    metric: str = "",
    whatever_it_costs: bool = False,
    objective: Objective = "latency",
    validation: Samples | None = None,
    **by: Any,
) -> Made:
    """What `edgewise prune` makes of a net by these options, from inputs without labels.

    Some of them judge, or those for `validation`. In int8, stored in a `form`, it may cost as much of the
    metric as by default, or `whatever_it_costs`.
    """
    out = setting.folder / f"{net.name}.{name}.onnx"
    recipe = Recipe(
        prune=Prune(**by),
        quantize=Quantize(format=form) if int8 else None,
        metric=metric or None,
        objective=objective,
        short_names=short_names,
        threads=setting.threads,
    )
    if whatever_it_costs:
        recipe = recipe.with_options(objective="size", max_drop=1.0)
    given = {"data": samples(net, setting), "validation": validation}
    return attempted(out, lambda: prune(net.path, out, **given, recipe=recipe, force=True))


def in_int8(source: Path, net: Net, setting: Setting) -> Made:
    """A file in int8, whatever it costs in accuracy."""
    out = setting.folder / f"{source.stem}.int8.onnx"
    recipe = Recipe(threads=setting.threads, objective="size", max_drop=1.0)
    return attempted(
        out, lambda: quantize(source, out, data=samples(net, setting), recipe=recipe, force=True)
    )


def int8_alone(net: Net, setting: Setting, validation: Samples) -> Made:
    """The fastest that `edgewise quantize` makes within a point of the metric."""
    out = setting.folder / f"{net.name}.int8-alone.onnx"
    recipe, given = Recipe(threads=setting.threads), {"data": samples(net, setting), "validation": validation}
    return attempted(out, lambda: quantize(net.path, out, **given, recipe=recipe, force=True))


def labelled(images: Labelled, classifier: Classifier) -> Samples:
    """Images and their labels, as edgewise takes them."""
    specs = input_specs(files.load(classifier.path))
    labels = images.labels + classifier.first_class
    return from_arrays({specs[0].name: np.concatenate(list(images))}, specs, labels=labels)


def attempted(out: Path, make: Callable[[], object]) -> Made:
    """What is made at `out`; whatever goes wrong is an answer too."""
    start = time.perf_counter()
    try:
        with foreign_code("failed"):
            make()
    except EdgewiseError as error:
        return Made(out, time.perf_counter() - start, str(error))
    return Made(out, time.perf_counter() - start)


@cache
def samples(net: Net, setting: Setting) -> Samples:
    """The inputs that edgewise gets, without labels."""
    return net.samples(CALIBRATE, setting.samples)


def theirs(net: Net, setting: Setting, name: str, *, estimated: bool = False, **goal: Any) -> Made:
    """What Torch-Pruning makes of the same net.

    With `estimated` its batch norms see the inputs that edgewise gets.
    """
    images, out = Path(), setting.folder / f"{net.name}.{name}.torch-pruning.onnx"
    if estimated and setting.rivals:
        images = setting.folder / f"{net.name}.images.npy"
        feeds = net.feeds(CALIBRATE, setting.samples)
        np.save(images, np.concatenate([next(iter(feed.values())) for feed in feeds]))
    source = net.name if net.title else str(net.path)
    request = Request(source, str(out), images=str(images) if images.name else "", **goal)
    found = prune_rival.attempt(setting.rivals, request)
    return Made(out, found.seconds, found.failure)


def left(before: Path, after: Path) -> Row:
    """Percent of the MACs, the parameters and the bytes that stay."""
    old, new = files.load(before), files.load(after)
    return {
        "MACs %": 100 * count_macs(new).total / count_macs(old).total,
        "parameters %": 100 * parameters(new) / parameters(old),
        "bytes %": 100 * files.file_bytes(after) / files.file_bytes(before),
    }


def reached(rows: Sequence[Row], column: str = "reached") -> str:
    """How many of the lines that have something to reach do so, and which do not."""
    judged = [row for row in rows if row.get(column) is not None]
    short = [
        " ".join(str(row[key]) for key in ("model", "file") if key in row)
        for row in judged
        if not row[column]
    ]
    return f"{len(judged) - len(short)} of {len(judged)}; missed: {', '.join(short) or 'none'}"


def present(made: Mapping[str, Made]) -> dict[str, Path]:
    """The files that there are."""
    return {name: m.path for name, m in made.items() if not m.failure}
