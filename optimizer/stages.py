"""A model as a chain of smaller ones, so that a question about its end does not run its beginning again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from edgewise.passes.base import bodies_of
from edgewise.passes.graph import constant_of
from edgewise.passes.infer_shapes import InferShapes

State = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """A part of a model that is a model itself. It runs on a state, the values known so far by name.

    `nodes` are the first outputs of its nodes, `names` all values that these read or write, and `keeps`
    the values that are needed behind it.
    """

    model: ir.Model
    nodes: frozenset[str]
    names: frozenset[str]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    keeps: frozenset[str]

    def after(self, state: State, written: State) -> dict[str, Any]:
        """The state behind this stage."""
        return {name: value for name, value in {**state, **written}.items() if name in self.keeps}


def in_stages(model: ir.Model, count: int, together: Sequence[Sequence[str]]) -> tuple[Stage, ...]:
    """`model` in up to `count` stages with about as many of the groups `together` in each.

    A group holds the first outputs of nodes that stay in one stage. Between groups the model is cut where
    the values that are alive there are smallest.
    """
    model = model.clone()
    InferShapes().apply(model)
    life = _Life(tuple(model.graph), frozenset(v.name or "" for v in model.graph.outputs))
    places = [0, *life.places(count, together), len(life.order)]
    return tuple(
        stage
        for first, last in itertools.pairwise(places)
        if (stage := life.stage(model, first, last)) is not None
    )


class _Life:
    """From where to where in the order of nodes each value is alive. Constants are anywhere at hand."""

    def __init__(self, order: tuple[ir.Node, ...], outputs: frozenset[str]) -> None:
        self.order = order
        self._born: dict[ir.Value, int] = {}
        self._dies: dict[ir.Value, int] = {}
        for i, node in enumerate(order):
            self._born |= {v: i for v in node.outputs if constant_of(v) is None}
            for value in _reads(node):
                self._dies[value] = i
        self._dies |= {v: len(order) for v in self._born if v.name in outputs}

    def alive(self, place: int) -> list[ir.Value]:
        """What nodes in front of `place` made and nodes from there on, or the caller, read."""
        return [v for v, born in self._born.items() if born < place <= self._dies.get(v, -1)]

    def places(self, count: int, together: Sequence[Sequence[str]]) -> list[int]:
        """Where to cut, in order."""
        at = {v.name: i for i, node in enumerate(self.order) for v in node.outputs[:1]}
        spans = [(min(at[n] for n in names), max(at[n] for n in names)) for names in together]
        closed = {p for first, last in spans for p in range(first + 1, last + 1)}
        ends = sorted(last + 1 for _, last in spans)
        wanted = {ends[max(len(ends) * k // count - 1, 0)] for k in range(1, count)} if ends else set()
        found: list[int] = []
        for near, far in itertools.pairwise([*sorted(wanted), len(self.order)]):
            room = (p for p in range(near, near + (far - near + 1) // 2) if p not in closed)
            size, place = min(((self._bytes(p), p) for p in room), default=(math.inf, 0))
            if size < math.inf:
                found.append(place)
        return found

    def _bytes(self, place: int) -> float:
        """The size of what is alive, a free dimension counted as one; infinite where that is no tensor."""
        return sum((_size(v) for v in self.alive(place)), 0.0) or math.inf

    def stage(self, model: ir.Model, first: int, last: int) -> Stage | None:
        """The nodes from `first` up to `last`; None if nobody needs what they make."""
        nodes = self.order[first:last]
        needed = set(self.alive(last))
        writes = [v for node in nodes for v in node.outputs if v in needed]
        if not writes:
            return None
        inputs = [v for v in model.graph.inputs if not v.is_initializer()]
        known = {*inputs, *self.alive(first)}
        read = {v for node in nodes for v in _reads(node)}
        reads = [v for v in (*inputs, *self.alive(first)) if v in read]
        graph = ir.convenience.extract(model.graph, reads, writes)
        behind = {v for node in self.order[last:] for v in _reads(node)}
        return Stage(
            ir.Model(graph, ir_version=model.ir_version, functions=tuple(model.functions.values())),
            frozenset(n.outputs[0].name or "" for n in nodes if n.outputs),
            frozenset(v.name for n in nodes for v in (*n.inputs, *n.outputs) if v is not None and v.name),
            tuple(v.name or "" for v in reads),
            tuple(v.name or "" for v in writes),
            frozenset(v.name or "" for v in needed | (known & behind)),
        )


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """The values that a node or a body of it reads."""
    yield from (v for v in node.inputs if v is not None)
    for body in bodies_of(node):
        yield from body.outputs
        for inner in body:
            yield from _reads(inner)


def _size(value: ir.Value) -> float:
    if not isinstance(value.type, ir.TensorType) or value.shape is None:
        return math.inf
    return math.prod(d for d in value.shape if isinstance(d, int) and d > 0) * value.type.dtype.itemsize
