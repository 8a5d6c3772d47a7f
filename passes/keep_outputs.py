"""Outputs that nobody wants, and all that is computed for them alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from edgewise.passes.base import Outcome, Pass, PassError
from edgewise.passes.drop_dead_nodes import DropDeadNodes
from edgewise.passes.graph import drop_unused_initializer


@dataclass(frozen=True)
class KeepOutputs(Pass):
    """Cut the outputs of the model down to those named, and drop what only the others needed.

    Given:   outputs (scores, features, mask)      names "mask,scores"
    Result:  outputs (scores, mask)

    The order stays the model's. With `unused_inputs` the inputs that nothing reads are dropped as well.
    Raises `PassError` on a name that is no output.
    """

    name = "keep-outputs"
    keeps_signature: ClassVar[bool] = False  # outputs go, and inputs where that is asked for
    names: str = ""
    unused_inputs: bool = False

    def apply(self, model: ir.Model) -> Outcome:
        edits = _cut(model.graph, [n for n in map(str.strip, self.names.split(",")) if n])
        if edits:
            edits += DropDeadNodes().apply(model).edits
        if self.unused_inputs:
            edits += _drop_unused_inputs(model.graph)
        return Outcome(edits)


def _cut(graph: ir.Graph, names: list[str]) -> int:
    """Take the outputs that are not in `names` out of the list; how many they were."""
    outputs = list(graph.outputs)
    known = [v.name or "" for v in outputs]
    for name in names:
        if name not in known:
            raise PassError(f"there is no output {name!r}, only {', '.join(known)}")
    kept = [v for v in outputs if v.name in names]
    if names and len(kept) < len(outputs):
        graph.outputs.clear()
        graph.outputs.extend(kept)
        return len(outputs) - len(kept)
    return 0


def _drop_unused_inputs(graph: ir.Graph) -> int:
    unused = [v for v in graph.inputs if not (v.uses() or v.is_graph_output())]
    for value in unused:
        graph.inputs.remove(value)
        drop_unused_initializer(value)  # where the input had a default value
    return len(unused)
