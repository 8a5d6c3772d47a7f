"""Reshapes on either side of a Transpose that merge and split the same axes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import Array, build, constants, operators, refusal, rewritten

from edgewise.passes.merge_reshapes import MergeReshapes
from edgewise.passes.split_before_transpose import SplitBeforeTranspose

PASS = SplitBeforeTranspose()


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def net(given: str, merge: Array, perm: list[int], split: Array) -> ir.Model:
    body = f"m = Reshape(x, a) t = Transpose<perm = {perm}>(m) s = Reshape(t, b) y = Relu(s)"
    return build(f"g ({given} x) => (float[] y) {{ {body} }}", a=merge, b=split)


@pytest.mark.parametrize("batch", ["N", "2"])
def test_keys_of_an_attention(batch: str) -> None:
    """Samples and heads were one axis for as long as the last two were swapped."""
    model = net(f"float[{batch}, 4, 5, 6]", ints(-1, 5, 6), [0, 2, 1], ints(-1, 4, 6, 5))
    after, _ = rewritten(model, PASS)
    MergeReshapes().apply(after)
    assert operators(after) == ["Reshape", "Transpose", "Relu"]
    (shape,) = [a for a in constants(after).values() if a.size == 4]
    assert shape.tolist() == [-1 if batch == "N" else 2, 4, 5, 6]
    assert after.graph.node(1).attributes["perm"].value == (0, 1, 3, 2)


def test_heads_of_a_packed_projection() -> None:
    """Tokens first: samples and heads are merged while tokens move behind them."""
    model = net("float[5, N, 24]", ints(5, -1, 6), [1, 0, 2], ints(-1, 4, 5, 6))
    after, _ = rewritten(model, PASS)
    MergeReshapes().apply(after)
    assert operators(after) == ["Reshape", "Transpose", "Relu"]
    (shape,) = [a for a in constants(after).values() if a.size == 4]
    assert shape.tolist() == [5, -1, 4, 6]


def test_a_reshape_that_does_not_split_stays() -> None:
    """Nothing is known of rows that are merged in another order."""
    model = net("float[2, 3, 4]", ints(6, 4), [1, 0], ints(2, 12))
    assert refusal(model, PASS) == "the Reshape merges axes"


def test_what_is_not_known_is_copied_where_it_stays() -> None:
    """Queries of as many tokens and samples as there are: tokens come first on both sides."""
    body = "m = Reshape(x, a) t = Transpose<perm = [1, 0, 2]>(m) s = Reshape(t, b) y = Relu(s)"
    model = build(f"g (float[T, N, 24] x, int64[4] b) => (float[] y) {{ {body} }}", a=ints(0, -1, 6))
    model.graph.node(2).outputs[0].shape = ir.Shape(["N", 4, "T", 6])
    after, _ = rewritten(model, PASS, {"x": np.ones((5, 3, 24), np.float32), "b": ints(3, 4, 5, 6)})
    MergeReshapes().apply(after)
    assert operators(after) == ["Reshape", "Transpose", "Relu"]
    assert constants(after).popitem()[1].tolist() == [0, -1, 4, 6]


def test_two_free_sizes_stay() -> None:
    body = "m = Reshape(x, a) t = Transpose<perm = [1, 0, 2]>(m) s = Reshape(t, b) y = Relu(s)"
    model = build(f"g (float[N, A, B, 6] x, int64[4] b) => (float[] y) {{ {body} }}", a=ints(0, -1, 6))
    model.graph.node(2).outputs[0].shape = ir.Shape(["A", "B", "N", 6])
    assert refusal(model, PASS) == "the Reshape makes two dimensions that are not known"


def test_other_users() -> None:
    model = build(
        """g (float[2, 4, 5, 6] x) => (float[] y, float[] z) {
            m = Reshape(x, a) t = Transpose<perm = [0, 2, 1]>(m) s = Reshape(t, b) y = Relu(s) z = Neg(t)
        }""",
        a=ints(-1, 5, 6),
        b=ints(-1, 4, 6, 5),
    )
    assert refusal(model, PASS) == "a value between the two Reshapes has another user"


@pytest.mark.parametrize(
    "middle", ["t = Transpose(x)", "m = Relu(x) t = Transpose(m)", "m = Reshape(x, a) t = Relu(m)"]
)
def test_must_not_fire(middle: str) -> None:
    text = f"g (float[2, 12] x) => (float[] y) {{ {middle} s = Reshape(t, b) y = Relu(s) }}"
    held = {"a": ints(12, 2)} if "(x, a)" in middle else {}
    _, outcome = rewritten(build(text, b=ints(12, 2, 1), **held), PASS)
    assert outcome.edits == 0
