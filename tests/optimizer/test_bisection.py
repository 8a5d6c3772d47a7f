"""Halving the chain finds the pass that made a model slower."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from edgewise.optimizer.bisection import culprit, replay
from edgewise.passes import parse

NAMES = (
    "drop-identity",
    "drop-no-ops",
    "merge-transposes",
    "eliminate-common-subexpressions",
    "dedupe-initializers",
)
"""Each of them edits the model, and leaves what the others look for."""
STEPS = [parse(name) for name in NAMES]

TEXT = """
<ir_version: 8, opset_import: ["" : 16]>
main (float[2,3] x) => (float[2,3] y)
<float[1] one = {1}, float[1] two = {2}, float[1] other_two = {2}>
{
    a = Identity(x)
    b = Mul(a, one)
    c = Transpose<perm = [1, 0]>(b)
    d = Transpose<perm = [1, 0]>(c)
    e = Exp(d)
    f = Exp(d)
    g = Mul(e, two)
    h = Add(f, other_two)
    i = Sigmoid(h)
    y = Add(g, i)
}
"""


def model() -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(TEXT))


def op_types(graph: ir.Graph) -> list[str]:
    return [node.op_type for node in graph]


MARKS = {
    "drop-identity": lambda graph: "Identity" not in op_types(graph),
    "drop-no-ops": lambda graph: op_types(graph).count("Mul") == 1,
    "merge-transposes": lambda graph: "Transpose" not in op_types(graph),
    "eliminate-common-subexpressions": lambda graph: op_types(graph).count("Exp") == 1,
    "dedupe-initializers": lambda graph: len(graph.initializers) == 1,
}
"""What a graph shows once the pass has run."""


@pytest.mark.parametrize("guilty", NAMES)
def test_finds_the_pass_from_which_on_the_model_is_slower(guilty: str) -> None:
    measured = []

    def is_slower(candidate: ir.Model) -> bool:
        measured.append(candidate)
        return MARKS[guilty](candidate.graph)

    assert culprit(model(), STEPS, is_slower).name == guilty
    assert 2 <= len(measured) <= 3  # five passes are halved to one


def test_a_chain_of_one_pass_needs_no_measurement() -> None:
    def is_slower(_: ir.Model) -> bool:
        raise AssertionError("measured for nothing")

    assert culprit(model(), STEPS[:1], is_slower) == STEPS[0]


def test_replaying_leaves_the_model_as_it_was() -> None:
    original = model()
    after = replay(original, STEPS)
    assert op_types(original.graph) == op_types(model().graph)
    assert all(mark(after.graph) for mark in MARKS.values())
