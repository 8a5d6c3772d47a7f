"""The rotation of a position embedding becomes the operator of that name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Outcome, Refused, Rule
from edgewise.passes.channel_links import Dim, dims_of
from edgewise.passes.graph import (
    Array,
    attribute,
    constant_of,
    graph_of,
    new_initializer,
    new_node,
    opset,
    replace,
)
from edgewise.passes.pattern import Match, Var, either, number_of, op

_SINCE = 23
_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})
_ELEMENTWISE = frozenset({"Cast", "Cos", "Sin"})

_HALVES = op("Concat", op("Neg", Var("imaginary")), Var("real"), name="halves")
_PAIRS = op(
    "Reshape",
    op(
        "Concat",
        op("Unsqueeze", op("Neg", Var("imaginary")), Var()),
        op("Unsqueeze", Var("real"), Var(), name="one"),
        name="pairs",
    ),
    Var(),
    name="turned",
)
_ROTATION = op("Add", op("Mul", Var("x"), Var("cos")), op("Mul", either(_HALVES, _PAIRS), Var("sin")))

Build = Callable[[ir.Node], ir.Value]
"""Makes a value in front of a node."""


@dataclass(frozen=True)
class FuseRotary(Rule):
    """Write the rotation of a position embedding as the standard's operator, where the operator set has it.

    Given:   y = x * cos + turned(x) * sin          x of [batch, heads, length, size]
             turned(x) = Concat(-x[..., size/2:], x[..., :size/2])
             or, in pairs, -x[..., 1::2] and x[..., 0::2] alternately
    Result:  y = RotaryEmbedding(x, half(cos), half(sin))             from operator set 23 on

    cos and sin are [batch, 1, length, size]: the operator does not broadcast over samples. It has one angle
    for two elements that turn together, so both must be known to have the same. What is computed is
    followed back to constants, rows of a constant table, or a Concat of a value with itself, and from
    there on is computed for half the size.
    """

    name = "fuse-rotary"
    op_types = ("Add",)

    def apply(self, model: ir.Model) -> Outcome:
        return super().apply(model) if opset(model) >= _SINCE else Outcome()

    def rewrite(self, node: ir.Node) -> bool:
        found = _read(node)
        if found is None:
            return False
        x, in_pairs = found["x"], "pairs" in found
        found.check_private()
        if x.dtype not in _TYPES:
            raise Refused("runtimes have no rotary embedding of this type")
        builds = [_cache(found[name], dims_of(x), in_pairs) for name in ("cos", "sin")]
        caches = [build(node) for build in builds]
        rotated = new_node(node, "RotaryEmbedding", [x, *caches], {"interleaved": 1} if in_pairs else {})
        rotated.shape = x.shape
        replace(node.outputs[0], rotated)
        return True


def _read(node: ir.Node) -> Match | None:
    """The rotation that ends with this Add, or None."""
    for found in _ROTATION.solutions(node.outputs[0], Match()):
        x = found["x"]
        if x.shape is None or len(x.shape) != 4:
            continue
        size = x.shape[3]
        if not isinstance(size, int) or size <= 0 or size % 2:
            continue
        places = range(size)
        in_halves = "halves" in found
        real, imaginary = (
            (places[: size // 2], places[size // 2 :]) if in_halves else (places[::2], places[1::2])
        )
        is_joined = _joins_last_axis(found.node("halves"), 4) if in_halves else _alternates(found, size)
        if is_joined and _part(found["real"], x) == real and _part(found["imaginary"], x) == imaginary:
            return found
    return None


def _joins_last_axis(concat: ir.Node, rank: int) -> bool:
    return attribute(concat, "axis") in (-1, rank - 1)


def _alternates(found: Match, size: int) -> bool:
    """Whether [..., size/2] and [..., size/2] become [..., size/2, 2] and then [..., size]."""
    one, pairs, turned = (found[name].shape for name in ("one", "pairs", "turned"))
    if one is None or pairs is None or turned is None or len(turned) != 4:
        return False
    stacked = tuple(one[-2:]) == (size // 2, 1) and tuple(pairs[-2:]) == (size // 2, 2)
    return stacked and len(pairs) == 5 and turned[3] == size


def _part(value: ir.Value, x: ir.Value) -> range | None:
    """The places along the last axis of `x` that `value` takes, or None where it is no part of it."""
    node = value.producer()
    if node is None or node.domain != "" or not node.inputs or node.inputs[0] is not x or x.shape is None:
        return None
    size = x.shape[-1]
    if not isinstance(size, int):
        return None
    if node.op_type == "Slice":
        return _taken(node, len(x.shape), size)
    if node.op_type == "Split" and attribute(node, "axis", 0) in (-1, len(x.shape) - 1):
        return _split_off(node, value, size)
    return None


def _taken(node: ir.Node, rank: int, size: int) -> range | None:
    """What a Slice takes of the last axis, if it slices no other."""
    start, end, axis, step = (number_of(given) for given in (*node.inputs[1:], None, None)[:4])
    if len(node.inputs) < 5:
        step = 1
    if start is None or end is None or step is None or axis not in (-1, rank - 1):
        return None
    return range(size)[int(start) : int(end) : int(step)]


def _split_off(node: ir.Node, value: ir.Value, size: int) -> range | None:
    """The part of the last axis that an output of a Split is."""
    ends = [0]
    for output in node.outputs:
        width = None if output.shape is None else output.shape[-1]
        if not isinstance(width, int):
            return None
        ends.append(ends[-1] + width)
    index = list(node.outputs).index(value)
    return range(size)[ends[index] : ends[index + 1]]


def _cache(angles: ir.Value, dims: tuple[Dim, ...], in_pairs: bool) -> Build:
    """cos or sin for x of `dims` as the operator reads them: [batch, length, size / 2]."""
    batch, _, length, size = dims
    given = dims_of(angles)
    aligned = (1,) * (4 - len(given)) + given
    if aligned != (batch, 1, length, size) or None in aligned:
        raise Refused("cos and sin are not known to be given for each sample and once for all heads")
    constant = constant_of(angles)
    if constant is not None:
        return _half_of_constant(angles, constant.reshape(-1, *constant.shape[-2:]), in_pairs)
    node = angles.producer()
    if node is not None and node.domain == "" and node.op_type in ("Unsqueeze", "Reshape"):
        source = node.inputs[0]
        if source is not None and source.shape is not None and dims_of(source) == (batch, length, size):
            return _half(source, in_pairs)
    raise Refused("the axis of the heads is not added to cos and sin at last")


def _half(value: ir.Value, in_pairs: bool) -> Build:
    """One angle of every two that turn together; `Refused` where they are not known to be equal."""
    constant, node = constant_of(value), value.producer()
    if constant is not None:
        return _half_of_constant(value, constant, in_pairs)
    if node is not None and node.domain == "" and value.shape is not None:
        if node.op_type == "Concat" and not in_pairs and _joins_last_axis(node, len(value.shape)):
            first, *others = node.inputs
            if first is not None and len(others) == 1 and others[0] is first:
                return lambda _: first
        data = _data_of(node)
        source = None if data is None else node.inputs[data]
        if data is not None and source is not None:
            return _again(node, data, _half(source, in_pairs))
    raise Refused("elements that turn together are not known to have one angle")


def _data_of(node: ir.Node) -> int | None:
    """The input whose last axis, element by element, becomes that of the output."""
    if node.op_type in _ELEMENTWISE:
        return 0
    if node.op_type == "Mul":
        return next((i for i in (0, 1) if number_of(node.inputs[1 - i]) is not None), None)
    table = constant_of(node.inputs[0]) if node.op_type == "Gather" else None
    return 0 if table is not None and table.ndim == 2 and attribute(node, "axis", 0) == 0 else None


def _half_of_constant(value: ir.Value, array: Array, in_pairs: bool) -> Build:
    middle = array.shape[-1] // 2
    first, second = (
        (array[..., ::2], array[..., 1::2]) if in_pairs else (array[..., :middle], array[..., middle:])
    )
    if not np.array_equal(first, second):
        raise Refused("elements that turn together have different angles")
    return lambda before: new_initializer(graph_of(before), f"{value.name}.half", first)


def _again(node: ir.Node, index: int, source: Build) -> Build:
    """The node once more, with input `index` of half the size."""

    def build(before: ir.Node) -> ir.Value:
        inputs = list(node.inputs)
        inputs[index] = source(before)
        whole = node.outputs[0]
        half = new_node(
            before,
            node.op_type,
            inputs,
            {name: attr.value for name, attr in node.attributes.items()},
            hint=f"{whole.name}.half",
        )
        half.type = whole.type
        *dims, size = dims_of(whole)
        half.shape = ir.Shape([*dims, size // 2 if isinstance(size, int) else None])
        return half

    return build
