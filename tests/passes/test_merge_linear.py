"""merge-linear: two layers in a row become one where that is smaller, and the border is the same."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import build, constants, operators, refusal, rewritten

from edgewise.passes.graph import attribute
from edgewise.passes.merge_linear import MergeLinear
from edgewise.runtime.evaluate import Array

RULE = MergeLinear()
RNG = np.random.default_rng(0)
COSTS = "the merged layer would cost more"
POINTLESS = "neither kernel is a single tap at stride 1 without padding"


def normal(*shape: int, dtype: type = np.float32) -> Array:
    """Weights whose sums are of the order of one."""
    scale = math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 1.0
    return np.asarray(RNG.standard_normal(shape) / scale, dtype)


def net(body: str, declared: str, outputs: str = "float[] y", **weights: Array) -> ir.Model:
    """A graph with those of the weights that it reads and does not declare as inputs."""
    words = set("".join(c if c.isalnum() else " " for c in body).split())
    free = {part.split()[-1] for part in declared.replace("]", "] ").split(",")}
    held = {name: a for name, a in weights.items() if name in words - free}
    return build(f"g ({declared}) => ({outputs}) {{ {body} }}", **held)


def dense(
    body: str, declared: str = "float[N, 4] x", outputs: str = "float[] y", **weights: Array
) -> ir.Model:
    """Matrices w of [4, 8] and v of [8, 3], wt and vt transposed, and biases b and c."""
    held = {"w": normal(4, 8), "v": normal(8, 3), "b": normal(8), "c": normal(3), **weights}
    held = {"wt": held["w"].T, "vt": held["v"].T, **held}
    return net(body, declared, outputs, **held)


def images(body: str, declared: str = "float[N, 2, 6, 6] x", **weights: Array) -> ir.Model:
    """Kernels of 2 to 8 to 3 channels: w and v of 3x3, p and q of 1x1; biases b and c."""
    held = {
        "w": normal(8, 2, 3, 3),
        "v": normal(3, 8, 3, 3),
        "p": normal(8, 2, 1, 1),
        "q": normal(3, 8, 1, 1),
        "b": normal(8),
        "c": normal(3),
        **weights,
    }
    return net(body, declared, **held)


FIRST = [
    "h = MatMul(x, w)",
    "m = MatMul(x, w) h = Add(m, b)",
    "h = Gemm(x, w, b)",
    "h = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(x, wt, b)",
]
SECOND = [
    "y = MatMul(h, v)",
    "n = MatMul(h, v) y = Add(c, n)",
    "y = Gemm(h, v, c)",
    "y = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(h, vt, c)",
    "y = Gemm(h, v)",
]


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("first", FIRST)
def test_products_of_matrices(first: str, second: str) -> None:
    after, outcome = rewritten(dense(f"{first} {second}"), RULE)
    assert outcome.edits == 1
    has_bias = " b" in first or "c" in second.partition("(")[2]
    shift_in_matmul = second.startswith("y = MatMul") and " b" in first
    tail = ["Add"] if second.startswith("n = ") else []
    assert operators(after) == (["Gemm"] if "Gemm" in second or shift_in_matmul else ["MatMul"]) + tail
    assert sum(a.ndim == 1 for a in constants(after).values()) == has_bias


@pytest.mark.parametrize("kind", ["float16", "float", "double"])
def test_keeps_the_type_of_the_weights(kind: str) -> None:
    dtype = {"float16": np.float16, "float": np.float32, "double": np.float64}[kind]
    weights = {
        "w": normal(4, 8, dtype=dtype),
        "v": normal(8, 3, dtype=dtype),
        "b": normal(8, dtype=dtype),
        "c": normal(3, dtype=dtype),
    }
    body = "h = Gemm(x, w, b) y = Gemm(h, v, c)"
    after, _ = rewritten(dense(body, f"{kind}[N, 4] x", f"{kind}[] y", **weights), RULE)
    assert operators(after) == ["Gemm"]
    assert {a.dtype for a in constants(after).values()} == {np.dtype(dtype)}


def test_a_row_of_three() -> None:
    body = "h = Gemm(x, w, b) i = Gemm(h, k) y = Gemm(i, v, c)"
    after, outcome = rewritten(dense(body, k=normal(8, 8)), RULE)
    assert operators(after) == ["Gemm"]
    assert outcome.edits == 2


@pytest.mark.parametrize("bias", [(), (1,), (8,), (1, 8), (1, 1, 8)])
def test_batches_of_matrices(bias: tuple[int, ...]) -> None:
    body = "m = MatMul(x, w) h = Add(m, b) n = MatMul(h, v) y = Add(n, c)"
    after, _ = rewritten(dense(body, "float[N, 2, 4] x", b=normal(*bias)), RULE)
    assert operators(after) == ["MatMul", "Add"]


def test_batches_without_a_bias() -> None:
    after, _ = rewritten(dense("h = MatMul(x, w) y = MatMul(h, v)", "float[N, 2, 4] x"), RULE)
    assert operators(after) == ["MatMul"]


def test_the_second_bias_may_vary_along_other_axes() -> None:
    body = "h = Gemm(x, w, b) n = MatMul(h, v) y = Add(n, c)"
    after, _ = rewritten(dense(body, "float[2, 4] x", c=normal(2, 3)), RULE)
    assert operators(after) == ["MatMul", "Add"]


@st.composite
def windows(draw: st.DrawFn, dims: int, padded: bool) -> tuple[list[int], str]:
    """Kernel size, and the other attributes as text; padding up to what keeps the size."""
    axes = st.lists(st.integers(1, 2), min_size=dims, max_size=dims)
    kernel, strides, dilations = draw(axes), draw(axes), draw(axes)
    room = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
    begin = [draw(st.integers(0, n)) if padded else 0 for n in room]
    end = [draw(st.integers(0, n - b)) if padded else 0 for n, b in zip(room, begin, strict=True)]
    return kernel, f"strides = {strides}, dilations = {dilations}, pads = {begin + end}"


@given(st.data())
@settings(deadline=None, max_examples=40)
def test_a_window_and_then_a_single_tap(data: st.DataObject) -> None:
    """The first layer pads x itself: any padding and any bias will do."""
    dims, inputs, outputs = (data.draw(st.integers(1, 3)) for _ in range(3))
    kernel, window = data.draw(windows(dims, padded=True))
    middle = inputs + outputs
    weights = {"w": normal(middle, inputs, *kernel), "v": normal(outputs, middle, *[1] * dims)}
    weights |= {n: normal(size) for n, size in (("b", middle), ("c", outputs)) if data.draw(st.booleans())}
    body = f"h = Conv<{window}>(x, w{', b' * ('b' in weights)}) y = Conv(h, v{', c' * ('c' in weights)})"
    after, _ = rewritten(net(body, f"float[2, {inputs}{', 6' * dims}] x", **weights), RULE)
    assert operators(after) == ["Conv"]
    assert {a.ndim for a in constants(after).values()} == {dims + 2, *[1] * (len(weights) > 2)}


@given(st.data(), st.booleans())
@settings(deadline=None, max_examples=40)
def test_a_single_tap_and_then_a_window(data: st.DataObject, has_bias: bool) -> None:
    """A bias between the two is only where the second pads, which would show zeros instead."""
    dims, inputs, outputs = (data.draw(st.integers(1, 3)) for _ in range(3))
    kernel, window = data.draw(windows(dims, padded=not has_bias))
    middle = inputs + outputs
    weights = {"w": normal(middle, inputs, *[1] * dims), "v": normal(outputs, middle, *kernel)}
    weights |= {"b": normal(middle)} if has_bias else {}
    weights |= {"c": normal(outputs)} if data.draw(st.booleans()) else {}
    body = f"h = Conv(x, w{', b' * has_bias}) y = Conv<{window}>(h, v{', c' * ('c' in weights)})"
    after, _ = rewritten(net(body, f"float[2, {inputs}{', 6' * dims}] x", **weights), RULE)
    assert operators(after) == ["Conv"]


def test_a_bias_of_zero_passes_through_padding() -> None:
    body = "h = Conv(x, p, b) y = Conv<pads = [1, 1, 1, 1]>(h, v, c)"
    after, _ = rewritten(images(body, b=np.zeros(8, np.float32)), RULE)
    assert operators(after) == ["Conv"]


def test_the_window_moves_with_its_attributes() -> None:
    window = 'auto_pad = "SAME_UPPER", strides = [2, 2], kernel_shape = [3, 3]'
    body = f"h = Conv<{window}>(x, w, b) y = Conv<kernel_shape = [1, 1], pads = [0, 0, 0, 0]>(h, q)"
    after, _ = rewritten(images(body), RULE)
    (conv,) = after.graph
    assert attribute(conv, "auto_pad") == "SAME_UPPER"
    assert tuple(attribute(conv, "kernel_shape")) == (3, 3)
    assert attribute(conv, "pads") is None
    assert constants(after)["q"].shape == (3, 2, 3, 3)


def test_inside_a_subgraph() -> None:
    branch = "{{ h{0} = Gemm(x, w{0}, b) o{0} = Gemm(h{0}, v{0}, c) }}"
    text = (
        "g (float[N, 4] x, bool f) => (float[N, 3] y) { y = If (f) <"
        f"then_branch = t () => (float[N, 3] o1) {branch.format(1)},"
        f"else_branch = e () => (float[N, 3] o2) {branch.format(2)}> }}"
    )
    weights = {f"{name}{i}": normal(*shape) for name, shape in (("w", (4, 8)), ("v", (8, 3))) for i in (1, 2)}
    after, outcome = rewritten(build(text, **weights, b=normal(8), c=normal(3)), RULE)
    assert outcome.edits == 2
    assert [[n.op_type for n in g] for g in after.graph.subgraphs()] == [["Gemm"], ["Gemm"]]


def test_a_bottleneck_stays() -> None:
    """4 to 1 and to 3: 7 weights, where one layer would have 12."""
    model = dense("h = Gemm(x, w) y = Gemm(h, v)", w=normal(4, 1), v=normal(1, 3))
    assert refusal(model, RULE) == COSTS


def test_a_wider_bottleneck_goes() -> None:
    """4 to 2 and to 3: 14 weights, where one layer has 12."""
    model = dense("h = Gemm(x, w) y = Gemm(h, v)", w=normal(4, 2), v=normal(2, 3))
    assert operators(rewritten(model, RULE)[0]) == ["Gemm"]


def test_as_many_weights_are_no_gain() -> None:
    model = dense("h = Gemm(x, w) y = Gemm(h, v)", w=normal(4, 2), v=normal(2, 4))
    assert refusal(model, RULE) == COSTS


def test_a_narrow_kernel_and_then_a_point_stay() -> None:
    """2 to 1 through 3x3 and then to 8: 26 weights, where one layer would have 144."""
    model = images("h = Conv(x, w) y = Conv(h, q)", w=normal(1, 2, 3, 3), q=normal(8, 1, 1, 1))
    assert refusal(model, RULE) == COSTS


DENSE = [
    ("h = Gemm<transA = 1>(x, w) y = Gemm(h, v)", "float[4, N] x", "Gemm transposes its input"),
    ("h = Gemm(x, w) y = Gemm<transA = 1>(h, u)", "float[2, 4] x", "Gemm transposes its input"),
    ("h = Gemm(x, w) y = Gemm(h, v) z = Relu(h)", "float[N, 4] x", "the first layer has another user"),
    ("h = Gemm(x, w) y = Gemm(h, v) z = Gemm(h, v)", "float[N, 4] x", "the first layer has another user"),
    ("h = Gemm(x, w) y = MatMul(h, h)", "float[8, 4] x", "the first layer has another user"),
    ("h = Gemm(x, k) i = Relu(h) j = Gemm(i, k) y = Gemm(j, v)", "float[N, 8] x", "a weight is shared"),
    ("h = Gemm(x, w) y = Gemm(h, v)", "float[N, 4] x, float[4, 8] w", "weight is not constant"),
    ("h = Gemm(x, w) y = Gemm(h, v)", "float[N, 4] x, float[8, 3] v", "weight is not constant"),
    ("h = Gemm(x, w, b) y = Gemm(h, v)", "float[N, 4] x, float[8] b", "bias is not constant"),
    ("h = Gemm(x, w, r) y = Gemm(h, v)", "float[2, 4] x", "bias is not per channel"),
    ("h = Gemm(x, w, s) y = Gemm(h, v)", "float[8, 4] x", "bias is not per channel"),
    (
        "m = MatMul(x, w) h = Add(m, t) n = MatMul(h, v) y = Add(n, c)",
        "float[N, 4] x",
        "bias may change the rank of its data",
    ),
    (
        "m = MatMul(x, w) h = Add(m, b) y = MatMul(h, v)",
        "float[N, 2, 4] x",
        "MatMul without a bias is not known to be of rank 2",
    ),
]


@pytest.mark.parametrize(("body", "declared", "reason"), DENSE)
def test_conditions_on_matrices(body: str, declared: str, reason: str) -> None:
    outputs = "float[] y, float[] z" if "z =" in body else "float[] y"
    more = {"u": normal(2, 3), "k": normal(8, 8), "r": normal(2, 8), "s": normal(8, 1), "t": normal(1, 1, 8)}
    assert refusal(dense(body, declared, outputs, **more), RULE) == reason


def test_the_first_result_is_an_output() -> None:
    model = dense("h = Gemm(x, w) y = Gemm(h, v)", outputs="float[] y, float[] h")
    assert refusal(model, RULE) == "the first layer has another user"


def test_overflow() -> None:
    weights = {"w": np.full((4, 8), 1e30, np.float32), "v": np.full((8, 3), 1e30, np.float32)}
    assert refusal(dense("h = Gemm(x, w) y = Gemm(h, v)", **weights), RULE) == "folded weights would overflow"


def test_layers_in_different_graphs() -> None:
    body = (
        "h = Gemm(x, w) y = If (f) <"
        "then_branch = t () => (float[N, 3] o1) { o1 = Gemm(h, v) },"
        "else_branch = e () => (float[N, 3] o2) { o2 = Gemm(x, k) }>"
    )
    model = dense(body, "float[N, 4] x, bool f", k=normal(4, 3))
    assert refusal(model, RULE) == "the layers are in different graphs"


PADDED = "Conv<pads = [1, 1, 1, 1]>"
IMAGES = [
    (f"h = Conv(x, p, b) y = {PADDED}(h, v)", "padding would meet the shift"),
    (
        'h = Conv(x, p, b) y = Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>(h, v)',
        "padding would meet the shift",
    ),
    ("h = Conv(x, w) y = Conv(h, v)", POINTLESS),
    ("h = Conv<strides = [2, 2]>(x, p) y = Conv(h, v)", POINTLESS),
    (f"h = {PADDED}(x, p) y = Conv(h, v)", POINTLESS),
    ("h = Conv(x, w) y = Conv<strides = [2, 2]>(h, q)", POINTLESS),
    (f"h = Conv(x, w) y = {PADDED}(h, q)", POINTLESS),
    (f"h = Conv(x, p) y = {PADDED}(h, q)", "the second layer has more positions than the first"),
    ("h = Conv<group = 2>(x, d) y = Conv(h, q)", "grouped convolutions"),
    ("h = Conv(x, p) y = Conv<group = 8>(h, e)", "grouped convolutions"),
]


@pytest.mark.parametrize(("body", "reason"), IMAGES)
def test_conditions_on_convolutions(body: str, reason: str) -> None:
    assert refusal(images(body, d=normal(8, 1, 3, 3), e=normal(8, 1, 3, 3)), RULE) == reason


BODIES = [
    "h = Conv(x, w) y = Relu(h)",
    "h = Conv(x, w) i = Relu(h) y = Conv(i, q)",
    "h = Conv(x, p) y = ConvTranspose(h, k)",
    "h = Conv(x, p) a = Add(h, h) y = Conv(a, q)",
    "h = Conv(x, p) y = Conv(z, h)",  # as a kernel
    "h = MatMul(x, m) y = Conv(h, w)",  # one mixes the last axis, the other the second
    "h = Conv(x, w) y = MatMul(h, n)",
]


@pytest.mark.parametrize("body", BODIES)
def test_what_is_no_row_of_layers(body: str) -> None:
    weights = {"k": normal(8, 3, 1, 1), "m": normal(6, 6), "n": normal(4, 4)}
    declared = "float[N, 2, 6, 6] x" + (", float[1, 8, 9, 9] z" if "z" in body else "")
    assert refusal(images(body, declared, **weights), RULE) == ""
