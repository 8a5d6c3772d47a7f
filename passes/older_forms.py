"""What newer operator sets brought, written in what older ones know.

A form rewrites a node of operator set n in the terms of n - 1. It gives back the nodes it wrote, among them
the node itself, which keeps its name and its output, and raises `Refused` before it edits anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Refused
from edgewise.passes.graph import (
    Array,
    attribute,
    constant_of,
    drop_unused_initializer,
    graph_of,
    new_initializer,
    new_node,
    remove_if_unused,
)

Form = Callable[[ir.Node], Sequence[ir.Node]]

_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_END = np.iinfo(np.int64).max


class _Formula:
    """Writes nodes in front of `node`, and at last `node` itself."""

    def __init__(self, node: ir.Node) -> None:
        self._node = node
        self._made: list[ir.Node] = []

    def __call__(
        self, op_type: str, *inputs: ir.Value | None, kind: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        """The result of a new node; `kind` where its type is not that of its first input."""
        result = new_node(self._node, op_type, inputs, attributes)
        if kind is not None:
            result.type = ir.TensorType(kind)
        made = result.producer()
        assert made is not None
        self._made.append(made)
        return result

    def number(self, value: float, like: ir.Value) -> ir.Value:
        """A scalar of the type of `like`."""
        if like.dtype is None:
            raise Refused(f"the type that {self._node.op_type} works on is not known")
        return self.constant(np.array(value, like.dtype.numpy()), "number")

    def constant(self, array: Array, hint: str) -> ir.Value:
        return new_initializer(graph_of(self._node), f"{self._node.outputs[0].name}.{hint}", array)

    def end(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> Sequence[ir.Node]:
        """Let the node compute the last step; all nodes that were written."""
        node = self._node
        node.op_type = op_type
        node.attributes.clear()
        for attr in ir.convenience.convert_attributes(attributes):
            node.attributes.add(attr)
        node.resize_inputs(len(inputs))
        for index, value in enumerate(inputs):
            node.replace_input_with(index, value)
        return [*self._made, node]


def _first(node: ir.Node) -> ir.Value:
    """The data that an operator works on, whose type has to be known."""
    source = node.inputs[0]
    if source is None or source.dtype is None:
        raise Refused(f"the type that {node.op_type} works on is not known")
    return source


def _rank(node: ir.Node) -> int:
    source = node.inputs[0]
    if source is None or source.shape is None:
        raise Refused(f"the rank that {node.op_type} works on is not known")
    return source.shape.rank()


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _constant_input(node: ir.Node, index: int, what: str) -> Array | None:
    """The numbers at an optional input; None where it is left out."""
    value = _input(node, index)
    array = constant_of(value)
    if value is not None and array is None:
        raise Refused(f"{node.op_type} with computed {what} has no older form")
    return array


def _set_input(node: ir.Node, index: int, value: ir.Value | None) -> None:
    """Exchange an input, and let go of a constant that nothing else reads."""
    before = node.inputs[index]
    node.replace_input_with(index, value)
    if before is None:
        return
    producer = before.producer()
    if producer is None:
        drop_unused_initializer(before)
    else:
        remove_if_unused(producer)


def _in_wide(f: _Formula, x: ir.Value) -> ir.Value:
    """`x` in the precision in which norms are computed."""
    return f("Cast", x, kind=ir.DataType.FLOAT, to=int(ir.DataType.FLOAT)) if x.dtype in _NARROW else x


def _as_before(f: _Formula, value: ir.Value, x: ir.Value) -> ir.Value:
    """`value` in the type of `x`."""
    if x.dtype is None or x.dtype not in _NARROW:
        return value
    return f("Cast", value, kind=x.dtype, to=int(x.dtype))


def _gelu_20(node: ir.Node) -> Sequence[ir.Node]:
    """y = 0.5 x (1 + erf(x / sqrt(2))), or with tanh(sqrt(2 / pi) (x + 0.044715 x^3)) in place of erf."""
    x, f = _first(node), _Formula(node)
    if attribute(node, "approximate", "none") == "tanh":
        cube = f("Mul", f("Mul", x, x), x)
        inner = f("Add", x, f("Mul", cube, f.number(0.044715, x)))
        curve = f("Tanh", f("Mul", inner, f.number(math.sqrt(2 / math.pi), x)))
    else:
        curve = f("Erf", f("Mul", x, f.number(math.sqrt(0.5), x)))
    half = f("Mul", x, f.number(0.5, x))
    return f.end("Mul", half, f("Add", curve, f.number(1, x)))


def _hard_swish_14(node: ir.Node) -> Sequence[ir.Node]:
    """y = x max(0, min(1, x / 6 + 1 / 2))"""
    x, f = _first(node), _Formula(node)
    return f.end("Mul", x, f("HardSigmoid", x, alpha=1 / 6, beta=0.5))


def _mish_18(node: ir.Node) -> Sequence[ir.Node]:
    """y = x tanh(log(1 + e^x))"""
    x, f = _first(node), _Formula(node)
    return f.end("Mul", x, f("Tanh", f("Softplus", x)))


def _swish_24(node: ir.Node) -> Sequence[ir.Node]:
    """y = x / (1 + e^(-alpha x))"""
    x, f, alpha = _first(node), _Formula(node), attribute(node, "alpha", 1.0)
    inner = x if alpha == 1 else f("Mul", x, f.number(alpha, x))
    return f.end("Mul", x, f("Sigmoid", inner))


def _layer_normalization_17(node: ir.Node) -> Sequence[ir.Node]:
    """y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias, over all axes from `axis` on."""
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise Refused("LayerNormalization that hands out its mean has no older form")
    x, axes = _first(node), _axes_to_the_end(node)
    node.resize_outputs(1)
    f, scale, bias = _Formula(node), node.inputs[1], _input(node, 2)
    wide = _in_wide(f, x)
    centered = f("Sub", wide, f("ReduceMean", wide, axes=axes, keepdims=1))
    variance = f("ReduceMean", f("Mul", centered, centered), axes=axes, keepdims=1)
    root = f("Sqrt", f("Add", variance, f.number(attribute(node, "epsilon", 1e-5), wide)))
    normal = _as_before(f, f("Div", centered, root), x)
    return f.end("Mul", normal, scale) if bias is None else f.end("Add", f("Mul", normal, scale), bias)


def _rms_normalization_23(node: ir.Node) -> Sequence[ir.Node]:
    """y = x / sqrt(mean(x^2) + epsilon) * scale, over all axes from `axis` on."""
    x, axes, f = _first(node), _axes_to_the_end(node), _Formula(node)
    wide = _in_wide(f, x)
    mean = f("ReduceMean", f("Mul", wide, wide), f.constant(np.array(axes, np.int64), "axes"), keepdims=1)
    root = f("Sqrt", f("Add", mean, f.number(attribute(node, "epsilon", 1e-5), wide)))
    return f.end("Mul", _as_before(f, f("Div", wide, root), x), node.inputs[1])


def _axes_to_the_end(node: ir.Node) -> list[int]:
    """The axes from `axis` on, counted from behind."""
    axis = int(attribute(node, "axis", -1))
    return list(range(axis if axis < 0 else axis - _rank(node), 0))


def _group_normalization_21(node: ir.Node) -> Sequence[ir.Node]:
    """y = InstanceNormalization over each group, then scale and shift per channel."""
    x, rank, groups = _first(node), _rank(node), int(attribute(node, "num_groups"))
    f, scale, bias = _Formula(node), node.inputs[1], node.inputs[2]
    kind = np.dtype(np.float32) if x.dtype in _NARROW else x.dtype.numpy()  # type: ignore[union-attr]
    ones, zeros = f.constant(np.ones(groups, kind), "ones"), f.constant(np.zeros(groups, kind), "zeros")
    normal = _as_before(f, _over_groups(f, node, x, groups, ones, zeros), x)
    shape = f.constant(np.array([-1] + [1] * (rank - 2), np.int64), "per_channel")
    scaled = f("Mul", normal, f("Reshape", scale, shape))
    return f.end("Add", scaled, f("Reshape", bias, shape))


def _group_normalization_18(node: ir.Node) -> Sequence[ir.Node]:
    """y = InstanceNormalization over each group; scale and shift are one a group."""
    x, groups, f = _first(node), int(attribute(node, "num_groups")), _Formula(node)
    flat = f("Reshape", x, f.constant(np.array([0, groups, -1], np.int64), "grouped"))
    epsilon = attribute(node, "epsilon", 1e-5)
    normal = f("InstanceNormalization", flat, node.inputs[1], node.inputs[2], epsilon=epsilon)
    return f.end("Reshape", normal, f("Shape", x, kind=ir.DataType.INT64))


def _over_groups(
    f: _Formula, node: ir.Node, x: ir.Value, groups: int, scale: ir.Value, bias: ir.Value
) -> ir.Value:
    """`x` in wide precision with every group of its channels normalized."""
    flat = f("Reshape", _in_wide(f, x), f.constant(np.array([0, groups, -1], np.int64), "grouped"))
    epsilon = attribute(node, "epsilon", 1e-5)
    normal = f("InstanceNormalization", flat, scale, bias, epsilon=epsilon)
    return f("Reshape", normal, f("Shape", x, kind=ir.DataType.INT64))


def _cast_like_15(node: ir.Node) -> Sequence[ir.Node]:
    kind = None if node.inputs[1] is None else node.inputs[1].dtype
    if kind is None:
        raise Refused("the type that CastLike casts to is not known")
    return _Formula(node).end("Cast", node.inputs[0], to=int(kind))


def _shape_15(node: ir.Node) -> Sequence[ir.Node]:
    start, end = attribute(node, "start", 0), attribute(node, "end")
    if start == 0 and end is None:
        return [node]
    f, source = _Formula(node), node.inputs[0]
    whole = f("Shape", source, kind=ir.DataType.INT64)
    bounds = [start, _END if end is None else end, 0]
    return f.end("Slice", whole, *(f.constant(np.array([n], np.int64), "bound") for n in bounds))


def _reshape_14(node: ir.Node) -> Sequence[ir.Node]:
    """A zero stood for the size of the input, which counts where there is a zero."""
    shape = constant_of(node.inputs[1])
    if attribute(node, "allowzero", 0) and (shape is None or not shape.all()):
        raise Refused("Reshape with allowzero has no older form")
    node.attributes.pop("allowzero", None)
    return [node]


def _roi_align_16(node: ir.Node) -> Sequence[ir.Node]:
    if attribute(node, "coordinate_transformation_mode", "half_pixel") != "output_half_pixel":
        raise Refused("RoiAlign by half pixels has no older form")
    node.attributes.pop("coordinate_transformation_mode")
    return [node]


def _scatter_18(node: ir.Node) -> Sequence[ir.Node]:
    if (reduction := attribute(node, "reduction", "none")) in ("max", "min"):
        raise Refused(f"{node.op_type} by {reduction} has no older form")
    return [node]


def _reduce_18(node: ir.Node) -> Sequence[ir.Node]:
    """The axes were an attribute."""
    axes = _constant_input(node, 1, "axes")
    none = axes is None or axes.size == 0
    if none and attribute(node, "noop_with_empty_axes", 0):
        raise Refused(f"{node.op_type} over no axes has no older form")
    node.attributes.pop("noop_with_empty_axes", None)
    if axes is not None and not none:
        node.attributes.add(ir.AttrInt64s("axes", tuple(int(a) for a in axes.ravel())))
    if len(node.inputs) > 1:
        _set_input(node, 1, None)
        node.resize_inputs(1)
    return [node]


def _split_18(node: ir.Node) -> Sequence[ir.Node]:
    """The sizes of unequal parts had to be told."""
    parts = attribute(node, "num_outputs")
    if parts is None:
        return [node]
    source, axis = node.inputs[0], attribute(node, "axis", 0)
    size = None if source is None or source.shape is None else source.shape[axis]
    if not isinstance(size, int) or size < 0:
        raise Refused("Split of an unknown size into equal parts has no older form")
    node.attributes.pop("num_outputs")
    most = -(-size // parts)
    sizes = np.array([most] * (parts - 1) + [size - most * (parts - 1)], np.int64)
    node.resize_inputs(2)
    node.replace_input_with(1, _Formula(node).constant(sizes, "split"))
    return [node]


def _pad_19(node: ir.Node) -> Sequence[ir.Node]:
    if attribute(node, "mode", "constant") == "wrap":
        raise Refused("Pad that wraps around has no older form")
    return [node]


def _pad_18(node: ir.Node) -> Sequence[ir.Node]:
    """Every axis had to be told."""
    axes, pads = _constant_input(node, 3, "axes"), constant_of(node.inputs[1])
    if axes is not None:
        if pads is None:
            raise Refused("Pad of some axes by computed amounts has no older form")
        rank = _rank(node)
        full = np.zeros((2, rank), np.int64)
        full[:, axes] = pads.reshape(2, -1)
        _set_input(node, 1, _Formula(node).constant(full.ravel(), "pads"))
        _set_input(node, 3, None)
    if len(node.inputs) > 3:
        node.resize_inputs(3)
    return [node]


def _resize_19(node: ir.Node) -> Sequence[ir.Node]:
    if attribute(node, "coordinate_transformation_mode", "half_pixel") == "half_pixel_symmetric":
        raise Refused("Resize by symmetric half pixels has no older form")
    return [node]


def _resize_18(node: ir.Node) -> Sequence[ir.Node]:
    """Every axis had to be told."""
    axes = attribute(node, "axes")
    if axes is None:
        return [node]
    if attribute(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        raise Refused("Resize of a part of some axes has no older form")
    rank = _rank(node)
    scales, sizes = _constant_input(node, 2, "scales"), _constant_input(node, 3, "sizes")
    if sizes is not None and sizes.size:
        index, full = 3, _sizes(node, axes, sizes)
    else:
        assert scales is not None
        index, full = 2, np.ones(rank, np.float32)
        full[list(axes)] = scales
    node.attributes.pop("axes")
    _set_input(node, index, _Formula(node).constant(full, "sizes" if index == 3 else "scales"))
    if node.inputs[1] is not None:
        _set_input(node, 1, None)  # a region, which counts in tf_crop_and_resize alone
    return [node]


def _sizes(node: ir.Node, axes: Sequence[int], sizes: Array) -> Array:
    """The sizes of all axes, those that are not resized as they are."""
    source = node.inputs[0]
    assert source is not None
    assert source.shape is not None
    resized = {axis % source.shape.rank() for axis in axes}
    full = np.array([d if isinstance(d, int) else -1 for d in source.shape], np.int64)
    if any(d < 0 and axis not in resized for axis, d in enumerate(full)):
        raise Refused("Resize of some axes where others have no known size has no older form")
    full[list(axes)] = sizes
    return full


def _grid_sample_20(node: ir.Node) -> Sequence[ir.Node]:
    """The modes had other names, and there were images only."""
    if _rank(node) != 4:
        raise Refused("GridSample of volumes has no older form")
    mode = attribute(node, "mode", "linear")
    names = {"linear": "bilinear", "cubic": "bicubic"}
    node.attributes.add(ir.AttrString("mode", names.get(mode, mode)))
    return [node]


def _dft_20(node: ir.Node) -> Sequence[ir.Node]:
    """The axis was an attribute."""
    axis = _constant_input(node, 2, "axis")
    number = -2 if axis is None else int(axis.reshape(()))
    node.attributes.add(ir.AttrInt64("axis", number if number >= 0 else number + _rank(node)))
    if len(node.inputs) > 2:
        _set_input(node, 2, None)
        node.resize_inputs(2)
    return [node]


def _quantize_linear_21(node: ir.Node) -> Sequence[ir.Node]:
    """The type came from the zero point alone, without one it was uint8."""
    dtype = attribute(node, "output_dtype", 0)
    if dtype not in (0, int(ir.DataType.UINT8)) and _input(node, 2) is None:
        scale = constant_of(node.inputs[1])
        if scale is None:
            raise Refused("QuantizeLinear by a computed scale without zero point has no older form")
        zeros = np.zeros(scale.shape, ir.DataType(dtype).numpy())
        node.resize_inputs(3)
        node.replace_input_with(2, _Formula(node).constant(zeros, "zero_point"))
    node.attributes.pop("output_dtype", None)
    return [node]


def _pool(node: ir.Node) -> Sequence[ir.Node]:
    """There were no dilations, and averages over windows that hang over the border counted otherwise."""
    if set(attribute(node, "dilations", ())) - {1}:
        raise Refused(f"{node.op_type} with dilations has no older form")
    if node.op_type == "AveragePool" and attribute(node, "ceil_mode", 0):
        raise Refused("AveragePool with ceil_mode had another meaning")
    node.attributes.pop("dilations", None)
    return [node]


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")

FORMS: Mapping[str, Sequence[tuple[int, Form]]] = MappingProxyType(
    {
        "AveragePool": ((19, _pool),),
        "CastLike": ((15, _cast_like_15),),
        "DFT": ((20, _dft_20),),
        "Gelu": ((20, _gelu_20),),
        "GridSample": ((20, _grid_sample_20),),
        "GroupNormalization": ((21, _group_normalization_21), (18, _group_normalization_18)),
        "HardSwish": ((14, _hard_swish_14),),
        "LayerNormalization": ((17, _layer_normalization_17),),
        "LpPool": ((18, _pool),),
        "Mish": ((18, _mish_18),),
        "Pad": ((19, _pad_19), (18, _pad_18)),
        "QuantizeLinear": ((21, _quantize_linear_21),),
        "RMSNormalization": ((23, _rms_normalization_23),),
        "Reshape": ((14, _reshape_14),),
        "Resize": ((19, _resize_19), (18, _resize_18)),
        "RoiAlign": ((16, _roi_align_16),),
        "ScatterElements": ((18, _scatter_18),),
        "ScatterND": ((18, _scatter_18),),
        "Shape": ((15, _shape_15),),
        "Split": ((18, _split_18),),
        "Swish": ((24, _swish_24),),
        **{f"Reduce{name}": ((18, _reduce_18),) for name in _REDUCTIONS},
    }
)
"""The operator sets that brought an operator, or another form or meaning of it, newest first."""
