"""dedupe-initializers: equal numbers are stored once, where they can be seen."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build, refusal, rewritten

from edgewise.passes.dedupe_initializers import DedupeInitializers, content_key
from edgewise.runtime.evaluate import Array

RULE = DedupeInitializers()
W = np.float32([[1, 2], [3, 4]])


def added(**weights: Array) -> ir.Model:
    """The sum of the input and of all weights."""
    return build(f"g (float[2, 2] x) => (float[2, 2] y) {{ y = Sum(x, {', '.join(weights)}) }}", **weights)


def test_the_first_stays() -> None:
    after, outcome = rewritten(added(a=W, b=W + 1, c=W.copy(), d=W.copy()), RULE)
    assert list(after.graph.initializers) == ["a", "b"]
    assert [v.name for v in after.graph.node(0).inputs if v] == ["x", "a", "b", "a", "a"]
    assert outcome.edits == 2


@pytest.mark.parametrize(
    "other",
    [W + 1, W.reshape(4, 1), W.astype(np.float64), np.where(W == 1, np.nan, W)],
    ids=["content", "shape", "type", "one number"],
)
def test_what_differs(other: Array) -> None:
    first, second = ir.tensor(W), ir.tensor(other)
    assert content_key(first) != content_key(second)


def test_zeros_of_two_signs_differ() -> None:
    assert refusal(added(a=np.float32([[0.0]]), b=np.float32([[-0.0]])), RULE) == ""


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, ml_dtypes.int4, ml_dtypes.float8_e4m3fn, np.bool_])
def test_types_numpy_does_not_know(kind: type) -> None:
    keys = {content_key(ir.tensor(np.array(numbers, kind))) for numbers in ([0, 1], [1, 0], [0, 1])}
    assert len(keys) == 2


def test_texts() -> None:
    keys = {
        content_key(ir.StringTensor(t, shape=ir.Shape((2,))))
        for t in ([b"a", b"b"], [b"a", b"b\0"], [b"a", b"b"])
    }
    assert len(keys) == 2


@pytest.mark.parametrize(
    "text",
    [
        "g (float[2, 2] x, float[2, 2] b) => (float[2, 2] y) { y = Sum(x, a, b) }",
        "g (float[2, 2] x) => (float[2, 2] y, float[2, 2] b) { y = Sum(x, a) }",
    ],
    ids=["an input", "an output"],
)
def test_what_a_caller_can_see(text: str) -> None:
    assert refusal(build(text, a=W, b=W.copy()), RULE) == ""


def branches(then: Mapping[str, Array], other: Mapping[str, Array]) -> ir.Model:
    model = build(
        """g (bool c, float[2, 2] x) => (float[2, 2] y) {
            o = Mul(x, w)
            y = If(c) <then_branch = t () => (float[2, 2] a) { a = Sum(o, p, q) },
                       else_branch = e () => (float[2, 2] b) { b = Sub(o, p) }>
        }""",
        w=W,
        p=W + 5,
        q=W + 6,
        shapes=False,
    )
    for name in ("p", "q"):
        model.graph.initializers.pop(name)
    for branch, weights in (("then_branch", then), ("else_branch", other)):
        body = model.graph.node(1).attributes[branch].as_graph()
        for name, array in weights.items():
            value = ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(ir.DataType.FLOAT),
                const_value=ir.tensor(array),
            )
            body.register_initializer(value)
            for node in body:
                for i, source in enumerate(node.inputs):
                    if source is not None and source.name == name:
                        node.replace_input_with(i, value)
    return model


def test_a_branch_reads_the_weight_around_it() -> None:
    model = branches({"p": W.copy(), "q": W + 6}, {"p": W + 6})
    feed = {"c": np.array(True), "x": W}
    after, outcome = rewritten(model, RULE, feed)
    assert outcome.edits == 1  # q and the other branch's p are equal, but neither can see the other
    then = after.graph.node(1).attributes["then_branch"].as_graph()
    assert list(then.initializers) == ["q"]
