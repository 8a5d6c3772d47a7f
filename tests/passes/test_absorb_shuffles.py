"""absorb-shuffles: weights take up a constant order of channels wherever it is seen, or it stays."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import build, operators, refusal, rewritten

from edgewise.passes.absorb_shuffles import AbsorbShuffles
from edgewise.runtime.evaluate import Array

RULE = AbsorbShuffles()
RNG = np.random.default_rng(0)
SHUFFLE = (
    "{1}p = Reshape({0}, parts) {1}t = Transpose<perm = [0, 2, 1, 3, 4]>({1}p) {1} = Reshape({1}t, whole)"
)
GATHER = "{1} = Gather<axis = 1>({0}, k)"


def floats(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


HELD = {
    "parts": np.array([0, 2, 3, 5, 5], np.int64),
    "whole": np.array([0, 6, 5, 5], np.int64),
    "k": np.array([4, -6, 3, 1, 5, 2], np.int64),
    "twice": np.array([4, 0, 3, 1, 5, 4], np.int64),
    "five": np.array([4, 0, 3, 1, 2], np.int64),
    "same": np.arange(6),
    "w": floats(4, 6, 3, 3),
    "v": floats(6, 4, 1, 1),
    "d": floats(6, 1, 3, 3),
    "q": floats(6, 3, 1, 1),
    "b7": floats(4),
    "b6": floats(6),
    "c": floats(6, 1, 1),
    "c1": floats(1, 1, 1),
    "g": floats(6),
    "s": floats(6),
    "m": floats(6),
    "var": np.abs(floats(6)) + np.float32(0.5),
    "l": floats(6, 3),
    "lt": floats(3, 6),
    "u": floats(4, 6),
    "l150": floats(150, 3),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
    "scale": np.float32(0.05),
    "zero": np.uint8(128),
    "scales": np.full(6, 0.05, np.float32),
    "zeros": np.full(6, 128, np.uint8),
    "axes": np.array([2, 3], np.int64),
}


def net(body: str, declared: str = "float[N, 6, 5, 5] x", out: str = "float[] y", **more: Array) -> ir.Model:
    """A graph with those of the constants that its body reads."""
    held = {**HELD, **more}
    words = set(re.findall(r"\w+", re.sub(r"<[^<>]*>", "", body))) - set(re.findall(r"(\w+) =", body))
    words -= {part.split()[-1] for part in declared.replace("]", "] ").split(",")}
    return build(f"g ({declared}) => ({out}) {{ {body} }}", **{n: a for n, a in held.items() if n in words})


# From the shuffled z of [N, 6, 5, 5] to y.
AFTER = {
    "convolution": "y = Conv(z, w, b7)",
    "padded convolution": "y = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(z, w)",
    "activation": "r = Relu(z) y = Conv(r, w)",
    "bounds": "r = Clip(z, zero_, six) y = Conv(r, w)",
    "scale and shift": "r = Mul(z, c) q_ = Add(r, c1) y = Conv(q_, w)",
    "norm": "r = BatchNormalization(z, g, s, m, var) y = Conv(r, w)",
    "single channels": "r = Conv<group = 6, pads = [1, 1, 1, 1]>(z, d, b6) q_ = Relu(r) y = Conv(q_, w, b7)",
    "pooling": "r = MaxPool<kernel_shape = [3, 3]>(z) y = Conv<kernel_shape = [3, 3]>(r, w)",
    "classifier": "r = GlobalAveragePool(z) f = Flatten(r) y = Gemm(f, l)",
    "mean and matrix": "r = ReduceMean<axes = [2, 3], keepdims = 0>(z) y = MatMul(r, l)",
    "transposed matrix": "r = ReduceMean<axes = [-1, -2], keepdims = 0>(z) y = Gemm<transB = 1>(r, lt)",
    "squeezed": "r = GlobalMaxPool(z) f = Squeeze(r, axes) y = Gemm(f, l)",
    "features": "f = Flatten(z) y = Gemm(f, l150)",
    "two readers": "r = Relu(z) n = Neg(z) a = Conv(r, w) b_ = Conv(n, w) y = Add(a, b_)",
    "gate": "p_ = GlobalAveragePool(z) e = Sigmoid(p_) r = Mul(z, e) y = Conv(r, w)",
    "residual": "a = Conv(x, v6) r = Add(a, z) y = Conv(r, w)",
    "quantized": "i = QuantizeLinear(z, scale, zero) r = DequantizeLinear(i, scale, zero) y = Conv(r, w)",
}
MORE = {"zero_": np.float32(0), "six": np.float32(6), "v6": floats(6, 6, 1, 1)}


@pytest.mark.parametrize("shuffle", [SHUFFLE, GATHER], ids=["shuffle", "gather"])
@pytest.mark.parametrize("name", AFTER)
def test_into_what_comes_after(name: str, shuffle: str) -> None:
    model = net(f"h = Abs(x) {shuffle.format('h', 'z')} {AFTER[name]}", **MORE)
    after, outcome = rewritten(model, RULE)
    gone = ["Gather"] if shuffle is GATHER else ["Reshape", "Transpose", "Reshape"]
    assert operators(after) == ["Abs", *operators(model)[1 + len(gone) :]]
    assert outcome.edits == 1


# From x of [N, 4, 5, 5] to h, which is shuffled to be an output.
BEFORE = {
    "convolution": "h = Conv(x, v, b6)",
    "activation": "a = Conv(x, v) h = Relu(a)",
    "single channels": "a = Conv(x, v) h = Conv<group = 6, pads = [1, 1, 1, 1]>(a, d, b6)",
    "sum": "a = Conv(x, v) e = Conv(x, v, b6) h = Add(a, e)",
}


@pytest.mark.parametrize("shuffle", [SHUFFLE, GATHER], ids=["shuffle", "gather"])
@pytest.mark.parametrize("name", BEFORE)
def test_into_what_comes_before(name: str, shuffle: str) -> None:
    model = net(f"{BEFORE[name]} {shuffle.format('h', 'y')}", "float[N, 4, 5, 5] x")
    after, _ = rewritten(model, RULE)
    kept = len(operators(model)) - (1 if shuffle is GATHER else 3)
    assert operators(after) == operators(model)[:kept]
    assert after.graph.outputs[0].name == "y"


@pytest.mark.parametrize(
    "layer", ["h = Gemm(x, u, b6)", "h = Gemm<transB = 1, alpha = 0.5>(x, ut, c0)", "h = MatMul(x, u)"]
)
def test_into_a_matrix_before(layer: str) -> None:
    more = {"ut": floats(6, 4), "c0": floats(1)}
    after, _ = rewritten(net(f"{layer} {GATHER.format('h', 'y')}", "float[N, 4] x", **more), RULE)
    assert operators(after) == [layer.split()[2].split("(")[0].split("<")[0]]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**16))
@settings(max_examples=20)
def test_any_groups(groups: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    channels = groups * size
    body = f"h = Abs(x) {SHUFFLE.format('h', 'z')} r = Conv<group = {channels}>(z, d) y = Conv(r, w)"
    model = net(
        body,
        f"float[2, {channels}, 3, 3] x",
        parts=np.array([-1, groups, size, 3, 3]),
        whole=np.array([2, channels, -1, 3]),
        d=rng.standard_normal((channels, 1, 1, 1)).astype(np.float32),
        w=rng.standard_normal((2, channels, 1, 1)).astype(np.float32),
    )
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Abs", "Conv", "Conv"]


def test_inside_a_body() -> None:
    branch = "{{ h{0} = Abs(x) z{0} = Gather<axis = 1>(h{0}, k) o{0} = Conv(z{0}, w) }}"
    text = (
        "g (float[1, 6, 3, 3] x, bool f) => (float[1, 7, 1, 1] y) { y = If (f) <"
        f"then_branch = t () => (float[1, 7, 1, 1] o1) {branch.format(1)},"
        f"else_branch = e () => (float[1, 7, 1, 1] o2) {branch.format(2)}> }}"
    )
    w = floats(7, 6, 3, 3)
    model = build(text, k=HELD["k"], w=w)
    assert refusal(model, RULE) == "a weight is shared"
    own = build(text.replace("z2, w", "z2, w2"), k=HELD["k"], w=w, w2=w)
    assert [[n.op_type for n in g] for g in rewritten(own, RULE)[0].graph.subgraphs()] == [
        ["Abs", "Conv"]
    ] * 2


@pytest.mark.parametrize(
    "body", ["y = Conv<group = 2>(z, q)", "y = Concat<axis = 1>(z, z)", "y = Identity(z)"]
)
def test_what_has_to_be_made_is_made_by_one_node(body: str) -> None:
    after, outcome = rewritten(net(f"{SHUFFLE.format('x', 'z')} {body}"), RULE)
    assert operators(after)[0] == "Gather"
    assert outcome.edits == 1


def test_an_output_that_has_to_be_made() -> None:
    after, _ = rewritten(net(SHUFFLE.format("x", "y")), RULE)
    assert operators(after) == ["Gather"]
    assert after.graph.outputs[0].name == "y"


def test_channels_of_one_number() -> None:
    parts = {"parts": np.array([0, 2, 3]), "whole": np.array([0, 6])}
    body = "p = Reshape(x, parts) t = Transpose<perm = [0, 2, 1]>(p) y = Reshape(t, whole)"
    assert refusal(net(body, "float[N, 6] x", **parts), RULE) == f"an output of the graph {SEEN}"


def test_parts_that_others_read() -> None:
    model = net(f"{SHUFFLE.format('x', 'z')} y = Neg(z) a = Neg(zp)", out="float[] y, float[] a")
    assert refusal(model, RULE) == f"an output of the graph {SEEN}"


SEEN = "sees the order of the channels"
ODD = "a weight of Conv is not constant, or of another size"
REFUSED = {
    "groups": ("y = Conv<group = 2>(z, q)", f"a convolution of several groups {SEEN}"),
    "output": ("y = Relu(z)", f"an output of the graph {SEEN}"),
    "concat": ("r = Concat<axis = 1>(z, z) y = Neg(r)", f"Concat {SEEN}"),
    "softmax": ("r = Softmax<axis = 1>(z) y = Conv(r, w)", f"Softmax {SEEN}"),
    "mean of channels": ("y = ReduceMean<axes = [1]>(z)", f"ReduceMean {SEEN}"),
    "mean of all": ("y = ReduceMean(z)", f"ReduceMean {SEEN}"),
    "input": ("r = Add(z, x) y = Conv(r, w)", "a value would need two orders of its channels"),
    "another input": ("r = Add(z, i) y = Conv(r, w)", f"an input of the graph {SEEN}"),
    "weight": ("y = Conv(z, i)", ODD),
    "bias": ("r = Conv<group = 6>(z, d, i) y = Conv(r, w)", ODD),
    "shared": ("y_ = Conv(z, large) n = Neg(large) r = Flatten(n) y = Neg(y_)", "a weight is shared"),
    "two orders": ("t = Gather<axis = 1>(z, k2) r = Add(z, t) y = Conv(r, w)", f"Gather {SEEN}"),
    "reshaped": ("f = Reshape(z, rows) y = MatMul(f, five5)", f"Reshape {SEEN}"),
    "rows": ("y = MatMul(z, five5)", f"MatMul {SEEN}"),
    "scales": ("i_ = QuantizeLinear(z, scales, zeros) r = DequantizeLinear(i_, scales, zeros) y = Conv(r, w)",
               "QuantizeLinear has a scale for each channel"),
    "indices": ("r, j = MaxPool<kernel_shape = [3, 3]>(z) f = Conv(r, w) y = Cast<to = 1>(j)",
                "another result of MaxPool is read"),
    "kernel": ("y = Conv(i, z)", f"Conv {SEEN}"),
    "unknown operand": ("r = Add(z, i) y = Conv(r, w)", "Add has operands of unknown or different channels"),
}  # fmt: skip
INPUTS = {
    "another input": "float[1, 6, 5, 5] i",
    "weight": "float[7, 6, 3, 3] i",
    "bias": "float[6] i",
    "kernel": "float[1, 6, 9, 9] i",
    "unknown operand": "float[1, K, 5, 5] i",
}


@pytest.mark.parametrize("name", REFUSED)
def test_conditions(name: str) -> None:
    body, reason = REFUSED[name]
    declared = "float[1, 6, 5, 5] x" + (f", {INPUTS[name]}" if name in INPUTS else "")
    more = {
        "large": floats(60, 6, 1, 1),
        "k2": HELD["k"],
        "rows": np.array([-1, 5], np.int64),
        "five5": floats(5, 5),
    }
    model = net(f"{GATHER.format('x', 'z')} {body}", declared, **more)
    outcome = RULE.apply(model)
    assert outcome.edits == 0
    assert reason in outcome.refused


@pytest.mark.parametrize(
    "body",
    [
        "y = Gather<axis = 1>(x, twice)",
        "y = Gather<axis = 1>(x, five)",
        "y = Gather<axis = 1>(x, same)",
        "y = Gather<axis = 2>(x, five)",
        "y = Reshape(x, parts)",
        "t = Transpose<perm = [0, 2, 1, 3]>(x) y = Reshape(t, whole)",
        "p = Reshape(x, parts) t = Transpose<perm = [0, 1, 2, 4, 3]>(p) y = Reshape(t, whole)",
        "p = Reshape(x, parts) t = Transpose<perm = [0, 2, 1, 3, 4]>(p) y = Reshape(t, other)",
        "p = Reshape(x, mixed) t = Transpose<perm = [0, 2, 1, 3, 4]>(p) y = Reshape(t, whole)",
    ],
)
def test_what_is_no_shuffle(body: str) -> None:
    more = {"other": np.array([0, 3, 10, 5]), "mixed": np.array([0, 3, 5, 2, 5])}
    assert refusal(net(body, "float[1, 6, 5, 5] x", **more), RULE) == ""


def test_a_reader_in_a_body() -> None:
    text = """g (float[1, 6, 3, 3] x, bool f) => (float[] y) { z = Gather<axis = 1>(x, k)
        y = If (f) <then_branch = t () => (float[1, 4, 1, 1] a) { a = Conv(z, w) },
                    else_branch = e () => (float[1, 4, 1, 1] b) { b = Conv(z, w) }> }"""
    assert refusal(build(text, k=HELD["k"], w=HELD["w"]), RULE) == f"Conv {SEEN}"
