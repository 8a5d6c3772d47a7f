"""eliminate-common-subexpressions: computed once what is the same, and only what is."""

from __future__ import annotations

import numpy as np
import pytest
from rewrites import build, operators, refusal, rewritten

from edgewise.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from edgewise.passes.purity import is_pure

RULE = EliminateCommonSubexpressions()
SHARED = "the repeated result is a graph output that cannot be shared"


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("a = Neg(x) b = Neg(x) y = Mul(a, b)", ["Neg", "Mul"]),
        ("a = Neg(x) b = Abs(a) c = Neg(x) d = Abs(c) y = Mul(b, d)", ["Neg", "Abs", "Mul"]),
        ("a = Elu<alpha = 0.5>(x) b = Elu<alpha = 0.5>(x) y = Mul(a, b)", ["Elu", "Mul"]),
        ("a = Neg(x) y = Neg(x)", ["Neg"]),
        ("a = Clip(x, , h) b = Clip(x, , h) y = Mul(a, b)", ["Clip", "Mul"]),
        ("a = Dropout(x) b = Dropout(x) y = Mul(a, b)", ["Dropout", "Mul"]),
        (
            "s = Shape(x) a = ConstantOfShape<value = float[1] {2}>(s) "
            "b = ConstantOfShape<value = float[1] {2}>(s) c = Sub(a, x) d = Mul(b, x) y = Mul(c, d)",
            ["Shape", "ConstantOfShape", "Sub", "Mul", "Mul"],
        ),
    ],
)
def test_merged(body: str, left: list[str]) -> None:
    weights = {"h": np.float32(0.5)} if "h)" in body else {}
    after, _ = rewritten(build(f"g (float[2, 3] x) => (float[] y) {{ {body} }}", **weights), RULE)
    assert operators(after) == left


@pytest.mark.parametrize(
    "body",
    [
        "a = Neg(x) b = Abs(x) y = Mul(a, b)",
        "a = Elu<alpha = 0.5>(x) b = Elu<alpha = 0.25>(x) y = Mul(a, b)",
        "a = Elu(x) b = Elu<alpha = 0.5>(x) y = Mul(a, b)",
        "a = Sub(x, h) b = Sub(h, x) y = Mul(a, b)",
        "a = Clip(x, h) b = Clip(x, , h) y = Mul(a, b)",
    ],
)
def test_not_the_same(body: str) -> None:
    weights = {"h": np.float32(0.5)} if "h" in body.replace("alpha", "") else {}
    assert refusal(build(f"g (float[2, 3] x) => (float[] y) {{ {body} }}", **weights), RULE) == ""


@pytest.mark.parametrize(
    "node",
    [
        "RandomNormalLike(x)",
        "RandomUniformLike<seed = 1.0>(x)",
        "Bernoulli(x)",
        "Dropout(x, r, t)",
    ],
)
def test_chance(node: str) -> None:
    weights = {"r": np.float32(0.5), "t": np.array(True)} if "r, t" in node else {}
    model = build(f"g (float[2, 3] x) => (float[] y) {{ a = {node} b = {node} y = Sub(a, b) }}", **weights)
    assert not is_pure(model.graph.node(0))
    assert refusal(model, RULE) == ""


def test_equal_small_constants() -> None:
    body = "a = Reshape(x, s) b = Reshape(x, t) c = Neg(a) y = Mul(c, b)"
    shape = np.int64([3, 2])
    model = build(f"g (float[2, 3] x) => (float[] y) {{ {body} }}", s=shape, t=shape)
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Reshape", "Neg", "Mul"]
    assert list(after.graph.initializers) == ["s"]


def test_a_constant_that_may_be_overridden() -> None:
    body = "a = Reshape(x, s) b = Reshape(x, t) c = Neg(a) y = Mul(c, b)"
    shape = np.int64([3, 2])
    model = build(f"g (float[2, 3] x, int64[2] t) => (float[A, B] y) {{ {body} }}", s=shape, t=shape)
    assert refusal(model, RULE) == ""


def test_a_domain_of_which_nothing_is_known() -> None:
    model = build("g (float[2] x) => (float[2] y) { a = Neg(x) b = Neg(x) y = Mul(a, b) }")
    for node in list(model.graph)[:2]:
        node.domain = "custom"
    assert RULE.apply(model).edits == 0


def test_quantized_edges_keep_their_pairs() -> None:
    body = """a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z) c = DequantizeLinear(a, s, z)
              y = Mul(b, c)"""
    model = build(f"g (float[2, 3] x) => (float[] y) {{ {body} }}", s=np.float32(0.1), z=np.uint8(128))
    assert refusal(model, RULE) == ""


def test_two_outputs_keep_their_names() -> None:
    model = build("g (float[2] x) => (float[2] y, float[2] z) { y = Neg(x) z = Neg(x) }")
    assert refusal(model, RULE) == SHARED


def test_an_output_takes_over_the_name() -> None:
    model = build("g (float[2] x) => (float[2] y, float[2] z) { a = Neg(x) z = Abs(a) y = Neg(x) }")
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Neg", "Abs"]


def test_all_results_of_a_node_or_none() -> None:
    """One output could be shared, the other cannot: the node stays whole."""
    body = "a, y = Split<axis = 0>(x, s) b, z = Split<axis = 0>(x, s) c = Sub(a, b)"
    model = build(f"g (float[4] x) => (float[2] y, float[2] z, float[2] c) {{ {body} }}", s=np.int64([2, 2]))
    assert refusal(model, RULE) == SHARED


def test_left_out_results_count() -> None:
    """The first computes only the last state, the second the whole sequence as well."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((1, 2, 3)), "r": rng.standard_normal((1, 2, 2))}
    body = "a, b = RNN<hidden_size = 2>(x, w, r) c, d = RNN<hidden_size = 2>(x, w, r) y = Mul(c, b)"
    model = build(
        f"g (float[4, 2, 3] x) => (float[] y) {{ {body} }}",
        **{name: array.astype(np.float32) for name, array in weights.items()},
    )
    first = model.graph.node(0).outputs[0]
    first.name, first.type, first.shape = "", None, None
    assert refusal(model, RULE) == ""


def test_a_branch_reads_what_is_computed_before_it() -> None:
    model = build(
        """g (bool c, float[2] x) => (float[2] y) {
            o = Neg(x)
            i = If(c) <then_branch = t () => (float[2] a) { p = Neg(x) a = Abs(p) },
                       else_branch = e () => (float[2] b) { b = Neg(x) }>
            y = Mul(i, o)
        }"""
    )
    after, outcome = rewritten(model, RULE)
    assert outcome.edits == 1
    assert outcome.refused == {SHARED: 1}  # the result of the other branch is its output
    then = after.graph.node(1).attributes["then_branch"].as_graph()
    assert [n.op_type for n in then] == ["Abs"]


def test_branches_do_not_see_each_other() -> None:
    model = build(
        """g (bool c, float[2] x) => (float[2] y) {
            i = If(c) <then_branch = t () => (float[2] a) { p = Neg(x) a = Abs(p) },
                       else_branch = e () => (float[2] b) { q = Neg(x) b = Exp(q) }>
            o = Neg(x)
            y = Mul(i, o)
        }"""
    )
    assert refusal(model, RULE) == ""


def test_what_has_a_body_is_left_alone() -> None:
    branches = """then_branch = t () => (float[2] p) { p = Neg(x) },
                  else_branch = e () => (float[2] q) { q = Abs(x) }"""
    body = f"a = If(c) <{branches}> b = If(c) <{branches}> y = Mul(a, b)"
    model = build(f"g (bool c, float[2] x) => (float[2] y) {{ {body} }}")
    assert not is_pure(model.graph.node(0))
    assert refusal(model, RULE) == ""
