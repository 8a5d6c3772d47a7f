"""convert-floats: 16 bits inside, float32 at the ends, and in the middle where 16 bits do not do."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build, normal, operators, settled

from edgewise.passes.base import Outcome
from edgewise.passes.convert_floats import ConvertFloats
from edgewise.runtime.evaluate import Array, Evaluator, input_specs, seeded_feed

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


def converted(
    model: ir.Model, rule: ConvertFloats | None = None, feed: Mapping[str, Array] | None = None
) -> tuple[ir.Model, Outcome]:
    """The model after the pass: settled, and equal to 11 bits."""
    rule = rule or ConvertFloats()
    after, outcome = settled(model, rule)
    if rule.to == "float16":
        feed = feed or seeded_feed(input_specs(model), size=3)
        expected, actual = Evaluator(model).run(feed), Evaluator(after).run(feed)
        for name, array in expected.items():
            assert array.dtype == actual[name].dtype
            np.testing.assert_allclose(actual[name], array, rtol=0, atol=5e-3 * np.abs(array).max())
    return after, outcome


def kinds(model: ir.Model) -> dict[str, ir.DataType | None]:
    """The type of what each operator writes."""
    return {node.op_type: node.outputs[0].dtype for node in model.graph if node.op_type != "Cast"}


NET = "g (float[1, 3, 8, 8] x) => (float[1, 4, 6, 6] y) { c = Conv(x, w, b) y = Relu(c) }"


def test_net() -> None:
    after, outcome = converted(build(NET, w=normal(4, 3, 3, 3), b=normal(4)))
    assert operators(after) == ["Cast", "Conv", "Relu", "Cast"]
    assert outcome == Outcome(2, {})
    assert {v.dtype for v in after.graph.initializers.values()} == {HALF}


def test_bfloat16_by_schema() -> None:
    after, outcome = converted(
        build(NET, opset=22, w=normal(4, 3, 3, 3), b=normal(4)), ConvertFloats("bfloat16")
    )
    assert outcome.edits == 2
    assert kinds(after) == {"Conv": ir.DataType.BFLOAT16, "Relu": ir.DataType.BFLOAT16}


def test_bfloat16_by_the_kernels_there_are() -> None:
    model = build(NET, w=normal(4, 3, 3, 3), b=normal(4))
    after, outcome = converted(model, ConvertFloats("bfloat16", provider="cpu"))
    assert dict(outcome.refused) == {"Conv has no bfloat16 on cpu": 1, "Relu has no bfloat16 on cpu": 1}
    assert operators(after) == ["Conv", "Relu"]


def test_one_cast_for_all_readers() -> None:
    text = "g (float[4] x) => (float[4] y, float[4] z) { y = Relu(x) z = Tanh(x) }"
    after, _ = converted(build(text))
    assert operators(after) == ["Cast", "Relu", "Cast", "Tanh", "Cast"]


def test_an_output_that_is_read_inside_too() -> None:
    text = "g (float[4] x) => (float[4] h, float[4] y) { h = Relu(x) y = Tanh(h) }"
    after, _ = converted(build(text))
    assert operators(after).count("Cast") == 3


def test_scales_of_a_resize_stay() -> None:
    text = "g (float[1, 2, 4, 4] x) => (float[1, 2, 8, 8] y) { r = Relu(x) y = Resize(r, , s) }"
    after, _ = converted(build(text, s=np.array([1, 1, 2, 2], np.float32)))
    assert kinds(after)["Resize"] == HALF
    assert after.graph.initializers["s"].dtype == FLOAT


def test_a_mask_stays_with_all_that_sees_it() -> None:
    """In float16 -3e38 is -inf, and a row of them has a softmax of NaN."""
    text = """g (float[2, 4] x) => (float[2, 4] y)
        { r = Relu(x) a = Add(r, m) b = Reshape(a, s) p = Softmax(b) y = Tanh(p) }"""
    mask = np.full((2, 4), np.finfo(np.float32).min, np.float32)
    mask[0] = 0
    after, outcome = converted(build(text, m=mask, s=np.array([2, 4])))
    assert dict(outcome.refused) == {"a number may exceed float16": 3}
    assert kinds(after)["Relu"] == HALF
    assert kinds(after)["Add"] == kinds(after)["Softmax"] == FLOAT


def test_an_epsilon_stays_until_it_is_divided_by() -> None:
    text = """g (float[2, 4] x) => (float[2, 4] y)
        { a = Abs(x) v = Add(a, e) r = Sqrt(v) q = Reciprocal(r) y = Mul(x, q) }"""
    x = np.array([[0, 0, 1, 2], [0, 3, 4, 5]], np.float32)
    after, outcome = converted(build(text, e=np.array(1e-12, np.float32)), feed={"x": x})
    assert dict(outcome.refused) == {
        "a constant is too small for float16": 1,
        "a number may be too small for float16": 3,
    }
    assert kinds(after)["Abs"] == HALF


def test_weights_may_hold_tiny_elements() -> None:
    weight = normal(8, 8)
    weight[0, 0] = 1e-9
    text = "g (float[2, 8] x) => (float[2, 8] y) {{ y = {}(x, w) }}"
    assert converted(build(text.format("MatMul"), w=weight))[1].edits == 1
    divided = text.format("Div").replace("[2, 8]", "[8, 8]")
    assert converted(build(divided, w=weight))[1].edits == 0


def test_infinities_are_what_they_are() -> None:
    text = "g (bool[2, 4] c, float[2, 4] x) => (float[2, 4] y) { w = Where(c, x, m) y = Softmax(w) }"
    model = build(text, m=np.array(-np.inf, np.float32))
    assert converted(model)[1] == Outcome(2, {})


def test_observed_values_are_kept() -> None:
    text = "g (float[4] x) => (float[4] y) { r = Relu(x) m = Mul(r, r) y = Sigmoid(m) }"
    after, outcome = converted(build(text), ConvertFloats(keep="m"))
    assert dict(outcome.refused) == {
        "kept: its results exceed the range": 1,
        "a number may exceed float16": 1,
    }
    assert kinds(after) == {"Relu": HALF, "Mul": FLOAT, "Sigmoid": FLOAT}


def test_sums_stay() -> None:
    text = "g (float[4, 8] x) => (float[4, 1] y) { r = Relu(x) y = ReduceSum(r, a) }"
    _, outcome = converted(build(text, a=np.array([1])))
    assert dict(outcome.refused) == {"ReduceSum exceeds 16 bits": 1}


def test_what_only_moves_data_is_no_reason_to_convert() -> None:
    text = "g (float[4, 8] x) => (float[8, 4] y) { y = Transpose(x) }"
    assert converted(build(text))[1] == Outcome()
    text = "g (float[4, 8] x) => (float[8, 4] y) { r = Relu(x) y = Transpose(r) }"
    assert converted(build(text))[1].edits == 2


def test_branches_are_converted_inside() -> None:
    text = """g (bool c, float[2, 4] x) => (float[2, 4] y) { h = Relu(x) i = If(c) <
        then_branch = t () => (float[2, 4] p) { q = MatMul(h, w) p = Tanh(q) },
        else_branch = e () => (float[2, 4] r) { r = Abs(h) } > y = Tanh(i) }"""
    model = build(text, w=normal(4, 4))
    for condition in (True, False):
        after, outcome = converted(model, feed={"c": np.array(condition), "x": normal(2, 4)})
        assert outcome.edits == 5
        assert dict(outcome.refused) == {"If stays in float32": 1}
    assert after.graph.initializers["w.float16"].dtype == HALF


def test_the_body_of_a_loop() -> None:
    text = """g (float[4] x) => (float[4] y) { y = Loop(n, , x) <
        body = b (int64 i, bool c, float[4] s) => (bool d, float[4] t)
        { d = Identity(c) u = Tanh(s) t = Abs(u) } > }"""
    _, outcome = converted(build(text, n=np.array(3)))
    assert outcome.edits == 2


def test_a_quantized_model_is_left_alone() -> None:
    text = (
        "g (float[4] x) => (float[4] y) { q = QuantizeLinear(x, s) d = DequantizeLinear(q, s) y = Relu(d) }"
    )
    _, outcome = converted(build(text, s=np.array(0.1, np.float32)))
    assert outcome == Outcome(0, {"the model is quantized already": 2})


def test_options() -> None:
    with pytest.raises(ValueError, match="one of"):
        ConvertFloats("float8")
