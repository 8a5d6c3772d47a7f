"""Activations written out in simple operators become the operator that is meant."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import permutations
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

from edgewise.passes import graph as rewiring
from edgewise.passes.base import Outcome, Pass, Refused, Rule
from edgewise.passes.graph import Array, attribute, constant_of, new_initializer, new_node, only_user, opset
from edgewise.passes.linear import rank_of
from edgewise.passes.pattern import (
    Constant,
    Match,
    Number,
    Var,
    check_operator,
    either,
    finfo,
    is_float,
    number_of,
    op,
    rounding_of,
)
from edgewise.passes.polynomial import Coefficient, Polynomial, affine_of, expand

_OLDEST = 7  # before, an attribute said how to broadcast
# Measured on onnxruntime 1.31: its kernels of Softplus and PRelu take up to ten times as long as what they
# replace, and Swish it computes step by step, where it fuses what it replaces.
_SLOW = frozenset({"Softplus", "Swish", "PRelu"})
_CUBIC = 0.044715  # Hendrycks and Gimpel, Gaussian Error Linear Units, 2016
_TANH = math.sqrt(2 / math.pi)

_X = Var("x")
_ZERO = Number(0.0)
_LEAK = op("Mul", _X, Constant("slope"))
_POSITIVE = either(op("Greater|GreaterOrEqual", _X, _ZERO), op("Less|LessOrEqual", _ZERO, _X))
_NEGATIVE = either(op("Less|LessOrEqual", _X, _ZERO), op("Greater|GreaterOrEqual", _ZERO, _X))
_LEAKY_WHERE = either(op("Where", _POSITIVE, _X, _LEAK), op("Where", _NEGATIVE, _LEAK, _X))
_LEAKY_MAX = op("Max", _X, _LEAK)
_THRESHOLD = op(
    "Where",
    op("Greater|GreaterOrEqual", _X, Number(name="threshold")),
    _X,
    op("Softplus", _X, name="softplus"),
)
_CLIPS = ("Clip", "Relu", "Max", "Min")


@dataclass(frozen=True)
class FuseActivations(Pass):
    """Recognise activations that exporters write out, where the model's operator set has them.

    Given:   x * (1 + Erf(x / sqrt(2))) / 2                                             opset 20
    Result:  Gelu(x)
    Given:   x * (1 + Tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) / 2, or with Sigmoid   opset 20
    Result:  Gelu<approximate = "tanh">(x)
    Given:   Clip(a * x + b, 0, k) / k
    Result:  HardSigmoid<alpha = a / k, beta = b / k>(x)
    Given:   x * Clip(x + 3, 0, 6) / 6, or x * HardSigmoid<alpha = 1 / 6>(x)            opset 14
    Result:  HardSwish(x)
    Given:   x * Tanh(Softplus(x))                                                      opset 18
    Result:  Mish(x)
    Given:   x * Sigmoid(a * x)                                                         opset 24
    Result:  Swish<alpha = a>(x)
    Given:   Log(1 + Exp(x)); x / (1 + Abs(x)); 1 / (1 + Exp(-x))
    Result:  Softplus(x); Softsign(x); Sigmoid(x)
    Given:   Where(x > t, x, Softplus(x)), where t is so large that Softplus(t) rounds to t
    Result:  Softplus(x)
    Given:   Max(x, 0), Clip(x, 0)
    Result:  Relu(x)
    Given:   Where(x > 0, x, a * x), Max(x, a * x) with 0 <= a <= 1, or Relu(x) - a * Relu(-x)
    Result:  LeakyRelu<alpha = a>(x), or PRelu(x, a) where a is more than one number

    Softplus, Swish and PRelu are written only with `always`, for runtimes that have good kernels of them.
    Sums and products in any order and grouping, clips as Clip, Relu, Max and Min. A number has to be the
    exact one as far as the data's type can hold it, through all the sums and products it went into. What
    is computed between has no other user. The operator's result is the more precise one where Exp
    overflows or 1 + Exp rounds to one.
    """

    name = "fuse-activations"
    always: bool = False  # also where onnxruntime is faster without

    def apply(self, model: ir.Model) -> Outcome:
        if opset(model) < _OLDEST:
            return Outcome()
        return _Fusion(opset(model), self.always).apply(model)


@dataclass(frozen=True, eq=False)
class _Activation:
    """`op_type` of `source`, where `inner` are the values that would no longer be computed."""

    op_type: str
    source: ir.Value
    inner: tuple[ir.Value, ...] = ()
    number_rank: int = 0
    attributes: Mapping[str, float | str] = field(default_factory=lambda: MappingProxyType({}))
    slope: ir.Value | Array | None = None

    def check(self, version: int, always: bool) -> None:
        """`Refused` where the operator cannot take the place of what is there, or should not."""
        check_operator(self.op_type, version, self.source)
        if self.op_type in _SLOW and not always and not self._is_there():
            raise Refused(f"{self.op_type} is slower in onnxruntime than what it is written as")
        if any(only_user(value) is None for value in self.inner):
            raise Refused("a value inside the pattern has another user")
        Match(number_rank=self.number_rank).check_rank(rank_of(self.source))
        if self.slope is not None and not _broadcasts(self.slope, self.source):
            raise Refused("the slope does not fit the data")

    def _is_there(self) -> bool:
        """Whether the operator is among those that would no longer be computed."""
        producers = (value.producer() for value in self.inner)
        return any(node is not None and node.op_type == self.op_type for node in producers)

    def write(self, root: ir.Node) -> None:
        """Compute it in place of the result of `root`."""
        inputs, out = [self.source], root.outputs[0]
        if isinstance(self.slope, ir.Value):
            inputs.append(self.slope)
        elif self.slope is not None:
            inputs.append(new_initializer(rewiring.graph_of(root), f"{out.name}.slope", self.slope))
        new = new_node(root, self.op_type, inputs, self.attributes)
        new.shape, new.type = out.shape, out.type
        rewiring.replace(out, new)


@dataclass(frozen=True)
class _Fusion(Rule):
    """The rewrite in operator set `version`, of slow operators too if `always`."""

    name = FuseActivations.name
    op_types = ("Mul", "Div", "Add", "Sub", "Clip", "Max", "Min", "Log", "Reciprocal", "Where")
    version: int
    always: bool

    def rewrite(self, node: ir.Node) -> bool:
        found = (form(node) for form in _FORMS[node.op_type])
        activation = next((a for a in found if a is not None), None)
        if activation is None:
            return False
        activation.check(self.version, self.always)
        activation.write(node)
        return True


def _dtype(value: ir.Value) -> np.dtype[Any]:
    assert value.dtype is not None
    return value.dtype.numpy()


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and is_float(value.dtype.numpy())


def _broadcasts(slope: ir.Value | Array, data: ir.Value) -> bool:
    """Whether a constant slope stretches to the shape of the data, and the data not to the slope's."""
    array = constant_of(slope) if isinstance(slope, ir.Value) else slope
    if array is None or data.shape is None or array.ndim > data.shape.rank():
        return False
    dims = list(data.shape.dims)[data.shape.rank() - array.ndim :]
    return all(size in (1, dim) for size, dim in zip(array.shape, dims, strict=True))


def _local(value: ir.Value | None, reader: ir.Node, *types: str) -> ir.Node | None:
    """The node of one of `types` that computes `value` in the graph of `reader`."""
    node = None if value is None else value.producer()
    if node is None or node.domain != "" or node.op_type not in types or node.graph is not reader.graph:
        return None
    return node


def _first(node: ir.Node) -> ir.Value:
    """The first input, which all operators here require."""
    (value, *_) = node.inputs
    assert value is not None
    return value


def _gated(node: ir.Node) -> _Activation | None:
    """A product of a value and a function of it, or a sum of such."""
    product = expand(node.outputs[0])
    if len(product.atoms) != 2:
        return None
    for source, value in permutations(product.atoms):
        gate = _local(value, node, *_GATES)
        found = None if gate is None else _GATES[gate.op_type](product, source, gate)
        if found is not None:
            return found
    return None


def _gelu(product: Polynomial, x: ir.Value, gate: ir.Node) -> _Activation | None:
    inside, t = affine_of(_first(gate), gate), gate.outputs[0]
    if inside is None or inside.source is not x or not inside.equals(math.sqrt(0.5), 0.0):
        return None
    if not product.equals({(x,): 0.5, (x, t): 0.5}):
        return None
    return _Activation("Gelu", x, (t,), max(product.number_rank, inside.number_rank))


def _gelu_tanh(product: Polynomial, x: ir.Value, gate: ir.Node, factor: float = _TANH) -> _Activation | None:
    inside, t = expand(_first(gate), gate), gate.outputs[0]
    whole: Mapping[tuple[ir.Value, ...], float] = (
        {(x,): 0.5, (x, t): 0.5} if gate.op_type == "Tanh" else {(x, t): 1.0}
    )
    if not inside.equals({(x,): factor, (x, x, x): factor * _CUBIC}) or not product.equals(whole):
        return None
    rank = max(product.number_rank, inside.number_rank)
    return _Activation("Gelu", x, (t,), rank, {"approximate": "tanh"})


def _tanh_gated(product: Polynomial, x: ir.Value, gate: ir.Node) -> _Activation | None:
    softplus, t = _local(_first(gate), gate, "Softplus"), gate.outputs[0]
    if softplus is None:
        return _gelu_tanh(product, x, gate)
    if softplus.inputs[0] is not x or not product.equals({(x, t): 1.0}):
        return None
    return _Activation("Mish", x, (t, softplus.outputs[0]), product.number_rank)


def _sigmoid_gated(product: Polynomial, x: ir.Value, gate: ir.Node) -> _Activation | None:
    inside, t = affine_of(_first(gate), gate), gate.outputs[0]
    if inside is None or inside.source is not x:
        return _gelu_tanh(product, x, gate, 2 * _TANH)  # (1 + tanh(z)) / 2 = sigmoid(2 z)
    if inside.shift.value != 0 or not product.equals({(x, t): 1.0}):
        return None
    rank = max(product.number_rank, inside.number_rank)
    return _Activation("Swish", x, (t,), rank, {"alpha": inside.scale.value})


def _softsign_gated(product: Polynomial, x: ir.Value, gate: ir.Node) -> _Activation | None:
    found, t = _over_one_plus_abs(x, _first(gate), gate), gate.outputs[0]
    if found is None or not product.equals({(x, t): 1.0}):
        return None
    rank = max(product.number_rank, found.number_rank)
    return _Activation("Softsign", x, (t, *found.inner), rank)


def _hard_sigmoid_gated(product: Polynomial, x: ir.Value, gate: ir.Node) -> _Activation | None:
    t = gate.outputs[0]
    if gate.inputs[0] is not x or not _is_float(x) or not product.equals({(x, t): 1.0}):
        return None
    error = 2 * rounding_of(_dtype(x))  # the numbers of the data's type went into a quotient
    alpha, beta = attribute(gate, "alpha", 0.2), attribute(gate, "beta", 0.5)
    if abs(6 * alpha - 1) > error or abs(2 * beta - 1) > error:
        return None
    return _Activation("HardSwish", x, (t,), product.number_rank)


def _clip_gated(product: Polynomial, x: ir.Value, gate: ir.Node) -> _Activation | None:
    t = gate.outputs[0]
    factor = product.coefficient(x, t)
    found = _step(gate, factor)
    if found is None or found.source is not x or not product.equals({(x, t): factor.value}):
        return None
    if not found.alpha.stands_for(1 / 6) or not found.beta.stands_for(0.5):
        return None
    return _Activation("HardSwish", x, (t,), max(product.number_rank, found.number_rank))


_GATES: Mapping[str, Callable[[Polynomial, ir.Value, ir.Node], _Activation | None]] = MappingProxyType(
    {
        "Erf": _gelu,
        "Tanh": _tanh_gated,
        "Sigmoid": _sigmoid_gated,
        "Reciprocal": _softsign_gated,
        "HardSigmoid": _hard_sigmoid_gated,
        **dict.fromkeys(_CLIPS, _clip_gated),
    }
)


@dataclass(frozen=True, eq=False)
class _Bounds:
    """min(max(source, low), high), where `source` is read by `reader` alone or has other users."""

    source: ir.Value
    reader: ir.Node
    low: float
    high: float
    number_rank: int


def _own_bounds(node: ir.Node) -> _Bounds | None:
    """What one operator clips to; None where that is computed."""
    if node.op_type == "Relu":
        return _Bounds(_first(node), node, 0.0, math.inf, 0)
    if node.op_type == "Clip":
        low, high = _limit(node, 1, "min", -math.inf), _limit(node, 2, "max", math.inf)
        return None if low is None or high is None else _Bounds(_first(node), node, low, high, 0)
    match = op(node.op_type, _X, Number(name="limit")).match(node.outputs[0])
    limit = None if match is None else number_of(match["limit"])
    if match is None or limit is None:
        return None
    low, high = (limit, math.inf) if node.op_type == "Max" else (-math.inf, limit)
    return _Bounds(match["x"], node, low, high, match.number_rank)


def _limit(node: ir.Node, index: int, name: str, default: float) -> float | None:
    """A limit of Clip: an attribute before opset 11, then an input that may be left out."""
    if index < len(node.inputs) and node.inputs[index] is not None:
        return number_of(node.inputs[index])
    return float(attribute(node, name, default))


def _bounds(node: ir.Node) -> _Bounds | None:
    """What `node` clips to, together with a clip before it that nothing else reads."""
    outer = _own_bounds(node)
    before = None if outer is None else _local(outer.source, node, *_CLIPS)
    if outer is None or before is None or only_user(outer.source) is not node:
        return outer
    inner = _own_bounds(before)
    if inner is None or max(inner.low, outer.low) > min(inner.high, outer.high):
        return outer
    low, high = max(inner.low, outer.low), min(inner.high, outer.high)
    return _Bounds(inner.source, before, low, high, max(inner.number_rank, outer.number_rank))


@dataclass(frozen=True, eq=False)
class _Step:
    """min(max(alpha * source + beta, 0), 1)."""

    source: ir.Value
    alpha: Coefficient
    beta: Coefficient
    number_rank: int


def _step(node: ir.Node, factor: Coefficient) -> _Step | None:
    """`factor` times the clip that ends with `node`, if that goes from 0 to 1."""
    clip = _bounds(node)
    if clip is None or clip.low != 0 or not 0 < clip.high < math.inf or not _is_float(clip.source):
        return None
    top = Coefficient(clip.high, clip.high * rounding_of(_dtype(clip.source)))
    inside = affine_of(clip.source, clip.reader)
    if inside is None or not (top * factor).stands_for(1.0):
        return None
    rank = max(clip.number_rank, inside.number_rank)
    return _Step(inside.source, inside.scale * factor, inside.shift * factor, rank)


def _hard_sigmoid(node: ir.Node) -> _Activation | None:
    out = node.outputs[0]
    outer = affine_of(out)
    clip = None if outer is None else _local(outer.source, node, *_CLIPS)
    if outer is None or clip is None or outer.shift.value != 0:
        return None
    found = _step(clip, outer.scale)
    if found is None or found.alpha.value == 0 or (found.alpha.value, found.beta.value) == (1.0, 0.0):
        return None
    inner = () if outer.source is out else (outer.source,)
    rank = max(outer.number_rank, found.number_rank)
    numbers = {"alpha": found.alpha.value, "beta": found.beta.value}
    return _Activation("HardSigmoid", found.source, inner, rank, numbers)


def _relu(node: ir.Node) -> _Activation | None:
    clip = _own_bounds(node)
    if clip is None or clip.low != 0 or not _is_float(clip.source):
        return None
    if clip.high < finfo(_dtype(clip.source)).max:
        return None
    return _Activation("Relu", clip.source, (), clip.number_rank)


def _softplus(node: ir.Node) -> _Activation | None:
    inside = expand(_first(node), node)
    exp = _local(inside.atoms[0], node, "Exp") if len(inside.atoms) == 1 else None
    if exp is None or not inside.equals({(): 1.0, (exp.outputs[0],): 1.0}):
        return None
    return _Activation("Softplus", _first(exp), (exp.outputs[0],), inside.number_rank)


def _softsign(node: ir.Node) -> _Activation | None:
    divisor = node.inputs[1]
    assert divisor is not None
    return _over_one_plus_abs(_first(node), divisor, node)


def _over_one_plus_abs(x: ir.Value, divisor: ir.Value, reader: ir.Node) -> _Activation | None:
    """Softsign, if the divisor is one plus the absolute value of `x`."""
    inside = expand(divisor, reader)
    absolute = _local(inside.atoms[0], reader, "Abs") if len(inside.atoms) == 1 else None
    if absolute is None or absolute.inputs[0] is not x:
        return None
    if not inside.equals({(): 1.0, (absolute.outputs[0],): 1.0}):
        return None
    return _Activation("Softsign", x, (absolute.outputs[0],), inside.number_rank)


def _sigmoid(node: ir.Node) -> _Activation | None:
    dividend = Polynomial.of(_first(node)) if node.op_type == "Div" else None
    if dividend is not None and not dividend.equals({(): 1.0}):
        return None
    divisor = node.inputs[-1]
    assert divisor is not None
    inside = expand(divisor, node)
    exp = _local(inside.atoms[0], node, "Exp") if len(inside.atoms) == 1 else None
    if exp is None or not inside.equals({(): 1.0, (exp.outputs[0],): 1.0}):
        return None
    power = affine_of(_first(exp), exp)
    if power is None or not power.equals(-1.0, 0.0):
        return None
    rank = max(inside.number_rank, power.number_rank, dividend.number_rank if dividend else 0)
    return _Activation("Sigmoid", power.source, (exp.outputs[0],), rank)


def _leaky(node: ir.Node) -> _Activation | None:
    """A line with a kink at zero, as a choice between its two halves."""
    match = (_LEAKY_MAX if node.op_type == "Max" else _LEAKY_WHERE).match(node.outputs[0])
    slope = None if match is None else constant_of(match["slope"])
    if match is None or slope is None:
        return None
    if node.op_type == "Max" and not bool(((slope >= 0) & (slope <= 1)).all()):
        return None
    match.check_private()
    if slope.size > 1:
        return _Activation("PRelu", match["x"], (), match.number_rank, slope=match["slope"])
    rank = max(match.number_rank, slope.ndim)
    return _Activation("LeakyRelu", match["x"], (), rank, {"alpha": float(slope.item())})


def _thresholded(node: ir.Node) -> _Activation | None:
    """Where(x > t, x, Softplus(x)), as torch writes it: beyond t, Softplus(x) rounds to x."""
    match = _THRESHOLD.match(node.outputs[0])
    threshold = None if match is None else number_of(match["threshold"])
    if match is None or threshold is None or not _is_float(match["x"]):
        return None
    if threshold <= 0 or math.exp(-threshold) > rounding_of(_dtype(match["x"])) * threshold:
        return None
    return _Activation("Softplus", match["x"], (match["softplus"],), match.number_rank)


def _two_relus(node: ir.Node) -> _Activation | None:
    """Relu(x) - a * Relu(-x), as Keras writes PReLU."""
    total = expand(node.outputs[0])
    relus = [r for r in (_local(v, node, "Relu") for v in total.atoms) if r is not None]
    if len(relus) != 2:
        return None
    for right, left in permutations(relus):
        mirrored = affine_of(_first(left), left)
        if mirrored is not None and mirrored.source is right.inputs[0] and mirrored.equals(-1.0, 0.0):
            rank = max(total.number_rank, mirrored.number_rank)
            return _kinked(total, right.outputs[0], left.outputs[0], mirrored.source, rank)
    return None


def _kinked(total: Polynomial, right: ir.Value, left: ir.Value, x: ir.Value, rank: int) -> _Activation | None:
    """`total` as what is `right` of zero plus a multiple of what is `left` of it."""
    inner = (right, left)
    factor = total.coefficient(left).value
    if total.equals({(right,): 1.0, (left,): factor}):
        return _Activation("LeakyRelu", x, inner, rank, {"alpha": -factor})
    for slope in total.atoms:
        array = constant_of(slope)
        if array is not None and total.equals({(right,): 1.0, (left, slope): 1.0}):
            return _Activation("PRelu", x, inner, rank, slope=np.negative(array))
        if array is not None and total.equals({(right,): 1.0, (left, slope): -1.0}):
            return _Activation("PRelu", x, inner, rank, slope=slope)
    return None


_FORMS: Mapping[str, tuple[Callable[[ir.Node], _Activation | None], ...]] = MappingProxyType(
    {
        "Mul": (_gated, _hard_sigmoid),
        "Div": (_gated, _hard_sigmoid, _softsign, _sigmoid),
        "Add": (_gated, _two_relus),
        "Sub": (_two_relus,),
        "Clip": (_hard_sigmoid, _relu),
        "Max": (_hard_sigmoid, _leaky, _relu),
        "Min": (_hard_sigmoid,),
        "Log": (_softplus,),
        "Reciprocal": (_sigmoid,),
        "Where": (_leaky, _thresholded),
    }
)
"""What may end with a node of a type."""
