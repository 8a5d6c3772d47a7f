"""A model as one file, its large tensors copied there from where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

Numbers = ir.Tensor[Any] | ir.PackedTensor[Any] | ir.ExternalTensor | ir.TensorProtoTensor
"""Tensors that can be copied into a file."""

_KINDS = (ir.Tensor, ir.PackedTensor, ir.ExternalTensor, ir.TensorProtoTensor)

_LARGE = 2**20  # bytes: tensors above it are copied, the others are part of a message in memory
_BYTES = 2  # protobuf's wire type of what is written with its length before it


def save(model: ir.Model, path: Path) -> None:
    """Write what `ir.save` would, without a second copy of the weights in memory; `model` is used up.

    A protobuf message is a row of fields in any order, so the graph is written as what protobuf makes of it
    without its initializers, followed by these. Of a large one the numbers are the last field.
    Constants in nodes and in the bodies of control flow are written as part of the message.
    """
    large = _large_tensors(model.graph)
    for name, tensor in large.items():
        model.graph.initializers[name].const_value = _without_numbers(tensor)
    ir.external_data.load_to_model(model)
    proto = ir.to_proto(model)
    entries = [(_start_of(t, large.get(t.name)), large.get(t.name)) for t in proto.graph.initializer]
    proto.graph.ClearField("initializer")
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    size = len(graph) + sum(len(start) + (0 if t is None else t.nbytes) for start, t in entries)
    with open(path, "wb") as file:
        file.write(proto.SerializeToString() + _key(onnx.ModelProto.GRAPH_FIELD_NUMBER, size) + graph)
        for start, numbers in entries:
            file.write(start)
            if numbers is not None:
                numbers.tofile(file)


def _large_tensors(graph: ir.Graph) -> dict[str, Numbers]:
    """The initializers to copy, by name; texts have no size."""
    held = {name: value.const_value for name, value in graph.initializers.items()}
    numbers = {n: t for n, t in held.items() if isinstance(t, _KINDS) and t.dtype != ir.DataType.STRING}
    return {name: tensor for name, tensor in numbers.items() if tensor.nbytes > _LARGE}


def _without_numbers(tensor: Numbers) -> ir.LazyTensor:
    """A tensor that is written as `tensor` but for its numbers."""
    nothing = ir.tensor([], tensor.dtype)
    return ir.LazyTensor(
        lambda: nothing,
        tensor.dtype,
        ir.Shape(tensor.shape),
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _start_of(proto: onnx.TensorProto, large: Numbers | None) -> bytes:
    """An initializer up to the numbers of a large one, which follow; others as a whole."""
    if large is not None:
        proto.ClearField("raw_data")
    data: bytes = proto.SerializeToString()
    if large is not None:
        data += _key(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, large.nbytes)
    size = len(data) + (0 if large is None else large.nbytes)
    return _key(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, size) + data


def _key(field: int, size: int) -> bytes:
    """What stands before `size` bytes of a field: its number and wire type, then the size."""
    return _varint(field << 3 | _BYTES) + _varint(size)


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow (protobuf's encoding)."""
    pieces = [number & 127]
    while number := number >> 7:
        pieces[-1] |= 128
        pieces.append(number & 127)
    return bytes(pieces)
