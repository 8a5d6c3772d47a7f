"""The inputs that every step of a run is checked on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgewise.calibration.data import Samples
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Evaluator, Feed, TensorSpec, input_specs
from edgewise.runtime.plausible import plausible_feed

_SAMPLES = 2
_SIZES = (2, 1, 3, 8, 16, 32, 64, 224)  # tried in turn for the dimensions a model leaves open


def probe_feeds(model: ir.Model, samples: Samples | None, *, seed: int = 0) -> tuple[Feed, ...]:
    """A few feeds the model runs on: real samples if there are any, else seeded ones of plausible shape.

    With a dynamic batch axis one feed holds two samples. Raises `InputError` where no size that is
    tried for the open dimensions runs.
    """
    specs = input_specs(model)
    if samples is None:
        return _seeded(model, specs, seed)
    feeds = list(itertools.islice(samples, _SAMPLES))
    shapes = {tuple(feed[spec.name].shape[1:] for spec in specs) for feed in feeds}
    if len(feeds) > 1 and len(shapes) == 1 and all(map(is_batched, specs)):
        feeds.append({spec.name: np.concatenate([f[spec.name] for f in feeds]) for spec in specs})
    return tuple(feeds)


def is_batched(spec: TensorSpec) -> bool:
    """Whether the leading axis takes any number of samples."""
    return bool(spec.shape) and not isinstance(spec.shape[0], int)


def _seeded(model: ir.Model, specs: Sequence[TensorSpec], seed: int) -> tuple[Feed, ...]:
    """One sample, and two where the batch is open, at the first size that runs for the other dimensions."""
    evaluator = Evaluator(model)
    problem = ""
    for size in _SIZES if any(_is_open(spec) for spec in specs) else (1,):
        for batches in ((1, 2), (1, 1)):
            feeds = tuple(
                plausible_feed(model, seed=seed + i, size=size, batch=batch)
                for i, batch in enumerate(batches)
            )
            try:
                for feed in feeds:
                    evaluator.run(feed)
            except InputError as error:
                problem = problem or str(error)
                continue
            return feeds
    raise InputError(f"no inputs could be guessed ({problem}): pass samples with --data")


def _is_open(spec: TensorSpec) -> bool:
    return any(not isinstance(d, int) for d in spec.shape)
