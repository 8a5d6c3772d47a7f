"""Normalizations written out in simple operators become the operator that is meant."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgewise.passes import graph as rewiring
from edgewise.passes.base import Outcome, Pass, Refused, Rule
from edgewise.passes.graph import (
    attribute,
    constant_of,
    new_initializer,
    new_node,
    only_user,
    opset,
    static_shape,
)
from edgewise.passes.pattern import (
    Constant,
    Either,
    Match,
    Number,
    Pattern,
    Var,
    check_operator,
    either,
    is_rounded,
    number_of,
    op,
)

Shape = tuple[int, ...]

_OLDEST = 7  # before, an attribute said how to broadcast
# Measured on onnxruntime 1.31, which computes it step by step, in twice the time of InstanceNormalization.
_SLOW = "GroupNormalization"
_FIRST_GROUPS = 21  # before, GroupNormalization had one scale a group


@dataclass(frozen=True)
class FuseNorms(Pass):
    """Recognise normalizations that exporters write out, where the model's operator set has them.

    Given:   y = d / sqrt(mean(d^2) + e) * g + s,  d = x - mean(x)   over the last axes    opset 17
             or x * r + (s - mean(x) * r),  r = g / sqrt(mean(d^2) + e)
    Result:  y = LayerNormalization(x, g, s)
    Given:   the same over all axes but the first two, of rank 4 or more, g and s one number a channel
    Result:  y = InstanceNormalization(x, g, s)
    Given:   y = x / sqrt(mean(x^2) + e) * g                         over the last axes    opset 23
    Result:  y = RMSNormalization(x, g)
    Given:   y = Reshape(InstanceNormalization(Reshape(x, [N, k, -1]), 1, 0), Shape(x)) * g + s
    Result:  y = GroupNormalization<num_groups = k>(x, g, s)                               opset 21

    The square is Pow or a product, the mean of squares ReduceMean or a sum over its count, the quotient
    Div, or Mul by Reciprocal or by a power of -1/2, and e may be missing. So may scale g and shift s; where
    they do not fit the operator's parameters they stay behind it. What is computed between has no other
    user. Norms of mixed precision, next to a Cast, stay: onnxruntime fuses the operator with the Cast into
    one that forbids the types. GroupNormalization is written only with `always`, for runtimes that have a
    kernel of it.
    """

    name = "fuse-norms"
    always: bool = False  # also where onnxruntime is faster without

    def apply(self, model: ir.Model) -> Outcome:
        if opset(model) < _OLDEST:
            return Outcome()
        return _Fusion(opset(model), self.always).apply(model)


_X = Var("x")
_MEAN = op("ReduceMean", _X, more=True)
_SCALE, _SHIFT = Var("scale"), Var("shift")


def _deviation(data: Pattern) -> tuple[Either, Either]:
    """The root of the mean square of `data`, and one over it."""
    squares = either(op("Pow", data, Number(2.0)), op("Mul", data, data))
    total = either(op("ReduceSum", squares, more=True), op("ReduceSumSquare", data, more=True))
    mean = either(
        op("ReduceMean", squares, more=True),
        op("Div", total, Number(name="count")),
        op("Mul", total, Number(name="part")),
    )
    shifted = either(op("Add", mean, Number(name="epsilon")), mean)
    root = either(op("Sqrt", shifted), op("Pow", shifted, Number(0.5)))
    inverse = either(op("Reciprocal", root), op("Div", Number(1.0), root), op("Pow", shifted, Number(-0.5)))
    return root, inverse


def _quotient(data: Pattern) -> Either:
    """`data` over its deviation, with the scale behind or in between."""
    root, inverse = _deviation(data)
    scaled = op("Mul", data, _SCALE)
    return either(
        op("Div", data, root),
        op("Mul", data, inverse),
        op("Mul", data, op("Mul", inverse, _SCALE)),
        op("Div", scaled, root),
        op("Mul", scaled, inverse),
    )


def _moments(data: Pattern) -> Either:
    """x * r + (s - mean(x) * r), as TensorFlow normalizes with moments."""
    _, inverse = _deviation(data)
    return either(
        *(
            op("Add", op("Mul", _X, r), op("Sub", _SHIFT, op("Mul", _MEAN, r)))
            for r in (op("Mul", inverse, _SCALE), inverse)
        )
    )


_CENTERED = op("Sub", _X, _MEAN)
_STANDARDIZED = either(_quotient(_CENTERED), _moments(_CENTERED))
_ROOT_MEAN_SQUARE = _quotient(_X)
_IN_GROUPS = op(
    "Reshape",
    op("InstanceNormalization", op("Reshape", _X, Var()), Constant("ones"), Constant("zeros"), name="normal"),
    Var("shape"),
)


@dataclass(frozen=True, eq=False)
class _Norm:
    """`op_type` of `source`, with parameters of shape `parameter` that stretch like those of shape `spread`.

    `result` is what it takes the place of, once `scale` and `shift` are taken in; None stands for one and
    for zero.
    """

    op_type: str
    source: ir.Value
    attributes: Mapping[str, float | int]
    spread: Shape
    parameter: Shape
    result: ir.Value
    scale: ir.Value | None = None
    shift: ir.Value | None = None

    def fits(self, value: ir.Value) -> bool:
        """Whether `value` can be a parameter: of its shape, or constant and stretched to it."""
        shape = static_shape(value)
        if shape is None or self.source.shape is None or len(shape) > self.source.shape.rank():
            return False
        if shape == self.spread == self.parameter:
            return True
        own = shape[len(shape) - len(self.spread) :] if len(shape) > len(self.spread) else shape
        ahead = shape[: len(shape) - len(own)]
        padded = (1,) * (len(self.spread) - len(own)) + own
        stretches = all(size in (1, whole) for size, whole in zip(padded, self.spread, strict=True))
        return stretches and math.prod(ahead) == 1 and constant_of(value) is not None

    @property
    def parameters(self) -> int:
        """How many of scale and shift can be taken in."""
        return sum(v is not None and self.fits(v) for v in (self.scale, self.shift))

    def with_tail(self) -> _Norm:
        """This norm with the scale and the shift that follow it, as far as they fit."""
        norm = self
        if norm.scale is None and norm.shift is None and (found := norm._next("Mul")):
            norm = dataclasses.replace(norm, scale=found[0], result=found[1])
        if norm.shift is None and norm.op_type != "RMSNormalization" and (found := norm._next("Add")):
            norm = dataclasses.replace(norm, shift=found[0], result=found[1])
        return norm

    def _next(self, op_type: str) -> tuple[ir.Value, ir.Value] | None:
        """The parameter and the result of an `op_type` that alone reads the result, if the parameter fits."""
        user, node = only_user(self.result), self.result.producer()
        if user is None or node is None or user.op_type != op_type or user.domain != "":
            return None
        first, second = user.inputs
        other = second if first is self.result else first
        if user.graph is not node.graph or other is None or not self.fits(other):
            return None
        return other, user.outputs[0]

    def check(self, version: int, always: bool) -> None:
        """`Refused` where the operator cannot take the place of what is there, or should not."""
        if self.op_type == "GroupNormalization" and version < _FIRST_GROUPS:
            raise Refused("the model's operator set has no GroupNormalization")
        check_operator(self.op_type, version, self.source)
        if self.op_type == _SLOW and not always:
            raise Refused(f"{_SLOW} is slower in onnxruntime than what it is written as")
        if any(v is not None and not self.fits(v) for v in (self.scale, self.shift)):
            raise Refused("scale or shift do not fit the operator")
        if any(map(_is_cast, (self.source, self.scale, self.shift))):
            raise Refused("mixed precision")
        if any(use.node.op_type == "Cast" for use in self.result.uses()):
            raise Refused("mixed precision")

    def write(self) -> None:
        """Compute it in place of its result."""
        last = self.result.producer()
        assert last is not None
        inputs = [self.source, self._parameter(last, self.scale, "scale")]
        if self.op_type != "RMSNormalization":
            inputs.append(self._parameter(last, self.shift, "shift"))
        new = new_node(last, self.op_type, inputs, self.attributes)
        new.shape, new.type = self.result.shape, self.result.type
        rewiring.replace(self.result, new)

    def _parameter(self, last: ir.Node, value: ir.Value | None, role: str) -> ir.Value:
        if value is not None and static_shape(value) == self.parameter:
            return value
        assert self.source.dtype is not None  # `check_operator` has seen to it
        array = constant_of(value)
        if array is None:
            array = np.full(1, role == "scale", self.source.dtype.numpy())
        whole = np.broadcast_to(array.reshape(array.shape[-len(self.spread) :]), self.spread)
        hint = f"{self.result.name}.{role}"
        return new_initializer(rewiring.graph_of(last), hint, whole.reshape(self.parameter))


@dataclass(frozen=True)
class _Fusion(Rule):
    """The rewrite in operator set `version`, of slow operators too if `always`."""

    name = FuseNorms.name
    op_types = ("Div", "Mul", "Add", "Reshape")
    version: int
    always: bool

    def rewrite(self, node: ir.Node) -> bool:
        norm = _grouped(node) if node.op_type == "Reshape" else _computed(node)
        if norm is None:
            return False
        norm.check(self.version, self.always)
        norm.write()
        return True


def _is_cast(value: ir.Value | None) -> bool:
    """Whether a value was of another float type before."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Cast":
        return False
    (before,) = node.inputs
    return before is None or before.dtype is None or before.dtype.is_floating_point()


def _dims(shape: ir.Shape) -> list[int | None]:
    """The sizes, None for what is not a fixed number."""
    return [d if isinstance(d, int) and d >= 0 else None for d in shape]


def _computed(node: ir.Node) -> _Norm | None:
    """The norm that ends with `node`, as a quotient of reductions, and with what follows."""
    out = node.outputs[0]
    match = centered = _STANDARDIZED.match(out)
    if match is None:
        match = _ROOT_MEAN_SQUARE.match(out)
    if match is None:
        return None
    x = match["x"]
    if x.shape is None:
        raise Refused("the rank of the data is not known")
    match.check_private()
    match.check_rank(x.shape.rank())
    axes = _axes_of(match, x.shape.rank())
    _check_count(match, x, axes)
    norms = _operators(match, axes, is_centered=centered is not None)
    if not norms:
        raise Refused("the axes are not those of an operator, or of unknown size")
    return max(norms, key=lambda norm: norm.parameters)


def _operators(match: Match, axes: Shape, *, is_centered: bool) -> list[_Norm]:
    """The operators that may do it, the preferred first."""
    x, out = match["x"], match.nodes[0].outputs[0]
    assert x.shape is not None
    dims, rank = _dims(x.shape), x.shape.rank()
    scale, shift = match.get("scale"), match.get("shift")
    epsilon = number_of(match.get("epsilon")) or 0.0
    norms = []
    if is_centered and rank >= 4 and axes == tuple(range(2, rank)) and dims[1] is not None:
        channels = (dims[1],)
        spread = channels + (1,) * (rank - 2)
        numbers: dict[str, float | int] = {"epsilon": epsilon}
        norms.append(_Norm("InstanceNormalization", x, numbers, spread, channels, out, scale, shift))
    sizes = tuple(d for d in dims[rank - len(axes) :] if d is not None)
    if axes == tuple(range(rank - len(axes), rank)) and len(sizes) == len(axes):
        kind = "LayerNormalization" if is_centered else "RMSNormalization"
        numbers = {"axis": -len(axes), "epsilon": epsilon}
        norms.append(_Norm(kind, x, numbers, sizes, sizes, out, scale, shift))
    return [norm.with_tail() for norm in norms]


def _axes_of(match: Match, rank: int) -> Shape:
    """The axes over which all reductions of the match go."""
    reductions = [node for node in match.nodes if node.op_type.startswith("Reduce")]
    (axes, *others) = {_reduced(node, rank) for node in reductions}
    if axes is None or others:
        raise Refused("the reductions are not over the same constant axes")
    return axes


def _reduced(node: ir.Node, rank: int) -> Shape | None:
    """The axes of a reduction that keeps them, in order; None where they are computed or dropped."""
    axes = attribute(node, "axes")
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        array = constant_of(node.inputs[1])
        axes = None if array is None else array.tolist()
    if not attribute(node, "keepdims", 1) or not axes:
        return None
    return tuple(sorted(int(a) % rank for a in axes))


def _check_count(match: Match, x: ir.Value, axes: Shape) -> None:
    """`Refused` where a sum is not divided by the number of its terms."""
    if "count" not in match and "part" not in match:
        return
    assert x.shape is not None
    dims = _dims(x.shape)
    count = math.prod(dims[axis] or 0 for axis in axes)
    name, exact = ("count", float(count)) if "count" in match else ("part", 1 / max(count, 1))
    array = constant_of(match[name])
    if not count or array is None or not is_rounded(array, exact):
        raise Refused("a sum is not divided by its known count")


def _grouped(node: ir.Node) -> _Norm | None:
    """The norm in groups that ends with the Reshape `node`, and with what follows."""
    match = _IN_GROUPS.match(node.outputs[0])
    if match is None:
        return None
    ones, zeros = (constant_of(match[name]) for name in ("ones", "zeros"))
    if ones is None or zeros is None or (ones != 1).any() or (zeros != 0).any():
        return None
    match.check_private()
    x, normal = match["x"], match.node("normal")
    dims = None if x.shape is None else _dims(x.shape)
    if dims is None or len(dims) < 3 or dims[1] is None:
        raise Refused("the number of channels is not known")
    if not _splits_channels(normal.inputs[0], x) or not _restores(node, match["shape"], x):
        raise Refused("the Reshapes are not known to split the channels and to join them again")
    groups, channels = ones.size, (dims[1],)
    if channels[0] % groups:
        raise Refused("the channels do not fall into equal groups")
    numbers = {"num_groups": groups, "epsilon": attribute(normal, "epsilon", 1e-5)}
    spread = channels + (1,) * (len(dims) - 2)
    return _Norm("GroupNormalization", x, numbers, spread, channels, node.outputs[0]).with_tail()


def _splits_channels(grouped: ir.Value | None, x: ir.Value) -> bool:
    """Whether a Reshape of `x` leaves the first axis and gives three: the middle one is of groups then."""
    node = None if grouped is None else grouped.producer()
    target = None if node is None else constant_of(node.inputs[1])
    if node is None or target is None or target.size != 3 or attribute(node, "allowzero", 0):
        return False
    return bool(target[0] == 0 or (x.shape is not None and target[0] == _dims(x.shape)[0]))


def _restores(node: ir.Node, shape: ir.Value, x: ir.Value) -> bool:
    """Whether a Reshape gives the shape of `x`, and keeps the first axis."""
    source, target = shape.producer(), constant_of(shape)
    if attribute(node, "allowzero", 0) or x.shape is None:
        return False
    if source is not None and source.op_type == "Shape" and not source.attributes:
        return source.inputs[0] is x
    dims = _dims(x.shape)
    if target is None or target.size != len(dims) or None in dims[1:]:
        return False
    return target[1:].tolist() == dims[1:] and bool(target[0] in (0, -1, dims[0]))
