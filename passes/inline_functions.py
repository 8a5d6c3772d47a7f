"""Functions that a model brings along."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import MappingProxyType

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from edgewise.passes.base import Outcome, Pass, PassError
from edgewise.passes.graph import forget_names

_RUNTIMES_OWN = frozenset(
    {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
)  # runtimes may have kernels for them


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Put the bodies of model-local functions in place of their calls, for no other pass looks into them.

    Given:   y = f<k>(x), where f<k>(a) => b is a function of the model
    Result:  the nodes of f between x and y, under names of their own, with k written out

    Weights that a body holds are written for every call, and shared again by `dedupe-initializers`. Refused
    are functions by whose copies the model would grow by more than `max_nodes` nodes, that import other
    versions of an operator set than the model, or that stand in for an operator of which runtimes have
    their own.
    """

    name = "inline-functions"
    max_nodes: int = 10_000

    def apply(self, model: ir.Model) -> Outcome:
        refused = Counter[str]()
        calls, chosen = _calls(model), set()
        for key, function in model.functions.items():
            reason = self._reason(model, function, calls[key])
            refused.update([reason] if reason else [])
            chosen |= set() if reason else {key}
        if not chosen:
            return Outcome(0, MappingProxyType(dict(refused)))
        try:
            InlinePass(lambda function: function.identifier() in chosen).call(model)
        except ValueError as error:
            raise PassError(f"a function cannot be inlined: {error}") from error
        for graph in model.graphs():
            if isinstance(graph, ir.Graph):
                forget_names(graph)
        return Outcome(calls.total() - _calls(model).total(), MappingProxyType(dict(refused)))

    def _reason(self, model: ir.Model, function: ir.Function, calls: int) -> str:
        """Why `function` has to stay, or an empty text."""
        if function.domain in _RUNTIMES_OWN:
            return "the function stands in for an operator of the runtime"
        if any(
            model.opset_imports.get(d, version) != version for d, version in function.opset_imports.items()
        ):
            return "the function imports another version of an operator set"
        if (calls - 1) * len(function) > self.max_nodes:
            return "the copies of the function would be too many"
        return ""


def _calls(model: ir.Model) -> Counter[ir.OperatorIdentifier]:
    """How often each function is called, by the graph and by other functions."""
    graphs = (model.graph, *(function.graph for function in model.functions.values()))
    nodes = (node for graph in graphs for node in graph.all_nodes())
    return Counter(key for node in nodes if (key := node.op_identifier()) in model.functions)
