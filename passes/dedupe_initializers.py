"""Initializers that hold the same numbers."""

from __future__ import annotations

import hashlib
from collections import ChainMap, Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Outcome, Pass

Seen = ChainMap[Hashable, ir.Value]


@dataclass(frozen=True)
class DedupeInitializers(Pass):
    """Let equal initializers be one.

    Given:   initializers a and b of the same type, shape and bytes, both visible where b is used
    Result:  a in place of b

    What a caller can see, an input or an output, is left alone.
    """

    name = "dedupe-initializers"
    helps = ("eliminate-common-subexpressions",)

    def apply(self, model: ir.Model) -> Outcome:
        kinds = Counter(_kind(v) for graph in model.graphs() for v in _inner(graph))
        return Outcome(_dedupe(model.graph, kinds, ChainMap()))


def content_key(tensor: ir.TensorProtocol) -> Hashable:
    """Equal for two tensors exactly if their type, shape and bytes are (up to a collision of SHA-256)."""
    if isinstance(tensor, ir.StringTensor):
        return (tensor.dtype, tuple(tensor.shape), tuple(tensor.string_data()))
    array = np.asarray(tensor.numpy(), order="C")
    return (tensor.dtype, array.shape, hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest())


def _inner(graph: ir.Graph) -> Iterator[ir.Value]:
    """The initializers that no caller can see."""
    for value in graph.initializers.values():
        if value.const_value is not None and not (value.is_graph_input() or value.is_graph_output()):
            yield value


def _kind(value: ir.Value) -> Hashable:
    tensor = value.const_value
    return None if tensor is None else (tensor.dtype, tuple(tensor.shape))


def _dedupe(graph: ir.Graph, kinds: Counter[Hashable], seen: Seen) -> int:
    """Merge the initializers of `graph` with each other and with those of the graphs around it."""
    edits = 0
    for value in list(_inner(graph)):
        if value.const_value is None or kinds[_kind(value)] < 2:  # alone of its kind: no need to read it
            continue
        kept = seen.setdefault(content_key(value.const_value), value)
        if kept is not value and value.name is not None:
            value.replace_all_uses_with(kept)
            graph.initializers.pop(value.name)
            edits += 1
    for node in graph:
        for attr in node.attributes.values():
            if attr.type == ir.AttributeType.GRAPH:
                edits += _dedupe(attr.as_graph(), kinds, seen.new_child())
    return edits
