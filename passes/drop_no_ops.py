"""Nodes that compute what they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Refused, Rule
from edgewise.passes.graph import Array, attribute, constant_of, replace, static_shape

_WHOLE_AXIS = 2**31 - 1  # what exporters write for "to the end"; no dimension is that long

Dims = tuple[int | None, ...]


@dataclass(frozen=True)
class DropNoOps(Rule):
    """Let the users of a node that changes nothing read its input.

    Given:   y = f(x), and f(x) = x whatever x holds: Dropout at inference, Cast to the same type, Transpose
             in the same order, Reshape, Expand, Tile, Slice, Squeeze or Flatten to the same shape, Pad by
             nothing, Resize by one, x + 0, x - 0, x * 1, x / 1, Relu of what is not negative,
             Concat, Split, Sum, Max, Min or Mean of one tensor
    Result:  x in place of y

    Exact but for the sign of a zero: -0 + 0 is 0.
    """

    name = "drop-no-ops"
    op_types = (
        *("Add", "Sub", "Mul", "Div", "Relu", "Dropout", "Cast", "CastLike", "Transpose"),
        *("Reshape", "Expand", "Tile", "Slice", "Squeeze", "Flatten", "Pad", "Resize"),
        *("Concat", "Split", "Sum", "Max", "Min", "Mean"),
    )

    def rewrite(self, node: ir.Node) -> bool:
        if any(v is not None and v.is_graph_output() and v is not node.outputs[0] for v in node.outputs):
            return False
        source = _UNCHANGED[node.op_type](node)
        if source is None:
            return False
        replace(node.outputs[0], source)
        return True


def _if(condition: bool, node: ir.Node) -> ir.Value | None:
    return node.inputs[0] if condition else None


def _constant_input(node: ir.Node, index: int) -> Array | None:
    """The constant at an optional input, or None where it is absent or computed."""
    return constant_of(node.inputs[index]) if _has(node, index) else None


def _has(node: ir.Node, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None


def _dims(value: ir.Value | None) -> Dims | None:
    """The shape with None for what is not a fixed number, or None where not even the rank is known."""
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) and d >= 0 else None for d in value.shape)


def _dropout(node: ir.Node) -> ir.Value | None:
    if len(node.outputs) > 1 and node.outputs[1].uses():
        raise Refused("the mask of the Dropout is used")
    if _has(node, 2):
        training = constant_of(node.inputs[2])
        if training is None:
            raise Refused("whether the Dropout is in training mode is not constant")
        return _if(not training.any(), node)
    return node.inputs[0]


def _cast(node: ir.Node) -> ir.Value | None:
    source = node.inputs[0]
    return _if(source is not None and source.dtype == attribute(node, "to"), node)


def _cast_like(node: ir.Node) -> ir.Value | None:
    source, like = node.inputs[:2]
    known = source is not None and like is not None and source.dtype is not None
    return _if(known and source is not None and like is not None and source.dtype == like.dtype, node)


def _transpose(node: ir.Node) -> ir.Value | None:
    perm, dims = attribute(node, "perm"), _dims(node.inputs[0])
    if perm is None:  # the default reverses all axes
        return _if(dims is not None and len(dims) < 2, node)
    return _if(tuple(perm) == tuple(range(len(perm))), node)


def _reshape(node: ir.Node) -> ir.Value | None:
    dims, target = _dims(node.inputs[0]), _constant_input(node, 1)
    if dims is None or target is None or target.shape != (len(dims),):
        return None
    copies = not attribute(node, "allowzero", 0)
    same = [d == t or (t == 0 and copies) for d, t in zip(dims, target.tolist(), strict=True)]
    # A single -1 stands for the one dimension that all the equal ones leave over.
    left = [t for t, ok in zip(target.tolist(), same, strict=True) if not ok]
    empty = 0 in dims or (0 in target and not copies)
    return _if(not left or (left == [-1] and not empty), node)


def _expand(node: ir.Node) -> ir.Value | None:
    dims, target = _dims(node.inputs[0]), _constant_input(node, 1)
    if dims is None or target is None or target.size > len(dims):
        return None
    aligned = dims[len(dims) - target.size :]
    return _if(all(t in (1, d) for d, t in zip(aligned, target.tolist(), strict=True)), node)


def _tile(node: ir.Node) -> ir.Value | None:
    repeats = _constant_input(node, 1)
    return _if(repeats is not None and bool((repeats == 1).all()), node)


def _slice(node: ir.Node) -> ir.Value | None:
    starts, ends = _constant_input(node, 1), _constant_input(node, 2)
    dims = _dims(node.inputs[0])
    if starts is None or ends is None or dims is None:
        return None
    axes = _constant_input(node, 3) if _has(node, 3) else np.arange(starts.size)
    steps = _constant_input(node, 4) if _has(node, 4) else np.ones(starts.size, np.int64)
    if axes is None or steps is None or (steps != 1).any():
        return None
    taken = zip((dims[a] for a in axes.tolist()), starts.tolist(), ends.tolist(), strict=True)
    return _if(all(_is_whole(*t) for t in taken), node)


def _is_whole(dim: int | None, start: int, end: int) -> bool:
    """Whether start:end takes all of an axis."""
    if dim is None:
        return start == 0 and end >= _WHOLE_AXIS
    return (start == 0 or start <= -dim) and end >= dim


def _squeeze(node: ir.Node) -> ir.Value | None:
    shape = static_shape(node.inputs[0])
    no_axes = not _has(node, 1) and attribute(node, "axes") is None
    return _if(no_axes and shape is not None and 1 not in shape, node)


def _flatten(node: ir.Node) -> ir.Value | None:
    dims = _dims(node.inputs[0])
    return _if(dims is not None and len(dims) == 2 and attribute(node, "axis", 1) in (1, -1), node)


def _pad(node: ir.Node) -> ir.Value | None:
    pads = _constant_input(node, 1)
    return _if(pads is not None and not pads.any(), node)


def _resize(node: ir.Node) -> ir.Value | None:
    if attribute(node, "coordinate_transformation_mode") == "tf_crop_and_resize":
        return None
    scales, sizes = _constant_input(node, 2), _constant_input(node, 3)
    if scales is not None and scales.size:
        return _if(bool((scales == 1).all()), node)
    if sizes is None or "axes" in node.attributes:
        return None
    return _if(tuple(sizes.tolist()) == static_shape(node.inputs[0]), node)


def _only_input(node: ir.Node) -> ir.Value | None:
    return _if(len(node.inputs) == 1, node)


def _split(node: ir.Node) -> ir.Value | None:
    return _if(len(node.outputs) == 1, node)


def _relu(node: ir.Node) -> ir.Value | None:
    source = node.inputs[0]
    producer = None if source is None else source.producer()
    if producer is None or producer.domain != "":
        return None
    if producer.op_type != "Clip":
        return _if(producer.op_type == "Relu", node)
    low, high = _constant_input(producer, 1), _constant_input(producer, 2)
    if low is None or (high is None and _has(producer, 2)):
        return None
    return _if(bool((low >= 0).all()) and (high is None or bool((high >= 0).all())), node)


def _neutral(element: int, *, commutes: bool) -> Callable[[ir.Node], ir.Value | None]:
    """The check for `x op element`, and for `element op x` where the operator commutes."""

    def check(node: ir.Node) -> ir.Value | None:
        for source, other in ((0, 1), (1, 0))[: 2 if commutes else 1]:
            constant = _constant_input(node, other)
            if constant is not None and (constant == element).all():
                if not _keeps_shape(node.inputs[source], constant):
                    raise Refused("the neutral operand may enlarge the other one")
                return node.inputs[source]
        return None

    return check


def _keeps_shape(value: ir.Value | None, constant: Array) -> bool:
    """Whether broadcasting `value` with `constant` leaves the shape of `value`."""
    if constant.ndim == 0:
        return True
    dims = _dims(value)
    if dims is None or constant.ndim > len(dims):
        return False
    aligned = dims[len(dims) - constant.ndim :]
    return all(c in (1, d) for d, c in zip(aligned, constant.shape, strict=True))


_UNCHANGED: Mapping[str, Callable[[ir.Node], ir.Value | None]] = MappingProxyType(
    {
        "Add": _neutral(0, commutes=True),
        "Sub": _neutral(0, commutes=False),
        "Mul": _neutral(1, commutes=True),
        "Div": _neutral(1, commutes=False),
        "Relu": _relu,
        "Dropout": _dropout,
        "Cast": _cast,
        "CastLike": _cast_like,
        "Transpose": _transpose,
        "Reshape": _reshape,
        "Expand": _expand,
        "Tile": _tile,
        "Slice": _slice,
        "Squeeze": _squeeze,
        "Flatten": _flatten,
        "Pad": _pad,
        "Resize": _resize,
        "Split": _split,
        "Concat": _only_input,
        "Sum": _only_input,
        "Max": _only_input,
        "Min": _only_input,
        "Mean": _only_input,
    }
)
