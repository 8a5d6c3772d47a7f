"""Names of nodes and values as short as they can be: in a small network they are a good part of the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, product
from string import ascii_lowercase

import onnx_ir as ir

from edgewise.passes.base import Outcome, Pass


@dataclass(frozen=True)
class ShortenNames(Pass):
    """Name values a, b, ..., aa, ab, ... in the order in which nodes mention them, nodes by their results.

    Inputs and outputs of the model keep their names, and so do dimensions and what is in functions. Nobody
    will find a layer by the name that an exporter gave it.
    """

    name = "shorten-names"

    def apply(self, model: ir.Model) -> Outcome:
        kept = {v.name for v in (*model.graph.inputs, *model.graph.outputs)}
        names = (name for name in _shortest() if name not in kept)
        wanted = {v: name for v, name in zip(_values(model.graph), names, strict=False) if v.name != name}
        for number, value in enumerate(wanted):  # two may change names with each other
            value.name = f"shorten-names.{number}"
        for value, name in wanted.items():
            value.name = name
        return Outcome(len(wanted) + sum(map(_named_by_result, list(model.graph.all_nodes()))))


def _shortest() -> Iterator[str]:
    for length in count(1):
        yield from map("".join, product(ascii_lowercase, repeat=length))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every value of a graph and those within it, once; but the inputs and outputs of the model."""
    fixed = {*graph.inputs, *graph.outputs}
    mentioned = (v for node in graph.all_nodes() for v in (*node.inputs, *node.outputs))
    held = (
        v for part in graph.subgraphs() for v in (*part.inputs, *part.outputs, *part.initializers.values())
    )
    for value in dict.fromkeys(chain(mentioned, held, graph.initializers.values())):
        if value is not None and value.name and value not in fixed:
            yield value


def _named_by_result(node: ir.Node) -> bool:
    """Whether that is another name."""
    name = next((v.name for v in node.outputs if v.name), None)
    changed = node.name != name
    node.name = name
    return changed
