"""How much noise a result has gathered from the inputs up to each layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgewise.calibration.noise import Energy
from edgewise.calibration.taps import in_groups, sizes_on, tapped
from edgewise.passes.graph import constant_of
from edgewise.runtime.evaluate import Evaluator, Feed

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE})
_STAND_IN = re.compile(r"\.dequantized(_\d+)?$")  # what insert-qdq calls the floats that integers stand for


@dataclass(frozen=True)
class LayerNoise:
    """A value of a result against the same value of the original, on all inputs.

    `snr_db` is the energy of the original's numbers over that of the difference, in dB: all noise since the
    inputs, not what this layer alone adds; infinite where nothing differs. `op_type` and `node` name the
    node of the result that yields the value, `position` is its place in the order of execution.
    """

    value: str
    op_type: str
    node: str
    snr_db: float
    position: int


@dataclass(frozen=True)
class _Layer:
    """A value of both models: its name in the original, and what is read for it in the result."""

    value: str
    read: str
    node: ir.Node
    position: int


def layer_noise(
    expected: ir.Model,
    actual: ir.Model,
    feeds: Sequence[Feed],
    *,
    threads: int | None = None,
    memory: int = 1 << 28,
) -> tuple[LayerNoise, ...]:
    """The noise in every float that both models compute under one name and in one shape, in order.

    The name has to mean the same in both: a model whose norms were folded into its convolutions is to be
    compared with one where they are folded as well.

    Of a value on a grid of integers counts what is read for it: what its DequantizeLinear yields. Both
    models run node by node as the files say, without fusions, and so without what an int8 kernel saturates.
    The numbers of at most `memory` bytes by their shapes are held at once, or of a single value; the models
    are run in as many parts. Raises `InputError` where a model does not run on the feeds.
    """
    layers = {layer.value: layer for layer in _layers(expected, actual)}
    if not feeds or not layers:
        return ()
    found: dict[str, Energy] = {}
    for group in in_groups(sizes_on(expected, list(layers), feeds[0]), memory // 2):
        found |= _energies(expected, actual, [layers[name] for name in group], feeds, threads)
    return tuple(
        LayerNoise(name, at.node.op_type, at.node.name or "", found[name].decibels, at.position)
        for name, at in layers.items()
        if name in found
    )


def _layers(expected: ir.Model, actual: ir.Model) -> list[_Layer]:
    """What can be compared, in the order of execution."""
    known = {value.name for node in expected.graph for value in node.outputs if value.name}
    order = {node: i for i, node in enumerate(actual.graph)}
    found: dict[str, _Layer] = {}
    for read, names, node in _values(actual.graph):
        name = next((name for name in names if name in known), None)
        if name is not None and (name not in found or _is_dequantized(read)):
            found[name] = _Layer(name, read.name or "", node, order[node])
    return sorted(found.values(), key=lambda layer: layer.position)


def _values(graph: ir.Graph) -> Iterator[tuple[ir.Value, tuple[str, ...], ir.Node]]:
    """The floats that are read, with the names they may have in the original, and the nodes behind them."""
    for node in graph:
        if node.op_type == "DequantizeLinear":
            yield from _stand_in(node)
        elif node.op_type != "QuantizeLinear":
            for value in node.outputs:
                if value.name and (value.dtype in _FLOATS or value.dtype is None):
                    yield value, (value.name,), node


def _stand_in(node: ir.Node) -> Iterator[tuple[ir.Value, tuple[str, ...], ir.Node]]:
    """The same of a DequantizeLinear, unless it holds a constant or an input of the model."""
    integers, floats = node.inputs[0], node.outputs[0]
    before = None if integers is None or constant_of(integers) is not None else integers.producer()
    names = [floats.name or "", _STAND_IN.sub("", floats.name or "")]
    if before is not None and before.op_type == "QuantizeLinear" and (source := before.inputs[0]) is not None:
        names.append(source.name or "")
        before = source.producer()
    if before is not None:
        yield floats, tuple(names), before


def _is_dequantized(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _energies(
    expected: ir.Model, actual: ir.Model, group: Sequence[_Layer], feeds: Sequence[Feed], threads: int | None
) -> dict[str, Energy]:
    """The energies of one group's values; those that turn out to be no float of one shape are left out."""
    original = _evaluator(expected, [layer.value for layer in group], threads)
    result = _evaluator(actual, [layer.read for layer in group], threads)
    energies = {layer.value: Energy() for layer in group}
    for feed in feeds:
        e, a = original.run(feed), result.run(feed)
        for layer in group:
            if layer.value not in energies:
                continue
            if _comparable(e[layer.value], a[layer.read]):
                energies[layer.value].add(e[layer.value], a[layer.read])
            else:
                del energies[layer.value]
    return energies


def _evaluator(model: ir.Model, names: Sequence[str], threads: int | None) -> Evaluator:
    return Evaluator(tapped(model, names), outputs=names, threads=threads, optimize=False)


def _comparable(expected: Any, actual: Any) -> bool:
    if not isinstance(expected, np.ndarray) or not isinstance(actual, np.ndarray):
        return False
    return bool(expected.shape == actual.shape and expected.dtype.kind == actual.dtype.kind == "f")
