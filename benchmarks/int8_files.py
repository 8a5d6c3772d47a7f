"""The int8 files that are compared: edgewise's, with no option chosen, and the rivals'."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import uniform_int8
from int8_jobs import Setting
from int8_nets import CALIBRATE, Net

from edgewise.optimizer import files, quantize
from edgewise.optimizer.pipeline import Reference, run_passes
from edgewise.optimizer.recipe import Recipe
from edgewise.runtime.errors import EdgewiseError
from edgewise.runtime.evaluate import Feed


@dataclass(frozen=True)
class Made:
    """The file that `edgewise quantize` leaves a user with, and what it is."""

    path: Path
    what: str
    seconds: float


@cache
def ours(net: Net, setting: Setting, *, smallest: bool = False) -> Made:
    """The file by the defaults; the model itself where the answer is that it should stay as it is.

    The smallest file is int8 where accuracy allows it, though float may be faster.
    """
    out = setting.folder / f"{net.name}.{'smallest' if smallest else 'edgewise'}.onnx"
    recipe = Recipe(threads=setting.threads, objective="size" if smallest else "latency")
    data = net.samples(CALIBRATE, setting.samples)
    start = time.perf_counter()
    try:
        report = quantize(net.path, out, data=data, recipe=recipe, force=True)
    except EdgewiseError as error:
        return Made(net.path, f"none: {error}"[:60], time.perf_counter() - start)
    return Made(out, report.chosen, time.perf_counter() - start)


def after_exact(net: Net, feed: Feed, setting: Setting) -> Path:
    """The model after edgewise's exact passes."""
    model = files.load(net.path)
    exact, _ = run_passes(model, Recipe().chain, Reference(model, [feed]))
    return files.save(exact, setting.folder / f"{net.name}.exact.onnx", force=True)


def theirs(
    source: Path, feeds: Sequence[Feed], recipes: Sequence[str], setting: Setting, purpose: str
) -> tuple[uniform_int8.Attempt, ...]:
    """The rivals' files from their own environment, in a folder for `purpose`."""
    folder = setting.folder / f"{source.stem}-{purpose}"
    return uniform_int8.attempts(setting.rivals, source, feeds, recipes, folder)
