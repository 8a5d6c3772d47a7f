"""Polynomials of values: the same for every order and grouping, and exact about their numbers."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import build

from edgewise.passes.polynomial import Coefficient, Polynomial, affine_of, expand

NUMBERS = {"half": 0.5, "two": 2.0, "three": 3.0, "one": 1.0}


def values(body: str, outputs: str = "float[] y", **weights: object) -> dict[str, ir.Value]:
    """All values by name; x and z are inputs."""
    arrays = {name: np.asarray(a, np.float32) for name, a in {**NUMBERS, **weights}.items()}
    model = build(f"g (float[N, 4] x, float[N, 4] z) => ({outputs}) {{ {body} }}", **arrays)
    produced = {v.name: v for node in model.graph for v in node.outputs}
    return {v.name or "": v for v in (*model.graph.inputs, *produced.values())}


CUBICS = [
    "a = Mul(x, x) b = Mul(a, x) c = Mul(two, b) y = Add(x, c)",
    "a = Mul(two, x) b = Mul(a, x) c = Add(b, one) y = Mul(x, c)",
    "a = Pow(x, three) b = Mul(a, two) y = Add(b, x)",
    "a = Pow(x, two) b = Mul(a, x) c = Div(b, half) y = Add(x, c)",
    "a = Neg(x) b = Pow(a, three) c = Mul(b, two) y = Sub(x, c)",
]


@pytest.mark.parametrize("body", CUBICS)
def test_a_cubic_in_many_forms(body: str) -> None:
    v = values(body)
    x = v["x"]
    assert expand(v["y"]).equals({(x,): 1.0, (x, x, x): 2.0})
    assert not expand(v["y"]).equals({(x,): 1.0})
    assert not expand(v["y"]).equals({(x,): 1.0, (x, x, x): 2.0, (): 1.0})


def test_stops_at_what_others_read() -> None:
    v = values("a = Add(x, one) y = Mul(a, two) w = Neg(a)", "float[] y, float[] w")
    assert expand(v["y"]).equals({(v["a"],): 2.0})
    v = values("a = Add(x, one) y = Mul(a, two)", "float[] y, float[] a")
    assert expand(v["y"]).equals({(v["a"],): 2.0})


def test_stops_at_other_operators_and_quotients_of_values() -> None:
    v = values("a = Exp(x) y = Add(a, z)")
    assert expand(v["y"]).equals({(v["a"],): 1.0, (v["z"],): 1.0})
    v = values("y = Div(x, z)")
    assert expand(v["y"]).equals({(v["y"],): 1.0})


def test_a_reader_has_to_be_the_only_one() -> None:
    v = values("a = Add(x, one) b = Exp(a) y = Mul(a, b)")
    exp = v["b"].producer()
    assert affine_of(v["a"], exp).source is v["a"]
    v = values("a = Add(x, one) y = Exp(a)")
    assert affine_of(v["a"], v["y"].producer()).source is v["x"]


def test_lines_leave_sums_of_values_alone() -> None:
    v = values("a = Add(x, z) b = Add(a, three) y = Div(b, two)")
    line = affine_of(v["y"])
    assert line is not None
    assert line.source is v["a"]
    assert line.equals(0.5, 1.5)
    assert not line.equals(0.5, 1.0)


def test_a_constant_is_no_line() -> None:
    v = values("y = Exp(half)")
    assert affine_of(v["y"].producer().inputs[0]) is None


def test_rank_of_numbers() -> None:
    assert expand(values("a = Mul(x, k) y = Add(a, one)", k=[[[1.0]]])["y"]).number_rank == 3


@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_infinite_numbers_are_no_coefficients(number: float) -> None:
    v = values("y = Mul(x, k)", k=number)
    assert len(expand(v["y"]).atoms) == 2


def test_many_factors_do_not_explode() -> None:
    body = " ".join(f"s{i} = Add(x, z) " for i in range(8)) + "p0 = Mul(s0, s1) "
    body += " ".join(f"p{i} = Mul(p{i - 1}, s{i + 1}) " for i in range(1, 7))
    assert len(expand(values(body, "float[] p6")["p6"]).terms) <= 64


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e3, 1e3).filter(lambda v: abs(v) > 1e-3), min_size=1, max_size=5))
def test_products_of_rounded_numbers_stand_for_the_exact_product(numbers: list[float]) -> None:
    def rounded(number: float) -> Coefficient:
        value = ir.Value(name="k", const_value=ir.tensor(np.asarray(number, np.float32)))
        number_ = Polynomial.of(value).number
        assert number_ is not None
        return number_

    product = Coefficient(1.0)
    for number in numbers:
        product = product * rounded(number)
    exact = math.prod(numbers)
    assert product.stands_for(exact)
    assert product.inverse().stands_for(1 / exact)
    assert not product.stands_for(exact * (1 + 2e-7 * (len(numbers) + 1)))
