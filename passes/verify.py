"""Structural invariants that hold before and after every pass."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgewise.passes.base import PassError, bodies_of


@dataclass(frozen=True)
class Signature:
    """What callers of a model rely on: the names, types and shapes that go in and come out.

    An initializer that is also an input has a default, so callers need not name it: it is left out.
    """

    inputs: tuple[tuple[str, str, str], ...]
    outputs: tuple[tuple[str, str, str], ...]

    @classmethod
    def of(cls, model: ir.Model) -> Signature:
        graph = model.graph
        required = (v for v in graph.inputs if v.name not in graph.initializers)
        return cls(tuple(map(_describe, required)), tuple(map(_describe, graph.outputs)))


def _describe(value: ir.Value) -> tuple[str, str, str]:
    return (value.name or "", str(value.type), str(value.shape))


def check(model: ir.Model, signature: Signature) -> None:
    """Raise `PassError` on the first invariant the model breaks.

    No dangling value, unique names, topological order, and the inputs and outputs of `signature`.
    """
    if (now := Signature.of(model)) != signature:
        raise PassError(f"inputs or outputs changed: {_first_difference(signature, now)}")
    _check_graph(model.graph, frozenset())
    for function in model.functions.values():
        _check_graph(function.graph, frozenset())


def _first_difference(old: Signature, new: Signature) -> str:
    for before, after in zip(old.inputs + old.outputs, new.inputs + new.outputs, strict=False):
        if before != after:
            return f"{before} became {after}"
    return f"{_counts(old)} became {_counts(new)}"


def _counts(signature: Signature) -> str:
    return f"{len(signature.inputs)} inputs and {len(signature.outputs)} outputs"


def _check_graph(graph: ir.Graph, outer: frozenset[ir.Value]) -> set[ir.Value]:
    """Walk one graph in order; give back what it reads of `outer`, the values of enclosing graphs.

    Graphs side by side may use the same names. A name of an enclosing graph may be used again as long
    as nothing inside reads the value that it hides: a file knows values by name alone.
    """
    known, names, captured = set(outer), set[str](), set[ir.Value]()

    def define(value: ir.Value) -> None:
        if not value.name:
            raise PassError(f"a value of {graph.name!r} has no name")
        if value not in known:
            if value.name in names:
                raise PassError(f"two values are named {value.name!r}")
            names.add(value.name)
            known.add(value)

    for value in (*graph.inputs, *graph.initializers.values()):
        define(value)
    for node in graph:
        for source in node.inputs:
            if source is not None and source not in known:
                raise PassError(f"{node.op_type} {node.name!r} reads {source.name!r} before it is produced")
        read = {v for v in node.inputs if v is not None}
        read.update(*(_check_graph(body, frozenset(known)) for body in bodies_of(node)))
        captured |= read & outer
        for value in node.outputs:
            if value.name:  # an optional output that is left out has no name
                define(value)
    for value in graph.outputs:
        if value not in known:
            raise PassError(f"output {value.name!r} of {graph.name!r} has no producer")
    captured |= outer.intersection(graph.outputs)
    if hidden := sorted(v.name or "" for v in captured if v.name in names):
        raise PassError(f"{graph.name!r} reads {hidden[0]!r} of an enclosing graph, and hides it")
    return captured
