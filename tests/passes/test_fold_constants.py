"""fold-constants: what depends on no input is computed once, as far as the file does not grow by it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import assert_equal, build, constants, operators

from edgewise.passes.base import Outcome
from edgewise.passes.fold_constants import FoldConstants
from edgewise.passes.graph import constant_of
from edgewise.passes.verify import Signature, check
from edgewise.runtime.evaluate import Array, Evaluator, Feed, input_specs, seeded_feed
from edgewise.runtime.session import serialize, weight_bytes

RULE = FoldConstants()
LARGE = "the result is larger than what it is computed from"
W = np.float32([[1, 2, 3], [4, 5, 6]])


def folded(model: ir.Model, rule: FoldConstants = RULE, feed: Feed | None = None) -> tuple[ir.Model, Outcome]:
    """The model after the pass, which is sound, settled and equal, the original being untouched."""
    before, after = serialize(model), model.clone()
    outcome = rule.apply(after)
    assert serialize(model) == before
    check(after, Signature.of(model))
    assert rule.apply(after.clone()).edits == 0
    feed = feed or seeded_feed(input_specs(model), size=3)
    assert_equal(Evaluator(model, optimize=False).run(feed), Evaluator(after, optimize=False).run(feed))
    return after, outcome


def reason(model: ir.Model, rule: FoldConstants = RULE) -> Mapping[str, int]:
    _, outcome = folded(model, rule)
    assert outcome.edits == 0
    return outcome.refused


def test_a_chain_becomes_its_last_value() -> None:
    body = "a = Transpose(w) b = Neg(a) c = Add(b, k) y = MatMul(x, c)"
    model = build(f"g (float[N, 3] x) => (float[N, 2] y) {{ {body} }}", w=W, k=np.float32(1))
    after, outcome = folded(model)
    assert operators(after) == ["MatMul"]
    assert outcome.edits == 1
    assert list(after.graph.initializers) == ["c"]
    np.testing.assert_array_equal(constants(after)["c"], 1 - W.T)


def test_values_with_users_on_the_way() -> None:
    body = "a = Neg(w) b = Exp(a) c = Add(x, a) y = Add(c, b)"
    after, outcome = folded(build(f"g (float[2, 3] x) => (float[2, 3] y) {{ {body} }}", w=W))
    assert operators(after) == ["Add", "Add"]
    assert sorted(after.graph.initializers) == ["a", "b"]
    assert outcome.edits == 2


def test_constants_that_are_nodes() -> None:
    body = "c = Constant<value_floats = [1.0, 2.0]>() n = Neg(c) y = Add(x, n)"
    after, _ = folded(build(f"g (float[2] x) => (float[2] y) {{ {body} }}"))
    assert operators(after) == ["Add"]


def test_some_of_the_outputs() -> None:
    body = "a, b = Split<axis = 0>(w, s) y = Add(x, b)"
    model = build(f"g (float[1, 3] x) => (float[1, 3] y) {{ {body} }}", w=W, s=np.int64([1, 1]))
    after, _ = folded(model)
    assert operators(after) == ["Add"]
    np.testing.assert_array_equal(constants(after)["b"], W[1:])


def test_amounts_computed_from_shapes() -> None:
    """How torch's older exporter writes a Pad: through Shape, ConstantOfShape and a reversed Slice."""
    body = """n = Shape(p) k = Gather(n, zero) m = Sub(eight, k) z = ConstantOfShape<value = int64[1] {0}>(m)
              all = Concat<axis = 0>(p, z)
              pairs = Reshape(all, by2) back = Slice(pairs, last, first, axis, step) turned = Transpose(back)
              amounts = Reshape(turned, flat) y = Pad(x, amounts)"""
    model = build(
        f"g (float[N, 2, 4, 4] x) => (float[] y) {{ {body} }}",
        p=np.int64([0, 1, 2, 3]),
        zero=np.int64([0]),
        eight=np.int64([8]),
        by2=np.int64([-1, 2]),
        last=np.int64([-1]),
        first=np.int64([-(2**63) + 1]),
        axis=np.int64([0]),
        step=np.int64([-1]),
        flat=np.int64([-1]),
    )
    after, _ = folded(model)
    assert operators(after) == ["Pad"]
    np.testing.assert_array_equal(constants(after)["amounts"], [0, 0, 2, 0, 0, 0, 3, 1])


@pytest.mark.parametrize(
    ("move", "weights"),
    [
        ("m = Unsqueeze(a, axes)", {"axes": np.int64([1, 2])}),
        ("m = Reshape(a, axes)", {"axes": np.int64([-1, 1, 1])}),
        ("b = Unsqueeze(a, axes) m = Transpose<perm = [1, 0, 2]>(b)", {"axes": np.int64([0, 2])}),
        ("m = Expand(a, axes)", {"axes": np.int64([2000, 3, 600])}),
    ],
)
def test_a_large_fill_that_is_moved_is_a_fill(move: str, weights: dict[str, np.ndarray]) -> None:
    """Its numbers would take more room than the shape they are made from."""
    body = f"a = ConstantOfShape<value = float[1] {{0.5}}>(s) {move} y = Mul(x, m)"
    model = build(f"g (float[1, 3, 600] x) => (float[A, B, C] y) {{ {body} }}", s=np.int64([600]), **weights)
    after, _ = folded(model)
    assert operators(after) == ["ConstantOfShape", "Mul"]
    fill = after.graph.node(0).outputs[0]
    assert constant_of(fill) is not None
    assert fill.shape == constant_of(fill).shape


def test_a_moved_fill_of_unknown_shape_stays() -> None:
    body = "a = ConstantOfShape<value = float[1] {0.5}>(s) m = Reshape(a, t) y = Add(m, m)"
    model = build(f"g (int64[2] t) => (float[A, B] y) {{ {body} }}", s=np.int64([600]))
    after, _ = folded(model, feed={"t": np.int64([-1, 3])})
    assert operators(after) == ["ConstantOfShape", "Reshape", "Add"]


def test_shapes_that_only_follow_from_folded_ones() -> None:
    """The grid is as large as a dimension says, which says how large the next one is."""
    body = (
        "s = Shape(x) n = Gather(s, i) g = Range(zero, n, one) h = Shape(g) k = Cast<to = 1>(h) y = Add(x, k)"
    )
    weights = {"i": np.int64(1), "zero": np.int64(0), "one": np.int64(1)}
    after, _ = folded(build(f"g (float[N, 3] x) => (float[N, 3] y) {{ {body} }}", **weights))
    assert operators(after) == ["Add"]
    np.testing.assert_array_equal(constants(after)["k"], np.float32([3]))


def test_inside_a_branch() -> None:
    model = build(
        """g (bool c, float[2, 3] x) => (float[2, 3] y) {
            y = If(c) <then_branch = t () => (float[2, 3] a) { n = Neg(w) a = Add(x, n) },
                       else_branch = e () => (float[2, 3] b) { n = Exp(w) b = Add(x, n) }>
        }""",
        w=W,
    )
    after, outcome = folded(model, feed={"c": np.array(False), "x": W})
    assert outcome.edits == 2
    for attr in after.graph.node(0).attributes.values():
        assert [n.op_type for n in attr.as_graph()] == ["Add"]
        assert list(attr.as_graph().initializers) == ["n"]


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("a = Identity(w) y = Add(x, a)", {"w": W}),
        ("a = Cast<to = 1>(w) y = Add(x, a)", {"w": W.astype(np.float16)}),
        ("a = ConstantOfShape(w) y = Add(x, a)", {"w": np.int64([2, 3])}),
        ("a = Expand(w, s) y = Add(x, a)", {"w": W[:1], "s": np.int64([2, 3])}),
    ],
)
def test_small_results_may_be_larger_than_their_source(body: str, weights: Mapping[str, Array]) -> None:
    after, _ = folded(build(f"g (float[2, 3] x) => (float[2, 3] y) {{ {body} }}", **weights))
    assert operators(after) == ["Add"]


def test_what_would_make_the_file_grow() -> None:
    body = "a = Expand(w, s) y = Add(x, a)"
    model = build(f"g (float[20, 20] x) => (float[20, 20] y) {{ {body} }}", w=W[:1, :1], s=np.int64([20, 20]))
    assert reason(model) == {LARGE: 1}
    after, _ = folded(model, FoldConstants(max_growth=1600))
    assert operators(after) == ["Add"]


def test_what_leads_to_a_large_result_is_folded() -> None:
    body = "k = Neg(w) a = Expand(k, s) y = Add(x, a)"
    model = build(f"g (float[20, 20] x) => (float[20, 20] y) {{ {body} }}", w=W[:1, :1], s=np.int64([20, 20]))
    after, outcome = folded(model)
    assert operators(after) == ["Expand", "Add"]
    assert (outcome.edits, dict(outcome.refused)) == (1, {LARGE: 1})


def test_a_large_result_on_the_way_to_a_small_one() -> None:
    body = "a = Expand(w, s) b = ReduceSum<keepdims = 0>(a) y = Add(x, b)"
    model = build(f"g (float[2] x) => (float[2] y) {{ {body} }}", w=W[:1, :1], s=np.int64([20, 20]))
    after, _ = folded(model)
    assert operators(after) == ["Add"]


def test_a_weight_that_is_needed_otherwise() -> None:
    """Its transposed copy would be stored beside it."""
    weight = np.ones((20, 20), np.float32)
    body = "t = Transpose(w) a = MatMul(x, t) y = MatMul(a, w)"
    model = build(f"g (float[N, 20] x) => (float[N, 20] y) {{ {body} }}", w=weight)
    assert reason(model) == {LARGE: 1}


@given(st.lists(st.sampled_from(["Neg", "Transpose", "Exp"]), min_size=1, max_size=4), st.booleans())
@settings(deadline=None, max_examples=10)
def test_the_weights_never_grow_by_more_than_is_allowed(chain: list[str], reused: bool) -> None:
    steps = " ".join(f"a{i + 1} = {op}(a{i})" for i, op in enumerate(chain))
    last = "y = Sum(x, a0, z)" if reused else "y = Add(x, z)"
    text = f"g (float[20, 20] x) => (float[20, 20] y) {{ {steps} z = Abs(a{len(chain)}) {last} }}"
    model = build(text, a0=np.ones((20, 20), np.float32))
    after, _ = folded(model)
    assert weight_bytes(after) <= weight_bytes(model) + RULE.max_growth
    assert len(after.graph) == (len(model.graph) if reused else 1)


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        (
            "a = DequantizeLinear(q, s, z) y = Add(x, a)",
            {"q": np.int8([[1, 2, 3]]), "s": np.float32(1), "z": np.int8(0)},
        ),
        (
            "q = QuantizeLinear(w, s, z) a = DequantizeLinear(q, s, z) y = Add(x, a)",
            {"w": W, "s": np.float32(1), "z": np.int8(0)},
        ),
    ],
)
def test_quantized_weights_stay_quantized(body: str, weights: Mapping[str, Array]) -> None:
    assert reason(build(f"g (float[2, 3] x) => (float[2, 3] y) {{ {body} }}", **weights)) == {}


@pytest.mark.parametrize(
    "node",
    [
        "RandomNormal<shape = [2, 3]>()",
        "RandomNormalLike(w)",
        "RandomUniformLike<seed = 1.0>(w)",
        "Dropout(w, r, t)",
    ],
)
def test_chance_is_not_folded(node: str) -> None:
    weights = {"w": W, "r": np.float32(0.5), "t": np.array(True)}
    used = {name: a for name, a in weights.items() if name in node.split("(")[1]}
    model = build(f"g (float[2, 3] x) => (float[2, 3] y) {{ a = {node} y = Add(x, a) }}", **used)
    assert RULE.apply(model).edits == 0
    assert len(model.graph) == 2


def test_an_overridable_weight_is_no_constant() -> None:
    model = build("g (float[2, 3] x, float[2, 3] w) => (float[2, 3] y) { a = Neg(w) y = Add(x, a) }", w=W)
    assert reason(model) == {}


def test_a_graph_output() -> None:
    model = build("g (float[2, 3] x) => (float[2, 3] y, float[2, 3] a) { a = Neg(w) y = Add(x, a) }", w=W)
    assert reason(model) == {"the constant result is a graph output": 1}


def test_a_type_that_does_not_come_back_as_an_array() -> None:
    body = "a = Cast<to = 16>(w) b = Cast<to = 1>(a) y = Add(x, b)"
    model = build(f"g (float[2, 3] x) => (float[2, 3] y) {{ {body} }}", w=W)
    assert reason(model) == {"the result is of a type that onnxruntime does not hand out": 1}


def test_another_domain() -> None:
    model = build("g (float[2, 3] x) => (float[2, 3] y) { a = Neg(w) y = Add(x, a) }", w=W)
    model.graph.node(0).domain = "custom"
    assert RULE.apply(model) == Outcome()


def test_one_that_cannot_be_computed_does_not_stop_the_others() -> None:
    """An integer division by zero, in a branch that is never taken."""
    model = build(
        """g (bool c, int64[2] x) => (int64[2] y) {
            n = Neg(one)
            y = If(c) <then_branch = t () => (int64[2] a) { d = Div(one, zero) f = Neg(d) a = Add(x, f) },
                       else_branch = e () => (int64[2] b) { b = Add(x, n) }>
        }""",
        one=np.int64([1, 1]),
        zero=np.int64([0, 1]),
    )
    after = model.clone()
    outcome = RULE.apply(after)
    assert outcome.edits == 1
    assert outcome.refused == {"onnxruntime cannot compute Div ahead": 1}
    assert list(after.graph.initializers) == ["one", "zero", "n"]
    check(after, Signature.of(model))


def test_a_size_nobody_knows() -> None:
    """A range of a length that only its run tells is left to that run."""
    body = """i = NonZero(w) k = ReduceSum<keepdims = 0>(i) r = Range(zero, k, one) c = Cast<to = 1>(r)
              y = Add(x, c)"""
    weights = {"w": np.float32([0, 1, 0, 1]), "zero": np.int64(0), "one": np.int64(1)}
    model = build(f"g (float[1] x) => (float[] y) {{ {body} }}", **weights)
    after, _ = folded(model)
    assert operators(after) == ["Add"]  # first the bounds are computed, then their range


def test_real_padding(corpus: Path) -> None:
    """A network whose shortcuts pad by amounts computed from shapes."""
    model = ir.load(corpus / "models" / "cifar_resnet20.onnx")
    after, _ = folded(model)
    pads = [n for n in after.graph if n.op_type == "Pad"]
    assert len(pads) == 2
    assert [constant_of(n.inputs[1]) is not None for n in pads] == [True, True]
    kinds = set(operators(after)) - {"Constant"}
    assert kinds == {"Conv", "BatchNormalization", "Relu", "Add", "Slice", "Pad", "ReduceMean", "Gemm"}
