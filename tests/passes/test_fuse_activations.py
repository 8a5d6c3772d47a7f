"""fuse-activations: activations written out become operators, exactly, where the operator set has them."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import build, operators, refusal, rewritten

from edgewise.passes.fuse_activations import FuseActivations
from edgewise.passes.graph import attribute
from edgewise.runtime.evaluate import Array

RULE = FuseActivations()
EVERYTHING = FuseActivations(always=True)
NUMBERS = {
    "zero": 0.0,
    "half": 0.5,
    "one": 1.0,
    "two": 2.0,
    "three": 3.0,
    "six": 6.0,
    "sixth": 1 / 6,
    "tenth": 0.1,
    "minus": -1.0,
    "root": math.sqrt(2),
    "inverse": math.sqrt(0.5),
    "cubic": 0.044715,
    "factor": math.sqrt(2 / math.pi),
    "product": math.sqrt(2 / math.pi) * 0.044715,
    "double": 2 * math.sqrt(2 / math.pi),
    "quick": 1.702,
    "infinite": math.inf,
}
DTYPES = {"float": np.float32, "float16": np.float16, "double": np.float64}


def net(
    body: str,
    version: int = 24,
    kind: str = "float",
    outputs: str = "{}[] y",
    declared: str = "",
    **held: Any,
) -> ir.Model:
    """A graph of x, of shape [N, 4], with the numbers that it reads by name, in its type."""
    words = set(re.findall(r"\w+", body))
    arrays: dict[str, Array] = {
        name: np.asarray(value, DTYPES[kind]) for name, value in {**NUMBERS, **held}.items() if name in words
    }
    return build(f"g ({kind}[N, 4] x{declared}) => ({outputs.format(kind)}) {{ {body} }}", version, **arrays)


def the_node(model: ir.Model) -> ir.Node:
    (node,) = model.graph
    return node


HALVES = ["u = Div(x, root)", "u = Mul(inverse, x)", "v = Mul(x, root) u = Div(v, two)"]
PRODUCTS = [
    "a = Add(t, one) b = Mul(x, half) y = Mul(b, a)",
    "a = Add(one, t) b = Mul(x, a) y = Mul(b, half)",
    "a = Add(one, t) b = Mul(x, a) y = Div(b, two)",
    "a = Add(t, one) b = Mul(half, a) y = Mul(x, b)",
    "a = Mul(t, half) b = Add(a, half) y = Mul(b, x)",
    "a = Mul(x, half) b = Mul(x, t) c = Mul(b, half) y = Add(a, c)",
    "m = Neg(t) a = Sub(one, m) b = Mul(x, a) y = Mul(b, half)",
]
CUBICS = [
    "p = Pow(x, three) q = Mul(p, cubic) r = Add(x, q) u = Mul(r, factor)",
    "p = Mul(x, x) q = Mul(p, x) s = Mul(cubic, q) r = Add(x, s) u = Mul(factor, r)",
    "p = Mul(cubic, x) q = Mul(p, x) s = Add(one, q) r = Mul(x, factor) u = Mul(r, s)",
    "p = Mul(x, x) q = Mul(p, cubic) s = Add(q, one) r = Mul(s, x) u = Mul(r, factor)",
    "p = Pow(x, two) q = Mul(p, product) s = Add(q, factor) u = Mul(s, x)",
]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("argument", HALVES)
def test_gelu(argument: str, product: str) -> None:
    after, _ = rewritten(net(f"{argument} t = Erf(u) {product}"), RULE)
    assert operators(after) == ["Gelu"]
    assert attribute(the_node(after), "approximate", "none") == "none"


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("argument", CUBICS)
def test_gelu_of_tanh(argument: str, product: str) -> None:
    after, _ = rewritten(net(f"{argument} t = Tanh(u) {product}"), RULE)
    assert operators(after) == ["Gelu"]
    assert attribute(the_node(after), "approximate") == "tanh"


def test_gelu_of_sigmoid() -> None:
    body = "p = Pow(x, three) q = Mul(p, cubic) r = Add(x, q) u = Mul(r, double) t = Sigmoid(u) y = Mul(x, t)"
    after, _ = rewritten(net(body), RULE)
    assert operators(after) == ["Gelu"]
    assert attribute(the_node(after), "approximate") == "tanh"


@st.composite
def gelus(draw: st.DrawFn) -> str:
    """x * (1 + Erf(x / sqrt(2))) / 2 in any order and grouping."""
    inner = draw(st.sampled_from(HALVES))
    sums = draw(st.sampled_from(["a = Add(t, one)", "a = Add(one, t)"]))
    factors, steps = ["x", "half", "a"], []
    while len(factors) > 1:
        left, right = (factors.pop(draw(st.integers(0, len(factors) - 1))) for _ in range(2))
        name = "y" if not factors else f"p{len(factors)}"
        steps.append(f"{name} = Mul({left}, {right})")
        factors.append(name)
    return f"{inner} t = Erf(u) {sums} {' '.join(steps)}"


@settings(deadline=None, max_examples=30)
@given(gelus(), st.sampled_from(["float", "float16"]))
def test_gelu_in_any_order(body: str, kind: str) -> None:
    after, _ = rewritten(net(body, kind=kind), RULE)
    assert operators(after) == ["Gelu"]


STEPS = [
    ("a = Add(x, three) b = Clip(a, zero, six) y = Div(b, six)", 1 / 6, 0.5),
    ("a = Add(three, x) b = Clip(a, zero, six) y = Mul(sixth, b)", 1 / 6, 0.5),
    ("a = Mul(x, sixth) b = Add(a, half) y = Clip(b, zero, one)", 1 / 6, 0.5),
    ("a = Div(x, six) b = Add(a, half) y = Clip(b, zero, one)", 1 / 6, 0.5),
    ("a = Mul(x, tenth) b = Add(a, half) c = Max(b, zero) y = Min(one, c)", 0.1, 0.5),
    ("a = Mul(x, tenth) b = Add(a, half) c = Min(b, one) y = Max(zero, c)", 0.1, 0.5),
    ("a = Add(x, three) b = Relu(a) c = Min(b, six) y = Div(c, six)", 1 / 6, 0.5),
    ("a = Sub(one, x) y = Clip(a, zero, one)", -1.0, 1.0),
    ("a = Clip(x, zero, six) y = Div(a, six)", 1 / 6, 0.0),
]


@pytest.mark.parametrize("kind", ["float", "float16"])
@pytest.mark.parametrize(("body", "alpha", "beta"), STEPS)
def test_hard_sigmoid(body: str, alpha: float, beta: float, kind: str) -> None:
    after, _ = rewritten(net(body, 13, kind), RULE)
    assert operators(after) == ["HardSigmoid"]
    rounding = float(np.finfo(DTYPES[kind]).eps)
    assert attribute(the_node(after), "alpha", 0.2) == pytest.approx(alpha, rel=rounding)
    assert attribute(the_node(after), "beta", 0.5) == pytest.approx(beta, rel=rounding)


SWITCHES = [
    "a = Add(x, three) b = Clip(a, zero, six) c = Mul(x, b) y = Div(c, six)",
    "a = Add(x, three) b = Clip(a, zero, six) c = Mul(b, x) y = Mul(c, sixth)",
    "a = Add(x, three) b = Clip(a, zero, six) c = Div(b, six) y = Mul(x, c)",
    "a = Add(x, three) b = Clip(a, zero, six) c = Mul(x, sixth) y = Mul(c, b)",
    "a = Add(x, three) b = Relu(a) d = Min(b, six) c = Div(x, six) y = Mul(c, d)",
    "a = Mul(x, sixth) b = Add(a, half) c = Clip(b, zero, one) y = Mul(c, x)",
    "a = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x) y = Mul(a, x)",
]


@pytest.mark.parametrize("kind", ["float", "float16"])
@pytest.mark.parametrize("body", SWITCHES)
def test_hard_swish(body: str, kind: str) -> None:
    after, _ = rewritten(net(body, 14, kind), RULE)
    assert operators(after) == ["HardSwish"]


def test_the_step_of_a_hard_swish_alone_where_there_is_no_such_operator() -> None:
    after, _ = rewritten(
        net("a = Add(x, three) b = Clip(a, zero, six) c = Div(b, six) y = Mul(x, c)", 13), RULE
    )
    assert operators(after) == ["HardSigmoid", "Mul"]


@pytest.mark.parametrize("softplus", ["s = Softplus(x)", "e = Exp(x) a = Add(one, e) s = Log(a)"])
def test_mish(softplus: str) -> None:
    after, _ = rewritten(net(f"{softplus} t = Tanh(s) y = Mul(t, x)", 18), EVERYTHING)
    assert operators(after) == ["Mish"]


SWISHES = [
    ("t = Sigmoid(x) y = Mul(x, t)", 1.0),
    ("u = Mul(quick, x) t = Sigmoid(u) y = Mul(t, x)", 1.702),
    ("u = Div(x, six) t = Sigmoid(u) y = Mul(x, t)", 1 / 6),
    ("n = Neg(x) e = Exp(n) a = Add(e, one) t = Div(one, a) y = Mul(x, t)", 1.0),
]


@pytest.mark.parametrize(("body", "alpha"), SWISHES)
def test_swish(body: str, alpha: float) -> None:
    after, _ = rewritten(net(body), EVERYTHING)
    assert operators(after) == ["Swish"]
    assert attribute(the_node(after), "alpha", 1.0) == pytest.approx(alpha, rel=1e-7)


SIMPLE = [
    ("e = Exp(x) a = Add(e, one) y = Log(a)", "Softplus"),
    ("a = Abs(x) b = Add(one, a) y = Div(x, b)", "Softsign"),
    ("a = Abs(x) b = Add(a, one) c = Reciprocal(b) y = Mul(x, c)", "Softsign"),
    ("n = Neg(x) e = Exp(n) a = Add(one, e) y = Div(one, a)", "Sigmoid"),
    ("n = Mul(minus, x) e = Exp(n) a = Add(one, e) y = Reciprocal(a)", "Sigmoid"),
    ("y = Max(zero, x)", "Relu"),
    ("y = Clip(x, zero)", "Relu"),
    ("y = Clip(x, zero, infinite)", "Relu"),
]


@pytest.mark.parametrize("kind", ["float", "float16"])
@pytest.mark.parametrize(("body", "operator"), SIMPLE)
def test_simple_operators(body: str, operator: str, kind: str) -> None:
    after, _ = rewritten(net(body, 13, kind), EVERYTHING)
    assert operators(after) == [operator]


def test_relu_as_the_clip_of_old_exporters() -> None:
    after, _ = rewritten(net("y = Clip<min = 0.0, max = 3.4028234663852886e+38>(x)", 10), RULE)
    assert operators(after) == ["Relu"]


KINKS = [
    "l = Mul(x, slope) y = Max(x, l)",
    "l = Mul(slope, x) y = Max(l, x)",
    "c = Greater(x, zero) l = Mul(x, slope) y = Where(c, x, l)",
    "c = GreaterOrEqual(x, zero) l = Mul(x, slope) y = Where(c, x, l)",
    "c = Less(zero, x) l = Mul(x, slope) y = Where(c, x, l)",
    "c = Less(x, zero) l = Mul(x, slope) y = Where(c, l, x)",
    "r = Relu(x) n = Neg(x) m = Relu(n) l = Mul(m, slope) y = Sub(r, l)",
    "r = Relu(x) n = Neg(x) m = Relu(n) k = Neg(m) l = Mul(slope, k) y = Add(r, l)",
]


@pytest.mark.parametrize("slope", [0.1, [0.1, 0.2, 0.3, 0.4], [[0.1], [0.2], [0.3]]])
@pytest.mark.parametrize("body", KINKS)
def test_leaky_relu(body: str, slope: Any) -> None:
    model = build(
        f"g (float[2, 3, 4] x) => (float[] y) {{ {body} }}",
        16,
        slope=np.asarray(slope, np.float32),
        **({"zero": np.zeros((), np.float32)} if "zero" in body else {}),
    )
    after, _ = rewritten(model, EVERYTHING)
    assert operators(after) == ["LeakyRelu" if np.ndim(slope) == 0 else "PRelu"]


@pytest.mark.parametrize(("kind", "threshold"), [("float", 20.0), ("float", 14.0), ("float16", 6.0)])
def test_softplus_with_a_threshold(kind: str, threshold: float) -> None:
    body = "c = Greater(x, threshold) s = Softplus(x) y = Where(c, x, s)"
    model = net(body, kind=kind, threshold=threshold)
    feed = {"x": np.linspace(-30, 30, 1200).reshape(-1, 4).astype(DTYPES[kind])}
    after, outcome = rewritten(model, RULE, feed)
    assert operators(after) == ["Softplus"]
    assert outcome.edits == 1


def test_negative_slope_with_a_sum() -> None:
    body = "r = Relu(x) n = Neg(x) m = Relu(n) l = Mul(m, slope) y = Add(r, l)"
    after, _ = rewritten(net(body, slope=[-0.1, -0.2, -0.3, -0.4]), EVERYTHING)
    assert operators(after) == ["PRelu"]


REFUSALS = [
    ("u = Div(x, root) t = Erf(u) a = Add(t, one) b = Mul(x, half) y = Mul(b, a)", 19, "no Gelu"),
    ("t = Sigmoid(x) y = Mul(x, t)", 23, "no Swish"),
    ("t = HardSigmoid<alpha = 0.16666667>(x) y = Mul(x, t)", 13, "no HardSwish"),
    ("s = Softplus(x) t = Tanh(s) y = Mul(t, x)", 17, "no Mish"),
]


@pytest.mark.parametrize(("body", "version", "reason"), REFUSALS)
def test_operator_sets(body: str, version: int, reason: str) -> None:
    assert refusal(net(body, version), RULE) == f"the model's operator set has {reason}"


SLOW = [
    ("t = Sigmoid(x) y = Mul(x, t)", "Swish"),
    ("e = Exp(x) a = Add(e, one) y = Log(a)", "Softplus"),
    ("l = Mul(x, slope) y = Max(x, l)", "PRelu"),
]


@pytest.mark.parametrize(("body", "operator"), SLOW)
def test_slow_operators(body: str, operator: str) -> None:
    reason = f"{operator} is slower in onnxruntime than what it is written as"
    assert refusal(net(body, slope=[0.1, 0.2, 0.3, 0.4]), RULE) == reason


def test_fast_operators_next_to_slow_ones() -> None:
    after, _ = rewritten(net("s = Softplus(x) t = Tanh(s) y = Mul(t, x)", 18), RULE)
    assert operators(after) == ["Mish"]


SHARED = [
    "t = Sigmoid(x) y = Mul(x, t) z = Neg(t)",
    "s = Softplus(x) t = Tanh(s) y = Mul(t, x) z = Neg(s)",
    "e = Exp(x) a = Add(e, one) y = Log(a) z = Neg(e)",
    "c = Greater(x, zero) l = Mul(x, tenth) y = Where(c, x, l) z = Neg(l)",
    "a = Mul(x, tenth) b = Add(a, half) c = Clip(b, zero, six) y = Div(c, six) z = Neg(c)",
]


@pytest.mark.parametrize("body", SHARED)
def test_a_value_inside_that_others_read(body: str) -> None:
    reason = "a value inside the pattern has another user"
    assert refusal(net(body, outputs="{0}[] y, {0}[] z"), EVERYTHING) == reason


def test_a_value_inside_that_is_an_output() -> None:
    reason = "a value inside the pattern has another user"
    assert refusal(net("t = Sigmoid(x) y = Mul(x, t)", outputs="{0}[] y, {0}[] t"), EVERYTHING) == reason


def test_double_precision_stays() -> None:
    body = "a = Abs(x) b = Add(one, a) y = Div(x, b)"
    assert refusal(net(body, kind="double"), RULE) == "double precision"


def test_a_number_that_adds_axes() -> None:
    body = "a = Add(wide, x) b = Clip(a, zero, six) y = Div(b, six)"
    reason = "a number of the pattern may change the rank of its data"
    assert refusal(net(body, wide=np.full((1, 1, 1), 3.0)), RULE) == reason
    after, _ = rewritten(net(body, wide=np.full((1, 1), 3.0)), RULE)
    assert operators(after) == ["HardSigmoid"]


@pytest.mark.parametrize("slope", [np.full((3, 1, 4), 0.1), np.full((3, 4), 0.1)])
def test_a_slope_that_stretches_the_data(slope: Array) -> None:
    body = "l = Mul(x, slope) y = Max(x, l)"
    model = build(f"g (float[1, 4] x) => (float[] y) {{ {body} }}", slope=slope.astype(np.float32))
    assert refusal(model, EVERYTHING) == "the slope does not fit the data"


NOTHING = [
    "y = Clip(x, zero, six)",
    "y = Clip(x, zero, one)",
    "y = Relu(x)",
    "y = Max(x, one)",
    "y = Min(x, zero)",
    "r = Relu(x) y = Add(x, r)",
    "a = Add(x, three) y = Clip(a, zero, six)",
    "a = Add(x, three) b = Clip(a, zero, six) y = Mul(x, b)",
    "a = Add(x, two) b = Clip(a, zero, six) c = Mul(x, b) y = Div(c, six)",
    "a = Add(x, three) b = Clip(a, one, six) y = Div(b, six)",
    "a = Sigmoid(x) b = Exp(x) y = Mul(a, b)",
    "u = Add(x, half) t = Sigmoid(u) y = Mul(x, t)",
    "u = Mul(x, half) t = Erf(u) a = Add(t, one) b = Mul(x, half) y = Mul(b, a)",
    "u = Div(x, root) t = Erf(u) a = Add(t, one) y = Mul(x, a)",
    "u = Div(x, root) t = Erf(u) a = Sub(one, t) b = Mul(x, half) y = Mul(b, a)",
    "u = Mul(x, factor) t = Tanh(u) a = Add(t, one) b = Mul(x, half) y = Mul(b, a)",
    "e = Exp(x) a = Add(e, two) y = Log(a)",
    "e = Exp(x) a = Add(e, one) y = Div(one, a)",
    "n = Neg(x) e = Exp(n) a = Add(e, one) y = Div(two, a)",
    "a = Abs(x) b = Add(two, a) y = Div(x, b)",
    "l = Mul(x, two) y = Max(x, l)",
    "l = Mul(x, tenth) y = Max(x, l, one)",
    "c = Greater(x, one) l = Mul(x, tenth) y = Where(c, x, l)",
    "c = Greater(x, zero) l = Mul(x, tenth) y = Where(c, l, x)",
    "r = Relu(x) n = Mul(x, two) m = Relu(n) l = Mul(m, tenth) y = Sub(r, l)",
    "t = HardSigmoid(x) y = Mul(x, t)",
    "s = Softplus(x) c = Greater(x, six) y = Where(c, x, s)",
    "s = Softplus(x) c = Greater(x, minus) y = Where(c, x, s)",
]


@pytest.mark.parametrize("body", NOTHING)
def test_what_is_no_activation(body: str) -> None:
    assert refusal(net(body), RULE) == ""


@pytest.mark.parametrize(("number", "exact"), [("root", 1.4142), ("half", 0.50001), ("one", 1.000001)])
def test_numbers_that_are_nearly_right(number: str, exact: float) -> None:
    body = "u = Div(x, root) t = Erf(u) a = Add(t, one) b = Mul(x, half) y = Mul(b, a)"
    assert refusal(net(body, **{number: exact}), RULE) == ""


def test_a_number_of_half_precision() -> None:
    """1.4142 is what half holds of the square root, and in single precision is another number."""
    body = "u = Div(x, root) t = Erf(u) a = Add(t, one) b = Mul(x, half) y = Mul(b, a)"
    rounded = float(np.float16(math.sqrt(2)))
    after, _ = rewritten(net(body, kind="float16", root=rounded), RULE)
    assert operators(after) == ["Gelu"]
    assert refusal(net(body, root=rounded), RULE) == ""


def test_integers() -> None:
    model = build("g (int64[N] x) => (int64[] y) { y = Max(x, zero) }", zero=np.zeros((), np.int64))
    assert refusal(model, RULE) == ""


def test_inside_a_body() -> None:
    body = (
        "y = If (f) <then_branch = t () => (float[N, 4] o) "
        "{ u = Div(x, root) s = Erf(u) a = Add(s, one) b = Mul(x, half) o = Mul(b, a) },"
        "else_branch = e () => (float[N, 4] q) { q = Neg(x) }>"
    )
    after, _ = rewritten(net(body, declared=", bool f"), RULE)
    assert [node.op_type for node in after.graph.all_nodes()] == ["If", "Gelu", "Neg"]
    assert not after.graph.initializers


def test_a_value_of_the_graph_around_a_body_stays_there() -> None:
    body = (
        "g = Sigmoid(x) y = If (f) <then_branch = t () => (float[N, 4] o) { o = Mul(x, g) },"
        "else_branch = e () => (float[N, 4] q) { q = Neg(x) }>"
    )
    assert refusal(net(body, declared=", bool f"), RULE) == ""


def test_old_broadcasting_is_left_alone() -> None:
    model = build("g (float[N, 4] x) => (float[] y) { y = Clip<min = 0.0>(x) }", 6)
    assert RULE.apply(model.clone()).edits == 0
