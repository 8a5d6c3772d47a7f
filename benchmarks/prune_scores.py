"""Which score finds the channels that a net can do without: top-1 at equal MACs, after the same recovery.

    EDGEWISE_CORPUS=... python benchmarks/prune_scores.py [NET ...] [--scores taylor fisher] [--distill 5]

Channels are scored on the calibration images, without their labels, and leave until half of the MACs have
left. Then the layers are fitted again by least squares, on the same images and for every score alike, or
trained with the original as teacher as well. The images that judge are others, and nothing is chosen by
them; with `--tune` it is images held back from calibration that judge, which may be looked at.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from corpus import Array, Classifier, Labelled, classifiers

from edgewise.calibration.data import Samples, from_arrays
from edgewise.optimizer import files
from edgewise.optimizer.pipeline import Reference, run_passes
from edgewise.optimizer.probe import probe_feeds
from edgewise.optimizer.pruning import PREPARATION
from edgewise.passes import parse
from edgewise.passes.infer_shapes import shapes_on
from edgewise.passes.remove_channels import PrunePlan, RemoveChannels, survivors
from edgewise.runtime.errors import EdgewiseError
from edgewise.runtime.evaluate import Evaluator, input_specs
from edgewise.training.costs import Macs
from edgewise.training.importance import METHODS, score
from edgewise.training.refit import recover_closed_form
from edgewise.training.selection import achieved, select

_NETS = (
    "cifar_resnet20",
    "cifar_resnet56",
    "mlperftiny_ic_resnet8",
    "winml_cifar_imageclassifier",
    "mnist_cntk",
)
_PLAIN = ("random", "magnitude-l1", "magnitude-l2")
_INFORMED = ("gradient", "taylor", "fisher", "reconstruction")


@dataclass(frozen=True)
class Setting:
    """How many images score, how many judge at most, what share of the MACs stays, and how long to train."""

    images: int
    judging: int
    budget: float
    epochs: int
    threads: int | None
    tune: bool


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("nets", nargs="*", default=_NETS, metavar="NET", help=f"by default {' '.join(_NETS)}")
    parser.add_argument("--scores", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--images", type=int, default=512, help="unlabelled images to score and recover with")
    parser.add_argument("--judging", type=int, default=5000, help="labelled images to judge by, at most")
    parser.add_argument("--macs", type=float, default=0.5, help="the share of the MACs that stays")
    parser.add_argument(
        "--distill", type=int, default=0, metavar="EPOCHS", help="train after the fit as well"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tune", action="store_true", help="judge by calibration images that are held back")
    given = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    setting = Setting(given.images, given.judging, given.macs, given.distill, given.threads, given.tune)
    known = {classifier.name: classifier for classifier in classifiers()}
    for name in given.nets:
        print("\n".join(summary(known[name], given.scores, setting)), flush=True)


def summary(classifier: Classifier, scores: Sequence[str], setting: Setting) -> Iterator[str]:
    """A line for the net, one for every score, and one that compares kinds of scores."""
    model = prepared(classifier)
    own, judges = drawn(classifier, model, setting)
    truth = judges.labels + classifier.first_class
    before = accuracy(answers(model, judges), truth)
    held = "calibration images held back" if setting.tune else "test images"
    yield f"{classifier.name}: top-1 {before:.2f} on {len(judges)} {held}, {len(own)} images without labels"
    found: dict[str, float] = {}
    for method in scores:
        try:
            plan, figures = chosen(model, method, own, setting)
        except EdgewiseError as error:
            yield f"  {method:18} {error}"
            continue
        bare = accuracy(answers(RemoveChannels(plan).on(model), judges), truth)
        recovered = recover(model, plan, own, setting)
        found[method] = accuracy(answers(recovered, judges), truth)
        yield f"  {method:18} {figures}, not recovered {bare:5.2f}, recovered {found[method]:5.2f}"
    yield from compared(found)


def compared(found: dict[str, float]) -> Iterator[str]:
    """By how many points each score that looks at data beats the best of those that do not."""
    plain = max((found[name] for name in _PLAIN if name in found), default=None)
    if plain is not None:
        gains = ", ".join(f"{name} {found[name] - plain:+.2f}" for name in _INFORMED if name in found)
        yield f"  points above the best of {', '.join(_PLAIN)}: {gains or 'nothing to compare'}"


def prepared(classifier: Classifier) -> ir.Model:
    """The model as lossy pruning takes it."""
    model = files.load(classifier.path)
    passes = [parse(name) for name in PREPARATION]
    return run_passes(model, passes, Reference(model, probe_feeds(model, None, seed=0)))[0]


def drawn(classifier: Classifier, model: ir.Model, setting: Setting) -> tuple[Samples, Labelled]:
    """Calibration images without labels in an order of chance, and the images that judge."""
    images, (spec,) = classifier.calibration(), input_specs(model)
    order = np.random.default_rng(0).permutation(len(images))
    own = part(images, order[: setting.images])
    judges = part(images, order[setting.images :]) if setting.tune else classifier.test()
    judges = judges.every(-(-len(judges) // setting.judging))
    return from_arrays({spec.name: np.concatenate(list(own))}, [spec]), judges


def part(images: Labelled, indices: Array) -> Labelled:
    return Labelled([images.images[i] for i in indices], images.labels[indices], images.prepare)


def chosen(model: ir.Model, method: str, own: Samples, setting: Setting) -> tuple[PrunePlan, str]:
    """What leaves by a score, and the seconds it took with the share of the MACs that stays."""
    start = time.perf_counter()
    scores = score(model, method, own, threads=setting.threads)
    seconds = time.perf_counter() - start
    cost = Macs(shapes_on(model, {name: array.shape for name, array in own[0].items()}))
    plan = select(model, scores, cost, setting.budget)
    return plan, f"{seconds:6.1f} s, MACs {achieved(model, plan, cost):6.1%}"


def recover(model: ir.Model, plan: PrunePlan, own: Samples, setting: Setting) -> ir.Model:
    """The model without the channels of `plan`, fitted to itself, and trained if that is asked for."""
    fitted = recover_closed_form(model, plan, own, threads=setting.threads)
    if not setting.epochs:
        return fitted
    from edgewise.training.distillation import distill  # needs torch
    from edgewise.training.options import TrainOptions

    held_back = len(own) // 8
    given, aside = own.take(range(held_back, len(own))), own.take(range(held_back))
    options = TrainOptions(epochs=setting.epochs)
    staying = survivors(model, plan)
    trained = distill(model, fitted, given, aside, options, staying=staying, threads=setting.threads)
    return trained.model


def answers(model: ir.Model, images: Labelled) -> Array:
    """The index of the highest score for every image."""
    evaluator, name = Evaluator(model), input_specs(model)[0].name
    return np.array([next(iter(evaluator.run({name: x}).values())).argmax() for x in images])


def accuracy(said: Array, truth: Array) -> float:
    """In percent."""
    return 100 * float((said == truth).mean())


if __name__ == "__main__":
    main()
