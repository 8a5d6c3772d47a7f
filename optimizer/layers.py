"""How much noise a result has gathered from the inputs up to each layer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgewise.optimizer.comparison import decibels
from edgewise.passes.graph import Array, constant_of
from edgewise.passes.infer_shapes import shapes_on
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


@dataclass
class _Energy:
    """Sums of squares over all inputs so far."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, expected: Array, actual: Array) -> None:
        """Infinities and NaN in the same places do not count; in one of the two they drown everything."""
        e, a = (array.astype(np.float64).ravel() for array in (expected, actual))
        finite = np.isfinite(e)
        if not np.array_equal(finite, np.isfinite(a)):
            self.noise = math.inf
            return
        e, a = e[finite], a[finite]
        self.signal += float(e @ e)
        self.noise += float(np.sum((e - a) ** 2))

    @property
    def ratio(self) -> float:
        return -math.inf if math.isinf(self.noise) else decibels(self.signal, self.noise)


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
    layers = _layers(expected, actual)
    if not feeds or not layers:
        return ()
    found: dict[str, _Energy] = {}
    for group in _groups(layers, _sizes(expected, feeds[0]), memory):
        found |= _energies(expected, actual, group, feeds, threads)
    return tuple(
        LayerNoise(
            layer.value, layer.node.op_type, layer.node.name or "", found[layer.value].ratio, layer.position
        )
        for layer in layers
        if layer.value in found
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


def _sizes(model: ir.Model, feed: Feed) -> dict[str, int]:
    """Bytes of the values of both models on inputs like `feed`, as far as shapes are known."""
    shapes = shapes_on(model, {name: np.shape(array) for name, array in feed.items()})
    return {name: 8 * math.prod(shape) for name, shape in shapes.items()}


def _groups(layers: Sequence[_Layer], sizes: dict[str, int], memory: int) -> list[list[_Layer]]:
    """The layers in order, cut where the next would pass the bound; one of unknown size is alone."""
    groups: list[list[_Layer]] = []
    room = 0
    for layer in layers:
        size = sizes.get(layer.value, memory)
        if not groups or size > room:
            groups.append([])
            room = memory
        groups[-1].append(layer)
        room -= size
    return groups


def _energies(
    expected: ir.Model, actual: ir.Model, group: Sequence[_Layer], feeds: Sequence[Feed], threads: int | None
) -> dict[str, _Energy]:
    """The energies of one group's values; those that turn out to be no float of one shape are left out."""
    original = _evaluator(expected, [layer.value for layer in group], threads)
    result = _evaluator(actual, [layer.read for layer in group], threads)
    energies = {layer.value: _Energy() for layer in group}
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
    """What of the model computes these values."""
    part = model.clone()
    produced = {value.name: value for node in part.graph for value in node.outputs}
    wanted = list(dict.fromkeys(names))
    part.graph.outputs[:] = [produced[name] for name in wanted]
    RemoveUnusedNodesPass()(part)
    return Evaluator(part, outputs=wanted, threads=threads, optimize=False)


def _comparable(expected: Any, actual: Any) -> bool:
    if not isinstance(expected, np.ndarray) or not isinstance(actual, np.ndarray):
        return False
    return bool(expected.shape == actual.shape and expected.dtype.kind == actual.dtype.kind == "f")
