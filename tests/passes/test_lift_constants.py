"""lift-constants: every way to write a Constant gives the initializer it stands for."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from rewrites import build, constants, operators, refusal, rewritten

from edgewise.passes.lift_constants import LiftConstants
from edgewise.runtime.evaluate import Array

RULE = LiftConstants()


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("value = float[2] {1.5, 2.5}", np.float32([1.5, 2.5])),
        ("value = double {1.5}", np.float64(1.5)),
        ("value = int8[2] {-1, 2}", np.int8([-1, 2])),
        ("value_float = 1.5", np.float32(1.5)),
        ("value_floats = [1.5, 2.5]", np.float32([1.5, 2.5])),
        ("value_int = 7", np.int64(7)),
        ("value_ints = [7, 8]", np.int64([7, 8])),
    ],
)
def test_numbers(attribute: str, expected: Array) -> None:
    model = build(
        f"g (float[2] x) => (float[2] y) {{ c = Constant<{attribute}>() f = Cast<to = 1>(c) y = Add(x, f) }}"
    )
    after, outcome = rewritten(model, RULE)
    assert outcome.edits == 1
    assert operators(after) == ["Cast", "Add"]
    np.testing.assert_array_equal(constants(after)["c"], expected, strict=True)
    value = after.graph.initializers["c"]
    assert value.shape == ir.Shape(expected.shape)
    assert value.dtype == ir.DataType.from_numpy(expected.dtype)


@pytest.mark.parametrize(
    ("attribute", "texts", "shape"),
    [('value_string = "a"', [b"a"], ()), ('value_strings = ["a", "bc"]', [b"a", b"bc"], (2,))],
)
def test_texts(attribute: str, texts: list[bytes], shape: tuple[int, ...]) -> None:
    model = build(f"g (string[2] x) => (bool[2] y) {{ c = Constant<{attribute}>() y = Equal(x, c) }}", 19)
    assert RULE.apply(model).edits == 1
    (value,) = model.graph.initializers.values()
    assert isinstance(value.const_value, ir.StringTensor)
    assert list(value.const_value.string_data()) == texts
    assert value.const_value.shape == ir.Shape(shape)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_inside_a_branch() -> None:
    model = build(
        """g (bool c, float[2] x) => (float[2] y) {
            y = If(c) <then_branch = t () => (float[2] a) { k = Constant<value_float = 2.0>() a = Mul(x, k) },
                       else_branch = e () => (float[2] b) { b = Neg(x) }>
        }"""
    )
    after, outcome = rewritten(model, RULE)
    assert outcome.edits == 1
    then = after.graph.node(0).attributes["then_branch"].as_graph()
    assert list(then.initializers) == ["k"]
    assert not after.graph.initializers


def test_a_graph_output_stays() -> None:
    model = build(
        "g (float[2] x) => (float[2] y, float c) { c = Constant<value_float = 2.0>() y = Mul(x, c) }"
    )
    assert refusal(model, RULE) == "the constant is a graph output"


def test_a_sparse_constant_stays() -> None:
    model = build(
        "g (float[2] x) => (float[2] y) { c = Constant<value_float = 2.0>() y = Mul(x, c) }", shapes=False
    )
    node = model.graph.node(0)
    node.attributes.clear()
    values = onnx.helper.make_tensor("v", onnx.TensorProto.FLOAT, [1], [2.0])
    indices = onnx.helper.make_tensor("i", onnx.TensorProto.INT64, [1], [0])
    sparse = onnx.helper.make_sparse_tensor(values, indices, [2])
    node.attributes.add(ir.Attr("sparse_value", ir.AttributeType.SPARSE_TENSOR, sparse))
    assert RULE.apply(model).refused == {"the constant is sparse": 1}


def test_a_file_whose_weights_must_be_inputs_is_left_alone() -> None:
    model = build("g (float[2] x) => (float[2] y) { c = Constant<value_float = 2.0>() y = Mul(x, c) }", 8)
    model.ir_version = 3
    outcome = RULE.apply(model)
    assert outcome.edits == 0
    assert list(outcome.refused) == ["IR version 3 wants every initializer to be an input"]


def test_a_clone_keeps_the_names_of_its_tensors() -> None:
    """Saving an initializer writes into its tensor: that of the clone must be another one."""
    model = build(
        "g (float[2] x) => (float[2] y) { c = Constant<value = float[2] k {1, 2}>() y = Mul(x, c) }"
    )
    after = model.clone()
    RULE.apply(after)
    ir.to_proto(after)
    assert model.graph.node(0).attributes["value"].as_tensor().name == "k"
