"""Which nodes are functions of their inputs and of nothing else."""

from __future__ import annotations

import onnx_ir as ir

from edgewise.passes.base import bodies_of
from edgewise.passes.graph import constant_of

_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def is_pure(node: ir.Node) -> bool:
    """Whether a node gives the same outputs whenever it gets the same inputs, and has no bodies.

    Of operators outside the standard nothing is known, so they do not count as pure. A random operator
    with a seed does not either: a runtime may let the state of its generator go on from run to run.
    """
    if node.domain != "" or any(bodies_of(node)):
        return False
    return not _draws(node)


def drawn_outputs(model: ir.Model) -> frozenset[str]:
    """The names of the outputs that depend on a random operator of the standard; a call may change them."""
    drawn = set[ir.Value]()
    for node in model.graph:
        inside = [node, *(n for body in bodies_of(node) for n in body.all_nodes())]
        if any(_draws(n) or not drawn.isdisjoint(v for v in n.inputs if v is not None) for n in inside):
            drawn.update(node.outputs)
    return frozenset(v.name for v in model.graph.outputs if v in drawn and v.name)


def _draws(node: ir.Node) -> bool:
    """Whether a node of the standard draws random numbers."""
    return node.domain == "" and (node.op_type in _RANDOM or (node.op_type == "Dropout" and _may_train(node)))


def _may_train(node: ir.Node) -> bool:
    """Whether a Dropout may drop anything: where its third input is there and not constantly false."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return False
    training = constant_of(node.inputs[2])
    return training is None or bool(training.any())
