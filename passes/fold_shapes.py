"""What the graph computes from shapes that are known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Outcome, Pass, Refused
from edgewise.passes.graph import (
    Array,
    attribute,
    constant_of,
    graph_of,
    new_initializer,
    remove_if_unused,
    replace,
    static_shape,
)

_LONGEST = 64  # elements; what is longer is no shape
_LARGEST = 2**31 - 1  # what is larger is no dimension, and may overflow
_INTEGERS = frozenset({ir.DataType.INT32, ir.DataType.INT64})
_NUMPY_TYPES: Mapping[ir.DataType | None, type[np.generic]] = MappingProxyType(
    {ir.DataType.INT32: np.int32, ir.DataType.BOOL: np.bool_}
)

Elements = Array
"""A scalar or vector of dimensions, as objects: a number, the name of a dimension, or None if unknown."""

Element = int | str | None

Known = dict[ir.Value, Elements]

Evaluate = Callable[[ir.Node, Known], Elements | None]


@dataclass(frozen=True)
class FoldShapes(Pass):
    """Follow dimensions through Shape, Gather, Concat, arithmetic and the like, even where some are dynamic.

    Given:   s = f(Shape(x)), all elements known          Result:  an initializer in place of s
    Given:   Reshape(x, s), s = [n, 64], n unknown        Result:  Reshape(x, [-1, 64])
    Given:   Reshape(x, s), s = [n, -1], x: [n, ...]      Result:  Reshape(x, [0, -1])
    Given:   Expand(x, s), s = [n, 64],  x: [n, 1]        Result:  Expand(x, [1, 64])

    It believes the shapes noted beside the values, so run shape inference first.
    """

    name = "fold-shapes"

    def apply(self, model: ir.Model) -> Outcome:
        known, refused = Known(), Counter[str]()
        nodes = _follow(model.graph, known)
        main = [n for n in nodes if n.graph is model.graph]
        # The names of dimensions hold for the whole run only outside of bodies, which may run many times.
        edits = sum(_write_target(node, known) for node in main if node.op_type in _TARGETS)
        # Users first, so that what only they read is gone when its turn comes.
        edits += sum(_fold(node.outputs[0], known, refused) for node in reversed(nodes))
        return Outcome(edits, MappingProxyType(dict(refused)))


def _follow(graph: ir.Graph, known: Known) -> list[ir.Node]:
    """Find what is known of the shapes computed in `graph` and its bodies; its standard nodes in order."""
    nodes = []
    for node in graph:
        for attr in node.attributes.values():
            if attr.type == ir.AttributeType.GRAPH:
                nodes += _follow(attr.as_graph(), known)
        if node.domain != "":
            continue
        nodes.append(node)
        evaluate = _OPERATORS.get(node.op_type)
        elements = None if evaluate is None else evaluate(node, known)
        if elements is not None and elements.size <= _LONGEST:
            known[node.outputs[0]] = elements
    return nodes


def _elements(value: ir.Value | None, known: Known) -> Elements | None:
    """What is known of an integer scalar or vector; None where not even its length is."""
    if value is None or value in known:
        return None if value is None else known[value]
    shape = static_shape(value)
    if value.dtype not in _INTEGERS or shape is None or len(shape) > 1 or sum(shape) > _LONGEST:
        return None
    constant = constant_of(value)
    return np.full(shape, None, dtype=object) if constant is None else constant.astype(object)


def _dims(value: ir.Value | None) -> list[int | str | None] | None:
    if value is None or value.shape is None:
        return None
    dims = [d if isinstance(d, int) else d.value for d in value.shape]
    return [None if isinstance(d, int) and d < 0 else d for d in dims]


def _objects(items: Iterable[object]) -> Elements:
    items = list(items)
    result = np.empty(len(items), dtype=object)
    result[:] = items
    return result


def _are_known(elements: Elements) -> bool:
    return all(isinstance(e, int) for e in elements.flat)


def _shape(node: ir.Node, known: Known) -> Elements | None:
    dims = _dims(node.inputs[0])
    if dims is None:
        return None
    return _objects(dims[attribute(node, "start", 0) : attribute(node, "end")])


def _size(node: ir.Node, known: Known) -> Elements | None:
    shape = static_shape(node.inputs[0])
    return None if shape is None else np.array(int(np.prod(shape, dtype=np.int64)), dtype=object)


def _gather(node: ir.Node, known: Known) -> Elements | None:
    data, indices = _elements(node.inputs[0], known), constant_of(node.inputs[1])
    if data is None or data.ndim != 1 or indices is None or indices.ndim > 1:
        return None
    if indices.size and not -data.size <= indices.min() <= indices.max() < data.size:
        return None
    taken = data[indices]
    return taken if isinstance(taken, np.ndarray) else np.array(taken, dtype=object)


def _slice(node: ir.Node, known: Known) -> Elements | None:
    data = _elements(node.inputs[0], known)
    bounds = [constant_of(v) for v in node.inputs[1:]]
    if data is None or data.ndim != 1 or len(bounds) < 2 or any(b is None or b.size != 1 for b in bounds):
        return None
    start, end, *rest = (int(b.item()) for b in bounds if b is not None)
    step = rest[1] if len(rest) > 1 else 1
    return data[start:end:step] if step > 0 else None  # backwards, Python clamps otherwise than the standard


def _concat(node: ir.Node, known: Known) -> Elements | None:
    parts = [_elements(v, known) for v in node.inputs]
    present = [p for p in parts if p is not None and p.ndim == 1]
    return np.concatenate(present) if len(present) == len(parts) else None


def _cast(node: ir.Node, known: Known) -> Elements | None:
    return _elements(node.inputs[0], known) if attribute(node, "to") in _INTEGERS else None


def _reshaped(node: ir.Node, known: Known) -> Elements | None:
    """A scalar made a vector of one, or the other way round."""
    data, shape = _elements(node.inputs[0], known), static_shape(node.outputs[0])
    if data is None or shape is None or len(shape) > 1 or data.size != int(np.prod(shape)):
        return None
    return data.reshape(shape)


def _arithmetic(compute: Callable[[Any, Any], object]) -> Evaluate:
    """An operator on pairs of elements; None where one of a pair is not known well enough."""

    def evaluate(node: ir.Node, known: Known) -> Elements | None:
        first, second = (_elements(v, known) for v in node.inputs)
        if first is None or second is None:
            return None
        pairs = np.broadcast(first, second)
        results = (compute(a, b) for a, b in pairs)
        sane = [None if isinstance(r, int) and abs(r) > _LARGEST else r for r in results]
        return _objects(sane).reshape(pairs.shape)

    return evaluate


def _plus(first: Element, second: Element) -> Element:
    if isinstance(first, int) and isinstance(second, int):
        return first + second
    return first if second == 0 else second if first == 0 else None


def _minus(first: Element, second: Element) -> Element:
    return _plus(first, -second) if isinstance(second, int) else None


def _times(first: Element, second: Element) -> Element:
    if isinstance(first, int) and isinstance(second, int):
        return first * second
    return first if second == 1 else second if first == 1 else None


def _over(first: Element, second: Element) -> Element:
    """Rounded towards zero; runtimes differ where something is negative."""
    if isinstance(first, int) and isinstance(second, int) and first >= 0 and second > 0:
        return first // second
    return first if second == 1 else None


def _equals(first: Element, second: Element) -> bool | None:
    """Of two names nothing is known: inside a body they may be those of different turns."""
    if isinstance(first, int) and isinstance(second, int):
        return first == second
    low = min((e for e in (first, second) if isinstance(e, int)), default=0)
    return False if low < 0 and None not in (first, second) else None  # no dimension is negative


def _where(node: ir.Node, known: Known) -> Elements | None:
    condition, *others = node.inputs
    choices = None if condition is None else known.get(condition)
    parts = [choices, *(_elements(v, known) for v in others)]
    present = [p for p in parts if p is not None]
    if len(present) < len(parts):
        return None
    triples = np.broadcast(*present)
    return _objects(None if c is None else a if c else b for c, a, b in triples).reshape(triples.shape)


_OPERATORS: Mapping[str, Evaluate] = MappingProxyType(
    {
        "Shape": _shape,
        "Size": _size,
        "Gather": _gather,
        "Slice": _slice,
        "Concat": _concat,
        "Cast": _cast,
        "Squeeze": _reshaped,
        "Unsqueeze": _reshaped,
        "Reshape": _reshaped,
        "Identity": _reshaped,
        "Add": _arithmetic(_plus),
        "Sub": _arithmetic(_minus),
        "Mul": _arithmetic(_times),
        "Div": _arithmetic(_over),
        "Equal": _arithmetic(_equals),
        "Where": _where,
    }
)


def _fold(value: ir.Value, known: Known, refused: Counter[str]) -> bool:
    """Put an initializer in place of a value whose elements are all known."""
    elements = known.get(value)
    if elements is None or not _are_known(elements) or not (value.uses() or value.is_graph_output()):
        return False
    try:
        substitute(value, elements.astype(_numpy_type(value)))
    except Refused as refusal:
        refused[str(refusal)] += 1
        return False
    return True


def substitute(value: ir.Value, array: Array) -> None:
    """Let an initializer that holds `array` take the place of `value`, and its name where that is free.

    What only `value` was computed from goes. Raises `Refused` on a graph output: its node has to stay.
    """
    node, name = value.producer(), value.name
    if node is None or name is None:
        raise Refused("the value has no node")
    if value.is_graph_output():
        raise Refused("the constant result is a graph output")
    constant = new_initializer(graph_of(node), name, array)
    replace(value, constant)
    if node.graph is None:
        constant.name = name


def _numpy_type(value: ir.Value) -> np.dtype[Any]:
    return np.dtype(_NUMPY_TYPES.get(value.dtype, np.int64))


def _reshape_target(source: ir.Value, elements: Elements) -> list[int] | None:
    """The target of a Reshape of `source` without the elements that are not numbers."""
    dims = _dims(source) or []
    if _are_known(elements) or 0 in elements:  # a 0 that is there copies already, or makes -1 ambiguous
        return None
    if sum(not isinstance(e, int) or e == -1 for e in elements) > 1:
        copied = [isinstance(e, str) and i < len(dims) and e == dims[i] for i, e in enumerate(elements)]
        elements = _objects(0 if c else e for c, e in zip(copied, elements, strict=True))
    target = [e if isinstance(e, int) else -1 for e in elements]
    return target if target.count(-1) < 2 else None


def _expand_target(source: ir.Value, elements: Elements) -> list[int] | None:
    """The target of an Expand of `source`, with 1 for a dimension that it has already."""
    dims = _dims(source)
    if dims is None or len(dims) < elements.size or _are_known(elements):
        return None
    aligned = dims[len(dims) - elements.size :]
    target = [1 if isinstance(e, str) and e == d else e for e, d in zip(elements, aligned, strict=True)]
    return [e for e in target if isinstance(e, int)] if _are_known(_objects(target)) else None


_TARGETS: Mapping[str, Callable[[ir.Value, Elements], list[int] | None]] = MappingProxyType(
    {"Reshape": _reshape_target, "Expand": _expand_target}
)


def _write_target(node: ir.Node, known: Known) -> bool:
    """Give a Reshape or Expand a constant target in place of one that is computed."""
    if len(node.inputs) < 2 or attribute(node, "allowzero", 0):
        return False
    source, old = node.inputs[0], node.inputs[1]
    elements = None if old is None else known.get(old)
    target = None if source is None or elements is None else _TARGETS[node.op_type](source, elements)
    if target is None or old is None:
        return False
    constant = new_initializer(graph_of(node), f"{node.outputs[0].name}.shape", np.array(target, np.int64))
    node.replace_input_with(1, constant)
    if (producer := old.producer()) is not None:
        remove_if_unused(producer)
    return True
