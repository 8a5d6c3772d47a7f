"""Open dimensions of the inputs become numbers, wherever they occur."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from edgewise.passes.base import Outcome, Pass, PassError, Refused
from edgewise.passes.infer_shapes import infer_shapes, symbol_of

_SYMBOL = re.compile(r"[A-Za-z_][\w.]*")  # what onnx-ir reads as one name of an expression
_Axis = tuple[ir.Value, int]


@dataclass(frozen=True)
class FixDimensions(Pass):
    """Give open dimensions of the inputs a size, and every dimension of the same name or computed from it.

    Given:   dims "batch=1,x.2=8,width=6"
             input x of [batch, 3, None, width], output y of [batch, width // 2]
    Result:  input x of [1, 3, 8, 6], output y of [1, 3]

    A dimension is addressed by its name, or as INPUT.AXIS, where one that has a name takes all others of
    that name along. What was noted of inner values is fixed likewise, bodies included; where a noted
    expression cannot be computed the dimension becomes unknown. Dimensions of outputs that are left open
    get the size that follows from the inputs, where onnx can tell. Names are gone once they have a size,
    so a second run does not know them. Raises `PassError` where a name is not known, where a dimension is
    another number already, and where it is given two sizes.
    """

    name = "fix-dimensions"
    keeps_signature: ClassVar[bool] = False  # the inputs, and outputs that depend on them, become narrower
    dims: str = ""

    def apply(self, model: ir.Model) -> Outcome:
        sizes = _resolve(model.graph.inputs, _wishes(self.dims))
        symbols = {key: size for key, size in sizes.items() if isinstance(key, str)}
        axes = {key: size for key, size in sizes.items() if not isinstance(key, str)}
        edits = 0
        for value in _values(model) if sizes else ():
            fixed = _fixed(value, symbols, axes)
            if fixed != value.shape:
                value.shape = fixed
                edits += 1
        return Outcome(edits + (_learn_outputs(model) if edits else 0))


def _wishes(dims: str) -> Iterator[tuple[str, int]]:
    """The pairs of name and size in `dims`."""
    for part in filter(None, (p.strip() for p in dims.split(","))):
        name, _, size = (p.strip() for p in part.rpartition("="))
        if not (name and size.isdecimal() and int(size)):
            raise PassError(f"dims: {part!r} is not NAME=SIZE or INPUT.AXIS=SIZE with a size above zero")
        yield name, int(size)


def _resolve(inputs: Sequence[ir.Value], wishes: Iterator[tuple[str, int]]) -> dict[str | _Axis, int]:
    """The size of every symbol and of every axis without one."""
    found: dict[str | _Axis, int] = {}
    for name, size in wishes:
        key = _find(inputs, name)
        if isinstance(key, int):
            if key != size:
                raise PassError(f"dims: {name} is {key} already, it cannot become {size}")
        elif found.setdefault(key, size) != size:
            raise PassError(f"dims: {name} is given two sizes, {found[key]} and {size}")
    return found


def _find(inputs: Sequence[ir.Value], name: str) -> str | _Axis | int:
    """What `name` addresses: a symbol, an axis without one, or one that has a size, which is given back."""
    if any(symbol_of(dim) == name for v in inputs for dim in v.shape or ()):
        return name
    owner, _, digits = name.rpartition(".")
    value = next((v for v in inputs if v.name == owner and v.shape is not None), None)
    if value is None or value.shape is None or not digits.isdecimal():
        raise PassError(f"dims: there is no open dimension {name!r}, {_open(inputs)}")
    axis = int(digits)
    if axis >= value.shape.rank():
        raise PassError(f"dims: there is no {name}, input {owner!r} has {value.shape.rank()} dimensions")
    dim = value.shape[axis]
    if isinstance(dim, int) and dim >= 0:
        return dim
    return symbol_of(dim) or (value, axis)


def _open(inputs: Sequence[ir.Value]) -> str:
    """The names by which open dimensions can be addressed."""
    names = {  # a set that keeps the order
        symbol_of(dim) or f"{value.name}.{axis}": None
        for value in inputs
        for axis, dim in enumerate(value.shape or ())
        if not isinstance(dim, int) or dim < 0
    }
    return f"only {', '.join(names)}" if names else "all inputs have fixed sizes"


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """Inputs and results of the main graph and of all bodies; functions have symbols of their own."""
    for graph in model.graphs():
        yield from graph.inputs
        for node in graph:
            yield from node.outputs


def _fixed(value: ir.Value, symbols: Mapping[str, int], axes: Mapping[_Axis, int]) -> ir.Shape | None:
    """The shape of `value` with the sizes in it."""
    if value.shape is None:
        return None
    shape: ir.Shape = value.shape.copy()
    for axis, dim in enumerate(value.shape):
        if (value, axis) in axes:
            shape[axis] = axes[value, axis]
        elif isinstance(dim, ir.SymbolicDim) and dim.value is not None:
            shape[axis] = _evaluated(dim, dim.value, symbols)
    return shape


def _evaluated(dim: ir.SymbolicDim, text: str, symbols: Mapping[str, int]) -> int | ir.SymbolicDim | None:
    """A name or an expression of names with the sizes put in; None where it cannot be computed."""
    if text in symbols:
        return symbols[text]
    if symbols.keys().isdisjoint(_SYMBOL.findall(text)):
        return dim
    try:
        found = dim.evaluate(symbols)
    except (ValueError, TypeError, ArithmeticError):  # a notation that onnx-ir does not know, or no number
        return None
    if isinstance(found, int):
        return found if found >= 0 else None
    return found if found.free_symbols() else None


def _learn_outputs(model: ir.Model) -> int:
    """Give open dimensions of the outputs the sizes that are inferred; how many outputs gained some."""
    twin = model.clone()
    inferred = list(twin.graph.outputs)
    twin.graph.outputs.clear()  # of outputs inference believes what they declare
    try:
        infer_shapes(twin)
    except Refused:  # a model that contradicts itself
        return 0
    return sum(_learn(old, new.shape) for old, new in zip(model.graph.outputs, inferred, strict=True))


def _learn(output: ir.Value, inferred: ir.Shape | None) -> bool:
    """Whether `output` had open dimensions whose sizes `inferred` holds; then it has them."""
    if output.shape is None or inferred is None or output.shape.rank() != inferred.rank():
        return False
    shape: ir.Shape = output.shape.copy()
    for axis, (old, new) in enumerate(zip(output.shape, inferred, strict=True)):
        if isinstance(new, int) and new >= 0 and not (isinstance(old, int) and old >= 0):
            shape[axis] = new
    news = shape != output.shape
    output.shape = shape
    return news
