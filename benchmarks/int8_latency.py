"""How fast int8 is beside float: edgewise's file, and the best that one setting for all nodes can do.

The setting is chosen for every model by its own latency on this machine, from files that were calibrated
with a few samples, which decide nothing about speed. What is reported is a paired run of its own, of files
made from all samples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from int8_files import after_exact, ours, theirs
from int8_jobs import Row, Setting
from int8_nets import CALIBRATE, JUDGE, Net
from uniform_int8 import DEFAULTS, FOR_SPEED, Attempt

from edgewise.optimizer.comparison import differences
from edgewise.runtime.conditions import Conditions
from edgewise.runtime.evaluate import Evaluator, Feed
from edgewise.runtime.latency import LatencyReport, Ratio, measure

FLOAT, OURS, BEST, AFTER = "float", "edgewise", "best uniform", "best uniform after the exact passes"

_FEW = 4  # samples
_AT_ONCE = 6  # files in one paired run
_JUDGES = 16


def latency_rows(net: Net, setting: Setting) -> list[Row]:
    """The line of a net: what edgewise wrote, and the rivals' best files beside it."""
    feeds, judges = net.feeds(CALIBRATE, setting.samples), net.feeds(JUDGE, _JUDGES)
    made, exact = ours(net, setting), after_exact(net, feeds[0], setting)
    best, best_after = (fastest(source, feeds, setting) for source in (net.path, exact))
    recipes = {BEST: (net.path, best), AFTER: (exact, best_after), DEFAULTS: (net.path, DEFAULTS)}
    paths = {FLOAT: net.path, OURS: made.path} | rivals(recipes, feeds, setting)
    report = raced(paths, judges[0], setting, setting.max_seconds)
    ratios = {ratio.name: ratio for ratio in report.ratios}
    mine, theirs_best = ratios.get(OURS), ratios.get(BEST)
    noise = {name: decibels(net.path, paths[name], judges) for name in (OURS, BEST) if name in ratios}
    row = {
        "model": net.title or net.name,
        "inputs": "real" if net.source else "random",
        "float ms": report.models[0].median_ms,
        "edgewise wrote": made.what,
        "x float": speedup(mine),
        "interval": interval(mine),
        "verdict": mine.verdict if mine else "",
        "dB": noise.get(OURS),
        "best uniform recipe": best or "none runs",
        "its x float": speedup(theirs_best),
        "its interval": interval(theirs_best),
        "its dB": noise.get(BEST),
        "after exact passes": best_after or "none runs",
        "its x float there": speedup(ratios.get(AFTER)),
        "defaults x float": speedup(ratios.get(DEFAULTS)),
        "edgewise / best": mine.speedup / theirs_best.speedup if mine and theirs_best else None,
    }
    return [row]


def rivals(
    recipes: Mapping[str, tuple[Path, str]], feeds: Sequence[Feed], setting: Setting
) -> dict[str, Path]:
    """The files of the recipes that run, each made from a model of its own, with all samples."""
    found: dict[str, Path] = {}
    for name, (source, recipe) in recipes.items():
        for made in theirs(source, feeds, [recipe], setting, name) if recipe else ():
            found |= {} if made.failure else {name: made.path}
    return found


def fastest(source: Path, feeds: Sequence[Feed], setting: Setting) -> str:
    """The recipe whose file runs fastest; none where none runs."""
    made = theirs(source, feeds[:_FEW], [str(recipe) for recipe in FOR_SPEED], setting, "speed")
    files = {a.recipe: a.path for a in distinct([a for a in made if not a.failure])}
    names, found = list(files), dict[str, float]()
    for start in range(0, len(names), _AT_ONCE):
        group = {name: files[name] for name in names[start : start + _AT_ONCE]}
        report = raced({FLOAT: source, **group}, feeds[0], setting, setting.max_seconds / 2)
        found |= {ratio.name: ratio.speedup for ratio in report.ratios}
    for attempt in made:
        attempt.path.unlink(missing_ok=True)
    return max(found, key=found.__getitem__, default="")


def distinct(made: Sequence[Attempt]) -> list[Attempt]:
    """One of those whose files differ in nothing but the numbers they hold: these run equally fast."""
    return list({structure(attempt.path): attempt for attempt in reversed(made)}.values())[::-1]


def structure(path: Path) -> str:
    """A digest of a model's operators and of the types and shapes of its weights."""
    graph = onnx.load(path).graph
    digest = hashlib.sha256()
    for node in graph.node:
        digest.update(f"{node.domain}:{node.op_type}".encode())
        digest.update(b"".join(sorted(a.SerializeToString() for a in node.attribute)))
    weights = sorted(f"{w.name} {w.data_type} {list(w.dims)}" for w in graph.initializer)
    digest.update("\n".join(weights).encode())
    return digest.hexdigest()


def raced(paths: Mapping[str, Path], feed: Feed, setting: Setting, seconds: float) -> LatencyReport:
    conditions = Conditions(threads=setting.threads)
    return measure(paths, feed=feed, conditions=conditions, max_seconds=seconds)


def decibels(reference: Path, path: Path, judges: Sequence[Feed]) -> float:
    """The signal-to-noise ratio of the worst output, at most 200."""
    outputs = [
        [evaluator.run(feed) for feed in judges] for evaluator in (Evaluator(reference), Evaluator(path))
    ]
    ratios = [found.snr_db for found in differences(*outputs)]
    return min([200.0, *(ratio for ratio in ratios if not math.isnan(ratio))])


def speedup(ratio: Ratio | None) -> float | None:
    return None if ratio is None else ratio.speedup


def interval(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.low:.2f} - {ratio.high:.2f}"


def latency_summary(rows: Sequence[Row]) -> list[str]:
    """What the issue of it all is: nothing slower than float, and how far the best recipe is behind."""
    quotients = [row["edgewise / best"] for row in rows if row["edgewise / best"]]
    slower = [str(row["model"]) for row in rows if row["verdict"] == "slower"]
    below = [str(row["model"]) for row in rows if row["edgewise / best"] and row["edgewise / best"] < 1]
    lines = [f"slower than float beyond noise: {', '.join(slower) or 'none'} of {len(rows)} (reach: none)"]
    if quotients:
        mean = float(np.exp(np.mean(np.log(quotients))))
        lines.append(
            f"edgewise / best uniform recipe, geometric mean of {len(quotients)}: {mean:.3f} (reach: 1.15)"
        )
        lines.append(f"behind the best uniform recipe: {', '.join(below) or 'none'}")
    return lines
