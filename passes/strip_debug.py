"""What an exporter wrote down for people who look for its mistakes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from edgewise.passes.base import Outcome, Pass

_EXPORTERS = ("pkg.", "namespace")  # stack traces, scopes and classes, as torch's exporters note them


@dataclass(frozen=True)
class StripDebug(Pass):
    """Remove documentation of the model, its graphs, nodes and values, and what exporters noted on them.

    Names stay, and so does all other metadata: class names and the like, that an application reads.
    """

    name = "strip-debug"

    def apply(self, model: ir.Model) -> Outcome:
        return Outcome(sum(map(_strip, _parts(model))))


def _parts(model: ir.Model) -> Iterator[Any]:
    """Whatever holds a documentation string or metadata."""
    yield model
    yield from model.functions.values()
    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        for part in (graph, *graph.subgraphs()):
            yield part
            yield from (*part.inputs, *part.initializers.values())
        for node in graph.all_nodes():
            yield node
            yield from node.outputs


def _strip(part: Any) -> int:
    """How many texts were removed."""
    notes = [key for key in part.metadata_props if key.startswith(_EXPORTERS)]
    for key in notes:
        del part.metadata_props[key]
    documented = bool(part.doc_string)
    if documented:
        part.doc_string = None
    return len(notes) + documented
