"""Attention written out in products of matrices becomes the operator of that name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Outcome, Refused, Rule
from edgewise.passes.channel_links import Dim, dims_of, op_types
from edgewise.passes.graph import (
    Array,
    attribute,
    constant_of,
    graph_of,
    new_initializer,
    new_node,
    only_user,
    opset,
    replace,
)
from edgewise.passes.pattern import is_rounded, number_of

_SINCE = 23
_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})
_IN_ORDER = (0, 1, 2, 3)  # batch, heads, length, size
_MASK_OPS = op_types(
    "Add Cast CastLike Concat ConstantOfShape Expand Gather Identity Max Min Mul Reshape ScatterND Slice "
    "Squeeze Sub Tile Transpose Trilu Unsqueeze Where"
)
"""What masks are made with."""


@dataclass(frozen=True)
class FuseAttention(Rule):
    """Write scaled dot-product attention as the standard's operator, where the operator set has it.

    Given:   y = MatMul(Softmax(a q . transposed(b k) * c + mask), v)     a, b, c constant numbers or absent
             the same with Where(seen, scores, -inf) for the sum
    Result:  y = Attention<scale = a b c>(q, k, v, mask)                  from operator set 23 on

    q is [batch, heads, length, size]; k and v have as many heads, or one for all, or fewer that were
    repeated one after another. The batch sizes must be known to agree, and the mask must have every
    key; one row of it for all queries is expanded. A constant mask that hides exactly the keys behind
    the query's own place becomes `is_causal`.

    A row in which all keys are hidden is NaN written out and zero in the operator. So a mask that holds
    -inf must be constant, with a key to see in every row, unless the graph makes zeros of NaN itself:
    Where(IsNaN(weights), 0, weights), which goes.
    """

    name = "fuse-attention"
    op_types = ("Softmax",)

    def apply(self, model: ir.Model) -> Outcome:
        return super().apply(model) if opset(model) >= _SINCE else Outcome()

    def rewrite(self, node: ir.Node) -> bool:
        found = _read(node)
        if found is None:
            return False
        found.check()
        found.write()
        return True


@dataclass(frozen=True, eq=False)
class _Scores:
    """What goes into the softmax: `value` and the mask on it.

    `bias` is added, or where it is boolean says which scores count: those where it is `seen`.
    `infinite` is whether the others become -inf, and not just the lowest number.
    """

    value: ir.Value
    bias: ir.Value | None = None
    seen: bool = True
    infinite: bool = True


@dataclass(frozen=True, eq=False)
class _Product:
    """A product of queries and transposed keys. The axes of `keys` in `order` are those of the queries."""

    node: ir.Node
    query: ir.Value
    transposed: ir.Value
    keys: ir.Value
    order: tuple[int, ...]
    scale: float

    def sizes_of(self, keys: ir.Value) -> tuple[Dim, ...]:
        """The dimensions of keys as [batch, heads, length, size]; their first two may be given merged."""
        dims = dims_of(keys)
        if len(dims) != len(_IN_ORDER):
            batch, heads, size, length = dims_of(self.transposed)
            return batch, heads, length, size
        return tuple(dims[axis] for axis in self.order)


@dataclass(frozen=True, eq=False)
class _Attention:
    """The parts of an attention that is written out, from its first product to the last one."""

    product: _Product
    scores: _Scores
    softmax: ir.Node
    guard: ir.Node | None
    """What makes zeros of NaN."""
    last: ir.Node
    keys: ir.Value
    values: ir.Value
    repeated: bool
    """Whether the graph repeats the heads of `keys` and `values`."""

    def check(self) -> None:
        """Raise `Refused` where the operator would not do the same."""
        self._check_readers()
        if attribute(self.softmax, "axis", -1) not in (-1, 3):
            raise Refused("the softmax is not over the keys")
        if not self.product.scale > 0:
            raise Refused("the scale is not positive")
        operands = (self.product.query, self.keys, self.values)
        if operands[0].dtype not in _TYPES or len({v.dtype for v in operands}) > 1:
            raise Refused("runtimes have no attention of this type")
        self._check_sizes()
        if self.scores.bias is not None:
            self._check_mask(self.scores.bias)
            self._check_rows(self.scores.bias)

    def _check_readers(self) -> None:
        """What the operator does not give out must have no other reader, and all be in one graph."""
        if not self.product.node.graph is self.softmax.graph is self.last.graph:
            raise Refused("the attention is spread over several graphs")
        reader = only_user(self.product.node.outputs[0])
        while reader is not None and reader is not self.softmax:
            reader = only_user(reader.outputs[0])
        weights = self.softmax.outputs[0]
        if self.guard is None:
            alone = only_user(weights) is self.last
        else:  # read by the guard and by its condition
            alone = len(weights.uses()) == 2 and not weights.is_graph_output()
            alone &= only_user(self.guard.outputs[0]) is self.last
        if reader is None or not alone:
            raise Refused("a value inside the attention has another user")

    @property
    def _sizes(self) -> tuple[tuple[Dim, ...], ...]:
        """The dimensions of queries, keys and values as [batch, heads, length, size]."""
        query, values = dims_of(self.product.query), dims_of(self.values)
        keys = self.product.sizes_of(self.keys)
        if not len(query) == len(keys) == len(values) == len(_IN_ORDER):
            raise Refused("the operands are not of rank 4")
        return query, keys, values

    def _check_sizes(self) -> None:
        (batch, heads, *_), keys, values = self._sizes
        if len(dims_of(self.keys)) == 3 and sum(not isinstance(d, int) for d in keys) > 1:
            raise Refused("the keys have more than one open dimension to be given")
        if not (_equal(batch, keys[0]) and _equal(batch, values[0])):
            raise Refused("the batch sizes are not known to be equal")
        if not isinstance(heads, int) or not isinstance(keys[1], int) or keys[1] != values[1]:
            raise Refused("the numbers of heads are not known, or differ between keys and values")
        if keys[1] not in (1, heads) and not self.repeated:
            raise Refused("the heads of queries and keys do not go together")

    def _check_mask(self, bias: ir.Value) -> None:
        """The mask must have every key, and must not add axes, heads or samples."""
        if bias.dtype not in (ir.DataType.BOOL, self.product.query.dtype):
            raise Refused("the mask is of another type than the queries")
        query, keys, values = self._sizes
        dims = dims_of(bias)
        if not 2 <= len(dims) <= len(query):
            raise Refused("the mask is not of rank 2 to 4")
        if not (_equal(dims[-1], keys[2]) or _equal(dims[-1], values[2])):
            raise Refused("the mask is not known to have every key")
        spread = zip(reversed(dims[:-1]), reversed(query[:-1]), strict=False)
        if not all(dim == 1 or _equal(dim, size) for dim, size in spread):
            raise Refused("the mask may spread the scores")
        if not _equal(dims[-2], query[2]) and not isinstance(query[2], int):
            raise Refused("the mask has one row for an open number of queries")

    def _check_rows(self, bias: ir.Value) -> None:
        """Rows of which every key is hidden come out differently."""
        is_boolean = bias.dtype == ir.DataType.BOOL
        if self.guard is not None and (self.scores.infinite or not is_boolean):
            return
        constant = constant_of(bias)
        if constant is not None:
            hidden = constant != self.scores.seen if is_boolean else np.isneginf(constant)
            if hidden.all(-1).any():
                raise Refused("the mask hides all keys of a row")
        elif is_boolean or _may_hold_infinity(bias):
            raise Refused("the mask may hide all keys of a row")

    def _is_causal(self) -> bool:
        """Whether the mask is constant and hides exactly the keys behind the query's own place."""
        constant = constant_of(self.scores.bias)
        length = self._sizes[0][2]
        if constant is None or not isinstance(length, int) or constant.shape[-2:] != (length, length):
            return False
        squares, seen = constant.reshape(-1, length, length), np.tri(length, dtype=np.bool_)
        if constant.dtype == np.bool_:
            return bool(((squares == self.scores.seen) == seen).all())
        return bool((squares[:, seen] == 0).all()) and _is_lowest(squares[:, ~seen])

    def write(self) -> None:
        """Put the operator in place of the last product."""
        result = self.last.outputs[0]
        inputs: list[ir.Value | None] = [self.product.query, self._write_keys(), self.values]
        attributes: dict[str, float] = {}
        size = self._sizes[0][3]
        if not isinstance(size, int) or not _is_usual(self.product.scale, size):
            attributes["scale"] = self.product.scale
        if self._is_causal():
            attributes["is_causal"] = 1
        elif self.scores.bias is not None:
            inputs.append(self._write_mask(self.scores.bias))
        attention = new_node(self.last, "Attention", inputs, attributes)
        attention.shape = result.shape
        replace(result, attention)

    def _write_keys(self) -> ir.Value:
        sizes = self._sizes[1]
        if len(dims_of(self.keys)) != len(sizes):
            target = np.array([d if isinstance(d, int) else -1 for d in sizes], np.int64)
            shape = new_initializer(graph_of(self.last), f"{self.keys.name}.shape", target)
            keys = new_node(self.last, "Reshape", [self.keys, shape])
        elif self.product.order != _IN_ORDER:
            keys = new_node(self.last, "Transpose", [self.keys], {"perm": self.product.order})
        else:
            return self.keys
        keys.shape = ir.Shape(sizes)
        return keys

    def _write_mask(self, bias: ir.Value) -> ir.Value:
        """The mask; onnxruntime 1.31 has no kernel for one with a single row for many queries."""
        dims, length = dims_of(bias), self._sizes[0][2]
        if not self.scores.seen:
            bias = new_node(self.last, "Not", [bias])
            bias.shape = ir.Shape(dims)
        if not _equal(dims[-2], length):
            target = new_initializer(
                graph_of(self.last), f"{bias.name}.rows", np.array([length, 1], np.int64)
            )
            bias = new_node(self.last, "Expand", [bias, target])
            bias.shape = ir.Shape([*dims[:-2], length, dims[-1]])
        return bias


def _is_usual(scale: float, size: int) -> bool:
    """Whether it is the operator's default, 1/sqrt(size), after the roundings of two roots in float32."""
    return is_rounded(np.array([scale], np.float32), size**-0.5, 4)


def _read(softmax: ir.Node) -> _Attention | None:
    """The attention around a softmax, or None."""
    weights = softmax.outputs[0]
    guard = _guard_of(weights)
    last = _product_with_values(weights if guard is None else guard.outputs[0])
    if last is None:
        return None
    _, values = last.inputs
    for scores in _masks(softmax.inputs[0]):
        product = _product_with_keys(scores.value)
        if product is None or values is None:
            continue
        fewer = _before_repeat(product.keys), _before_repeat(values)
        if product.order == _IN_ORDER and fewer[0] is not None and fewer[1] is not None:
            return _Attention(product, scores, softmax, guard, last, fewer[0], fewer[1], repeated=True)
        return _Attention(product, scores, softmax, guard, last, product.keys, values, repeated=False)
    return None


def _is(node: ir.Node | None, op_type: str) -> TypeGuard[ir.Node]:
    return node is not None and node.op_type == op_type and node.domain == ""


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes `value`, if it is of that type."""
    node = None if value is None else value.producer()
    return node if _is(node, op_type) else None


def _guard_of(weights: ir.Value) -> ir.Node | None:
    """Where(IsNaN(weights), 0, weights), which torch writes for rows that may be hidden altogether."""
    for node, index in weights.uses():
        if not _is(node, "Where") or index != 2 or number_of(node.inputs[1]) != 0:
            continue
        condition = node.inputs[0]
        test = _made_by(condition, "IsNaN")
        if test is not None and condition is not None and test.inputs[0] is weights:
            return node if only_user(condition) is node else None
    return None


def _product_with_values(weights: ir.Value) -> ir.Node | None:
    return next((node for node, index in weights.uses() if index == 0 and _is(node, "MatMul")), None)


def _masks(value: ir.Value | None) -> Iterator[_Scores]:
    """The ways to read what goes into a softmax."""
    if value is None:
        return
    yield _Scores(value)
    node = value.producer()
    if _is(node, "Add"):
        first, second = node.inputs
        if first is not None and second is not None:
            yield _Scores(first, second)
            yield _Scores(second, first)
    if _is(node, "Where"):
        condition, first, second = node.inputs
        for scores, low, seen in ((first, second, True), (second, first, False)):
            constant = constant_of(low)
            if scores is not None and constant is not None and constant.size == 1 and _is_lowest(constant):
                yield _Scores(scores, condition, seen, bool(np.isneginf(constant).all()))


def _is_lowest(array: Array) -> bool:
    """Whether all of it is -inf or the lowest finite number: a mask that no score outweighs."""
    return array.dtype.kind == "f" and bool((array <= np.finfo(array.dtype).min).all())


def _product_with_keys(scores: ir.Value) -> _Product | None:
    """The product that `scores` are, with factors before and after it; None without a transposition."""
    product, after = _unscaled(scores)
    node = _made_by(product, "MatMul")
    if node is None or node.inputs[0] is None or node.inputs[1] is None:
        return None
    query, before = _unscaled(node.inputs[0])
    transposed, outer = _unscaled(node.inputs[1])
    found = _transposed(transposed)
    if found is None:
        return None
    keys, inner = _unscaled(found[0])
    return _Product(node, query, transposed, keys, found[1], after * before * outer * inner)


def _unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """What constant numbers are multiplied with to make `value`, and their product."""
    factor = 1.0
    while (step := _scaling(value)) is not None:
        value, number = step
        factor *= number
    return value, factor


def _scaling(value: ir.Value) -> tuple[ir.Value, float] | None:
    """Data and the number it is multiplied with or divided by; the number must not add axes."""
    node = _made_by(value, "Mul") or _made_by(value, "Div")
    if node is None or value.shape is None:
        return None
    pairs = [node.inputs] if node.op_type == "Div" else [node.inputs, node.inputs[::-1]]
    for data, constant in pairs:
        number = number_of(constant)
        if number and data is not None and data.shape is not None and len(data.shape) == len(value.shape):
            return data, number if node.op_type == "Mul" else 1 / number
    return None


def _transposed(value: ir.Value) -> tuple[ir.Value, tuple[int, ...]] | None:
    """x, and the order of its axes in which it has the last two axes of `value` swapped."""
    node = _made_by(value, "Transpose")
    if node is None:
        source = _transposed_in_three_axes(value)
        return None if source is None else (source, _IN_ORDER)
    perm = attribute(node, "perm", _IN_ORDER[::-1])
    if node.inputs[0] is None or len(perm) != len(_IN_ORDER):
        return None
    return node.inputs[0], (*perm[:2], perm[3], perm[2])


def _transposed_in_three_axes(value: ir.Value) -> ir.Value | None:
    """x, where `value` is Reshape(Transpose(Reshape(x), [0, 2, 1])): torch swaps axes of any rank so.

    Where x was reshaped before, there is nothing of rank 4, and the Reshape in three axes is given instead.
    """
    last = _made_by(value, "Reshape")
    swap = None if last is None else _made_by(last.inputs[0], "Transpose")
    if swap is None or tuple(attribute(swap, "perm", ())) != (0, 2, 1):
        return None
    flat, turned = swap.inputs[0], _known(value, 4)
    dims = _known(flat, 3)
    if flat is None or dims is None or turned is None or not _all_equal(dims[1:], turned[:1:-1]):
        return None
    first = _made_by(flat, "Reshape")
    source = None if first is None else first.inputs[0]
    whole = _known(source, 4)
    same = whole is not None and _all_equal(whole, (*turned[:2], turned[3], turned[2]))
    return source if same else flat


def _before_repeat(value: ir.Value) -> ir.Value | None:
    """x [batch, heads, length, size], where `value` is Reshape(Expand(Unsqueeze(x, 2))): heads repeated."""
    merge = _made_by(value, "Reshape")
    spread = None if merge is None else _made_by(merge.inputs[0], "Expand")
    single = None if spread is None else spread.inputs[0]
    split = None if single is None else _made_by(single, "Unsqueeze") or _made_by(single, "Reshape")
    if spread is None or split is None:
        return None
    dims, one, wide = _known(split.inputs[0], 4), _known(single, 5), _known(spread.outputs[0], 5)
    made = _known(value, 4)
    if dims is None or one is None or wide is None or made is None:
        return None
    batch, heads, length, size = dims
    times = wide[2]
    if not isinstance(heads, int) or not isinstance(times, int):
        return None
    same = _all_equal(one, (batch, heads, 1, length, size))
    same &= _all_equal(wide, (batch, heads, times, length, size))
    same &= _all_equal(made, (batch, heads * times, length, size))
    return split.inputs[0] if same else None


def _known(value: ir.Value | None, rank: int) -> tuple[Dim, ...] | None:
    """The dimensions of a value of this rank."""
    if value is None or value.shape is None or len(value.shape) != rank:
        return None
    return dims_of(value)


def _equal(first: Dim, second: Dim) -> bool:
    """Whether two dimensions are known to be equal: the same number, or the same symbol."""
    return first is not None and first == second


def _all_equal(first: tuple[Dim, ...], second: tuple[Dim, ...]) -> bool:
    return all(map(_equal, first, second))


def _may_hold_infinity(mask: ir.Value) -> bool:
    """Whether -inf is among the constants that a mask is made of."""
    todo, seen = [mask], {mask}
    while todo:
        value = todo.pop()
        node, array = value.producer(), constant_of(value)
        if node is not None and node.op_type == "ConstantOfShape":
            fill = attribute(node, "value")
            array = None if fill is None else fill.numpy()
        if array is not None and array.dtype.kind == "f" and np.isneginf(array).any():
            return True
        if node is not None and node.domain == "" and node.op_type in _MASK_OPS:
            sources = {v for v in node.inputs if v is not None} - seen
            seen |= sources
            todo += sources
    return False
