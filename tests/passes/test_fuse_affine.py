"""fuse-affine: constants go into layers and into each other, unless shapes or runtimes would mind."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import ConvCase, build, constants, convolutions, operators, refusal, rewritten

from edgewise.passes.fuse_affine import FuseAffine
from edgewise.runtime.evaluate import Array

RULE = FuseAffine()
RNG = np.random.default_rng(0)

# {} is the data and k the constant.
ARITHMETIC = [
    "Mul({}, k)",
    "Mul(k, {})",
    "Div({}, k)",
    "Add({}, k)",
    "Add(k, {})",
    "Sub({}, k)",
    "Sub(k, {})",
]


def normal(*shape: int, dtype: type = np.float32) -> Array:
    return RNG.standard_normal(shape).astype(dtype)


def positive(*shape: int, dtype: type = np.float32) -> Array:
    """Factors and divisors of the order of one."""
    return RNG.uniform(0.5, 2.0, shape).astype(dtype)


@given(convolutions(), st.sampled_from(ARITHMETIC), st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_after_a_convolution(case: ConvCase, arithmetic: str, form: int) -> None:
    shape = [case.channel_shape(case.outputs), case.channel_shape(case.outputs)[1:], (), (1,)][form]
    model = build(
        f"g ({case.declared(case.inputs)} x) => (float[] y)"
        f"{{ c = {case.text.format('x')} y = {arithmetic.format('c')} }}",
        **case.weights,
        k=positive(*shape),
    )
    after, outcome = rewritten(model, RULE)
    assert operators(after) == [case.operator]
    assert outcome.edits == 1


@given(convolutions(padded=False, transposed=False), st.sampled_from(ARITHMETIC), st.integers(0, 2))
@settings(deadline=None, max_examples=25)
def test_before_a_convolution(case: ConvCase, arithmetic: str, form: int) -> None:
    shape = [case.channel_shape(case.inputs), case.channel_shape(case.inputs)[1:], ()][form]
    model = build(
        f"g ({case.declared(case.inputs)} x) => (float[] y)"
        f"{{ n = {arithmetic.format('x')} y = {case.text.format('n')} }}",
        **case.weights,
        k=positive(*shape),
    )
    assert operators(rewritten(model, RULE)[0]) == ["Conv"]


@given(convolutions(), st.sampled_from(["Mul({}, k)", "Div({}, k)"]))
@settings(deadline=None, max_examples=15)
def test_a_factor_before_passes_through_padding(case: ConvCase, arithmetic: str) -> None:
    model = build(
        f"g ({case.declared(case.inputs)} x) => (float[] y)"
        f"{{ n = {arithmetic.format('x')} y = {case.text.format('n')} }}",
        **case.weights,
        k=positive(*case.channel_shape(case.inputs)),
    )
    assert operators(rewritten(model, RULE)[0]) == [case.operator]


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 4)])
@pytest.mark.parametrize("layer", ["Gemm(x, w)", "Gemm<transB = 1, alpha = 0.5, beta = 2.0>(x, w, b)"])
def test_after_gemm(layer: str, shape: tuple[int, ...], arithmetic: str) -> None:
    text = f"g (float[N, 4] x) => (float[N, 4] y) {{ c = {layer} y = {arithmetic.format('c')} }}"
    weights = {"w": normal(4, 4), "k": positive(*shape), **({"b": normal(4)} if " b)" in layer else {})}
    assert operators(rewritten(build(text, **weights), RULE)[0]) == ["Gemm"]


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("shape", [(), (4,), (1, 4), (1, 1, 4)])
def test_after_matmul_and_its_bias(shape: tuple[int, ...], arithmetic: str) -> None:
    text = (
        "g (float[N, 2, 3] x) => (float[N, 2, 4] y)"
        f"{{ c = MatMul(x, w) d = Add(c, b) y = {arithmetic.format('d')} }}"
    )
    after, _ = rewritten(build(text, w=normal(3, 4), b=normal(4), k=positive(*shape)), RULE)
    assert operators(after) == ["MatMul", "Add"]


@pytest.mark.parametrize("shape", [(2, 4), (2, 1), (1, 1)])
def test_bias_of_matmul_may_vary_along_other_axes(shape: tuple[int, ...]) -> None:
    text = "g (float[N, 2, 3] x) => (float[N, 2, 4] y){ c = MatMul(x, w) d = Add(b, c) y = Mul(d, k) }"
    after, _ = rewritten(build(text, w=normal(3, 4), b=normal(*shape), k=positive(4)), RULE)
    assert operators(after) == ["MatMul", "Add"]


def test_bias_that_makes_the_columns() -> None:
    """[N, 1] + [4] is [N, 4]: the product itself has one column."""
    text = "g (float[N, 3] x) => (float[N, 4] y) { c = MatMul(x, w) d = Add(c, b) y = Mul(d, k) }"
    assert refusal(build(text, w=normal(3, 1), b=normal(4), k=positive()), RULE) == "bias is not per channel"


def test_factor_after_a_matmul_without_bias() -> None:
    text = "g (float[N, 2, 3] x) => (float[N, 2, 4] y) { c = MatMul(x, w) y = Div(c, k) }"
    assert operators(rewritten(build(text, w=normal(3, 4), k=positive(4)), RULE)[0]) == ["MatMul"]


def test_bias_of_a_matmul_stays() -> None:
    text = "g (float[N, 3] x) => (float[N, 4] y) { c = MatMul(x, w) y = Add(c, k) }"
    assert refusal(build(text, w=normal(3, 4), k=normal(4)), RULE) == ""


def test_matmul_of_unknown_rank_takes_a_vector() -> None:
    text = (
        "g (float[N, K] x, int64[R] r) => (float[P, 4] y){ z = Reshape(x, r) c = MatMul(z, w) y = Mul(c, k) }"
    )
    vector = build(text, shapes=False, w=normal(3, 4), k=positive(4))
    feed = {"x": normal(2, 3), "r": np.array([2, 3])}
    assert operators(rewritten(vector, RULE, feed)[0]) == ["Reshape", "MatMul"]
    matrix = build(text, shapes=False, w=normal(3, 4), k=positive(1, 4))
    assert refusal(matrix, RULE) == "constant is not per channel"


def test_scale_and_shift() -> None:
    text = "g (float[N, 2, 6, 6] x) => (float[N, 3, 4, 4] y){ c = Conv(x, w) m = Mul(c, k) y = Add(m, t) }"
    model = build(text, w=normal(3, 2, 3, 3), k=positive(1, 3, 1, 1), t=normal(3, 1, 1))
    after, outcome = rewritten(model, RULE)
    assert operators(after) == ["Conv"]
    assert outcome.edits == 2
    assert set(constants(after)) == {"w", "c.bias"}


def test_standardized_pixels() -> None:
    """(x - mean) / std before a convolution that does not pad."""
    text = (
        "g (float[N, 3, 6, 6] x) => (float[N, 4, 4, 4] y)"
        "{ a = Sub(x, mean) n = Div(a, std) y = Conv(n, w, b) }"
    )
    weights = {"mean": normal(1, 3, 1, 1), "std": positive(3, 1, 1), "w": normal(4, 3, 3, 3), "b": normal(4)}
    assert operators(rewritten(build(text, **weights), RULE)[0]) == ["Conv"]


PAIRS = [
    ("Mul({}, c)", "Mul({}, d)", "Mul"),
    ("Mul({}, c)", "Div({}, d)", "Mul"),
    ("Div({}, c)", "Div({}, d)", "Mul"),
    ("Add({}, c)", "Add(d, {})", "Add"),
    ("Sub({}, c)", "Sub({}, d)", "Add"),
    ("Sub({}, c)", "Add(d, {})", "Add"),
]


@pytest.mark.parametrize(("first", "second", "merged"), PAIRS)
@pytest.mark.parametrize(("c", "d"), [((), ()), ((4,), ()), ((), (2, 4)), ((2, 4), (4,)), ((2, 1), (2, 4))])
@pytest.mark.parametrize(("kind", "dtype"), [("float", np.float32), ("double", np.float64)])
def test_two_constants_become_one(
    first: str, second: str, merged: str, c: tuple[int, ...], d: tuple[int, ...], kind: str, dtype: type
) -> None:
    text = (
        f"g ({kind}[N, 2, 4] x) => ({kind}[N, 2, 4] y) {{ a = {first.format('x')} y = {second.format('a')} }}"
    )
    model = build(text, c=-positive(*c, dtype=dtype), d=-positive(*d, dtype=dtype) - 3)
    after, outcome = rewritten(model, RULE)
    assert operators(after) == [merged]
    assert outcome.edits == 1
    assert list(constants(after)) == ["d"]


@pytest.mark.parametrize(("first", "second"), [("Mul", "Add"), ("Add", "Mul"), ("Div", "Sub")])
def test_a_factor_and_a_term_stay_apart(first: str, second: str) -> None:
    text = f"g (float[N, 4] x) => (float[N, 4] y) {{ a = {first}(x, c) y = {second}(a, d) }}"
    assert refusal(build(text, c=positive(4), d=positive(4)), RULE) == ""


def test_merged_constant_would_be_larger() -> None:
    text = "g (float[2, 4] x) => (float[2, 4] y) { a = Mul(x, c) y = Mul(a, d) }"
    assert (
        refusal(build(text, c=positive(2, 1), d=positive(4)), RULE) == "the merged constant would be larger"
    )


@pytest.mark.parametrize(("outputs", "tail"), [(", float[N, 4] a", ""), (", float[N, 4] r", "r = Relu(a)")])
def test_first_constant_has_another_user(outputs: str, tail: str) -> None:
    text = f"g (float[N, 4] x) => (float[N, 4] y{outputs}) {{ a = Mul(x, c) y = Mul(a, d) {tail} }}"
    reason = "the first of two constants has another user"
    assert refusal(build(text, c=positive(4), d=positive(4)), RULE) == reason


def test_rounding_by_a_large_number_stays() -> None:
    """Adding 1.5 * 2**23 and taking it away rounds float32 to integers."""
    text = "g (float[N, 4] x) => (float[N, 4] y) { a = Add(x, c) y = Sub(a, c) }"
    assert refusal(build(text, c=np.array(12582912, np.float32)), RULE) == "the constants cancel"


def test_merged_constants_overflow() -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y) { a = Mul(x, c) y = Mul(a, c) }"
    assert refusal(build(text, c=np.array(1e30, np.float32)), RULE) == "folded weights would overflow"


def test_division_by_zero() -> None:
    text = "g (float[N, 3] x) => (float[N, 4] y) { c = Gemm(x, w) y = Div(c, k) }"
    assert (
        refusal(build(text, w=normal(3, 4), k=np.zeros(4, np.float32)), RULE)
        == "folded weights would overflow"
    )


# Each would change the shape of what the convolution gives, [1, 1, 5, 5], or differs between its positions.
@pytest.mark.parametrize("shape", [(4, 1, 1), (5,), (5, 1), (2, 1, 1, 1), (1, 1, 1, 1, 1), (1, 5, 5)])
def test_constant_that_is_not_per_channel(shape: tuple[int, ...]) -> None:
    text = "g (float[1, 2, 5, 5] x) => (float[] y) { c = Conv(x, w) y = Mul(c, k) }"
    model = build(text, w=normal(1, 2, 1, 1), k=positive(*shape))
    assert refusal(model, RULE) == "constant is not per channel"


# [1, 1, 5, 5] * [3, 1, 1] is [1, 3, 5, 5]: the layer after has three channels, its data only one.
@pytest.mark.parametrize("declared", ["float[1, 1, 5, 5] x", "float[1, C, 5, 5] x"])
def test_constant_that_makes_the_channels(declared: str) -> None:
    text = f"g ({declared}) => (float[1, 4, 5, 5] y) {{ n = Mul(x, k) y = Conv(n, w) }}"
    model = build(text, w=normal(4, 3, 1, 1), k=positive(3, 1, 1))
    assert refusal(model, RULE) == "constant may change the shape of its data"


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ("Conv<pads = [1, 1, 1, 1]>(n, w)", "padding would meet the shift"),
        ("ConvTranspose(n, w)", "ConvTranspose would spread the shift unevenly"),
    ],
)
def test_a_term_before_padding(layer: str, reason: str) -> None:
    text = f"g (float[N, 3, 5, 5] x) => (float[] y) {{ n = Add(x, k) y = {layer} }}"
    assert refusal(build(text, w=normal(3, 3, 3, 3), k=positive()), RULE) == reason


def test_a_term_before_a_matmul_of_rank_three() -> None:
    text = "g (float[N, 2, 3] x) => (float[N, 2, 4] y) { n = Add(x, k) y = MatMul(n, w) }"
    assert (
        refusal(build(text, w=normal(3, 4), k=normal(3)), RULE)
        == "MatMul without a bias is not known to be of rank 2"
    )


GELU = "h = Div(x, root) e = Erf(h) f = Add(e, one) g = Mul(x, f) n = Mul(g, half)"
NORM = (
    "m = ReduceMean<axes = [-1]>(x) d = Sub(x, m) q = Mul(d, d) v = ReduceMean<axes = [-1]>(q)"
    "s = Sqrt(v) u = Div(d, s) n = Mul(u, k)"
)


@pytest.mark.parametrize("body", [GELU, NORM, f"{NORM.replace('n =', 'o =')} n = Add(o, k)"])
def test_activations_written_out_stay_whole(body: str) -> None:
    """onnxruntime fuses them into one kernel if it finds all of their nodes."""
    scalars = {"root": 2**0.5, "one": 1.0, "half": 0.5}
    weights = {name: np.array(v, np.float32) for name, v in scalars.items() if f"{name})" in body}
    if "k)" in body:
        weights["k"] = positive(3)
    text = f"g (float[N, 3] x) => (float[N, 4] y) {{ {body} y = Gemm(n, w) }}"
    _, outcome = rewritten(build(text, w=normal(3, 4), **weights), RULE)
    assert outcome.edits == 0
    assert "constant may end a GELU or a normalization written out" in outcome.refused


@pytest.mark.parametrize("body", ["Mul(x, z)", "Div(k, x)", "Mul(x, x)", "Pow(x, k)"])
def test_what_is_no_constant_factor(body: str) -> None:
    text = f"g (float[N, 3] x, float[N, 3] z) => (float[N, 4] y) {{ n = {body} y = Gemm(n, w) }}"
    weights = {"w": normal(3, 4), **({"k": positive(3)} if "k" in body else {})}
    assert refusal(build(text, **weights), RULE) == ""


def test_shape_arithmetic_is_not_for_floats() -> None:
    text = "g (int64[N] x) => (int64[N] y) { a = Add(x, k) y = Add(a, k) }"
    assert refusal(build(text, k=np.array([2])), RULE) == ""


def test_a_shared_constant_stays_for_its_other_user() -> None:
    text = (
        "g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z)"
        "{ a = Mul(x, k) y = Mul(a, k) r = Relu(x) z = Mul(r, k) }"
    )
    model = build(text, k=positive(4))
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Mul", "Relu", "Mul"]
    np.testing.assert_array_equal(constants(after)["k"], constants(model)["k"])


def test_inside_a_subgraph_with_weights_from_outside() -> None:
    branch = "{{ c{0} = Conv(x, w) n{0} = Mul(c{0}, k) o{0} = Relu(n{0}) }}"
    text = (
        "g (float[N, 2, 6, 6] x, bool f) => (float[N, 3, 6, 6] y) { y = If (f) <"
        f"then_branch = t () => (float[N, 3, 6, 6] o1) {branch.format(1)},"
        f"else_branch = e () => (float[N, 3, 6, 6] o2) {branch.format(2)}> }}"
    )
    after, outcome = rewritten(build(text, w=normal(3, 2, 1, 1), k=positive(3, 1, 1)), RULE)
    assert outcome.edits == 2
    assert [[n.op_type for n in g] for g in after.graph.subgraphs()] == [["Conv", "Relu"], ["Conv", "Relu"]]


@pytest.mark.parametrize("outputs", ["float[N, 4] y, float[N, 4] c", "float[N, 4] y, float[N, 4] r"])
def test_other_users_of_the_layer(outputs: str) -> None:
    text = f"g (float[N, 3] x) => ({outputs}) {{ c = Gemm(x, w) y = Mul(c, k) r = Relu(c) }}"
    assert refusal(build(text, w=normal(3, 4), k=positive(4)), RULE) == "the layer's output has another user"


def test_computed_weight() -> None:
    text = "g (float[N, 3] x, float[3, 4] w) => (float[N, 4] y) { c = Gemm(x, w) y = Mul(c, k) }"
    assert refusal(build(text, k=positive(4)), RULE) == "weight is not constant"


def test_broadcasting_of_old_opsets() -> None:
    """Before opset 7 an attribute said along which axis a constant runs."""
    proto = ir.to_proto(
        build("g (float[2, 4] x) => (float[2, 4] y) { a = Mul(x, c) y = Mul(a, c) }", c=positive(4))
    )
    model = ir.from_proto(proto)
    for node in model.graph:
        node.attributes["broadcast"] = ir.AttrInt64("broadcast", 1)
    assert RULE.apply(model).edits == 0


NORM = {"g": positive(4), "h": normal(4), "m": normal(4), "v": positive(4)}


def normalized(tail: str, outputs: str = "float[] y", norm: str = "") -> str:
    """A normalization that no layer is next to, as in a DenseNet."""
    return (
        f"g (float[2, 4, 5, 5] x) => ({outputs})"
        f"{{ r = Relu(x) n = BatchNormalization{norm}(r, g, h, m, v) {tail} }}"
    )


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (4, 1, 1), (), (1,)])
def test_after_a_normalization(shape: tuple[int, ...], arithmetic: str) -> None:
    model = build(normalized(f"y = {arithmetic.format('n')}"), **NORM, k=positive(*shape))
    after, outcome = rewritten(model, RULE)
    assert outcome.edits == 1
    assert operators(after) == ["Relu", "BatchNormalization"]


def test_scale_and_shift_after_a_normalization() -> None:
    model = build(normalized("a = Mul(n, k) y = Add(a, t)"), **NORM, k=normal(4, 1, 1), t=normal(4, 1, 1))
    after, outcome = rewritten(model, RULE)
    assert outcome.edits == 2
    assert operators(after) == ["Relu", "BatchNormalization"]


def test_parameters_that_two_normalizations_share() -> None:
    tail = "o = BatchNormalization(x, g, h, m, v) a = Mul(n, k) y = Sub(a, o)"
    after, outcome = rewritten(build(normalized(tail), **NORM, k=normal(4, 1, 1)), RULE)
    assert outcome.edits == 1
    np.testing.assert_array_equal(constants(after)["g"], NORM["g"])


@pytest.mark.parametrize(
    ("tail", "outputs", "reason"),
    [
        ("y = Mul(n, k)", "float[] y, float[] n", "the normalization has another user"),
        ("e = Exp(n) a = Mul(n, k) y = Sub(a, e)", "float[] y", "the normalization has another user"),
        ("y = Mul(n, wide)", "float[] y", "constant is not per channel"),
    ],
)
def test_normalization_that_cannot_take_it(tail: str, outputs: str, reason: str) -> None:
    model = build(normalized(tail, outputs), **NORM, k=normal(4, 1, 1), wide=normal(5))
    assert refusal(model, RULE) == reason


def test_normalization_of_unknown_rank() -> None:
    model = build(normalized("y = Mul(n, k)"), **NORM, k=normal(4, 1, 1))
    model.graph[0].outputs[0].shape = None
    outcome = RULE.apply(model)
    assert dict(outcome.refused) == {"the rank of what is normalized is not known": 1}


def test_normalization_with_computed_parameters() -> None:
    text = (
        normalized("y = Mul(n, k)")
        .replace("r = Relu(x)", "r = Relu(x) s = Abs(z)")
        .replace("(r, g,", "(r, s,")
    )
    text = text.replace("5] x)", "5] x, float[4] z)")
    assert (
        refusal(build(text, **NORM, k=normal(4, 1, 1)), RULE)
        == "BatchNormalization parameters are not constant"
    )
