"""How well a model does its job on samples, as one number of which more is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.calibration.data import Samples
from edgewise.optimizer.frechet import PREFIX, Frechet
from edgewise.optimizer.image_metrics import psnr, ssim
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Evaluator
from edgewise.runtime.foreign import foreign_code, import_callable

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]
Function = Callable[[Outputs, Outputs, Array | None], float]

_BATCH = 32


@dataclass(frozen=True)
class Metric:
    """A named score of stacked outputs, given those of the original and the labels, if there are any."""

    name: str
    function: Function

    def score(self, outputs: Outputs, original: Outputs, labels: Array | None) -> float:
        """The score; `EdgewiseError` where the function gives no finite number."""
        with foreign_code(f"metric {self.name} failed"):
            value = float(self.function(outputs, original, labels))
        if not math.isfinite(value):
            raise EdgewiseError(f"metric {self.name} gave {value}: check it on the original model's outputs")
        return value


def top1(outputs: Outputs, _: Outputs, labels: Array | None) -> float:
    """Share of samples whose largest score in the first output stands at the label."""
    if labels is None:
        raise InputError("metric top1 needs labels: add them to the data, or use agreement or fidelity")
    scores, truth = _rows(_first(outputs)), labels.ravel()
    if len(scores) != len(truth):
        raise InputError(f"metric top1 wants one row of scores a label, not {len(scores)} for {len(truth)}")
    return float(np.mean(scores.argmax(-1) == truth))


def agreement(outputs: Outputs, original: Outputs, _: Array | None) -> float:
    """Share of samples on which the first output has its largest score where the original has it."""
    return float(np.mean(_rows(_first(outputs)).argmax(-1) == _rows(_first(original)).argmax(-1)))


def fidelity(outputs: Outputs, original: Outputs, _: Array | None) -> float:
    """1 - noise energy / signal energy, the worst of all float outputs: 0.99 is 20 dB, 0.999 is 30 dB."""
    if not _floats(original):
        raise InputError("metric fidelity needs an output of floats: use equality, or a metric of your own")
    share = noise_share(outputs, original)
    if share == math.inf:
        raise EdgewiseError("outputs hold NaN or infinity where the original's do not")
    return 1.0 - share


def equality(outputs: Outputs, original: Outputs, _: Array | None) -> float:
    """Share of elements that are the original's, in the worst of all outputs: classes, masks, texts."""
    return min(float(np.mean(outputs[name] == original[name])) for name in original)


def noise_share(outputs: Outputs, original: Outputs) -> float:
    """Noise energy over signal energy, the worst of all float outputs; else the share that differs."""
    if names := _floats(original):
        return max(_noise_share(original[name], outputs[name]) for name in names)
    return 1.0 - equality(outputs, original, None)


def _floats(outputs: Outputs) -> list[str]:
    return [name for name, output in outputs.items() if np.issubdtype(output.dtype, np.floating)]


def _noise_share(expected: Array, actual: Array) -> float:
    known = np.isfinite(expected)  # NaN and infinity of the original tell nothing of what is made of it
    e, a = expected[known].astype(np.float64), actual[known].astype(np.float64)
    if not np.isfinite(a).all():
        return math.inf
    signal, noise = float(np.sum(e * e)), float(np.sum((e - a) ** 2))
    return noise / signal if signal > 0 else float(noise > 0)


def _first(outputs: Outputs) -> Array:
    return next(iter(outputs.values()))


def _rows(scores: Array) -> Array:
    return scores.reshape(len(scores), -1)


METRICS: Mapping[str, Function] = MappingProxyType(
    {
        "top1": top1,
        "agreement": agreement,
        "fidelity": fidelity,
        "equality": equality,
        "psnr": psnr,
        "ssim": ssim,
    }
)


def metric_named(name: str) -> Metric:
    """One of `METRICS`, a `Frechet` by its name, or `module:function` of the user's.

    The user's is called as `function(outputs, labels)`.
    """
    if name in METRICS:
        return Metric(name, METRICS[name])
    if name.partition(":")[0] == PREFIX:
        return Metric(PREFIX, Frechet.named(name))
    function = import_callable(name, f"metric {name!r} is none of {', '.join(METRICS)}, {PREFIX}:...")
    return Metric(name, lambda outputs, _, labels: function(outputs, labels))


def default_metric(outputs: Outputs, labels: Array | None) -> Metric:
    """top1 for scores with labels, agreement for scores without, fidelity for other floats, else equality."""
    first = _first(outputs)
    is_scores = first.dtype.kind == "f" and first[0].size == max(first.shape[1:], default=1) > 1
    if is_scores:
        return metric_named("agreement" if labels is None else "top1")
    has_floats = any(output.dtype.kind == "f" for output in outputs.values())
    return metric_named("fidelity" if has_floats else "equality")


def run_all(model: ir.Model, samples: Samples, *, threads: int | None = None) -> dict[str, Array]:
    """Every output over all samples, stacked along the leading axis."""
    evaluator = Evaluator(model, threads=threads)
    parts = [evaluator.run(feed) for feed in samples.batches(_BATCH)]
    return {name: np.concatenate([_at_least_1d(p[name]) for p in parts]) for name in evaluator.outputs}


def _at_least_1d(value: Any) -> Array:
    if not isinstance(value, np.ndarray):
        raise InputError("outputs that are sequences or maps cannot be scored: name the tensor outputs")
    return np.atleast_1d(value)
