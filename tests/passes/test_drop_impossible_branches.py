"""drop-impossible-branches: an If keeps the one branch with which what is behind it can run."""

from __future__ import annotations

import numpy as np
import pytest
from rewrites import build, operators, rewritten

from edgewise.passes.drop_impossible_branches import DropImpossibleBranches
from edgewise.passes.graph import Array, constant_of

RULE = DropImpossibleBranches()


def weights() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shapes = {"w": (1, 12, 4), "r": (1, 12, 3), "k": (2, 4, 1)}
    drawn = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {**drawn, "last": np.array([-1]), "first": np.array([0]), "one": np.array([1])}


def squeezed(tail: str, output: str = "float[] y") -> str:
    """What torch's `squeeze(-1)` becomes where the last dimension is free."""
    return (
        f"agraph (float[5, 4, N] x) => ({output}) {{"
        "s = Shape(x) d = Gather(s, last) c = Equal(d, one)"
        "m = If(c) <then_branch = t () => (float[5, 4] a) { a = Squeeze(x, last) },"
        "           else_branch = e () => (float[5, 4, N] b) { b = Identity(x) }>"
        f"{tail} }}"
    )


@pytest.mark.parametrize(
    ("tail", "size"),
    [
        ("u = Unsqueeze(m, first) y = LSTM<hidden_size = 3>(u, w, r)", 1),
        ("y = Conv(m, k)", 3),
        (
            "p = Shape(m) z = Size(p) f = Equal(z, last) q = Not(f)"
            "v = If(q) <then_branch = t2 () => (float[] a2) { a2 = Unsqueeze(m, first) },"
            "           else_branch = e2 () => (float[] b2) { b2 = Identity(m) }>"
            "y = LSTM<hidden_size = 3>(v, w, r)",
            1,
        ),
    ],
)
def test_the_other_branch_is_chosen(tail: str, size: int) -> None:
    feed = {"x": np.random.default_rng(1).standard_normal((5, 4, size)).astype(np.float32)}
    output = "float[5, 2, M] y" if "Conv" in tail else "float[] y"
    model, outcome = rewritten(build(squeezed(tail, output), **weights()), RULE, feed)
    assert outcome.edits == 1
    assert "If" not in operators(model)
    assert ("Squeeze" in operators(model)) == (size == 1)


@pytest.mark.parametrize("tail", ["y = Exp(m)", "y = Conv(x, k) z = Exp(m)"])
def test_both_stay_where_nothing_tells(tail: str) -> None:
    model = build(squeezed(tail), **weights())
    outcome = RULE.apply(model)
    assert outcome.edits == 0
    assert dict(outcome.refused) == {"nothing tells which branches are possible": 1}
    (node,) = (n for n in model.graph if n.op_type == "If")
    assert constant_of(node.inputs[0]) is None


def test_branches_of_one_rank_are_no_question() -> None:
    text = squeezed("y = Exp(m)").replace("a = Squeeze(x, last)", "a = Exp(x)")
    assert RULE.apply(build(text.replace("float[5, 4] a", "float[5, 4, N] a"), **weights())).refused == {}
