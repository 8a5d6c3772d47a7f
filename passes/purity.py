"""Which nodes are functions of their inputs and of nothing else."""

from __future__ import annotations

import onnx_ir as ir

from edgewise.passes.graph import constant_of

_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
_BODIES = frozenset({ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS})


def is_pure(node: ir.Node) -> bool:
    """Whether a node gives the same outputs whenever it gets the same inputs, and has no bodies.

    Of operators outside the standard nothing is known, so they do not count as pure. A random operator
    with a seed does not either: a runtime may let the state of its generator go on from run to run.
    """
    if node.domain != "" or node.op_type in _RANDOM:
        return False
    if any(attr.type in _BODIES for attr in node.attributes.values()):
        return False
    return node.op_type != "Dropout" or not _may_train(node)


def _may_train(node: ir.Node) -> bool:
    """Whether a Dropout may drop anything: where its third input is there and not constantly false."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return False
    training = constant_of(node.inputs[2])
    return training is None or bool(training.any())
