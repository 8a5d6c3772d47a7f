"""Top-1 of int8 files that are there already, beside their float models.

    EDGEWISE_CORPUS=... python benchmarks/int8_top1.py FOLDER [--images 1000]

FOLDER is what `int8.py --folder FOLDER` left: NAME.edgewise.onnx for each model. Judged by the same images.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
from corpus import Array, Labelled, classifiers
from int8_accuracy import aside

from edgewise.optimizer import files
from edgewise.runtime.evaluate import Evaluator, input_specs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=1000, help="labelled images to judge by, at most")
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    for classifier in classifiers():
        path = options.folder / f"{classifier.name}.edgewise.onnx"
        if not path.exists():
            continue
        test, kind = aside(classifier.test(), options.images)
        float_, int8 = (answers(p, test) - classifier.first_class for p in (classifier.path, path))
        before, after = (100 * float((said == test.labels).mean()) for said in (float_, int8))
        same = 100 * float((float_ == int8).mean())
        figures = f"{before:.2f} -> {after:.2f}, drop {before - after:+.2f}, same answer {same:.2f} %"
        print(f"{classifier.name:32} {len(test):5} images ({kind}): {figures}", flush=True)


def answers(path: Path, test: Labelled) -> Array:
    """The index of the highest score for every image."""
    model = files.load(path)
    evaluator, name = Evaluator(model), input_specs(model)[0].name
    return np.array([next(iter(evaluator.run({name: x}).values())).argmax() for x in test])


if __name__ == "__main__":
    main()
