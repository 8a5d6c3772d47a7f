"""A graph of 1,500 nodes: convolutions with norms, then transformer layers, written out as by exporters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

WIDTH, HEADS, SIDE = 64, 4, 12
STAGES, LAYERS = 60, 20


class _Writer:
    """Appends nodes and seeded weights to a graph."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.weights: dict[str, ir.Value] = {}
        self._rng = np.random.default_rng(0)

    def node(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        node.outputs[0].name = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: npt.ArrayLike, dtype: type = np.float32) -> ir.Value:
        name = f"w{len(self.weights)}"
        tensor = ir.tensor(np.asarray(array, dtype), name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.weights[name] = value
        return value

    def weight(self, *shape: int) -> ir.Value:
        return self.constant(self._rng.standard_normal(shape) / np.sqrt(max(shape)))

    def linear(self, x: ir.Value, inputs: int, outputs: int) -> ir.Value:
        product = self.node("MatMul", x, self.weight(inputs, outputs))
        return self.node("Add", self.weight(outputs), product)

    def norm(self, x: ir.Value) -> ir.Value:
        """LayerNormalization, in nine nodes."""
        centred = self.node("Sub", x, self.node("ReduceMean", x, axes=[-1]))
        variance = self.node("ReduceMean", self.node("Pow", centred, self.constant(2.0)), axes=[-1])
        deviation = self.node("Sqrt", self.node("Add", variance, self.constant(1e-5)))
        scaled = self.node("Mul", self.node("Div", centred, deviation), self.weight(WIDTH))
        return self.node("Add", scaled, self.weight(WIDTH))

    def heads(self, x: ir.Value, order: Sequence[int]) -> ir.Value:
        """[batch, position, width] to [batch, head, ...], by the batch size that `x` has when it runs."""
        batch = self.node("Gather", self.node("Shape", x), self.constant(0, np.int64))
        first = self.node("Unsqueeze", batch, self.constant([0], np.int64))
        rest = self.constant([-1, HEADS, WIDTH // HEADS], np.int64)
        shape = self.node("Concat", first, rest, axis=0)
        return self.node("Transpose", self.node("Reshape", x, shape), perm=list(order))

    def attention(self, x: ir.Value) -> ir.Value:
        orders = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        q, k, v = (self.heads(self.linear(x, WIDTH, WIDTH), order) for order in orders)
        scores = self.node("Div", self.node("MatMul", q, k), self.constant(np.sqrt(WIDTH / HEADS)))
        seen = self.node("MatMul", self.node("Softmax", scores, axis=-1), v)
        joined = self.node(
            "Reshape",
            self.node("Transpose", seen, perm=[0, 2, 1, 3]),
            self.constant([0, -1, WIDTH], np.int64),
        )
        return self.linear(joined, WIDTH, WIDTH)

    def gelu(self, x: ir.Value) -> ir.Value:
        """GELU by erf, in five nodes."""
        erf = self.node("Erf", self.node("Div", x, self.constant(np.sqrt(2.0))))
        return self.node(
            "Mul", self.node("Mul", x, self.node("Add", erf, self.constant(1.0))), self.constant(0.5)
        )

    def layer(self, x: ir.Value) -> ir.Value:
        x = self.node("Add", x, self.attention(self.norm(x)))
        wide = self.gelu(self.linear(self.norm(x), WIDTH, 2 * WIDTH))
        return self.node("Add", x, self.linear(wide, 2 * WIDTH, WIDTH))

    def stage(self, x: ir.Value) -> ir.Value:
        """A residual convolution with its norm."""
        convolved = self.node("Conv", x, self.weight(WIDTH, WIDTH, 1, 1))
        scale, variance = self.constant(np.ones(WIDTH)), self.constant(np.full(WIDTH, 100.0))
        normal = self.node(
            "BatchNormalization", convolved, scale, self.weight(WIDTH), self.weight(WIDTH), variance
        )
        return self.node("Relu", self.node("Identity", self.node("Add", x, normal)))


def build() -> ir.Model:
    """The model, of operator set 16, with a free batch size and always the same weights."""
    writer = _Writer()
    kind = ir.TensorType(ir.DataType.FLOAT)
    image = ir.Value(name="x", shape=ir.Shape(["N", WIDTH, SIDE, SIDE]), type=kind)
    x = image
    for _ in range(STAGES):
        x = writer.stage(x)
    x = writer.node("Reshape", x, writer.constant([0, WIDTH, -1], np.int64))
    x = writer.node("Transpose", x, perm=[0, 2, 1])
    for _ in range(LAYERS):
        x = writer.layer(x)
    x.name, x.shape, x.type = "y", ir.Shape(["N", SIDE * SIDE, WIDTH]), kind
    graph = ir.Graph(
        [image],
        [x],
        nodes=writer.nodes,
        initializers=list(writer.weights.values()),
        opset_imports={"": 16},
        name="long",
    )
    return ir.Model(graph, ir_version=8)
