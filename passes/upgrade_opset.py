"""Old operator sets become one that the other passes know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx
import onnx_ir as ir

from edgewise.passes.base import Outcome, Pass, Refused
from edgewise.passes.freeze_inputs import FIRST_IR_WITH_DEFAULTS, freeze, raise_ir_version
from edgewise.passes.graph import (
    Array,
    attribute,
    constant_of,
    graph_of,
    new_initializer,
    new_node,
    opset,
)
from edgewise.passes.infer_shapes import infer_shapes

_OLDEST = 7  # below, onnxruntime has no kernels, and broadcasting was written as attributes


@dataclass(frozen=True)
class UpgradeOpset(Pass):
    """Rewrite the operators whose form or meaning changed up to version `to` of the standard's operator set.

    Given:   y = Clip<min = 0, max = 6>(x)         opset 10
    Result:  y = Clip(x, 0, 6)                     opset 16, and an IR version that goes with it

    All or nothing: one operator without an upgrade leaves the model as it is. Operators of other domains
    are not touched. onnx's own version converter is not used: it gives Resize, Upsample and Hardmax
    another meaning, makes invalid nodes of Clip and Pad in half and double precision, and drops the
    metadata of nodes and quantization annotations. The changes are those of onnx's Changelog.md.
    """

    name = "upgrade-opset"
    to: int = 16  # in 17, onnxruntime fuses a norm of mixed precision into an operator that forbids it

    def __post_init__(self) -> None:
        if not 13 <= self.to <= 17:
            raise ValueError(f"{self.name}: option to goes from 13 to 17, not {self.to}")

    def apply(self, model: ir.Model) -> Outcome:
        if opset(model) >= self.to:
            return Outcome()
        trial = model.clone()
        _, refused = self._upgrade(trial)
        if refused:
            return Outcome(0, MappingProxyType(dict(refused)))
        edits, _ = self._upgrade(model)
        if model.ir_version < FIRST_IR_WITH_DEFAULTS:
            freeze(model.graph)
        model.opset_imports.pop("ai.onnx", None)
        model.opset_imports[""] = self.to
        raise_ir_version(model, onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", self.to)]))
        return Outcome(edits + 1)

    def _upgrade(self, model: ir.Model) -> tuple[int, Counter[str]]:
        """Rewrite what can be rewritten; how many nodes, and why others could not be."""
        start, edits, refused = opset(model), 0, Counter[str]()
        if start < _OLDEST:
            refused[f"operator sets before {_OLDEST} are not upgraded"] += 1
        if model.functions:
            refused["functions of the model have an operator set of their own"] += 1
        if refused:
            return 0, refused
        with suppress(Refused):
            infer_shapes(model)  # some forms depend on ranks and types
        for node in [n for n in model.graph.all_nodes() if n.domain == ""]:
            try:
                edits += _upgrade_node(node, start, self.to)
            except Refused as refusal:
                refused[str(refusal)] += 1
        return edits, refused


def _upgrade_node(node: ir.Node, start: int, to: int) -> bool:
    """Bring a node into the form of version `to`; whether anything had to be done."""
    if not onnx.defs.has(node.op_type, start, ""):
        raise Refused(f"{node.op_type} is not in operator set {start}")
    adapters = [adapt for version, adapt in _CHANGES.get(node.op_type, ()) if start < version <= to]
    if not adapters:
        _check_defaults(node, start, to)
    for adapt in adapters:
        adapt(node)
    _check_form(node, to)
    return bool(adapters)


def _check_defaults(node: ir.Node, start: int, to: int) -> None:
    """Refuse a node that leaves out an attribute whose default is no longer what it was."""
    old = onnx.defs.get_schema(node.op_type, start, "").attributes
    new = onnx.defs.get_schema(node.op_type, to, "").attributes
    for name in old.keys() - node.attributes.keys():
        if name not in new or old[name].default_value != new[name].default_value:
            raise Refused(f"there is no upgrade for {node.op_type}")


def _check_form(node: ir.Node, to: int) -> None:
    """Refuse a node whose attributes, inputs or outputs version `to` does not have."""
    schema = onnx.defs.get_schema(node.op_type, to, "")
    required = {name for name, a in schema.attributes.items() if a.required}
    fits = (
        not schema.deprecated
        and required <= node.attributes.keys() <= schema.attributes.keys()
        and schema.min_input <= len(node.inputs) <= schema.max_input
        and schema.min_output <= len(node.outputs) <= schema.max_output
    )
    if not fits:
        raise Refused(f"there is no upgrade for {node.op_type}")


def _add_input(node: ir.Node, index: int, name: str, array: Array) -> None:
    """Put a new initializer at an optional input; inputs before it that are missing are left out."""
    node.resize_inputs(max(len(node.inputs), index + 1))
    node.replace_input_with(index, new_initializer(graph_of(node), f"{node.outputs[0].name}.{name}", array))


def _to_input(node: ir.Node, name: str, index: int) -> None:
    """Move a list of integers from an attribute to an input."""
    values = attribute(node, name)
    if values is not None:
        node.attributes.pop(name)
        _add_input(node, index, name, np.array(values, np.int64))


def _moved(name: str, index: int) -> Callable[[ir.Node], None]:
    return lambda node: _to_input(node, name, index)


def _type_of(node: ir.Node) -> np.dtype[np.generic]:
    source = node.inputs[0]
    if source is None or source.dtype is None:
        raise Refused(f"the type that {node.op_type} works on is not known")
    return source.dtype.numpy()


def _batch_normalization_9(node: ir.Node) -> None:
    if attribute(node, "spatial", 1) != 1:
        raise Refused("there is no upgrade for BatchNormalization<spatial = 0>")
    node.attributes.pop("spatial", None)


def _batch_normalization_14(node: ir.Node) -> None:
    if len(node.outputs) > 1:
        raise Refused("there is no upgrade for BatchNormalization in training")


def _scan_9(node: ir.Node) -> None:
    raise Refused("there is no upgrade for Scan over batches")


def _slice_10(node: ir.Node) -> None:
    for index, name in enumerate(("starts", "ends", "axes"), start=1):
        _to_input(node, name, index)


def _topk_10(node: ir.Node) -> None:
    node.attributes.add(ir.AttrInt64s("k", (attribute(node, "k"),)))
    _to_input(node, "k", 1)


def _dropout_12(node: ir.Node) -> None:
    """The ratio counts in training only, which took an input of its own from here on."""
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        raise Refused("the mask of the Dropout is used and changes its meaning")
    node.resize_outputs(1)
    node.attributes.pop("ratio", None)


def _clip_11(node: ir.Node) -> None:
    for index, name in ((1, "min"), (2, "max")):
        bound = attribute(node, name)
        if bound is not None:
            node.attributes.pop(name)
            _add_input(node, index, name, np.array(bound, _type_of(node)))


def _pad_11(node: ir.Node) -> None:
    value = attribute(node, "value", 0.0)
    node.attributes.pop("value", None)
    _to_input(node, "pads", 1)
    if value:
        _add_input(node, 2, "value", np.array(value, _type_of(node)))


def _upsample_10(node: ir.Node) -> None:
    """Upsample never shrinks, so the nearest element is always the one below."""
    scales = attribute(node, "scales")
    if scales is not None:
        node.attributes.pop("scales")
        _add_input(node, 1, "scales", np.array(scales, np.float32))
    node.op_type = "Resize"
    _resize(node, "floor")


def _resize_11(node: ir.Node) -> None:
    """The nearest element was the one below where the image grows and the one above where it shrinks."""
    scales = constant_of(node.inputs[1])
    grows = scales is not None and bool((scales >= 1).all())
    shrinks = scales is not None and bool((scales <= 1).all())
    if attribute(node, "mode", "nearest") == "nearest" and not (grows or shrinks):
        raise Refused("the Resize may grow one axis and shrink another")
    _resize(node, "ceil" if shrinks and not grows else "floor")


def _resize(node: ir.Node, nearest_mode: str) -> None:
    scales = node.inputs[1]
    node.resize_inputs(3)
    node.replace_input_with(1, None)
    node.replace_input_with(2, scales)
    node.attributes.add(ir.AttrString("coordinate_transformation_mode", "asymmetric"))
    node.attributes.add(ir.AttrString("nearest_mode", nearest_mode))


def _scatter_11(node: ir.Node) -> None:
    node.op_type = "ScatterElements"


def _softmax_13(node: ir.Node) -> None:
    """It went over all axes from `axis` on, taken together; now it goes over one.

    Given:   y = Softmax<axis = k>(x)                                                   up to opset 12
    Result:  y = Softmax<axis = j>(x)                                where only axis j >= k is not 1
             y = Reshape(Softmax<axis = -1>(Flatten<axis = k>(x)), Shape(x))            otherwise
    """
    source, axis = node.inputs[0], attribute(node, "axis", 1)
    only = _only_long_axis(source, axis)
    if only is not None:
        node.attributes.add(ir.AttrInt64("axis", only))
        return
    shape = new_node(node, "Shape", [source], hint=f"{node.outputs[0].name}.shape")
    shape.type = ir.TensorType(ir.DataType.INT64)
    flat = new_node(node, "Flatten", [source], {"axis": axis})
    normal = new_node(node, node.op_type, [flat], {"axis": -1})
    node.op_type = "Reshape"
    node.attributes.clear()
    node.resize_inputs(2)
    node.replace_input_with(0, normal)
    node.replace_input_with(1, shape)


def _only_long_axis(value: ir.Value | None, axis: int) -> int | None:
    """The one axis from `axis` on whose size is not 1, if there is no other."""
    if axis == -1:
        return axis
    if value is None or value.shape is None or not value.shape.dims:
        return None
    dims = value.shape.dims
    long = [i for i in range(axis % len(dims), len(dims)) if dims[i] != 1] or [len(dims) - 1]
    return long[0] if len(long) == 1 else None


def _roi_align_16(node: ir.Node) -> None:
    node.attributes.add(ir.AttrString("coordinate_transformation_mode", "output_half_pixel"))


Change = tuple[int, Callable[[ir.Node], None]]

_CHANGES: Mapping[str, tuple[Change, ...]] = MappingProxyType(
    {
        "BatchNormalization": ((9, _batch_normalization_9), (14, _batch_normalization_14)),
        "Clip": ((11, _clip_11),),
        "Dropout": ((12, _dropout_12),),
        "Hardmax": ((13, _softmax_13),),
        "LogSoftmax": ((13, _softmax_13),),
        "Pad": ((11, _pad_11),),
        "ReduceSum": ((13, _moved("axes", 1)),),
        "Resize": ((11, _resize_11),),
        "RoiAlign": ((16, _roi_align_16),),
        "Scan": ((9, _scan_9),),
        "Scatter": ((11, _scatter_11),),
        "Slice": ((10, _slice_10),),
        "Softmax": ((13, _softmax_13),),
        "Split": ((13, _moved("split", 1)),),
        "Squeeze": ((13, _moved("axes", 1)),),
        "TopK": ((10, _topk_10),),
        "Unsqueeze": ((13, _moved("axes", 1)),),
        "Upsample": ((10, _upsample_10),),
    }
)
"""The versions at which the form or the meaning of an operator changed, with what brings a node over."""
