"""How often int8 answers as well as float: trained classifiers with labelled data.

Everybody is calibrated with the same samples, which judge nobody. Where there is more labelled data than is
needed, judges are images that stood aside while edgewise's defaults were chosen ("unseen"); of data sets that
are too small for that all images judge, and they were looked at before ("seen").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import collapse
import numpy as np
from corpus import Array, Classifier, Labelled
from int8_files import Made, ours, theirs
from int8_jobs import Row, Setting
from int8_nets import CALIBRATE, Net
from uniform_int8 import DEFAULTS, FOR_ACCURACY, Attempt

from edgewise.optimizer import files
from edgewise.runtime.errors import EdgewiseError
from edgewise.runtime.evaluate import Evaluator, input_specs

_MOST_POINTS = 0.3
_MOST_COLLAPSED = 1.0  # points
_SPREAD = 6.0  # binary orders up and down
_COARSE_AND_FINE = (
    "QDQ u8s8 tensor",
    "QDQ u8s8 channel",
    "QDQ u8s8 channel 7 bits",
    "QDQ u8u8 channel",
    DEFAULTS,
)


def accuracy_rows(classifier: Classifier, net: Net, setting: Setting) -> list[Row]:
    """A line for every file: float, edgewise's and one for each recipe of the rivals."""
    test, kind = aside(classifier.test(), setting.images)
    made = Both(ours(net, setting), ours(net, setting, smallest=True))
    recipes = [*map(str, FOR_ACCURACY), DEFAULTS]
    rivals = theirs(net.path, net.feeds(CALIBRATE, setting.samples), recipes, setting, "accuracy")
    common = {"model": net.name, "judges": f"{len(test)} {kind}", "note": classifier.note}
    rows = scored(net.path, made, rivals, Judges(list(test), test.labels, classifier.first_class))
    return [{**common, **row} for row in rows]


def collapse_rows(classifier: Classifier, setting: Setting) -> list[Row]:
    """The same for a net whose channels were rescaled: equal in float, coarse int8 gives chance level."""
    model, images = collapse.trained(classifier, setting.samples)
    broken = collapse.collapsed(model, collapse.ranges_of(model, images), spread=_SPREAD, seed=0)
    path = files.save(broken, setting.folder / f"{classifier.name}.collapsed.onnx", force=True)
    name = input_specs(broken)[0].name
    feeds = [{name: image} for image in images]
    net = Net(path.stem, path, lambda part: feeds)
    test, kind = aside(classifier.test(), setting.images)
    rivals = theirs(path, feeds, _COARSE_AND_FINE, setting, "collapse")
    made = Both(ours(net, setting), ours(net, setting, smallest=True))
    rows = scored(path, made, rivals, Judges(list(test), test.labels, classifier.first_class))
    rows[1] = {**rows[1], "reached": rows[1]["drop"] <= _MOST_COLLAPSED}
    return [{"model": net.name, "judges": f"{len(test)} {kind}", **row} for row in rows]


@dataclass(frozen=True)
class Judges:
    """Prepared images, the class of each, and where class 0 stands in the model's output."""

    images: Sequence[Array]
    labels: Array
    first_class: int = 0

    def answers(self, path: Path) -> Array:
        """The class with the highest score for every image."""
        evaluator, name = Evaluator(path), input_specs(files.load(path))[0].name
        scores = (next(iter(evaluator.run({name: image}).values())) for image in self.images)
        return np.array([s.argmax() for s in scores]) - self.first_class


@dataclass(frozen=True)
class Both:
    """What edgewise writes, and what it writes where size decides."""

    fastest: Made
    smallest: Made


def scored(original: Path, made: Both, rivals: Sequence[Attempt], judges: Judges) -> list[Row]:
    """A line for float, for edgewise's files, the first with what it is held against, and for the rivals'."""
    reference = judges.answers(original)
    before = line("float", reference, reference, judges.labels)
    mine, small = (
        line(f"edgewise{aim}: {m.what}", judges.answers(m.path), reference, judges.labels)
        for aim, m in (("", made.fastest), (", smallest", made.smallest))
    )
    others = [rival_line(attempt, reference, judges) for attempt in rivals]
    drops = [row["drop"] for row in others if "drop" in row]
    reached = mine["drop"] <= min([_MOST_POINTS, *drops]) + 1e-9
    held = {**mine, "best rival's drop": min(drops, default=None), "reached": reached}
    return [before, held, small, *others]


def rival_line(attempt: Attempt, reference: Array, judges: Judges) -> Row:
    """The line of a rival's file; where there is none, or none that onnxruntime loads, the reason."""
    if attempt.failure:
        return {"file": attempt.recipe, "failure": attempt.failure}
    try:
        return line(attempt.recipe, judges.answers(attempt.path), reference, judges.labels)
    except EdgewiseError as error:
        return {"file": attempt.recipe, "failure": str(error)[-100:]}


def aside(test: Labelled, most: int) -> tuple[Labelled, str]:
    """At most so many images, those in the second place of every few rather than in the first."""
    step = -(-len(test) // most)
    if step == 1:
        return test, "seen"
    rest = dataclasses.replace(test, images=test.images[1:], labels=test.labels[1:])
    return rest.every(step), "unseen"


def line(file: str, said: Array, reference: Array, labels: Array) -> Row:
    """Top-1 in percent, the points below float's and their standard error, and how often both agree."""
    right, before = said == labels, reference == labels
    error = 100 * float(np.sqrt(np.sum(right != before))) / len(labels)
    same, top1 = (100 * float(np.mean(found)) for found in (said == reference, right))
    drop = 100 * float(np.mean(before)) - top1
    return {"file": file, "top-1 %": top1, "drop": drop, "+-": error, "agrees %": same}


def accuracy_summary(rows: Sequence[Row]) -> list[str]:
    """Whose drop is within the bound of `accuracy_rows`."""
    return [f"at most {_MOST_POINTS} points and no more than the best rival: {_reached(rows)}"]


def collapse_summary(rows: Sequence[Row]) -> list[str]:
    """Whose drop is within the bound of `collapse_rows`."""
    return [f"at most {_MOST_COLLAPSED} point: {_reached(rows)}"]


def _reached(rows: Sequence[Row]) -> str:
    mine = [row for row in rows if "reached" in row]
    missed = [f"{row['model']} {row['drop']:+.2f}" for row in mine if not row["reached"]]
    return f"{len(mine) - len(missed)} of {len(mine)}; missed: {', '.join(missed) or 'none'}"
