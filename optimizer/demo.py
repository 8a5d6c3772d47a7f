"""The whole chain on small trained networks of this project's own: a classifier, or a generator of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.calibration.data import from_arrays
from edgewise.models.digits import load_digits, load_digits_net
from edgewise.models.generators import GENERATORS, load_features, load_generator
from edgewise.optimizer import files
from edgewise.optimizer.frechet import Frechet
from edgewise.optimizer.image_metrics import CAP_DB
from edgewise.optimizer.judge import Judge
from edgewise.optimizer.optimization import optimize, publish
from edgewise.optimizer.pictures import Pictures, pictures
from edgewise.optimizer.pipeline import Progress, no_progress
from edgewise.optimizer.recipe import Prune, Recipe
from edgewise.optimizer.report import Report, Score, plain
from edgewise.optimizer.torch_export import export
from edgewise.runtime.evaluate import input_specs

_GENERATOR = "dcgan"
_LATENTS = 512  # that calibrate and choose
_FRESH_LATENTS = 500  # that judge at the end, as many as there are real images to test with
_LEAST_PSNR = 30.0  # dB: from here on a difference is hard to see
_PRUNE = Prune(min_metric=_LEAST_PSNR, trials=3, effort=0.02)  # a minute is enough for a demo


@dataclass(frozen=True)
class DemoReport:
    """Where the demo put its files, what became of the network, and how it does on what it never saw."""

    exported: str
    samples: str
    output: str
    report_folder: str
    report: Report
    accuracy: Score | None = None

    @property
    def findings(self) -> tuple[str, ...]:
        """How it does, in sentences."""
        if (score := self.accuracy) is not None:
            unseen = f"right answers on {score.samples} images never seen before"
            return (f"{unseen}: {score.before:.1%} -> {score.after:.1%}",)
        return () if self.report.images is None else self.report.images.findings

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "report"}
        return {**plain(own), "report": self.report.to_dict()}


def demo(
    folder: Path,
    *,
    generator: bool = False,
    recipe: Recipe | None = None,
    progress: Progress = no_progress,
) -> DemoReport:
    """Export a network and optimize it with unlabelled inputs; then judge it on others.

    The network is the digits network, or a DCGAN that draws digits with `generator`. The files of an
    earlier demo in `folder` are replaced. Raises `InputError` without torch.
    """
    files.make_folder(folder)
    progress("export", 0, 1)
    return (_generator_demo if generator else _classifier_demo)(folder, recipe, progress)


def _classifier_demo(folder: Path, recipe: Recipe | None, progress: Progress) -> DemoReport:
    """Right answers are counted on the test images; what calibrates has no labels."""
    exported, samples, output = (folder / n for n in ("digits.onnx", "samples.npz", "digits.optimized.onnx"))
    export(load_digits_net(), ["image=1x1x8x8"], exported, force=True)
    digits = load_digits()
    _write_arrays(samples, {"image": digits.train_images})
    report = optimize(
        exported,
        output,
        data=str(samples),
        recipe=recipe,
        report=folder / "report",
        force=True,
        progress=progress,
    )
    original = files.load(exported)
    test = from_arrays({"image": digits.test_images}, input_specs(original), labels=digits.test_labels)
    accuracy, _ = Judge(original, test, "top1", 0.0, None).verdict(files.load(output))
    return DemoReport(str(exported), str(samples), str(output), str(folder / "report"), report, accuracy)


def _generator_demo(folder: Path, recipe: Recipe | None, progress: Progress) -> DemoReport:
    """What is lossy is bounded by the quality of the image: PSNR against the original on the same latents.

    Beside the generator lie a network that gives images features, and real images: what its metric
    `frechet:FEATURES.onnx,REAL.npz` needs.
    """
    facts = GENERATORS[_GENERATOR]
    exported, samples, output = (folder / n for n in ("dcgan.onnx", "latents.npz", "dcgan.optimized.onnx"))
    export(load_generator(_GENERATOR), facts.inputs, exported, force=True)
    _write_arrays(samples, facts.feed(_LATENTS, seed=0))
    recipe = recipe or Recipe(metric="psnr", max_drop=CAP_DB - _LEAST_PSNR, prune=_PRUNE)
    report = optimize(
        exported,
        output,
        data=str(samples),
        recipe=recipe,
        report=folder / "report",
        force=True,
        progress=progress,
    )
    report = dataclasses.replace(report, images=_drawn(folder, exported, output))
    publish(report, folder / "report")
    return DemoReport(str(exported), str(samples), str(output), str(folder / "report"), report)


def _drawn(folder: Path, exported: Path, output: Path) -> Pictures | None:
    """What both models draw from latents that nothing was chosen by, held against the test images."""
    facts, digits = GENERATORS[_GENERATOR], load_digits()
    features, real = folder / "features.onnx", folder / "real.npz"
    export(load_features(_GENERATOR), [f"image=1x1x{facts.side}x{facts.side}"], features, force=True)
    _write_arrays(real, {"image": facts.real(digits.test_images)})
    frechet = Frechet(str(features), str(real))
    original = files.load(exported)
    return pictures(
        original,
        files.load(output),
        from_arrays(facts.feed(_FRESH_LATENTS, seed=1), input_specs(original)),
        frechet=frechet,
        floor=frechet.distance(facts.real(digits.train_images)),
    )


def _write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    with files.write_folder(path, force=True) as scratch:
        np.savez_compressed(scratch / path.name, **arrays)
