"""drop-identity: an Identity goes unless a name of the interface hangs on it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build, operators, refusal, rewritten

from edgewise.passes.drop_identity import DropIdentity

RULE = DropIdentity()
FIXED = "the result is a graph output and its source has a fixed name"


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("i = Identity(x) y = Neg(i)", ["Neg"]),
        ("i = Identity(x) j = Identity(i) a = Neg(j) y = Add(a, i)", ["Neg", "Add"]),
        ("a = Neg(x) y = Identity(a)", ["Neg"]),
        ("i = Identity(w) y = Add(x, i)", ["Add"]),
    ],
)
def test_gone(body: str, left: list[str]) -> None:
    weights = {"w": np.float32([1, 2])} if "w" in body else {}
    after, outcome = rewritten(build(f"g (float[2] x) => (float[2] y) {{ {body} }}", **weights), RULE)
    assert operators(after) == left
    assert outcome.edits == body.count("Identity")


def test_the_output_keeps_what_it_declares() -> None:
    """The value behind it is known better, but the caller was promised a dynamic batch."""
    model = build("g (float[2] x) => (float[N] y) { a = Neg(x) y = Identity(a) }", shapes=False)
    model.graph.node(0).outputs[0].shape = ir.Shape([2])
    after, _ = rewritten(model, RULE)
    assert after.graph.outputs[0].shape == ir.Shape(["N"])


@pytest.mark.parametrize(
    "body", ["y = Identity(x)", "y = Identity(w)"], ids=["an input to an output", "a weight to an output"]
)
def test_stays(body: str) -> None:
    weights = {"w": np.float32([1, 2])} if "w" in body else {}
    assert refusal(build(f"g (float[2] x) => (float[2] y) {{ {body} }}", **weights), RULE) == FIXED


def test_two_outputs_of_one_value() -> None:
    """One of them may take over the name, the other needs its node."""
    model = build("g (float[2] x) => (float[2] y, float[2] z) { a = Neg(x) y = Identity(a) z = Identity(a) }")
    after, outcome = rewritten(model, RULE)
    assert operators(after) == ["Neg", "Identity"]
    assert (outcome.edits, dict(outcome.refused)) == (1, {FIXED: 1})


def test_a_branch_that_hands_on_an_outer_value() -> None:
    model = build(
        """g (bool c, float[2] x) => (float[2] y) {
            n = Neg(x)
            y = If(c) <then_branch = t () => (float[2] a) { a = Identity(n) },
                       else_branch = e () => (float[2] b) { i = Identity(n) b = Neg(i) }>
        }"""
    )
    after, outcome = rewritten(model, RULE, {"c": np.array(False), "x": np.float32([1, 2])})
    assert outcome.edits == 1
    assert outcome.refused == {"the result is an output of another graph than its source": 1}
    bodies = [a.as_graph() for a in after.graph.node(1).attributes.values()]
    assert sorted(len(b) for b in bodies) == [1, 1]
