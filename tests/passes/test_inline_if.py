"""inline-if: the branch that is always taken takes the place of the If."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build, operators, refusal, rewritten

from edgewise.passes.inline_if import InlineIf

RULE = InlineIf()
TRUE, FALSE = np.array(True), np.array(False)


def chosen(then: str, other: str, rest: str = "y = Neg(i)", head: str = "o = Abs(x)") -> str:
    branches = (
        f"then_branch = t () => (float[2] a) {{ {then} }}, else_branch = e () => (float[2] b) {{ {other} }}"
    )
    return f"g (float[2] x) => (float[2] y) {{ {head} i = If(c) <{branches}> {rest} }}"


@pytest.mark.parametrize(
    ("condition", "taken"), [(TRUE, ["Exp", "Sqrt"]), (FALSE, ["Sin"]), (np.array([True]), ["Exp", "Sqrt"])]
)
def test_the_branch_that_is_taken(condition: np.ndarray, taken: list[str]) -> None:
    model = build(chosen("k = Exp(o) a = Sqrt(k)", "b = Sin(o)"), c=condition)
    after, outcome = rewritten(model, RULE)
    assert operators(after) == ["Abs", *taken, "Neg"]
    assert outcome.edits == 1
    assert not after.graph.initializers


def test_a_result_that_is_an_output_takes_over_the_name() -> None:
    text = """g (float[2] x) => (float[2] y) {
        y = If(c) <then_branch = t () => (float[2] a) { a = Exp(x) },
                   else_branch = e () => (float[2] b) { b = Sin(x) }>
    }"""
    after, _ = rewritten(build(text, c=TRUE), RULE)
    assert operators(after) == ["Exp"]


def test_what_only_the_other_branch_read_is_free() -> None:
    model = build(chosen("a = Exp(x)", "b = Sin(o)"), c=TRUE)
    after, _ = rewritten(model, RULE)
    assert not after.graph.node(0).outputs[0].uses()


def test_weights_of_the_branch_come_along() -> None:
    model = build(chosen("a = Mul(o, w)", "b = Sin(o)"), c=TRUE, w=np.float32([2, 3]))
    weight = model.graph.initializers.pop("w")
    body = model.graph.node(1).attributes["then_branch"].as_graph()
    body.register_initializer(weight)
    after, _ = rewritten(model, RULE)
    assert list(after.graph.initializers) == ["w"]


def test_nested() -> None:
    inner = """a = If(d) <then_branch = p () => (float[2] q) { q = Exp(o) },
                          else_branch = r () => (float[2] s) { s = Sin(o) }>"""
    model = build(chosen(inner, "b = Cos(o)"), c=TRUE, d=FALSE)
    after, outcome = rewritten(model, RULE)
    assert operators(after) == ["Abs", "Sin", "Neg"]
    assert outcome.edits == 2


def test_names_that_another_body_uses_too() -> None:
    """Bodies side by side may use the same names; a body and the graph around it had better not."""
    text = """g (float[2] x, bool u) => (float[2] y) {
        i = If(c) <then_branch = t () => (float[2] a) { k = Exp(x) a = Sqrt(k) },
                   else_branch = e () => (float[2] b) { b = Sin(x) }>
        j = If(u) <then_branch = p () => (float[2] q) { k = Cos(x) q = Neg(k) },
                   else_branch = r () => (float[2] s) { s = Sin(x) }>
        y = Add(i, j)
    }"""
    model = build(text, c=TRUE)
    after, _ = rewritten(model, RULE, {"x": np.float32([1, 2]), "u": TRUE})
    assert operators(after) == ["Exp", "Sqrt", "If", "Add"]
    assert after.graph.node(0).outputs[0].name == "k_1"


def test_several_results() -> None:
    text = """g (float[2] x) => (float[2] y, float[2] z) {
        i, z = If(c) <then_branch = t () => (float[2] a, float[2] b) { a = Exp(x) b = Neg(a) },
                      else_branch = e () => (float[2] k, float[2] l) { k = Sin(x) l = Cos(x) }>
        y = Neg(i)
    }"""
    after, _ = rewritten(build(text, c=TRUE), RULE)
    assert operators(after) == ["Exp", "Neg", "Neg"]


def test_a_condition_that_is_not_constant() -> None:
    text = chosen("a = Exp(o)", "b = Sin(o)").replace("float[2] x)", "float[2] x, bool c)", 1)
    assert refusal(build(text), RULE) == ""


def test_a_branch_that_hands_on_a_value_from_outside() -> None:
    model = build(chosen("a = Identity(o)", "b = Sin(o)"), c=TRUE)
    node = model.graph.node(1)
    body, outer = node.attributes["then_branch"].as_graph(), model.graph.node(0).outputs[0]
    weight = ir.val("k", ir.DataType.FLOAT, [2], const_value=ir.tensor(np.float32([1, 2])))
    body.register_initializer(weight)
    body.outputs[0] = weight
    node.outputs[0].replace_all_uses_with(outer)
    model.graph.outputs[0] = node.outputs[0]
    outcome = RULE.apply(model)
    assert outcome.refused == {"the branch gives a value that no node of it computes": 1}


def test_a_branch_that_gives_one_value_twice() -> None:
    text = """g (float[2] x) => (float[2] y, float[2] z) {
        y, z = If(c) <then_branch = t () => (float[2] a, float[2] b) { a = Exp(x) b = Neg(a) },
                      else_branch = e () => (float[2] k, float[2] l) { k = Sin(x) l = Cos(x) }>
    }"""
    model = build(text, c=TRUE)
    body = model.graph.node(0).attributes["then_branch"].as_graph()
    body.outputs[1] = body.outputs[0]
    assert RULE.apply(model).refused == {"the branch gives one value twice": 1}
