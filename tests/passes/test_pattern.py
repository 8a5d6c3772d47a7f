"""Patterns: what matches, in which order of inputs, and what a match says of its surroundings."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build

from edgewise.passes.base import Refused
from edgewise.passes.pattern import (
    Constant,
    Number,
    Var,
    check_operator,
    either,
    is_rounded,
    number_of,
    op,
)

X = Var("x")


def result(body: str, declared: str = "float[N, 4] x, float[N, 4] z", **weights: object) -> ir.Value:
    """The value called y."""
    arrays = {name: np.asarray(a, np.float32) for name, a in weights.items()}
    model = build(f"g ({declared}) => (float[] y) {{ {body} }}", **arrays)
    return next(v for node in model.graph for v in node.outputs if v.name == "y")


@pytest.mark.parametrize("product", ["Mul(x, s)", "Mul(s, x)"])
def test_commutative_inputs_match_in_any_order(product: str) -> None:
    match = op("Mul", X, op("Sigmoid", X, name="gate")).match(result(f"s = Sigmoid(x) y = {product}"))
    assert match is not None
    assert match["x"].name == "x"
    assert match.node("gate").op_type == "Sigmoid"
    assert [node.op_type for node in match.nodes] == ["Mul", "Sigmoid"]


def test_other_inputs_match_in_their_order() -> None:
    pattern = op("Sub", X, op("Exp", X))
    assert pattern.match(result("e = Exp(x) y = Sub(x, e)")) is not None
    assert pattern.match(result("e = Exp(x) y = Sub(e, x)")) is None


def test_a_name_stands_for_one_value() -> None:
    value = result("s = Sigmoid(z) y = Mul(x, s)")
    assert op("Mul", X, op("Sigmoid", X)).match(value) is None
    assert op("Mul", Var(), op("Sigmoid", Var())).match(value) is not None


def test_looks_for_another_way_where_the_first_leads_nowhere() -> None:
    """The first input fits the first half of the pattern, but only the second fits with the rest."""
    value = result("a = Exp(x) b = Exp(z) s = Add(a, b) y = Mul(s, x)")
    match = op("Mul", op("Add", op("Exp", X), op("Exp", Var("z"))), Var("z")).match(value)
    assert match is not None
    assert (match["x"].name, match["z"].name) == ("z", "x")


def test_alternatives_and_types() -> None:
    pattern = either(op("Exp|Log", X), op("Div", Number(1.0), X))
    assert pattern.match(result("y = Log(x)")) is not None
    assert pattern.match(result("y = Div(one, x)", one=1.0)) is not None
    assert pattern.match(result("y = Div(two, x)", two=2.0)) is None
    assert pattern.match(result("y = Abs(x)")) is None


def test_constants() -> None:
    value = result("y = Mul(x, k)", k=[1.0, 2.0, 3.0, 4.0])
    match = op("Mul", X, Constant("k")).match(value)
    assert match is not None
    assert "k" in match
    assert "other" not in match
    assert op("Mul", X, Number()).match(value) is None
    assert op("Exp", Constant()).match(result("y = Exp(x)")) is None


def test_number_of_inputs() -> None:
    value = result("y = Max(x, z, k)", k=1.0)
    assert op("Max", X, Var()).match(value) is None
    assert op("Max", Var(), Var(), Var()).match(value) is not None
    assert op("Clip", X, more=True).match(result("y = Clip(x, k)", k=1.0)) is not None
    assert op("Clip", X, Var(), Var()).match(result("y = Clip(x, , k)", k=1.0)) is None


def test_rank_of_numbers() -> None:
    match = op("Mul", X, Number(2.0)).match(result("y = Mul(x, k)", k=[[[2.0]]]))
    assert match is not None
    match.check_rank(3)
    for rank in (2, None):
        with pytest.raises(Refused, match="may change the rank"):
            match.check_rank(rank)


@pytest.mark.parametrize(("body", "private"), [("w = Exp(x)", True), ("w = Exp(s)", False)])
def test_private(body: str, private: bool) -> None:
    match = op("Mul", X, op("Sigmoid", X)).match(result(f"s = Sigmoid(x) y = Mul(x, s) {body}"))
    assert match is not None
    if private:
        match.check_private()
    else:
        with pytest.raises(Refused, match="another user"):
            match.check_private()


def test_nodes_of_an_outer_graph_are_no_part_of_a_match() -> None:
    body = (
        "s = Sigmoid(x) y = If (f) <then_branch = t () => (float[N, 4] o) { o = Mul(x, s) },"
        "else_branch = e () => (float[N, 4] q) { q = Neg(x) }>"
    )
    node = result(body, "float[N, 4] x, bool f").producer()
    assert node is not None
    inner = node.attributes["then_branch"].as_graph().outputs[0]
    assert op("Mul", X, op("Sigmoid", X)).match(inner) is None
    assert op("Mul", X, Var()).match(inner) is not None


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("exact", [math.sqrt(0.5), 1 / 6, 0.044715, -1e-3, 0.0, 3.0])
def test_what_a_type_holds_of_a_number_stands_for_it(dtype: type, exact: float) -> None:
    stored = np.asarray(exact, dtype)
    assert is_rounded(stored, exact)
    if exact:
        assert not is_rounded(
            np.asarray(stored * np.asarray(1 + 16 * ml_dtypes.finfo(dtype).eps, dtype)), exact
        )


def test_a_number_of_few_digits_stands_for_itself() -> None:
    assert not is_rounded(np.asarray(0.7071, np.float32), math.sqrt(0.5))
    assert is_rounded(np.asarray(0.7071, np.float16), math.sqrt(0.5))
    assert is_rounded(np.asarray(2, np.int64), 2.0)
    assert not is_rounded(np.asarray(2, np.int64), 2.5)


def test_number_of() -> None:
    node = result("y = Mul(x, k)", k=[[0.5]]).producer()
    assert node is not None
    assert number_of(node.inputs[1]) == 0.5
    assert number_of(node.inputs[0]) is None
    assert number_of(None) is None


def test_check_operator() -> None:
    def data(kind: ir.DataType | None) -> ir.Value:
        return ir.Value(name="v", type=None if kind is None else ir.TensorType(kind))

    check_operator("Gelu", 20, data(ir.DataType.FLOAT))
    refused = [
        ("Gelu", 19, ir.DataType.FLOAT, "has no Gelu"),
        ("Gelu", 20, None, "not known"),
        ("Gelu", 20, ir.DataType.DOUBLE, "double precision"),
        ("HardSwish", 14, ir.DataType.BFLOAT16, "not defined for this type"),
        ("Softplus", 20, ir.DataType.INT32, "not defined for this type"),
    ]
    for op_type, version, kind, reason in refused:
        with pytest.raises(Refused, match=reason):
            check_operator(op_type, version, data(kind))
