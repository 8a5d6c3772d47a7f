"""New operator sets become one that older runtimes read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from edgewise.passes.base import Outcome, Pass, Refused
from edgewise.passes.graph import opset
from edgewise.passes.infer_shapes import infer_shapes
from edgewise.passes.older_forms import FORMS

_OLDEST = 13
_FIRST_IR_WITH_FUNCTIONS = 8
_IR_OF_TYPES: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"), 9),
        **dict.fromkeys(("INT4", "UINT4"), 10),
        "FLOAT4E2M1": 11,
        "FLOAT8E8M0": 12,
        **dict.fromkeys(("INT2", "UINT2"), 13),
    }
)
"""The IR version that brought a type, by the comments in onnx.proto."""


@dataclass(frozen=True)
class LowerOpset(Pass):
    """Write the model in version `to` of the standard's operator set, and in an `ir_version` of the file.

    Given:   y = Gelu(x), m = ReduceMean(y, axes)                      opset 20
    Result:  y = x / 2 * (1 + Erf(x / sqrt(2))), m = ReduceMean<axes>(y)        opset 17

    An operator whose schema did not change, or gained only types and options that are not used here, stays
    as it is; one that changed is written in its older form, and one that did not exist in those that did.
    All or nothing: one operator without an older form leaves the model as it is, IR version included.
    Operators of other domains are not touched; functions are inlined. Without `ir_version` that of the
    file stays. Models that are old enough are left alone.
    """

    name = "lower-opset"
    to: int = 17
    ir_version: int = 0

    def __post_init__(self) -> None:
        if self.to < _OLDEST:
            raise ValueError(f"{self.name}: option to starts at {_OLDEST}, not {self.to}")

    def apply(self, model: ir.Model) -> Outcome:
        refused = Counter[str]()
        if opset(model) > self.to:
            refused += self._lower(model.clone())
        if self.ir_version and (needed := _needed_ir_version(model)) > self.ir_version:
            refused[f"its types or functions need IR version {needed}"] += 1
        if refused:
            return Outcome(0, MappingProxyType(dict(refused)))
        edits = 0
        if opset(model) > self.to:
            self._lower(model)
            model.opset_imports.pop("ai.onnx", None)
            model.opset_imports[""] = self.to
            edits += 1
        if self.ir_version and model.ir_version > self.ir_version:
            model.ir_version = self.ir_version
            edits += 1
        return Outcome(edits)

    def _lower(self, model: ir.Model) -> Counter[str]:
        """Rewrite what can be rewritten; why the rest cannot be."""
        start, refused = opset(model), Counter[str]()
        if model.functions:
            try:
                InlinePass()(model)
            except (ValueError, ir.passes.PassError):
                refused["functions of the model have an operator set of their own"] += 1
                return refused
        with suppress(Refused):
            infer_shapes(model)  # some forms depend on ranks and types
        for node in list(model.graph.all_nodes()):
            try:
                _lower(node, start, self.to)
            except Refused as refusal:
                refused[str(refusal)] += 1
        return refused


def _needed_ir_version(model: ir.Model) -> int:
    """The lowest IR version that knows all that the model is made of."""
    values = [
        v
        for graph in model.graphs()
        for v in (*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs))
    ]
    names = {v.dtype.name for v in values if v.dtype is not None}
    functions = _FIRST_IR_WITH_FUNCTIONS if model.functions else 0
    return max([functions, *(_IR_OF_TYPES.get(name, 0) for name in names)])


def _lower(node: ir.Node, start: int, to: int) -> None:
    """Bring a node from version `start` down to version `to`."""
    if node.domain != "" or _since(node, start) == _since(node, to):
        return
    for version, form in FORMS.get(node.op_type, ()):
        if to < version <= start:
            _fit(node, start, version)
            was = node.op_type
            for made in form(node):
                if made is node and made.op_type == was:
                    _fit(made, version, version - 1)
                _lower(made, version - 1, to)
            return
    _fit(node, start, to)


def _since(node: ir.Node, version: int) -> int:
    """The version in which the operator became what it is in `version`; 0 where it does not exist."""
    if not onnx.defs.has(node.op_type, version, ""):
        return 0
    return onnx.defs.get_schema(node.op_type, version, "").since_version


def _fit(node: ir.Node, start: int, to: int) -> None:
    """See to it that a node of version `start` means the same in `to`, where the operator only grew."""
    since = _since(node, start)
    if since == _since(node, to):
        return
    if not _since(node, to):
        raise Refused(f"{node.op_type} of operator set {since} has no older form")
    new, old = (onnx.defs.get_schema(node.op_type, version, "") for version in (start, to))
    _fit_attributes(node, new, old)
    required = {name for name, a in old.attributes.items() if a.required}
    fits = (
        required <= node.attributes.keys()
        and old.min_input <= len(node.inputs) <= old.max_input
        and old.min_output <= len(node.outputs) <= old.max_output
    )
    if old.deprecated or not fits:
        raise Refused(f"{node.op_type} in the form of operator set {since} has no older form")
    _check_types(node, old)


def _fit_attributes(node: ir.Node, new: onnx.defs.OpSchema, old: onnx.defs.OpSchema) -> None:
    """Leave out what the old form does not know and is at its default, write out defaults that changed."""
    fresh, former = _defaults(new), _defaults(old)
    for name, attr in list(node.attributes.items()):
        if name in old.attributes:
            continue
        if name not in fresh or not _same(attr.value, fresh[name]):
            raise Refused(f"{node.op_type} with {name} has no older form")
        node.attributes.pop(name)
    for name in old.attributes.keys() - node.attributes.keys():
        if name in former and not (name in fresh and _same(fresh[name], former[name])):
            if name not in fresh:
                raise Refused(f"{node.op_type} without {name} has no older form")
            (attr,) = ir.convenience.convert_attributes({name: fresh[name]})
            node.attributes.add(attr)


def _defaults(schema: onnx.defs.OpSchema) -> dict[str, Any]:
    """The values of attributes that a node leaves out."""
    values = {
        name: onnx.helper.get_attribute_value(a.default_value)
        for name, a in schema.attributes.items()
        if a.default_value.type
    }
    return {name: v.decode() if isinstance(v, bytes) else v for name, v in values.items()}


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, float) and isinstance(default, float):
        return bool(np.float32(value) == np.float32(default))  # the file holds 32 bits
    return type(value) is type(default) and bool(value == default)


def _check_types(node: ir.Node, schema: onnx.defs.OpSchema) -> None:
    """Refuse a node that reads or writes a type that its older form does not."""
    for values, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for index, value in enumerate(values):
            text = None if value is None else _type_text(value.type)
            if text is not None and text not in formal[min(index, len(formal) - 1)].types:
                kind = text[len("tensor(") : -1] if text.startswith("tensor(") else text
                raise Refused(f"{node.op_type} of {kind} has no older form")


def _type_text(kind: ir.TypeProtocol | None) -> str | None:
    """The type as schemas name it; None where it is not known."""
    if isinstance(kind, ir.TensorType):
        return f"tensor({kind.dtype.name.lower()})"
    if isinstance(kind, ir.SequenceType | ir.OptionalType):
        inner = _type_text(kind.elem_type)
        return (
            None
            if inner is None
            else f"{'seq' if isinstance(kind, ir.SequenceType) else 'optional'}({inner})"
        )
    return None
