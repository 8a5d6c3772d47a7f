"""Weights that take less room in the file and are floats again once it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Contract, Outcome, Pass, Refused, attempted, graphs_of
from edgewise.passes.graph import Array, attribute, drop_unused_initializer, new_initializer, new_node
from edgewise.passes.weight_grids import symmetric

_FEWEST = 1024  # elements, below which two more nodes and the scales take what is saved
_LAYERS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "Gather"})


@dataclass(frozen=True)
class StoreWeights(Pass):
    """Write the weights of layers as int8 with scales, or as float16; the layers compute in float32.

    Given:   y = Conv(x, W, b)                          any layer, and the table of a Gather
    Result:  y = Conv(x, Mul(Cast(W'), s), b)           8 bits: a scale s for each output channel
             y = Conv(x, Cast(W'), b)                   16 bits

    Cast and Mul of constants are computed once, when the file is loaded, by onnxruntime and most other
    runtimes: then the layers are about as fast as before. DequantizeLinear in their place is computed at
    every run, and keeps a Conv off its fast layout. For the same reason this has to be the last pass:
    folding constants undoes it.
    """

    bits: int = 8

    name: ClassVar[str] = "store-weights"
    contract: ClassVar[Contract] = Contract.LOSSY

    def __post_init__(self) -> None:
        if self.bits not in (8, 16):
            raise ValueError(f"{self.name}: bits is one of (8, 16)")

    def apply(self, model: ir.Model) -> Outcome:
        return attempted(
            partial(self._store, graph, value, array)
            for graph in graphs_of(model)
            for value, array in list(_large_floats(graph))
        )

    def _store(self, graph: ir.Graph, value: ir.Value, array: Array) -> bool:
        self._check(value, array)
        first = graph[0]
        if self.bits == 16:
            stored, factors = array.astype(np.float16), None
        else:
            channels = _channel_axis([use.node for use in value.uses()], array.ndim)
            stored, factors = symmetric(array, tuple(a for a in range(array.ndim) if a != channels))
        small = new_initializer(graph, f"{value.name}.stored", stored)
        floats = new_node(first, "Cast", [small], {"to": ir.DataType.FLOAT}, hint=f"{value.name}.floats")
        floats.type, floats.shape = value.type, value.shape
        if factors is not None:
            scale = new_initializer(graph, f"{value.name}.scale", factors)
            floats = new_node(first, "Mul", [floats, scale], hint=f"{value.name}.scaled")
            floats.shape = value.shape
        value.replace_all_uses_with(floats)
        drop_unused_initializer(value)
        return True

    def _check(self, value: ir.Value, array: Array) -> None:
        uses = value.uses()
        if value.is_graph_input() or value.is_graph_output():
            raise Refused("weight is an input or an output")
        if not uses or any(use.node.domain != "" or use.node.op_type not in _LAYERS for use in uses):
            raise Refused("a reader is no layer")
        largest = float(np.abs(array).max())
        if not np.isfinite(largest):
            raise Refused("weight is NaN or infinite")
        if self.bits == 16 and largest > float(np.finfo(np.float16).max):
            raise Refused("weight exceeds float16")


def _large_floats(graph: ir.Graph) -> Iterator[tuple[ir.Value, Array]]:
    """The float32 initializers of a graph that have an axis to scale along and are worth the nodes."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT:
            continue
        if len(tensor.shape) > 1 and tensor.size >= _FEWEST:
            yield value, tensor.numpy()


def _channel_axis(readers: Sequence[ir.Node], rank: int) -> int:
    """The axis that counts what the readers of a weight compute from it: output channels, gates, rows."""
    axes = {_axis_of(node, rank) for node in readers}
    return axes.pop() if len(axes) == 1 else 0


def _axis_of(node: ir.Node, rank: int) -> int:
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return {"ConvTranspose": 1, "LSTM": 1, "GRU": 1, "RNN": 1, "MatMul": rank - 1}.get(node.op_type, 0)
