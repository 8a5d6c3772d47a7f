"""What int8 kernels ask of a node: the conditions under which it can run in integers at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.calibration.target import Target
from edgewise.passes.base import Refused
from edgewise.passes.graph import attribute, constant_of, only_user

Array = npt.NDArray[Any]
Bounds = tuple[float, float]

UNBOUNDED: Bounds = (-math.inf, math.inf)


@dataclass(frozen=True)
class Weights:
    """The constant operands of a Conv, Gemm or MatMul. `axis` of `array` counts the output channels."""

    value: ir.Value
    array: Array
    axis: int
    bias_value: ir.Value | None

    @property
    def bias(self) -> Array | None:
        return constant_of(self.bias_value)

    @property
    def channels(self) -> int:
        return int(self.array.shape[self.axis])


def activations(node: ir.Node) -> tuple[ir.Value, ...]:
    """The inputs that are quantized per tensor, from ranges; the others are constants or shapes."""
    count = {"MatMul": 2, "Add": 2, "Mul": 2, "Concat": len(node.inputs)}.get(node.op_type, 1)
    values = [v for v in node.inputs[:count] if v is not None]
    return tuple(v for v in values if len(values) == 1 or constant_of(v) is None)


def numbers(node: ir.Node) -> tuple[ir.Value, ...]:
    """The single constant numbers that an Add or Mul takes: 8 bits hold one number exactly."""
    if node.op_type not in ("Add", "Mul"):
        return ()
    constants = ((v, constant_of(v)) for v in node.inputs if v is not None)
    return tuple(v for v, array in constants if array is not None and array.size == 1)


def biased_by(node: ir.Node) -> ir.Value | None:
    """The constant that an Add adds to every row of a MatMul which nothing else reads, or None."""
    if node.op_type != "Add":
        return None
    for product, bias in (node.inputs, node.inputs[::-1]):
        matmul = None if product is None else product.producer()
        if (
            product is not None
            and matmul is not None
            and only_user(product) is node
            and _is_row(bias, matmul)
        ):
            return bias
    return None


def _is_row(bias: ir.Value | None, matmul: ir.Node) -> bool:
    array, weights = constant_of(bias), constant_of(matmul.inputs[1]) if matmul.op_type == "MatMul" else None
    if array is None or weights is None or weights.ndim != 2:
        return False
    return array.shape in (weights.shape[1:], (1, weights.shape[1]))


def weights_of(node: ir.Node) -> Weights | None:
    """The weights of `node`, or None if it has none: activations on both sides of a MatMul."""
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    value = node.inputs[1]
    array = constant_of(value)
    if value is None or array is None:
        return None
    axis = {"Conv": 0, "Gemm": 0 if attribute(node, "transB", 0) else 1, "MatMul": 1}[node.op_type]
    reader = only_user(node.outputs[0])
    added = biased_by(reader) if node.op_type == "MatMul" and reader is not None else None
    return Weights(value, array, axis, added or _bias(node))


def kernel_rows(node: ir.Node, array: Array) -> Array:
    """Weights as (channels, k), k in the order in which the kernels add the products.

    A convolution is a matrix product over patches whose channels lie side by side, whatever the layout
    of its tensors.
    """
    if node.op_type == "Conv":
        return np.moveaxis(array, 1, -1).reshape(array.shape[0], -1)
    return array if node.op_type == "Gemm" and attribute(node, "transB", 0) else array.T


def is_depthwise(node: ir.Node, array: Array) -> bool:
    """Whether `node` is a convolution with one filter a channel, for which kernels add in 32 bits."""
    one_each = node.op_type == "Conv" and array.shape[1] == 1
    return bool(one_each and attribute(node, "group", 1) == array.shape[0])


def cut_bounds(node: ir.Node) -> Bounds:
    """The range a Relu or Clip cuts its input to. Raises `Refused` if that is not known here."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    low, high = (_clip_bound(node, index, default) for index, default in zip((1, 2), UNBOUNDED, strict=True))
    return low, high


def _clip_bound(node: ir.Node, index: int, default: float) -> float:
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None:
        return default
    bound = constant_of(value)
    if bound is None or bound.size != 1:
        raise Refused("bounds are not constant")
    return float(bound.reshape(()))


def refusal(node: ir.Node, target: Target) -> str | None:
    """Why `node` cannot run in int8 on `target`, or None if it can."""
    if _is_quantized(node):
        return "already quantized"
    known = target.anchors | target.followers | target.movers | {"Relu", "Clip"}
    if node.domain != "" or node.op_type not in known:
        return _no_kernel(node, target)
    if _touches_quantized(node):
        return "already quantized"
    try:
        condition = _CONDITIONS.get(node.op_type)
        return _operands(node, target) or (condition(node, target) if condition is not None else None)
    except Refused as refused:
        return str(refused)


def _operands(node: ir.Node, target: Target) -> str | None:
    """What is wrong with the inputs of `node`, whatever it does with them."""
    if any(v.is_graph_input() and v.is_initializer() for v in node.inputs if v is not None):
        return "an operand may be replaced by the caller"
    types = {v.dtype for v in activations(node)}
    if None in types and weights_of(node) is None:  # an activation is of its weight's type
        return "type unknown: infer shapes first"
    if not types or types - {None, ir.DataType.FLOAT}:
        return "not float32"
    return "an operand is constant" if _has_constant_operand(node, target) else None


def _has_constant_operand(node: ir.Node, target: Target) -> bool:
    """Whether 8 bits would have to hold a constant that is neither a weight, a bias nor a single number."""
    if node.op_type not in ("Add", "Mul", "Concat", "MatMul"):
        return constant_of(node.inputs[0]) is not None
    exact = {*numbers(node), biased_by(node) if target.int32_bias else None}
    if node.op_type == "MatMul":
        exact.add(node.inputs[1])
    return any(constant_of(v) is not None and v not in exact for v in node.inputs)


def _is_quantized(node: ir.Node | None) -> bool:
    return node is not None and (
        node.op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QGemm")
        or node.op_type.startswith("QLinear")
        or node.op_type.endswith("Integer")
    )


def _touches_quantized(node: ir.Node) -> bool:
    sources = (v.producer() for v in node.inputs if v is not None)
    readers = (use.node for v in node.outputs for use in v.uses())
    return any(map(_is_quantized, sources)) or any(n.op_type == "QuantizeLinear" for n in readers)


def _no_kernel(node: ir.Node, target: Target) -> str:
    if node.op_type in target.slow:
        return _slow(node, target)
    return f"{node.op_type} has no int8 kernel on {target.name}"


def _slow(node: ir.Node, target: Target) -> str:
    return f"{node.op_type} is slower in int8 than in float on {target.name}"


def _conv(node: ir.Node, target: Target) -> str | None:
    weights = weights_of(node)
    if weights is None:
        return "weight is not constant"
    if target.narrow_is_slow and _is_narrow(node, weights):
        return f"few channels are slower in int8 than in float on {target.name}"
    return _weights(weights) or _bias_refusal(node, weights.channels)


def _is_narrow(node: ir.Node, weights: Weights) -> bool:
    """Whether a convolution has too few channels for integers to pay.

    Time in int8 over time in float, with AVX2: 2 to 3 for a depthwise one with 8 or 12 channels (1.4 with
    16, less than a way through float), 1.2 to 3.7 for groups of 4 or 8 channels (0.8 for 32), 1.1 to 1.8
    for 3 channels in and up to 32 out (0.7 for 64), 0.8 for 8 in and 16 out.
    """
    width = int(weights.array.shape[1])
    if is_depthwise(node, weights.array):
        return weights.channels < 16
    if attribute(node, "group", 1) > 1:
        return width < 16
    return width < 4 and weights.channels < 32


def _gemm(node: ir.Node, target: Target) -> str | None:
    weights = weights_of(node)
    if weights is None:
        return "weight is not constant"
    if attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1:
        return "alpha or beta is not 1"
    return _weights(weights) or _bias_refusal(node, weights.channels)


def _matmul(node: ir.Node, target: Target) -> str | None:
    weights = weights_of(node)
    if weights is None:
        slow = f"two activations are multiplied no faster in int8 on {target.name}"
        return None if target.products else slow
    return "weight is no matrix" if weights.array.ndim != 2 else _weights(weights)


def _weights(weights: Weights) -> str | None:
    if weights.array.dtype != np.float32:
        return "not float32"
    if weights.array.size == 0 or not np.isfinite(weights.array).all():
        return "weight is empty, NaN or infinite"
    return None


def _bias(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _bias_refusal(node: ir.Node, channels: int) -> str | None:
    if _bias(node) is None:
        return None
    bias = constant_of(_bias(node))
    if bias is None:
        return "bias is not constant"
    if bias.size not in (1, channels) or bias.shape[-1:] not in ((), (1,), (channels,)):
        return "bias is not one number a channel"
    return None if np.isfinite(bias).all() else "bias is NaN or infinite"


def _average_pool(node: ir.Node, target: Target) -> str | None:
    shape = node.outputs[0].shape
    over_everything = shape is not None and all(size == 1 for size in tuple(shape)[2:])
    return _slow(node, target) if "AveragePool" in target.slow and not over_everything else None


def _max_pool(node: ir.Node, target: Target) -> str | None:
    return "indices are wanted too" if len(node.outputs) > 1 else None


def _resize(node: ir.Node, target: Target) -> str | None:
    if attribute(node, "mode", "nearest") != "nearest":
        return "interpolation has no int8 kernel"
    crop = attribute(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    return "extrapolation" if crop else None


def _pad(node: ir.Node, target: Target) -> str | None:
    if attribute(node, "mode", "constant") != "constant":
        return None
    filler = node.inputs[2] if len(node.inputs) > 2 else None
    constant = constant_of(filler)
    if filler is not None and (constant is None or constant.any()):
        return "padding is not zero"
    return None


def _cut(node: ir.Node, target: Target) -> str | None:
    low, high = cut_bounds(node)
    return None if low <= high else "bounds are empty"


_CONDITIONS: Mapping[str, Callable[[ir.Node, Target], str | None]] = MappingProxyType(
    {
        "Conv": _conv,
        "Gemm": _gemm,
        "MatMul": _matmul,
        "AveragePool": _average_pool,
        "MaxPool": _max_pool,
        "Resize": _resize,
        "Pad": _pad,
        "Relu": _cut,
        "Clip": _cut,
    }
)
