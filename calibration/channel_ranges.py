"""Run the float model on samples and note the range of every single channel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgewise.calibration.taps import reduction, tapped
from edgewise.passes.channel_ranges import ChannelRange, ChannelRanges
from edgewise.passes.channel_scales import observable
from edgewise.passes.fingerprint import fingerprint
from edgewise.passes.graph import Array, opset
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Evaluator, Feed


def collect_channels(
    model: ir.Model,
    samples: Iterable[Feed],
    values: Mapping[str, int] | None = None,
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> ChannelRanges:
    """The range of each channel of the named values over all `samples`, which are read once, one at a time.

    `values` are outputs of nodes of the model's main graph with the axis of their channels; by default those
    that equalizing and smoothing look at. The runtime reduces every value as soon as it is there, so the
    memory is that of inference. The order of the samples does not matter to minimum and maximum. A value in
    which NaN or infinity was seen is left out. `progress` hears the number of samples done. Raises
    `InputError` on a value that the model does not compute, and where there are no samples.
    """
    wanted = observable(model.graph, opset(model)) if values is None else values
    evaluator = Evaluator(_reducing(model, wanted), threads=threads) if wanted else None
    totals: dict[str, Array] = {}
    count = 0
    for count, feed in enumerate(samples, 1):
        for name, array in ({} if evaluator is None else evaluator.run(feed)).items():
            totals[name] = array.astype(np.float64) if count == 1 else _merged(name, totals[name], array)
        if progress is not None:
            progress(count)
    if not count:
        raise InputError("no samples to calibrate with")
    ranges = {name: _range(name, axis, totals, count) for name, axis in wanted.items()}
    finite = {name: own for name, own in ranges.items() if np.isfinite([own.low, own.high, own.mean]).all()}
    return ChannelRanges(fingerprint(model), MappingProxyType(finite))


_REDUCTIONS: Mapping[str, str] = MappingProxyType(
    {"low": "ReduceMin", "high": "ReduceMax", "mean": "ReduceMean"}
)


def _name(value: str, what: str) -> str:
    return f"{value}.channels.{what}"


def _merged(name: str, total: Array, array: Array) -> Array:
    """One more sample: sums of means, for they are divided in the end."""
    if name.endswith(".mean"):
        return total + array
    merged: Array = (np.minimum if name.endswith(".low") else np.maximum)(total, array)
    return merged


def _range(name: str, axis: int, totals: Mapping[str, Array], count: int) -> ChannelRange:
    low, high = (totals[_name(name, what)].astype(np.float32) for what in ("low", "high"))
    return ChannelRange(axis, low, high, (totals[_name(name, "mean")] / count).astype(np.float32))


def _reducing(model: ir.Model, wanted: Mapping[str, int]) -> ir.Model:
    """What of the model computes the values, and reductions of them as the only outputs."""
    part = tapped(model, list(wanted))
    outputs: list[ir.Value] = []
    for value, axis in zip(part.graph.outputs, wanted.values(), strict=True):
        if value.shape is None:
            raise InputError(f"the shape of {value.name!r} is not known: infer shapes first")
        axes = [i for i in range(len(value.shape)) if i != axis]
        outputs += [_reduced(part, value, what, axes) for what in _REDUCTIONS]
    part.graph.outputs[:] = outputs
    return part


def _reduced(model: ir.Model, value: ir.Value, what: str, axes: list[int]) -> ir.Value:
    source = value
    if what == "mean":
        source = _appended(model, ir.node("Abs", [value]), f"{value.name}.channels.magnitude", value)
    node = reduction(model.graph, _REDUCTIONS[what], source, axes, keepdims=False, version=opset(model))
    return _appended(model, node, _name(value.name or "", what), value)


def _appended(model: ir.Model, node: ir.Node, name: str, like: ir.Value) -> ir.Value:
    out = node.outputs[0]
    out.name, out.type = name, like.type
    model.graph.append(node)
    return out
