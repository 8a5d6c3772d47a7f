"""What no output of the model depends on."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from edgewise.passes.base import Outcome, Pass, bodies_of
from edgewise.passes.graph import opset, release_bodies

# The number of outputs of these chooses between training and inference in some operator set.
_ARITY_MATTERS = frozenset({"BatchNormalization", "Dropout"})


@dataclass(frozen=True)
class DropDeadNodes(Pass):
    """Remove nodes, initializers, functions and operator sets that nothing uses, and cut off unused
    optional outputs. Inputs and outputs of the model stay, used or not.
    """

    name = "drop-dead-nodes"

    def apply(self, model: ir.Model) -> Outcome:
        edits = _drop_functions(model)
        edits += _clean(model.graph, opset(model))
        for function in model.functions.values():
            edits += _clean(function.graph, function.opset_imports.get("", opset(model)))
        return Outcome(edits + _drop_opsets(model))


def _drop_functions(model: ir.Model) -> int:
    before = len(model.functions)
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    return before - len(model.functions)


def _clean(graph: ir.Graph, version: int) -> int:
    """Clean a graph and the bodies in it, last node first, so that one sweep is enough."""
    edits = 0
    for node in reversed(graph):
        if any(v.uses() or v.is_graph_output() for v in node.outputs):
            edits += _cut_outputs(node, version)
            edits += sum(_clean(body, version) for body in bodies_of(node))
        else:
            release_bodies(node)
            graph.remove(node, safe=True)
            edits += 1
    return edits + _drop_initializers(graph)


def _drop_initializers(graph: ir.Graph) -> int:
    unused = [
        name
        for name, v in graph.initializers.items()
        if not (v.uses() or v.is_graph_input() or v.is_graph_output())
    ]
    for name in unused:
        graph.initializers.pop(name)
    return len(unused)


def _cut_outputs(node: ir.Node, version: int) -> int:
    """Leave out the optional outputs that nobody reads: the kernel need not write them."""
    if node.domain != "" or node.op_type in _ARITY_MATTERS or not onnx.defs.has(node.op_type, version, ""):
        return 0
    formal = onnx.defs.get_schema(node.op_type, version, "").outputs
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    cut = 0
    for value, parameter in zip(node.outputs, formal, strict=False):
        if parameter.option == optional and value.name and not (value.uses() or value.is_graph_output()):
            value.name, value.type, value.shape = "", None, None
            cut += 1
    named = [i for i, value in enumerate(node.outputs) if value.name]
    if cut:
        node.resize_outputs(named[-1] + 1)
    return cut


def _drop_opsets(model: ir.Model) -> int:
    """Forget domains that no node is of; the default domain stays, by either of its names."""
    used = {"", "ai.onnx", *(domain for domain, *_ in model.functions)}
    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        used.update(node.domain for node in graph.all_nodes())
    unused = [domain for domain in model.opset_imports if domain not in used]
    for domain in unused:
        del model.opset_imports[domain]
    return len(unused)
