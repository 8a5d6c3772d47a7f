"""Top-1 of trained classifiers at half their MACs, and which scores choose the channels best.

Nobody gets a label. What edgewise chooses by, it holds back from the inputs it gets; the images that judge
here are others. Torch-Pruning prunes by the L2 norms of groups. It has no way back without labelled
training; with its batch norms estimated anew it gets what takes no more than forward passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import get_args

from corpus import Classifier
from int8_accuracy import Judges, line
from int8_jobs import Row, Setting
from int8_nets import Net
from prune_files import HALF, Made, left, ours, reached, theirs

from edgewise.optimizer.recipe import Importance

MOST: Mapping[str, float] = MappingProxyType({"cifar_resnet20": 2.0, "cifar_resnet56": 1.0})
"""Points of top-1 that may be lost at half the MACs."""

_EFFORT = 5.0  # some minutes: column s tells
_GAIN = 15.0  # points, of the closed form over none
_PLAIN = ("random", "magnitude-l1", "magnitude-l2")
_INFORMED = ("gradient", "taylor", "fisher", "reconstruction")
_WHOLE, _CLOSED, _NOT = "distilled", "closed form", "not recovered"


def accuracy_rows(classifier: Classifier, net: Net, setting: Setting) -> list[Row]:
    """A line for the model and for every file that is made of it."""
    made = {
        f"edgewise, {_WHOLE}": ours(net, setting, "distilled", max_macs=HALF, effort=_EFFORT),
        f"edgewise, {_CLOSED}": ours(net, setting, "closed", max_macs=HALF, recover="closed-form"),
        f"edgewise by magnitude, {_NOT}": ours(
            net, setting, "magnitude", max_macs=HALF, score="magnitude-l2", recover="none"
        ),
        f"Torch-Pruning, {_NOT}": theirs(net, setting, "half", macs=HALF),
        "Torch-Pruning, batch norms estimated": theirs(net, setting, "estimated", macs=HALF, estimated=True),
    }
    rows = judged(classifier, net, made)
    whole, closed, bare = rows[1:4]
    if "drop" in whole:
        rows[1] = {**whole, "reached": whole["drop"] <= MOST[net.name]}
    if "drop" in closed and "drop" in bare:
        rows[2] = {**closed, "reached": bare["drop"] - closed["drop"] >= _GAIN}
    return rows


def score_rows(classifier: Classifier, net: Net, setting: Setting) -> list[Row]:
    """A line for every score, all at the same MACs and recovered in the same way."""
    made = {
        method: ours(net, setting, method, max_macs=HALF, score=method, recover="closed-form")
        for method in get_args(Importance)
    }
    rows = judged(classifier, net, made)
    found = {row["file"]: row["drop"] for row in rows if "drop" in row}
    plain = min((found[name] for name in _PLAIN if name in found), default=None)
    if plain is None:
        return rows
    return [
        {**row, "reached": row["drop"] < plain} if row["file"] in _INFORMED and "drop" in row else row
        for row in rows
    ]


def judged(classifier: Classifier, net: Net, made: Mapping[str, Made]) -> list[Row]:
    """Top-1 and what is left of the model, for the model itself and every file; for a failure the reason."""
    test = classifier.test()
    judges = Judges(list(test), test.labels, classifier.first_class)
    reference = judges.answers(net.path)
    rows: list[Row] = [{"model": net.name, **line("as it is", reference, reference, test.labels)}]
    for name, m in made.items():
        if m.failure:
            rows.append({"model": net.name, "file": name, "failure": m.failure})
            continue
        found = line(name, judges.answers(m.path), reference, test.labels)
        rows.append({"model": net.name, **found, **left(net.path, m.path), "s": m.seconds})
    return rows


def accuracy_summary(rows: Sequence[Row]) -> list[str]:
    """Whose drop is within its bound, and what the closed form wins back."""
    whole, closed = ([row for row in rows if word in row["file"]] for word in (_WHOLE, _CLOSED))
    bounds = ", ".join(f"{name} {most}" for name, most in MOST.items())
    return [
        f"points that may be lost: {bounds}: {reached(whole)}",
        f"closed form at least {_GAIN:.0f} points above none: {reached(closed)}",
    ]


def score_summary(rows: Sequence[Row]) -> list[str]:
    """Whether the scores that look at data beat those that do not."""
    return [f"{', '.join(_INFORMED)} lose less than {', '.join(_PLAIN)}: {reached(rows)}"]
