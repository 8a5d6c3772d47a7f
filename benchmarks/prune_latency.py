"""How much faster networks become: at half the MACs, at a cut of one twentieth, and pruned and in int8.

Every figure is of one paired run with the file it is held against. At half the MACs channels and branches
leave for what they save of the time (`--cost latency`), in float or in int8; by the MACs alone is a line of
its own. Torch-Pruning's result goes through the same exporter, and into int8 by the same `quantize`. Trained
nets are refitted, for that tells which of several ways to cut is nearest; nothing learns, for numbers do not
change how long they take.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import architectures
from corpus import Classifier
from int8_accuracy import Judges, line
from int8_jobs import Row, Setting
from int8_latency import raced
from int8_nets import JUDGE, Net, seeded
from prune_files import (
    HALF,
    Made,
    in_int8,
    int8_alone,
    labelled,
    left,
    ours,
    present,
    reached,
    theirs,
)

RESNETS = ("cifar_resnet20", "cifar_resnet56", "resnet18", "resnet50")

_SLIGHT = 0.95  # of the MACs
_FEW = 64  # inputs of seeded nets, enough to choose channels and scales for a race
_FASTER = 1.7
_HALF_OURS, _SLIGHT_OURS = "edgewise, half", "edgewise, a twentieth less"
_BY_MACS = "edgewise, half, by MACs alone"
_HALF_THEIRS, _ROUND_THEIRS = "Torch-Pruning, half", "Torch-Pruning, half, multiples of 8"
_TOGETHER, _INT8 = "pruned and int8", "int8 alone"
_FASTER_TOGETHER, _SMALLER, _POINT = 1.3, 6.0, 1.0
_EFFORT, _TRIALS = 12, 4  # of 1 and 6: few amounts, learned for long


def resnet18(folder: Path) -> Net:
    """Like ResNet-50 of `int8_nets`, on the same photographs."""
    path = architectures.exported("resnet18", "none", folder)
    return dataclasses.replace(seeded("resnet50", folder), name="resnet18", path=path, title="ResNet-18")


def latency_rows(net: Net, setting: Setting) -> list[Row]:
    """A line for every file in float, and one for each of the halves in int8."""
    few = dataclasses.replace(setting, samples=_FEW) if net.title else setting
    recover = "none" if net.title else "closed-form"
    bare = {"recover": recover, "metric": "fidelity"}  # seeded nets have one answer to everything
    made = {
        _HALF_OURS: ours(net, few, "half", max_macs=HALF, cost="latency", **bare),
        _BY_MACS: ours(net, few, "by-macs", max_macs=HALF, **bare),
        _SLIGHT_OURS: ours(net, few, "slight", max_macs=_SLIGHT, cost="latency", **bare),
        _HALF_THEIRS: theirs(net, few, "half", macs=HALF),
        _ROUND_THEIRS: theirs(net, few, "round", macs=HALF, multiple=8),
        "Torch-Pruning, a twentieth less": theirs(net, few, "slight", macs=_SLIGHT),
    }
    halves = [name for name in (_BY_MACS, _HALF_THEIRS, _ROUND_THEIRS) if not made[name].failure]
    small = {name: in_int8(made[name].path, net, few) for name in halves}
    for_int8 = {"max_macs": HALF, "cost": "latency", **bare}
    small[_HALF_OURS] = ours(net, few, "half-int8", int8=True, whatever_it_costs=True, **for_int8)
    rows = lines(net, net.path, made, "float", few)
    return rows + lines(net, in_int8(net.path, net, few).path, small, "int8", few)


def lines(net: Net, base: Path, made: Mapping[str, Made], kind: str, setting: Setting) -> list[Row]:
    """A line for every file, raced against the one at `base`."""
    paths = present(made)
    feed = net.feeds(JUDGE, 1)[0]
    report = raced({kind: base, **paths}, feed, setting, setting.max_seconds)
    times = {found.name: found.median_ms for found in report.models}
    ratios = {ratio.name: ratio for ratio in report.ratios}
    rows: list[Row] = []
    for name, m in made.items():
        row: Row = {"model": net.title or net.name, "file": name, "in": kind}
        if m.failure or name not in ratios:
            rows.append({**row, "failure": m.failure or "does not run"})
            continue
        ratio = ratios[name]
        figures = {"ms": times[name], "as it was, ms": times[kind], "x": ratio.speedup}
        words = {"interval": f"{ratio.low:.2f} - {ratio.high:.2f}", "verdict": ratio.verdict}
        reach = {_HALF_OURS: ratio.speedup >= _FASTER, _SLIGHT_OURS: ratio.verdict != "slower"}.get(name)
        rows.append({**row, **left(base, m.path), **figures, **words, "reached": reach})
    return rows


def latency_summary(rows: Sequence[Row]) -> list[str]:
    """What is fast enough at half the MACs, and what became slower by a slight cut."""
    slower = [f"{r['model']} {r['file']}" for r in rows if r.get("verdict") == "slower"]
    return [
        f"{_FASTER}x at half the MACs: {reached([r for r in rows if r['file'] == _HALF_OURS])}",
        f"slower than what it was made of: {', '.join(slower) or 'none'}",
    ]


def together_rows(classifier: Classifier, net: Net, setting: Setting) -> list[Row]:
    """Pruned and int8 at once beside int8 alone, of the same images, and top-1 of all.

    One half of the test images holds edgewise to its bound, the other half judges here. Time and bytes are
    to be saved alike, so it is stored as operators on integers, which need fewer nodes, under short names;
    int8 alone is the fastest there is.
    """
    known, test = classifier.test().halves()
    validation = labelled(known, classifier)
    most = {"effort": _EFFORT, "trials": _TRIALS, "validation": validation}
    by = {"int8": True, "form": "qoperator", "short_names": True, "objective": "balanced", **most}
    pruned = ours(net, setting, "together", **by)
    if pruned.failure:
        return [{"model": net.name, "file": _TOGETHER, "failure": pruned.failure, "reached": False}]
    int8 = int8_alone(net, setting, validation)
    alone = net.path if int8.failure else int8.path
    report = raced(
        {_INT8: alone, _TOGETHER: pruned.path, "float": net.path},
        net.feeds(JUDGE, 1)[0],
        setting,
        setting.max_seconds,
    )
    (gain,) = (ratio for ratio in report.ratios if ratio.name == _TOGETHER)
    sizes = {found.name: found.file_bytes for found in report.models}
    times = {found.name: found.median_ms for found in report.models}
    judges = Judges(list(test), test.labels, classifier.first_class)
    reference = judges.answers(net.path)
    found = line(_TOGETHER, judges.answers(pruned.path), reference, test.labels)
    smaller = sizes["float"] / sizes[_TOGETHER]
    return [
        {
            "model": net.name,
            **found,
            "int8 alone, drop": line(_INT8, judges.answers(alone), reference, test.labels)["drop"],
            "float ms": times["float"],
            "int8 ms": times[_INT8],
            "ms": times[_TOGETHER],
            "x int8": gain.speedup,
            "interval": f"{gain.low:.2f} - {gain.high:.2f}",
            "times smaller than float": smaller,
            "s": pruned.seconds,
            "reached": gain.speedup >= _FASTER_TOGETHER and smaller >= _SMALLER and found["drop"] <= _POINT,
        }
    ]


def together_summary(rows: Sequence[Row]) -> list[str]:
    """Which classifiers reach all of it."""
    bounds = f"{_FASTER_TOGETHER}x int8 alone, {_SMALLER:.0f} times smaller than float, {_POINT} point"
    return [f"{bounds}: {reached(rows)}"]
