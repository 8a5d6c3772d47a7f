"""push-transposes: regions change their order where that takes fewer Transposes, and else stay."""

from __future__ import annotations

import itertools
import re

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import build, constants, operators, refusal, rewritten

from edgewise.passes.graph import attribute
from edgewise.passes.push_transposes import PushTransposes
from edgewise.runtime.evaluate import Array

RULE = PushTransposes()
RNG = np.random.default_rng(0)
NO_GAIN = "the operators around the Transpose would need as many at their other ends"
LAST, FIRST = "Transpose<perm = [0, 2, 3, 1]>", "Transpose<perm = [0, 3, 1, 2]>"


def floats(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


HELD = {
    "c4": floats(4),
    "p": floats(5, 1, 1),
    "full": floats(2, 5, 6, 4),
    "two": np.float32(2),
    "unit": np.ones((1, 1, 1), np.float32),
    "i0": ints(0),
    "i1": ints(1),
    "i2": ints(2),
    "i9": ints(9),
    "iend": ints(-1),
    "i12": ints(1, 2),
    "in1": ints(1, -1),
    "i21": ints(2, 1),
    "i22": ints(2, 2),
    "one": np.int64(1),
    "pads": ints(0, 1, 0, 0, 0, 2, 1, 0),
    "some": ints(1, 2),
    "scale": np.float32(0.05),
    "scales": np.abs(floats(4)) / 20 + np.float32(0.01),
    "zero": np.uint8(128),
    "zeros": np.full(4, 128, np.uint8),
    "w": floats(4, 3),
    "g4": floats(4),
    "b4": floats(4),
}


def net(body: str, declared: str = "float[2, 4, 5, 6] x", out: str = "float[] y", **more: Array) -> ir.Model:
    """A graph with those of the constants that its body reads."""
    held = {**HELD, **more}
    words = set(re.findall(r"\w+", re.sub(r"<[^<>]*>", "", body))) - set(re.findall(r"(\w+) =", body))
    return build(f"g ({declared}) => ({out}) {{ {body} }}", **{n: a for n, a in held.items() if n in words})


# What lies between a Transpose of [2, 4, 5, 6] to channels last, [2, 5, 6, 4], and one back.
BETWEEN = {
    "unary": "b = Relu(a)",
    "chain": "c = Relu(a) d = Neg(c) b = Clip(d, two)",
    "cast": "c = Cast<to = 11>(a) b = Cast<to = 1>(c)",
    "channel constant": "b = Mul(a, c4)",
    "constant on the left": "b = Sub(c4, a)",
    "scalar": "c = Add(a, two) b = Mul(c, unit)",
    "one row": "b = Add(a, p)",
    "full constant": "b = Add(a, full)",
    "square": "b = Mul(a, a)",
    "where": "k = Less(a, c4) b = Where(k, a, c4)",
    "prelu": "b = PRelu(a, c4)",
    "concat": "b = Concat<axis = -1>(a, a)",
    "concat with a constant": "b = Concat<axis = 1>(a, full)",
    "split": "c, d = Split<axis = 3>(a) b = Add(c, d)",
    "slice": "b = Slice(a, i1, i9, i2)",
    "slice from the end": "b = Slice(a, i0, iend, iend)",
    "slice without axes": "b = Slice(a, i12, i22)",
    "pad": "b = Pad(a, pads)",
    "pad at the border": 'b = Pad<mode = "reflect">(a, pads)',
    "mean": "b = ReduceMean<axes = [1, 2], keepdims = 1>(a)",
    "sum": "b = ReduceSum<keepdims = 1>(a, in1)",
    "softmax": "b = Softmax<axis = 1>(a)",
    "gather": "b = Gather<axis = 3>(a, i21)",
    "top": "b, i = TopK<axis = 1>(a, i2)",
    "quantized": "c = QuantizeLinear(a, scale, zero) b = DequantizeLinear(c, scale, zero)",
    "quantized by channel": "c = QuantizeLinear<axis = 3>(a, scales, zeros) "
    "b = DequantizeLinear<axis = -1>(c, scales, zeros)",
    "squeezed and back": "m = ReduceMean<axes = [1], keepdims = 1>(a) s = Squeeze(m, i1) r = Relu(s) "
    "b = Unsqueeze(r, i1)",
    "dropped and back": "m = ReduceMax<axes = [-2], keepdims = 0>(a) r = Relu(m) b = Unsqueeze(r, i2)",
    "gathered one": "m = Gather<axis = 2>(a, one) b = Unsqueeze(m, i2)",
    "put back by a scalar": "m = Gather<axis = 1>(a, one) b = Unsqueeze(m, one)",
    "gate": "m = ReduceMean<axes = [1, 2], keepdims = 1>(a) s = Sigmoid(m) b = Mul(a, s)",
    "index": "m = ArgMax<axis = 1, keepdims = 1>(a) f = Cast<to = 1>(m) b = Add(a, f)",
}


@pytest.mark.parametrize("name", BETWEEN)
def test_between_a_transpose_and_its_inverse(name: str) -> None:
    model = net(f"h = Abs(x) a = {LAST}(h) {BETWEEN[name]} o = {FIRST}(b) y = Neg(o)")
    after, outcome = rewritten(model, RULE)
    expected = [op for op in operators(model) if op != "Transpose"]
    assert operators(after) == expected
    assert outcome.edits


@pytest.mark.parametrize("name", [name for name, body in BETWEEN.items() if "Unsqueeze" not in body])
def test_from_the_other_end(name: str) -> None:
    """One Transpose is enough for both outputs."""
    body = BETWEEN[name]
    model = net(
        f"h = Abs(x) a = {LAST}(h) {body} o = {FIRST}(b) z = Neg(a) y = Neg(o)", out="float[] y, float[] z"
    )
    after, outcome = rewritten(model, RULE)
    assert operators(after).count("Transpose") == 1
    assert outcome.edits


ORDERS = st.permutations(range(3)).map(tuple).filter(lambda order: order != (0, 1, 2))


@given(st.lists(st.tuples(ORDERS, st.sampled_from(["Relu({})", "Add({}, z)", "Mul({0}, {0})"])), max_size=5))
@settings(max_examples=30)
def test_any_chain(steps: list[tuple[tuple[int, ...], str]]) -> None:
    """A chain of Transposes and functions needs one Transpose at most."""
    body, last = "h = Abs(x) ", "h"
    for number, (order, function) in enumerate(steps):
        body += f"t{number} = Transpose<perm = {list(order)}>({last}) "
        body += f"f{number} = {function.format(f't{number}')} "
        last = f"f{number}"
    after, _ = rewritten(net(f"{body} y = Neg({last})", "float[2, 3, 4] x", z=np.float32(3)), RULE)
    assert operators(after).count("Transpose") <= 1


@given(st.data())
@settings(max_examples=40)
def test_any_graph(data: st.DataObject) -> None:
    """Sums, products, functions and Transposes of cubes, joined at random: no more Transposes than before."""
    values, body = ["x", "z"], ""
    for number in range(data.draw(st.integers(2, 9))):
        first, second = (data.draw(st.sampled_from(values)) for _ in range(2))
        order = list(data.draw(ORDERS))
        kind = data.draw(
            st.sampled_from(["Transpose", "Transpose", "Relu", "Add", "Mul", "Softmax", "Concat"])
        )
        text = {
            "Transpose": f"Transpose<perm = {order}>({first})",
            "Relu": f"Relu({first})",
            "Softmax": f"Softmax<axis = {order[0]}>({first})",
            "Concat": f"Split<axis = {order[0]}>(k{number})",
        }.get(kind, f"{kind}({first}, {second})")
        if kind == "Concat":
            body += f"k{number} = Concat<axis = {order[0]}>({first}, {second}) "
            body += f"v{number}, d{number} = {text} "
        else:
            body += f"v{number} = {text} "
        values.append(f"v{number}")
    outputs = data.draw(st.sets(st.sampled_from(values[2:]), min_size=1, max_size=3))
    model = net(
        body, "float[3, 3, 3] x, float[3, 3, 3] z", ", ".join(f"float[] {v}" for v in sorted(outputs))
    )
    after, _ = rewritten(model, RULE)
    assert operators(after).count("Transpose") <= operators(model).count("Transpose")


def test_the_place_of_an_axis_of_size_one_is_not_looked_for() -> None:
    """It might be anywhere; what would save a Transpose is found from the one end, not from the other."""
    body = f"h = Abs(x) a = {LAST}(h) m = ReduceMean<axes = [1]>(a) s = Squeeze(m, i1) b = Unsqueeze(s, i1) "
    model = net(f"{body} o = {FIRST}(b) z = Neg(a) y = Neg(o)", out="float[] y, float[] z")
    assert refusal(model, RULE) == NO_GAIN


def test_both_operands_have_the_same_transpose() -> None:
    body = f"a = {LAST}(x) b = {LAST}(z) c = Add(a, b) d = Relu(c) o = {FIRST}(d) y = Neg(o)"
    after, _ = rewritten(net(body, "float[2, 4, 5, 6] x, float[2, 4, 5, 6] z"), RULE)
    assert operators(after) == ["Add", "Relu", "Neg"]


def test_one_transpose_of_a_sum_is_better_than_two_of_its_terms() -> None:
    body = f"a = {LAST}(x) b = {LAST}(z) y = Add(a, b)"
    after, _ = rewritten(net(body, "float[2, 4, 5, 6] x, float[2, 4, 5, 6] z"), RULE)
    assert operators(after) == ["Add", "Transpose"]
    assert after.graph.outputs[0].name == "y"


def test_a_residual_net_with_its_convolutions_channels_first() -> None:
    """As converters from TensorFlow write it: everything but the convolutions is channels last."""
    conv = f"{{0}} = Conv({{1}}, k) {{0}}l = {LAST}({{0}})"
    body = (
        f"i = {FIRST}(x) {conv.format('a', 'i')} ar = Relu(al) af = {FIRST}(ar) {conv.format('b', 'af')} "
        f"s = Add(ar, bl) r = Relu(s) m = Mul(r, c4) f = {FIRST}(m) {conv.format('c', 'f')} "
        "p = ReduceMean<axes = [1, 2], keepdims = 0>(cl) y = MatMul(p, w)"
    )
    after, _ = rewritten(net(body, "float[N, 5, 6, 4] x", k=floats(4, 4, 1, 1)), RULE)
    assert operators(after).count("Transpose") == 1
    assert operators(after)[0] == "Transpose"


def test_through_a_product_with_a_matrix() -> None:
    """Channels stay last: rows and columns of the image change places."""
    turn = "Transpose<perm = [0, 2, 1, 3]>"
    body = f"h = Abs(x) a = {turn}(h) b = MatMul(a, w) o = {turn}(b) y = Neg(o)"
    after, _ = rewritten(net(body, "float[2, 5, 6, 4] x"), RULE)
    assert operators(after) == ["Abs", "MatMul", "Neg"]


def test_through_a_norm_of_the_last_axis() -> None:
    turn = "Transpose<perm = [0, 2, 1, 3]>"
    body = f"h = Abs(x) a = {turn}(h) b = LayerNormalization(a, g4, b4) o = {turn}(b) y = Neg(o)"
    after, _ = rewritten(net(body, "float[2, 5, 6, 4] x"), RULE)
    assert operators(after) == ["Abs", "LayerNormalization", "Neg"]


def test_a_transpose_moves_to_where_there_is_less() -> None:
    """Behind the mean there are 8 numbers, in front 240."""
    body = f"h = Abs(x) a = {LAST}(h) m = ReduceMean<axes = [1, 2], keepdims = 1>(a) y = MatMul(m, w)"
    after, _ = rewritten(net(body), RULE)
    assert operators(after) == ["Abs", "ReduceMean", "Transpose", "MatMul"]


def test_it_vanishes_where_only_one_axis_is_left() -> None:
    body = f"h = Abs(x) a = {LAST}(h) m = ReduceMean<axes = [1, 2], keepdims = 0>(a) y = MatMul(m, w)"
    after, _ = rewritten(net(body), RULE)
    assert operators(after) == ["Abs", "ReduceMean", "MatMul"]


def test_an_output_of_a_region_keeps_its_name() -> None:
    body = f"a = {LAST}(x) b = Relu(a) o = {FIRST}(b) p = {FIRST}(b) y = Neg(o) z = Neg(p)"
    after, _ = rewritten(net(body, out="float[] y, float[] z, float[] b"), RULE)
    assert operators(after).count("Transpose") == 1
    assert [v.name for v in after.graph.outputs] == ["y", "z", "b"]


def test_the_inverse_is_an_output() -> None:
    after, _ = rewritten(net(f"a = {LAST}(x) b = Relu(a) y = {FIRST}(b)"), RULE)
    assert operators(after) == ["Relu"]
    assert [v.name for v in after.graph.outputs] == ["y"]


def test_two_inverses_are_outputs() -> None:
    """One of them takes over the name, and hands the value on to the other."""
    after, _ = rewritten(
        net(f"a = {LAST}(x) b = Relu(a) y = {FIRST}(b) z = {FIRST}(b)", out="float[] y, float[] z"), RULE
    )
    assert sorted(operators(after)) == ["Identity", "Relu"]


def test_unknown_sizes() -> None:
    body = f"h = Abs(x) a = {LAST}(h) c = Mul(a, c4) b = Concat<axis = 3>(c, c) o = {FIRST}(b) y = Neg(o)"
    after, _ = rewritten(net(body, "float[N, C, H, W] x"), RULE, {"x": floats(2, 4, 3, 5)})
    assert operators(after) == ["Abs", "Mul", "Concat", "Neg"]


def test_a_reader_in_a_body_gets_the_value_as_it_was() -> None:
    body = (
        f"a = {LAST}(x) b = Relu(a) o = {FIRST}(b) p = Transpose<perm = [0, 3, 1, 2]>(b) q = Add(o, p) "
        "y = If(f) <then_branch = t () => (float[2, 5, 6, 4] u) { u = Neg(b) },"
        "else_branch = e () => (float[2, 5, 6, 4] v) { v = Abs(b) }> z = Neg(q)"
    )
    model = net(body, "float[2, 4, 5, 6] x, bool f", "float[] y, float[] z")
    after, _ = rewritten(model, RULE)
    assert operators(after).count("Transpose") == 1


def test_inside_a_body() -> None:
    branch = f"h{{0}} = {LAST}(x) r{{0}} = Relu(h{{0}}) o{{0}} = {FIRST}(r{{0}})"
    text = (
        "g (float[2, 4, 5, 6] x, bool f) => (float[2, 4, 5, 6] y) { y = If (f) <"
        f"then_branch = t () => (float[2, 4, 5, 6] o1) {{ {branch.format(1)} }},"
        f"else_branch = e () => (float[2, 4, 5, 6] o2) {{ {branch.format(2)} }}> }}"
    )
    after, outcome = rewritten(build(text), RULE)
    assert outcome.edits == 2
    assert [[n.op_type for n in g] for g in after.graph.subgraphs()] == [["Relu"], ["Relu"]]


SHARED = floats(2, 5, 6, 40)


def test_a_large_constant_that_others_read_is_not_written_twice() -> None:
    body = f"h = Abs(x) a = {LAST}(h) b = Add(a, large) o = {FIRST}(b) y = Neg(o) z = Neg(large)"
    model = net(body, "float[2, 40, 5, 6] x", "float[] y, float[] z", large=SHARED)
    assert refusal(model, RULE) == NO_GAIN


def test_a_small_one_is() -> None:
    body = f"h = Abs(x) a = {LAST}(h) b = Add(a, c4) o = {FIRST}(b) y = Neg(o) z = Neg(c4)"
    after, _ = rewritten(net(body, out="float[] y, float[] z"), RULE)
    assert "Transpose" not in operators(after)
    assert {a.shape for a in constants(after).values()} == {(4,), (4, 1, 1)}


# Layers that take up the order.


@pytest.mark.parametrize("function", ["", "r = Relu(f)"])
@pytest.mark.parametrize("flat", ["Flatten(a)", "Reshape(a, s)"])
@pytest.mark.parametrize(
    "layer", ["y = MatMul({}, m)", "y = Gemm({}, m, b3)", "y = Gemm<transB = 1, alpha = 0.5>({}, n)"]
)
def test_into_the_weights_behind_a_flatten(layer: str, flat: str, function: str) -> None:
    m = floats(120, 3)
    body = f"h = Abs(x) a = {LAST}(h) f = {flat} {function} {layer.format('r' if function else 'f')}"
    model = net(body, "float[N, 4, 5, 6] x", m=m, n=m.T.copy(), b3=floats(3), s=ints(-1, 120))
    after, outcome = rewritten(model, RULE)
    assert operators(after) == [op for op in operators(model) if op != "Transpose"]
    assert outcome.edits == 1


@pytest.mark.parametrize("function", ["", "r = LeakyRelu(f)"])
@pytest.mark.parametrize(
    "layer", ["f = MatMul(x, m)", "f = Gemm(x, m, b)", "o = MatMul(x, m) f = Add(o, b)", "f = Gemm(x, m, s1)"]
)
def test_into_the_weights_in_front_of_a_reshape(layer: str, function: str) -> None:
    """As generators begin."""
    source = "r" if function else "f"
    body = f"{layer} {function} v = Reshape({source}, s) a = {FIRST}(v) y = Conv(a, k)"
    model = net(
        body,
        "float[N, 3] x",
        m=floats(3, 120),
        b=floats(120),
        s1=floats(1),
        s=ints(-1, 5, 6, 4),
        k=floats(2, 4, 1, 1),
    )
    after, _ = rewritten(model, RULE)
    assert operators(after) == [op for op in operators(model) if op != "Transpose"]


@pytest.mark.parametrize(
    ("layer", "attributes"),
    [
        ("Gemm(a, b)", {"transA": 1, "transB": 0}),
        ("Gemm<transA = 1>(a, b)", {"transA": 0, "transB": 0}),
        ("Gemm<transB = 1>(b, a)", {"transA": 0, "transB": 0}),
        ("MatMul(a, b)", {"transA": 1, "transB": 0}),
        ("MatMul(b, a)", {"transA": 0, "transB": 1}),
    ],
)
def test_a_product_reads_its_operand_transposed(layer: str, attributes: dict[str, int]) -> None:
    after, _ = rewritten(
        net(f"a = Transpose(x) b = Abs(z) y = {layer}", "float[3, 3] x, float[3, 3] z"), RULE
    )
    assert operators(after) == ["Abs", "Gemm"]
    product = after.graph.node(1)
    assert {name: attribute(product, name, 0) for name in attributes} == attributes


def test_a_product_of_two_transposed() -> None:
    after, _ = rewritten(
        net("a = Transpose(x) b = Transpose(z) y = MatMul(a, b)", "float[3, 3] x, float[3, 3] z"), RULE
    )
    assert operators(after) == ["Gemm"]


STAYS = {
    "between convolutions": f"h = Conv(x, k) a = {LAST}(h) r = Relu(a) y = MatMul(r, w)",
    "from an input to an output": f"a = {LAST}(x) y = Relu(a)",
    "softmax leaves the last axis": f"h = Abs(x) a = {LAST}(h) b = Softmax<axis = -1>(a) "
    f"o = {FIRST}(b) y = Neg(o)",
    "a norm leaves the last axis": f"h = Abs(x) a = {LAST}(h) m = ReduceMean<axes = [3]>(a) s = Sub(a, m) "
    f"o = {FIRST}(s) y = Neg(o)",
    "pooling": f"h = Abs(x) a = {LAST}(h) r = Relu(a) b = MaxPool<kernel_shape = [2, 2]>(r) q = Relu(b) "
    f"o = {FIRST}(q) y = Neg(o)",
}


@pytest.mark.parametrize("name", STAYS)
def test_what_would_not_be_less(name: str) -> None:
    model = net(STAYS[name], k=floats(4, 4, 1, 1))
    assert refusal(model, RULE) in (NO_GAIN, "")


def test_the_reason() -> None:
    assert refusal(net(f"h = Conv(x, k) a = {LAST}(h) y = Relu(a)", k=floats(4, 4, 1, 1)), RULE) == NO_GAIN


UNKNOWN = {
    "a slice along computed axes": ("b = Slice(a, i1, i9, n)", "int64[1] n"),
    "computed padding": ("b = Pad(a, n)", "int64[8] n"),
    "a sum over computed axes": ("b = ReduceSum(a, n)", "int64[2] n"),
    "a sum over everything": ("b = ReduceSum(a)", ""),
    "squeezed wherever there is one": (
        "m = ReduceMax<axes = [1]>(a) s = Squeeze(m) b = Unsqueeze(s, i1)",
        "",
    ),
    "unsqueezed somewhere": ("m = ReduceMax<axes = [1], keepdims = 0>(a) b = Unsqueeze(m, n)", "int64[1] n"),
    "gathered by a table": ("m = Gather<axis = 1>(a, n) b = Squeeze(m, i1)", "int64[1, 2] n"),
    "an operand of a lower rank": ("b = Add(a, n)", "float[4] n"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_operators_that_are_not_known_well_enough(name: str) -> None:
    body, declared = UNKNOWN[name]
    model = net(
        f"h = Abs(x) a = {LAST}(h) {body} k = Identity(b)  o = {FIRST}(k) y = Neg(o)",
        "float[2, 4, 5, 6] x" + (f", {declared}" if declared else ""),
    )
    before = operators(model)
    RULE.apply(model)
    assert [op for op in operators(model) if op == "Transpose"] == [op for op in before if op == "Transpose"]


@pytest.mark.parametrize(
    "body",
    [
        f"a = {LAST}(x) f = Flatten(a) y = MatMul(f, m) z = Neg(f)",  # another reader
        f"a = {LAST}(x) f = Flatten(a) y = MatMul(f, m) z = MatMul(m, w)",  # the weight is shared
        f"a = {LAST}(x) f = Flatten<axis = 2>(a) y = MatMul(f, w24) z = Neg(x)",
        f"a = {LAST}(x) f = Flatten(a) y = MatMul(f, i) z = Neg(i)",  # no constant
        "a = Transpose<perm = [1, 2, 3, 0]>(x) f = Flatten(a) y = MatMul(f, m40) z = Neg(x)",  # samples move
    ],
)
def test_layers_that_cannot_take_it_up(body: str) -> None:
    declared = "float[2, 4, 5, 6] x" + (", float[120, 3] i" if " i)" in body else "")
    more = {"m": floats(120, 4), "w": floats(4, 3), "w24": floats(24, 3), "m40": floats(60, 3)}
    assert refusal(net(body, declared, "float[] y, float[] z", **more), RULE) in (NO_GAIN, "")


@pytest.mark.parametrize("body", ["y = Relu(x)", "y = Transpose<perm = [0, 1, 2, 3]>(x)", f"y = {LAST}(x)"])
def test_nothing_to_do(body: str) -> None:
    assert refusal(net(body), RULE) == ""


def test_old_operator_sets() -> None:
    model = build(f"g (float[2, 4, 5, 6] x) => (float[] y) {{ a = {LAST}(x) y = Relu(a) }}", 12)
    assert refusal(model, RULE) == "opset below 13: upgrade it first"
    assert refusal(build("g (float[2] x) => (float[2] y) { y = Relu(x) }", 12), RULE) == ""


def test_another_domain() -> None:
    model = net(f"a = {LAST}(x) b = Relu(a) y = {FIRST}(b)")
    model.graph.node(1).domain = "custom"
    assert RULE.apply(model).edits == 0


def test_orders() -> None:
    """The algebra itself, against numpy, for all orders of three axes."""
    from edgewise.passes.layouts import inverse, ordered

    array = floats(2, 3, 4)
    for order in itertools.permutations(range(3)):
        moved = ordered(array, order)
        assert all(moved.shape[order[axis]] == array.shape[axis] for axis in range(3))
        np.testing.assert_array_equal(moved.transpose(order), array)
        np.testing.assert_array_equal(ordered(moved, inverse(order)), array)
