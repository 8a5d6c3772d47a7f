"""How far a model's outputs are from the original's, finely enough to compare two ways of quantizing it."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgewise.calibration.data import Samples
from edgewise.calibration.noise import decibels
from edgewise.optimizer.metrics import Array, noise_share, run_all

_SQUASHING = frozenset({"Softmax", "LogSoftmax"})
_TRACE = 1e-6  # of an energy; its square is float32's own rounding
_GRID = frozenset({"QuantizeLinear", "DequantizeLinear"})


class Yardstick:
    """Signal-to-noise of a model's outputs against those of `original`, on `samples` held back.

    A metric that counts samples cannot tell two good models apart; this can. Where a Softmax ends the model,
    its input counts, less what the Softmax takes away from it. Without labels, without a bound: that is the
    judge's.
    """

    def __init__(self, original: ir.Model, samples: Samples, *, threads: int | None = None) -> None:
        self.samples = samples
        self._threads = threads
        self._expected = self._outputs(original)

    def decibels(self, model: ir.Model) -> float:
        """Of the worst output: the mean over samples of signal over noise in dB.

        A mean of ratios in dB does not hang on the few samples with most noise, as the ratio of all energies
        does, so that two ways of quantizing can be told apart on few samples. Minus infinity where the model
        gives NaN or infinity. Outputs that are no floats count where there are no others, by the share of
        elements that differ.
        """
        found = self._outputs(model)
        floats = [name for name, array in self._expected.items() if array.dtype.kind == "f"]
        if not floats:
            return decibels(1.0, noise_share(found, self._expected))
        return min(_typical(self._expected[name], found[name]) for name in floats)

    def _outputs(self, model: ir.Model) -> dict[str, Array]:
        bare = model.clone()
        scores = [_scores(value) for value in bare.graph.outputs]
        names = [value.name or "" for value in bare.graph.outputs]
        bare.graph.outputs[:] = [
            v if s is None else s for v, s in zip(bare.graph.outputs, scores, strict=True)
        ]
        found = run_all(bare, self.samples, threads=self._threads)
        return {
            name: found[v.name or ""] if score is None else _centred(found[v.name or ""])
            for name, score, v in zip(names, scores, bare.graph.outputs, strict=True)
        }


def _scores(value: ir.Value) -> ir.Value | None:
    """What the Softmax at the end of a model reads, if one stands there and normalizes the last axis."""
    node = value.producer()
    while node is not None and node.op_type in _GRID and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type not in _SQUASHING:
        return None
    source = node.inputs[0]
    if source is None or source.producer() is None:
        return None
    axis = node.attributes.get_int("axis", -1)
    return source if source.shape is not None and axis in (-1, len(source.shape) - 1) else None


def _typical(expected: Array, actual: Array) -> float:
    """The mean of the rows' decibels; a row of silence is held against a trace of the others' signal.

    Where the original gives NaN or infinity nothing can be compared.
    """
    e, a = (array.astype(np.float64).reshape(len(array), -1) for array in (expected, actual))
    known = np.isfinite(e)
    e, a = np.where(known, e, 0.0), np.where(known, a, 0.0)
    signal, noise = np.square(e).sum(1), np.square(e - a).sum(1)
    if not np.isfinite(noise).all():
        return -math.inf
    if not noise.any():
        return math.inf
    share = noise / signal.clip(max(_TRACE * signal.mean(), np.finfo(np.float64).tiny))
    return float(np.mean(-10 * np.log10(share.clip(_TRACE**2, _TRACE**-2))))


def _centred(scores: Array) -> Array:
    """A Softmax is blind to what is added to all of a row."""
    centred: Array = scores - scores.mean(-1, keepdims=True)
    return centred
