"""A hash that tells whether two models compute the same thing under the same names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


def fingerprint(model: ir.Model) -> str:
    """SHA-256 (hex) over operator sets, inputs, outputs, nodes, their attributes and the weights.

    Values count by name, for what belongs to a model is addressed by the names of its values. Names of
    nodes, documentation, metadata and the types and shapes noted beside inner values do not count, nor
    does the order of initializers and attributes.
    """
    digest = _Digest()
    digest.texts("opsets", *(f"{domain}={v}" for domain, v in sorted(model.opset_imports.items())))
    digest.graph(model.graph)
    for key, function in sorted(model.functions.items()):
        digest.texts("function", *key, *function.attributes)
        digest.graph(function.graph)
    return digest.hexdigest()


class _Digest:
    """Writes a model into SHA-256, every text and list with its length, so that no two models read alike."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def texts(self, *texts: str) -> None:
        self._hash.update(len(texts).to_bytes(8, "little"))
        for text in texts:
            self._bytes(text.encode())

    def _bytes(self, data: bytes | memoryview) -> None:
        self._hash.update(len(data).to_bytes(8, "little"))
        self._hash.update(data)

    def graph(self, graph: ir.Graph) -> None:
        for title, values in (("inputs", graph.inputs), ("outputs", graph.outputs)):
            self.texts(title, *(f"{v.name} {v.type} {v.shape}" for v in values))
        self.texts("initializers", *sorted(graph.initializers))
        for _, value in sorted(graph.initializers.items()):
            self._tensor(value.const_value)
        for node in graph:
            self._node(node)

    def _node(self, node: ir.Node) -> None:
        self.texts("node", node.domain, node.op_type, node.overload)
        self.texts("reads", *("" if v is None else v.name or "" for v in node.inputs))
        self.texts("writes", *(v.name or "" for v in node.outputs))
        self.texts("attributes", *sorted(node.attributes))
        for _, attribute in sorted(node.attributes.items()):
            self._attribute(attribute)

    def _attribute(self, attribute: ir.Attr) -> None:
        self.texts(attribute.type.name, attribute.ref_attr_name or "")
        if attribute.is_ref():
            return
        if attribute.type in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
            for tensor in _listed(attribute.value):
                self._tensor(tensor)
        elif attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            for graph in _listed(attribute.value):
                self.graph(graph)
        else:
            self.texts(repr(attribute.value))

    def _tensor(self, tensor: ir.TensorProtocol | None) -> None:
        if tensor is None:
            self.texts("no tensor")
            return
        self.texts(tensor.dtype.name, str(tensor.shape))
        if tensor.dtype == ir.DataType.STRING:
            self.texts(*(repr(s) for s in tensor.numpy().ravel().tolist()))
        else:
            array = np.ascontiguousarray(tensor.numpy())
            self._bytes(array.reshape(-1).view(np.uint8).data)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)
