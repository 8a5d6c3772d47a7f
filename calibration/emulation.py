"""Run a model with QuantizeLinear and DequantizeLinear as an x86 processor without VNNI would, on any."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from edgewise.calibration.integer_products import (
    LIMITS,
    arrange,
    excess,
    neighbours,
    pair_bounds,
    patches,
    products,
)
from edgewise.calibration.kernels import is_depthwise, kernel_rows
from edgewise.passes.graph import Array, attribute, constant_of
from edgewise.runtime.evaluate import Evaluator, Feed


@dataclass(frozen=True, eq=False)
class Layer:
    """A Conv, Gemm or MatMul of uint8 activations and int8 weights whose kernel adds products in pairs.

    `rows` are its weights as (groups, channels of a group, k), `weight_scale` holds a number for each
    channel. `bias` is in units of the products.
    """

    node: ir.Node
    levels: ir.Value
    zero_point: int
    rows: Array
    kernel: tuple[int, ...]
    input_scale: float
    weight_scale: Array
    bias: Array

    @classmethod
    def of(cls, node: ir.Node) -> Layer | None:
        """`node` as such a layer, or None if it is none."""
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.domain != "":
            return None
        x, w = (_Dequantized.of(v) for v in node.inputs[:2])
        if x is None or w is None or x.integers.dtype != ir.DataType.UINT8 or x.scale.size != 1:
            return None
        weights = constant_of(w.integers)
        if weights is None or weights.dtype != np.int8 or w.zero_point.any() or is_depthwise(node, weights):
            return None
        rows = kernel_rows(node, weights)
        groups = int(attribute(node, "group", 1)) if node.op_type == "Conv" else 1
        third = _Dequantized.of(node.inputs[2]) if len(node.inputs) > 2 else None
        bias = None if third is None else constant_of(third.integers)
        return cls(
            node,
            x.integers,
            int(x.zero_point.reshape(())),
            rows.reshape(groups, len(rows) // groups, -1),
            weights.shape[2:],
            float(x.scale.reshape(())),
            np.broadcast_to(w.scale.astype(np.float64), len(rows)),
            np.broadcast_to(0.0 if bias is None else bias.astype(np.float64), len(rows)),
        )

    @property
    def name(self) -> str:
        return self.node.outputs[0].name or ""

    @cached_property
    def _offset(self) -> Array:
        """What the zero point of the activations adds to each sum of products."""
        offset: Array = self.rows.sum(axis=2, dtype=np.float64) * self.zero_point
        return offset

    @property
    def channels(self) -> int:
        return int(np.prod(self.rows.shape[:2]))

    @cached_property
    def can_saturate(self) -> Array:
        """Which output channels have a pair of weights that some pair of activations makes too large."""
        return self.overflow(*(np.full(self.rows[:, 0].shape, level) for level in (0, 255))) > 1

    def overflow(self, low: Array, high: Array) -> Array:
        """The largest sum of a pair over what 16 bits hold, for each output channel.

        Activations lie between `low` and `high`, both (groups, k).
        """
        least, largest = zip(*map(_bounds, self.rows, low, high), strict=True)
        return np.maximum(np.concatenate(least) / LIMITS[0], np.concatenate(largest) / LIMITS[1])

    def columns(self, levels: Array) -> Array:
        """The integers the weights are multiplied by, as (groups, positions, k)."""
        return patches(self.node, levels, self.kernel, self.zero_point)

    def sums(self, columns: Array) -> Array:
        """The sums of products as (groups, positions, channels of a group), nothing cut, without bias."""
        exact = [products(c, r) for c, r in zip(columns, self.rows, strict=True)]
        return np.stack(exact) - self._offset[:, None]

    def lost(self, columns: Array) -> Array:
        """What 16 bits cut from these sums."""
        return np.stack([excess(c, r) for c, r in zip(columns, self.rows, strict=True)])

    def output(self, sums: Array, shape: Sequence[int]) -> Array:
        """What the node gives for an input of that `shape`: the floats that `sums` stand for, bias added."""
        biased = self.floats(sums + self.bias.reshape(len(self.rows), 1, -1))
        return arrange(self.node, biased, shape, self.kernel).astype(np.float32)

    def floats(self, sums: Array) -> Array:
        """What sums of products stand for."""
        return sums * (self.input_scale * self.weight_scale).reshape(len(self.rows), 1, -1)


def _bounds(rows: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """The least and the largest sum of a pair that each row can give."""
    ends = (neighbours(level[None])[:, 0] for level in (low, high))
    least, largest = pair_bounds(neighbours(rows.astype(np.float64)), *ends)
    return least.min(axis=1), largest.max(axis=1)


@dataclass(frozen=True)
class _Dequantized:
    """What a DequantizeLinear reads."""

    integers: ir.Value
    scale: Array
    zero_point: Array

    @classmethod
    def of(cls, value: ir.Value | None) -> _Dequantized | None:
        node = None if value is None else value.producer()
        if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
            return None
        scale = constant_of(node.inputs[1])
        zero_point = constant_of(node.inputs[2]) if len(node.inputs) > 2 else np.zeros((), np.int32)
        if scale is None or zero_point is None or attribute(node, "block_size", 0):
            return None
        return cls(node.inputs[0], scale, zero_point)


Watch = Callable[[Layer, Array, Array], None]
"""Is told of every layer that runs, its columns and its sums before anything is cut."""


class Emulator:
    """A model with QuantizeLinear and DequantizeLinear whose layers that add in pairs run here.

    The rest, between them, runs in onnxruntime, on kernels that add in 32 bits on every processor. The
    results are the integers of the real kernels; floats between them may differ by their last digit.
    """

    def __init__(self, model: ir.Model, *, threads: int | None = None) -> None:
        found = (Layer.of(node) for node in model.graph)
        self.layers = tuple(layer for layer in found if layer is not None and layer.can_saturate.any())
        self.outputs = tuple(v.name or "" for v in model.graph.outputs)
        self._steps = tuple(_steps(model, self.layers, threads))

    def run(self, feed: Feed, *, saturating: bool = True, watch: Watch | None = None) -> dict[str, Array]:
        """Outputs by name; as with VNNI unless `saturating`. `watch` hears of every layer in turn."""
        values = dict(feed)
        for step in self._steps:
            if isinstance(step, _Part):
                values |= step(values)
                continue
            levels = values[step.levels.name or ""]
            columns = step.columns(levels)
            sums = step.sums(columns)
            if watch is not None:
                watch(step, columns, sums)
            sums = sums - step.lost(columns) if saturating else sums
            values[step.name] = step.output(sums, levels.shape)
        return {name: values[name] for name in self.outputs}


class _Part:
    """What of a model lies between values that are known and others that are wanted."""

    def __init__(
        self, model: ir.Model, known: Sequence[ir.Value], wanted: Sequence[ir.Value], threads: int | None
    ) -> None:
        graph = ir.convenience.extract(model.graph, [*model.graph.inputs, *known], wanted)
        given = graph.initializers
        graph.inputs[:] = [v for v in graph.inputs if v.uses() or v.is_graph_output()]
        for value in graph.inputs:
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)  # as all that layers give
        self._inputs = [v.name or "" for v in graph.inputs if v.name not in given]
        part = ir.Model(graph, ir_version=model.ir_version, functions=tuple(model.functions.values()))
        self._evaluator = Evaluator(part, threads=threads)

    def __call__(self, values: Mapping[str, Array]) -> dict[str, Array]:
        return self._evaluator.run({name: values[name] for name in self._inputs})


def _steps(model: ir.Model, layers: Sequence[Layer], threads: int | None) -> list[_Part | Layer]:
    """Layers in order; before each, what computes its input; at last what computes the outputs."""
    known: dict[ir.Value, None] = {}
    steps: list[_Part | Layer] = []
    for layer in layers:
        if layer.levels not in known and not layer.levels.is_graph_input():
            steps.append(_Part(model, list(known), [layer.levels], threads))
        known |= dict.fromkeys(v for v in (layer.levels, layer.node.outputs[0]) if not v.is_graph_input())
        steps.append(layer)
    if wanted := [v for v in model.graph.outputs if v not in known]:
        steps.append(_Part(model, list(known), wanted, threads))
    return steps
