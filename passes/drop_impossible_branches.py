"""Branches with which a model cannot run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Outcome, Pass
from edgewise.passes.drop_identity import DropIdentity
from edgewise.passes.fold_constants import FoldConstants
from edgewise.passes.graph import attribute, constant_of, graph_of, new_initializer, remove_if_unused
from edgewise.passes.inline_if import InlineIf
from edgewise.passes.linear import rank_of

_RECURRENT_RANK = 3
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
_BRANCHES = MappingProxyType({"then_branch": True, "else_branch": False})


@dataclass(frozen=True)
class DropImpossibleBranches(Pass):
    """Fix the condition of an If where a node behind it takes the result of one branch only.

    Given:   y = If(c){then: t; else: e}, z = LSTM(f(y), ...), where t and e have different ranks and f(t)
             has not the rank that the LSTM takes: 3, as GRU and RNN; of a Conv, the rank of its weight
    Result:  y = If(false){then: t; else: e}, which `inline-if` makes e
    Exporters write such an If for what depends on the shape of an input, as `squeeze` does. With the other
    value of c the run ended in an error. What the branch entails is followed through the shapes computed
    from it, and through other Ifs that depend on those.
    """

    name = "drop-impossible-branches"

    def apply(self, model: ir.Model) -> Outcome:
        edits, refused = 0, Counter[str]()
        while (found := _impossible(model, refused)) is not None:
            node, branch = found
            _fix(node, not _BRANCHES[branch])
            _settle(model)
            edits += 1
        return Outcome(edits, MappingProxyType(dict(refused)))


def _impossible(model: ir.Model, refused: Counter[str]) -> tuple[ir.Node, str] | None:
    """The first If that has an impossible branch, and the name of that."""
    refused.clear()
    for index, node in enumerate(model.graph.all_nodes()):
        if node.op_type != "If" or node.domain != "" or constant_of(node.inputs[0]) is not None:
            continue
        if not _differ(node):
            continue
        for branch in _BRANCHES:
            if _fails(model, index, branch):
                return node, branch
        refused["nothing tells which branches are possible"] += 1
    return None


def _differ(node: ir.Node) -> bool:
    """Whether the branches give a result of different ranks."""
    branches: list[ir.Graph] = [attribute(node, name) for name in _BRANCHES]
    pairs = zip(*(map(rank_of, branch.outputs) for branch in branches), strict=True)
    return any(None not in pair and len(set(pair)) > 1 for pair in pairs)


def _fails(model: ir.Model, index: int, branch: str) -> bool:
    """Whether node `index` of `model` can never take that branch."""
    trial = model.clone()
    node = next(n for i, n in enumerate(trial.graph.all_nodes()) if i == index)
    graph = graph_of(node)
    _fix(node, _BRANCHES[branch])
    _settle(trial)
    return any(_contradicts(n) for n in graph)


def _fix(node: ir.Node, taken: bool) -> None:
    old = node.inputs[0]
    constant = new_initializer(graph_of(node), f"{node.outputs[0].name}.condition", np.array(taken))
    node.replace_input_with(0, constant)
    producer = None if old is None else old.producer()
    if producer is not None:
        remove_if_unused(producer)


def _settle(model: ir.Model) -> None:
    """Let the passes that follow shapes, constants and conditions do all they can."""
    rules = (FoldConstants(), InlineIf(), DropIdentity())
    while sum(rule.apply(model).edits for rule in rules):
        pass


def _contradicts(node: ir.Node) -> bool:
    """Whether a node that runs whenever its graph does gets data of a rank that it does not take."""
    if node.domain != "" or not node.inputs:
        return False
    rank = rank_of(node.inputs[0])
    if node.op_type in _RECURRENT:
        return rank not in (None, _RECURRENT_RANK)
    wanted = rank_of(node.inputs[1]) if node.op_type in _CONVOLUTIONS else None
    return wanted is not None and rank not in (None, wanted)
