"""What goes into models: the samples a user names, and what the models of one job must agree in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgewise.calibration.data import Preprocess, Samples, open_samples
from edgewise.optimizer.probe import is_batched, probe_feeds
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Feed, input_specs

RANDOM = "the samples are random data: ranges and scores say nothing about real inputs"


def as_samples(
    data: str | Samples | None, model: ir.Model, preprocess: Preprocess | None, seed: int
) -> Samples | None:
    """The samples named by `data`, checked against the model's inputs; what is no name is given back."""
    if not isinstance(data, str):
        return data
    return open_samples(data, input_specs(model), preprocess=preprocess, seed=seed)


def feed_of(model: ir.Model, samples: Samples | None, batch: int, seed: int) -> Feed:
    """`batch` samples for every input, seeded ones if there are none; repeated where there are fewer."""
    feed = probe_feeds(model, None, seed=seed)[0] if samples is None else next(samples.batches(batch))
    if not all(map(is_batched, input_specs(model))):
        if batch > 1:
            raise InputError(
                f"the batch size is fixed in the model, {batch} cannot be measured: leave --batch out"
            )
        return feed
    return {name: np.take(array, range(batch), axis=0, mode="wrap") for name, array in feed.items()}


def check_inputs(expected: ir.Model, model: ir.Model, path: Path) -> None:
    """Raise `InputError` where `model`, read from `path`, takes other inputs than the one expected."""
    wanted = {spec.name: spec.dtype for spec in input_specs(expected)}
    given = {spec.name: spec.dtype for spec in input_specs(model)}
    if given != wanted:
        pixels = any(given.get(name) == np.uint8 for name in wanted)
        hint = ": it normalizes raw pixels itself, so compare it with models that do" if pixels else ""
        raise InputError(
            f"{path} takes {_inputs_text(given)}, not {_inputs_text(wanted)} as the first model{hint}"
        )


def _inputs_text(inputs: Mapping[str, np.dtype[Any]]) -> str:
    return ", ".join(f"{name} ({dtype})" for name, dtype in inputs.items()) or "no inputs"
