"""The whole chain on a small trained network of this project's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgewise.calibration.data import from_arrays
from edgewise.models.digits import load_digits, load_digits_net
from edgewise.optimizer import files
from edgewise.optimizer.judge import Judge
from edgewise.optimizer.optimization import optimize
from edgewise.optimizer.pipeline import Progress, no_progress
from edgewise.optimizer.recipe import Recipe
from edgewise.optimizer.report import Report, Score, plain
from edgewise.optimizer.torch_export import export
from edgewise.runtime.evaluate import input_specs


@dataclass(frozen=True)
class DemoReport:
    """Where the demo put its files, what became of the network, and its accuracy on images it never saw."""

    exported: str
    samples: str
    output: str
    report_folder: str
    report: Report
    accuracy: Score

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**plain(self), "report": self.report.to_dict()}


def demo(folder: Path, *, recipe: Recipe | None = None, progress: Progress = no_progress) -> DemoReport:
    """Export the digits network and optimize it with unlabelled images; then count right answers.

    The files of an earlier demo in `folder` are replaced. Raises `InputError` without torch.
    """
    files.make_folder(folder)
    exported, samples, output = (folder / n for n in ("digits.onnx", "samples.npz", "digits.optimized.onnx"))
    progress("export", 0, 1)
    export(load_digits_net(), ["image=1x1x8x8"], exported, force=True)
    digits = load_digits()
    with files.write_folder(samples, force=True) as scratch:
        np.savez_compressed(scratch / samples.name, image=digits.train_images)
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
