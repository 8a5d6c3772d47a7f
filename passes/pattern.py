"""Patterns: trees of operators that say what a value is computed from, and where a graph holds them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import permutations
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from edgewise.passes.base import Refused
from edgewise.passes.graph import Array, constant_of

finfo: Callable[[np.dtype[Any]], Any] = ml_dtypes.finfo
"""The limits of a float type, numpy's own or bfloat16."""

_COMMUTATIVE = frozenset({"Add", "Mul", "Sum", "Mean", "Max", "Min", "And", "Or", "Xor", "Equal"})


@dataclass(frozen=True, eq=False)
class Match:
    """One place where a pattern stands: the values its names stand for, and the nodes it covers, root first.

    `number_rank` is the largest rank of its `Number`s: one of shape [1, 1] makes a matrix of a vector.
    """

    values: Mapping[str, ir.Value] = field(default_factory=lambda: MappingProxyType({}))
    nodes: tuple[ir.Node, ...] = ()
    number_rank: int = 0

    def __getitem__(self, name: str) -> ir.Value:
        return self.values[name]

    def get(self, name: str) -> ir.Value | None:
        """The value called `name`, None where this way to match has none of that name."""
        return self.values.get(name)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def node(self, name: str) -> ir.Node:
        """The node that computes the value called `name`, which an `Op` has to be."""
        producer = self.values[name].producer()
        assert producer is not None
        return producer

    def bound(self, name: str, value: ir.Value) -> Match | None:
        """This match with `name` for `value`; None where the name stands for another value already."""
        if not name:
            return self
        if name in self.values:
            return self if self.values[name] is value else None
        return replace(self, values=MappingProxyType({**self.values, name: value}))

    def check_private(self) -> None:
        """`Refused` where something else reads a value between the nodes: it would have to stay."""
        inside = set(self.nodes)
        for value in (v for node in self.nodes[1:] for v in node.outputs):
            if value.is_graph_output() or any(use.node not in inside for use in value.uses()):
                raise Refused("a value inside the pattern has another user")

    def check_rank(self, rank: int | None) -> None:
        """`Refused` where a number of the pattern might add axes to data of `rank`."""
        if self.number_rank > (rank or 0):
            raise Refused("a number of the pattern may change the rank of its data")


class Pattern(ABC):
    """What a value may be computed from."""

    @abstractmethod
    def solutions(self, value: ir.Value, found: Match) -> Iterator[Match]:
        """Every way to read `value` as this pattern that agrees with what is `found` already."""

    def match(self, value: ir.Value) -> Match | None:
        """The first way to read `value` as this pattern, or None."""
        return next(self.solutions(value, Match()), None)


@dataclass(frozen=True)
class Var(Pattern):
    """Any value. The same name stands for the same value throughout; without a name, for any."""

    name: str = ""

    def solutions(self, value: ir.Value, found: Match) -> Iterator[Match]:
        extended = found.bound(self.name, value)
        if extended is not None:
            yield extended


@dataclass(frozen=True)
class Constant(Pattern):
    """Any constant of any shape, under a name as `Var` has one."""

    name: str = ""

    def solutions(self, value: ir.Value, found: Match) -> Iterator[Match]:
        extended = found.bound(self.name, value)
        if extended is not None and constant_of(value) is not None:
            yield extended


@dataclass(frozen=True)
class Number(Pattern):
    """A constant of one element: the given number as far as the constant's type can hold it, or any."""

    value: float | None = None
    name: str = ""

    def solutions(self, value: ir.Value, found: Match) -> Iterator[Match]:
        array = constant_of(value)
        if array is None or array.size != 1:
            return
        extended = found.bound(self.name, value)
        if extended is not None and (self.value is None or is_rounded(array, self.value)):
            yield replace(extended, number_rank=max(found.number_rank, array.ndim))


@dataclass(frozen=True)
class Op(Pattern):
    """The first output of a node of one of `types`, separated by "|", with inputs that match.

    Inputs of a commutative operator match in any order. `more` allows inputs after those of the
    pattern, matching or not. All nodes of a match are in the graph of its root: what a body reads of a
    graph around it is no part of a match, for a loop would compute it again and again.
    """

    types: str
    inputs: tuple[Pattern, ...]
    name: str = ""
    more: bool = False

    def solutions(self, value: ir.Value, found: Match) -> Iterator[Match]:
        node = value.producer()
        if node is None or not self._describes(node, value):
            return
        extended = found.bound(self.name, value)
        if extended is None or (found.nodes and node.graph is not found.nodes[0].graph):
            return
        if node not in found.nodes:
            extended = replace(extended, nodes=(*extended.nodes, node))
        given = node.inputs[: len(self.inputs)]
        orders = permutations(given) if node.op_type in _COMMUTATIVE else (given,)
        for order in orders:
            yield from _all(self.inputs, tuple(order), extended)

    def _describes(self, node: ir.Node, value: ir.Value) -> bool:
        if node.domain != "" or node.op_type not in self.types.split("|") or node.outputs[0] is not value:
            return False
        return len(node.inputs) == len(self.inputs) or (self.more and len(node.inputs) > len(self.inputs))


@dataclass(frozen=True)
class Either(Pattern):
    """One of several patterns; the first that matches comes first."""

    patterns: tuple[Pattern, ...]

    def solutions(self, value: ir.Value, found: Match) -> Iterator[Match]:
        for pattern in self.patterns:
            yield from pattern.solutions(value, found)


def op(types: str, *inputs: Pattern, name: str = "", more: bool = False) -> Op:
    """Short for `Op`: op("Mul", x, op("Sigmoid", x))."""
    return Op(types, inputs, name, more)


def either(*patterns: Pattern) -> Either:
    """Short for `Either`."""
    return Either(patterns)


def _all(patterns: tuple[Pattern, ...], values: tuple[ir.Value | None, ...], found: Match) -> Iterator[Match]:
    """Every way in which all `patterns` match the value at their place; an input left out matches none."""
    if not patterns:
        yield found
    elif values[0] is not None:
        for extended in patterns[0].solutions(values[0], found):
            yield from _all(patterns[1:], values[1:], extended)


def number_of(value: ir.Value | None) -> float | None:
    """The element of a constant that has one, or None."""
    array = constant_of(value)
    return None if array is None or array.size != 1 else float(array.item())


def is_rounded(array: Array, exact: float, roundings: int = 1) -> bool:
    """Whether all of `array` is `exact` after some roundings to its type.

    A number is stored with a relative error of up to half the type's epsilon: 6e-8 in float32, 5e-4 in
    float16. So 0.7071 stands for sqrt(1/2) in float16, where nothing is closer, and not in float32.
    """
    if not is_float(array.dtype):
        return bool((array == exact).all())
    difference = np.abs(array.astype(np.float64) - exact)
    return bool((difference <= roundings * rounding_of(array.dtype) * abs(exact)).all())


def rounding_of(dtype: np.dtype[np.generic]) -> float:
    """The largest relative error of rounding to a float type, and room for that of float64 arithmetic."""
    return float(finfo(dtype).eps) / 2 + 4 * float(np.finfo(np.float64).eps)


def is_float(dtype: np.dtype[np.generic]) -> bool:
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16


def check_operator(op_type: str, version: int, data: ir.Value) -> None:
    """`Refused` where operator set `version` has no `op_type`, or none for the type of `data`."""
    if not onnx.defs.has(op_type, version, ""):
        raise Refused(f"the model's operator set has no {op_type}")
    if data.dtype is None:
        raise Refused("the type of the data is not known")
    if data.dtype is ir.DataType.DOUBLE:
        raise Refused("double precision")  # legal, and few runtimes have kernels
    if f"tensor({data.dtype.name.lower()})" not in onnx.defs.get_schema(op_type, version, "").inputs[0].types:
        raise Refused(f"{op_type} is not defined for this type")
