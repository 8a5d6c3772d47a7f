"""Where a graph can be cut in two with a single value between the halves: the ends of its blocks."""

from __future__ import annotations

import onnx_ir as ir

from edgewise.passes.base import bodies_of
from edgewise.passes.channel_links import op_types
from edgewise.passes.graph import constant_of

_INSIDE = frozenset(
    op_types(
        "BatchNormalization InstanceNormalization LayerNormalization Relu LeakyRelu PRelu Clip Sigmoid Tanh "
        "Elu Selu Gelu HardSwish HardSigmoid Softplus Mish Erf Dropout Identity Cast Add Sub Mul Div Sqrt Pow"
    )
)
"""What continues a layer: a value that only these read is no end of a block."""
_MOST = 12


def cut_points(model: ir.Model, most: int = _MOST) -> tuple[str, ...]:
    """Values of the main graph, in order and at most so many, through which all that follows sees the input.

    Each is the end of a block: of a residual block its sum, of a plain chain the input of the next layer.
    """
    found = [value.name or "" for value in _lone(model.graph) if _ends_block(value)]
    if len(found) <= most:
        return tuple(found)
    return tuple(found[round((i + 1) * len(found) / most) - 1] for i in range(most))


def _ends_block(value: ir.Value) -> bool:
    readers = [node for node, _ in value.uses()]
    is_float = value.dtype is None or value.dtype.is_floating_point()
    return is_float and (len(readers) > 1 or any(node.op_type not in _INSIDE for node in readers))


def _lone(graph: ir.Graph) -> list[ir.Value]:
    """Computed values that are alone: everything behind them depends on nothing else before them."""
    nodes = list(graph)
    last: dict[ir.Value, int] = {}
    for index, node in enumerate(nodes):
        inner = (n for body in bodies_of(node) for n in body.all_nodes())
        for value in (v for n in (node, *inner) for v in n.inputs if v is not None):
            if constant_of(value) is None and value.const_value is None:
                last[value] = index
    alive, lone = {v for v in graph.inputs if v in last}, []
    for index, node in enumerate(nodes):
        alive = {v for v in alive if last[v] > index} | {v for v in node.outputs if last.get(v, -1) > index}
        if len(alive) == 1 and (value := next(iter(alive))) in node.outputs:
            lone.append(value)
    return lone
