"""merge-channels: copies and multiples leave, their readers read what stays, and what is held is named."""

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np
import onnx_ir as ir
import pytest
from channel_nets import Value, nets
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass
from rewrites import ConvCase, assert_equal, build, constants, convolutions, operators, refusal, rewritten
from zeroed_nets import BUILDERS, PIXELS, Zeroed

from edgewise.passes import merge_channels
from edgewise.passes.channel_copies import Copies
from edgewise.passes.channel_links import Slot
from edgewise.passes.channel_mixing import mixings
from edgewise.passes.channels import ChannelGraph
from edgewise.passes.graph import attribute
from edgewise.passes.merge_channels import MergeChannels
from edgewise.runtime.evaluate import Array, Evaluator, input_specs, seeded_feed
from edgewise.runtime.session import serialize

PASS = MergeChannels()
RNG = np.random.default_rng(0)


def floats(*shape: int) -> Array:
    return RNG.uniform(0.2, 1.0, shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def twins(array: Array, copy: float = 1, double: float = 2, negative: float = -1) -> Array:
    """Eight slices, of which 5 is a copy of 0, 6 is twice 1, and 7 the negative of 2."""
    found = array.copy()
    found[5], found[6], found[7] = copy * array[0], double * array[1], negative * array[2]
    return found


def equals(*shape: int) -> Array:
    """Parameters of eight channels that are equal where filters are multiples."""
    return twins(floats(*shape), 1, 1, 1)


ALL, POSITIVE, ODD, COPY = (5, 6, 7), (5, 6), (5, 7), (5,)


def net(
    middle: str, last: str = "y = Conv(b, w2, b2)", opset: int = 20, y: str = "float[] y", **weights: Array
) -> ir.Model:
    """x -> Conv with twins among eight filters -> `middle`, from a to b -> `last`, with the weights read."""
    held = {
        "w1": twins(floats(8, 3, 3, 3) - 0.5),
        "b1": twins(floats(8)),
        "w2": floats(4, 8, 1, 1),
        "b2": floats(4),
    }
    text = f"a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1) {middle} {last}"
    read = {name: array for name, array in {**held, **weights}.items() if re.search(rf"\b{name}\b", text)}
    return build(f"g (float[N, 3, 8, 8] x) => ({y}) {{ {text} }}", opset, **read)


def check_gone(model: ir.Model, gone: Collection[int]) -> ir.Model:
    """Just the filters `gone` of the first layer leave, and the others are what they were."""
    after, outcome = rewritten(model, PASS)
    stay = [i for i in range(8) if i not in gone]
    assert outcome.edits == len(gone)
    np.testing.assert_array_equal(constants(after)["w1"], constants(model)["w1"][stay])
    np.testing.assert_array_equal(constants(after)["b1"], constants(model)["b1"][stay])
    assert not outcome.refused
    return after


def widths(model: ir.Model) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in constants(model).items()}


def by_output(model: ir.Model, name: str) -> ir.Node:
    (node,) = [n for n in model.graph if n.outputs[0].name == name]
    return node


FUNCTIONS = {
    **dict.fromkeys(["Abs", "Dropout", "Identity", "Neg"], ALL),
    **dict.fromkeys(["LeakyRelu<alpha = 0.3>", "Relu"], POSITIVE),
    **dict.fromkeys(["Erf", "Softsign", "Tanh"], ODD),
    **dict.fromkeys(["Cast<to = 1>", "Celu<alpha = 0.5>", "Clip", "Cos", "Elu", "Exp", "Gelu"], COPY),
    **dict.fromkeys(["HardSigmoid", "HardSwish", "Mish", "Selu", "Sigmoid", "Softplus"], COPY),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_through_functions(function: str) -> None:
    after = check_gone(net(f"b = {function}(a)"), FUNCTIONS[function])
    assert widths(after)["w2"][1] == 8 - len(FUNCTIONS[function])


def test_columns_are_added() -> None:
    """Those of a copy, of a double, and of a negative."""
    model = net("b = Identity(a)")
    after = check_gone(model, ALL)
    w2 = constants(model)["w2"]
    expected = w2[:, :5].copy()
    expected[:, 0] += w2[:, 5]
    expected[:, 1] += 2 * w2[:, 6]
    expected[:, 2] -= w2[:, 7]
    np.testing.assert_allclose(constants(after)["w2"], expected, rtol=1e-7)
    np.testing.assert_array_equal(constants(after)["b2"], constants(model)["b2"])


GATE = "p = GlobalAveragePool(a) f = Conv(p, wf) e = Conv(f, we, be) s = Sigmoid(e) b = Mul(a, s)"
NORM = "b = BatchNormalization(a, s, t, m, v)"
PIXELS_PADDED = ints(0, 0, 1, 2, 0, 0, 0, 1)
BETWEEN = {
    "max pool": (POSITIVE, "b = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(a)", {}),
    "average pool": (ALL, "b = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(a)", {}),
    "global average": (ALL, "b = GlobalAveragePool(a)", {}),
    "global maximum": (POSITIVE, "b = GlobalMaxPool(a)", {}),
    "mean of pixels": (ALL, "b = ReduceMean<keepdims = 1>(a, axes)", {"axes": ints(2, 3)}),
    "sum of pixels": (ALL, "b = ReduceSum<keepdims = 1>(a, axes)", {"axes": ints(-1)}),
    "largest pixel": (POSITIVE, "b = ReduceMax<keepdims = 1>(a, axes)", {"axes": ints(2, 3)}),
    "length of pixels": (ALL, "b = ReduceL2<keepdims = 1>(a, axes)", {"axes": ints(2, 3)}),
    "sum of squares": (COPY, "b = ReduceSumSquare<keepdims = 1>(a, axes)", {"axes": ints(2, 3)}),
    "pad of pixels": (ALL, "b = Pad(a, p)", {"p": PIXELS_PADDED}),
    "pad of another number": (COPY, "b = Pad(a, p, o)", {"p": PIXELS_PADDED, "o": np.float32(1)}),
    "reflected": (ALL, 'b = Pad<mode = "reflect">(a, p)', {"p": PIXELS_PADDED}),
    "resize by scale": (ALL, 'b = Resize<mode = "linear">(a, , s)', {"s": np.float32([1, 1, 2, 2])}),
    "clip": (COPY, "b = Clip(a, low, high)", {"low": np.float32(-1), "high": np.float32(1)}),
    "swish": (COPY, "s = Sigmoid(a) b = Mul(a, s)", {}),
    "squared": (ALL, "b = Mul(a, a)", {}),
    "slopes": (POSITIVE, "b = PRelu(a, s)", {"s": equals(8, 1, 1)}),
    "one slope": (POSITIVE, "b = PRelu(a, s)", {"s": floats(1)}),
    "scale": (ALL, "b = Mul(a, s)", {"s": equals(8).reshape(1, 8, 1, 1)}),
    "scales that are twins": (ALL, "b = Mul(s, a)", {"s": twins(floats(8, 1, 1), -4, 0.5, -1)}),
    "one scale": (ALL, "b = Mul(a, s)", {"s": np.float32(3)}),
    "quotient": (ALL, "b = Div(a, s)", {"s": twins(floats(8, 1, 1))}),
    "power": (COPY, "b = Pow(a, two)", {"two": np.float32(2)}),
    "shift": (ALL, "b = Sub(s, a)", {"s": twins(floats(8, 1, 1))}),
    "one shift": (COPY, "b = Add(s, a)", {"s": np.float32(3)}),
    "shift by nothing": (ALL, "b = Add(a, s)", {"s": np.zeros((8, 1, 1), np.float32)}),
    "shift of pixels": (ALL, "b = Add(a, s)", {"s": twins(floats(8, 8, 8))}),
    "shift by one map": (COPY, "m = ReduceMean<axes = [1]>(x) b = Add(a, m)", {}),
    "no less than nothing": (POSITIVE, "b = Max(a, z)", {"z": np.zeros((8, 1, 1), np.float32)}),
    "choice": (COPY, "p = Greater(a, s) b = Where(p, a, s)", {"s": twins(floats(8, 1, 1))}),
    "sum and mean": (ALL, "c = Sum(a, a, s) b = Mean(a, c)", {"s": twins(floats(8, 1, 1))}),
    "transposed twice": (
        POSITIVE,
        "t = Transpose<perm = [0, 2, 3, 1]>(a) r = Relu(t) b = Transpose<perm = [0, 3, 1, 2]>(r)",
        {},
    ),
    "channels of pixels": (ALL, "u = Unsqueeze(a, one) s = Squeeze(u, one) b = Neg(s)", {"one": ints(1)}),
    "batch norm": (
        ALL,
        NORM,
        {"s": equals(8), "t": twins(floats(8)), "m": twins(floats(8)), "v": equals(8)},
    ),
    "batch norm with scales that are twins": (
        ALL,
        NORM,
        {"s": twins(floats(8)), "t": twins(floats(8), 1, 4, 1), "m": twins(floats(8)), "v": equals(8)},
    ),
    "batch norm with a shift": (COPY, NORM, {key: equals(8) for key in "stmv"}),
    "instance norm": (ODD, "b = InstanceNormalization(a, s, t)", {"s": equals(8), "t": twins(floats(8))}),
    "norm of pixels": (COPY, "b = LayerNormalization<axis = 3>(a, s)", {"s": floats(8)}),
    "softmax of pixels": (COPY, "s = Softmax<axis = 3>(a) b = Mul(s, a)", {}),
    "squeeze and excitation": (
        ALL,
        GATE,
        {"wf": floats(2, 8, 1, 1), "we": equals(8, 2, 1, 1), "be": equals(8)},
    ),
    "depthwise": (
        ALL,
        "b = Conv<group = 8, pads = [1, 1, 1, 1]>(a, wd, bd)",
        {"wd": equals(8, 1, 3, 3), "bd": twins(floats(8))},
    ),
    "depthwise with filters that are twins": (
        POSITIVE,
        "c = Conv<group = 8>(a, wd) b = Relu(c)",
        {"wd": twins(floats(8, 1, 3, 3), 1, 0.5, 1)},
    ),
    "transposed depthwise": (ALL, "b = ConvTranspose<group = 8>(a, wd)", {"wd": equals(8, 1, 2, 2)}),
    "selected": (ALL, "b = Gather<axis = 1>(a, i)", {"i": ints(7, 6, 5, 4, 3, 2, 1, -8)}),
    "joined with itself": (ALL, "b = Concat<axis = 1>(a, a)", {"w2": floats(4, 16, 1, 1)}),
    "joined with its transposed": (
        ALL,
        "t = Transpose<perm = [0, 1, 3, 2]>(a) b = Concat<axis = 1>(a, t)",
        {"w2": floats(4, 16, 1, 1)},
    ),
    "joined with another": (
        POSITIVE,
        "r = Relu(a) c = Conv<pads = [1, 1, 1, 1]>(x, wc) b = Concat<axis = 1>(c, r)",
        {"wc": floats(3, 3, 3, 3), "w2": floats(4, 11, 1, 1)},
    ),
    "joined in another axis": (
        COPY,
        "r = Relu(a) s = Sigmoid(a) b = Concat<axis = 2>(r, s)",
        {},
    ),
    "in space and in depth": (ALL, "b = SpaceToDepth<blocksize = 2>(a)", {"w2": floats(4, 32, 1, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_through(name: str) -> None:
    gone, middle, weights = BETWEEN[name]
    model = net(middle, opset=17 if "axes = [1]" in middle else 20, **weights)
    after = check_gone(model, gone)
    before = constants(model)["w2"].shape[1]
    assert constants(after)["w2"].shape[1] == before - len(gone) * (before // 8 if before % 8 == 0 else 1)


OLD = {
    "upsample": (9, ALL, "b = Upsample(a, s)", {"s": np.array([1, 1, 2, 2], np.float32)}),
    "clip": (10, COPY, "b = Clip<min = 0.0, max = 6.0>(a)", {}),
    "pad": (10, ALL, "b = Pad<pads = [0, 0, 1, 1, 0, 0, 1, 1], value = 0.0>(a)", {}),
    "pad of ones": (10, COPY, "b = Pad<pads = [0, 0, 1, 1, 0, 0, 1, 1], value = 1.0>(a)", {}),
}


@pytest.mark.parametrize("name", OLD)
def test_through_old_forms(name: str) -> None:
    opset, gone, middle, weights = OLD[name]
    check_gone(net(middle, opset=opset, **weights), gone)


def test_through_parts_of_the_channels() -> None:
    """Channel 7 is twice channel 4: both are in the second part."""
    first, bias = floats(8, 3, 3, 3), floats(8)
    first[7], bias[7] = 2 * first[4], 2 * bias[4]
    middle = "c, d = Split<axis = 1>(a, sizes) s = Sigmoid(c) r = Relu(d) b = Concat<axis = 1>(r, s)"
    after = check_gone(net(middle, w1=first, b1=bias, sizes=ints(3, 5)), [7])
    assert constants(after)["sizes"].tolist() == [3, 4]


def test_padding_of_channels() -> None:
    """Three channels of padding are as good as one."""
    after, outcome = rewritten(
        net("b = Pad(a, p)", p=ints(0, 2, 0, 0, 0, 1, 0, 0), w2=floats(4, 11, 1, 1)), PASS
    )
    assert outcome.edits == 5
    assert constants(after)["p"].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert widths(after)["w2"] == (4, 6, 1, 1)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space(mode: str) -> None:
    """Two channels of four each: where all four are alike, in order, the two are."""
    first, bias = floats(8, 3, 3, 3), floats(8)
    ones, others = ([0, 2, 4, 6], [1, 3, 5, 7]) if mode == "DCR" else ([0, 1, 2, 3], [4, 5, 6, 7])
    first[others], bias[others] = -first[ones], -bias[ones]
    middle = f'b = DepthToSpace<blocksize = 2, mode = "{mode}">(a)'
    after, outcome = rewritten(net(middle, w1=first, b1=bias, w2=floats(4, 2, 1, 1)), PASS)
    assert outcome.edits == 1
    np.testing.assert_array_equal(constants(after)["w1"], first[ones])


def test_shuffle_of_pairs() -> None:
    """A shuffle of two groups couples channels 0 and 4, 1 and 5: a pair leaves if it is like one."""
    first, bias = floats(8, 3, 3, 3), floats(8)
    first[[1, 5]], bias[[1, 5]] = 2 * first[[0, 4]], 2 * bias[[0, 4]]
    middle = "c = Reshape(a, apart) t = Transpose<perm = [0, 2, 1, 3, 4]>(c) b = Reshape(t, whole)"
    model = net(middle, w1=first, b1=bias, apart=ints(0, 2, 4, 8, 8), whole=ints(-1, 8, 8, 8))
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 1
    np.testing.assert_array_equal(constants(after)["w1"], first[[0, 2, 3, 4, 6, 7]])


def test_pairs_of_which_one_is_different_stay() -> None:
    first, bias = floats(8, 3, 3, 3), floats(8)
    first[1], bias[1] = first[0], bias[0]
    middle = "c = Reshape(a, apart) t = Transpose<perm = [0, 2, 1, 3, 4]>(c) b = Reshape(t, whole)"
    model = net(middle, w1=first, b1=bias, apart=ints(0, 2, 4, 8, 8), whole=ints(-1, 8, 8, 8))
    assert refusal(model, PASS) == ""


FLATTENED = {
    "flatten": ("b = Flatten(r)", {}),
    "reshape": ("b = Reshape(r, s)", {"s": ints(0, -1)}),
    "reshape to a size": ("b = Reshape(r, s)", {"s": ints(-1, 512)}),
    "pixels first": ("t = Transpose<perm = [0, 2, 3, 1]>(r) b = Reshape(t, s)", {"s": ints(-1, 512)}),
    "squeezed": ("p = GlobalAveragePool(r) b = Squeeze(p, s)", {"s": ints(2, 3)}),
    "averaged": ("b = ReduceMean<keepdims = 0>(r, s)", {"s": ints(2, 3)}),
}
DENSE = {
    "gemm": "y = Gemm(b, w, k)",
    "transposed gemm": "y = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(b, wt, k)",
    "matmul and bias": "m = MatMul(b, w) y = Add(m, k)",
}


@pytest.mark.parametrize("dense", DENSE)
@pytest.mark.parametrize("flat", FLATTENED)
def test_into_dense_layers(flat: str, dense: str) -> None:
    middle, weights = FLATTENED[flat]
    size = 8 if flat in ("squeezed", "averaged") else 512
    weight = floats(size, 4)
    held = {**weights, "w": weight, "wt": weight.T.copy(), "k": floats(4)}
    after = check_gone(net(f"r = Relu(a) {middle}", DENSE[dense], **held), POSITIVE)
    assert max(max(a.shape) for name, a in constants(after).items() if name in ("w", "wt")) == size * 6 // 8


@pytest.mark.parametrize(
    "layer",
    [
        "a = Gemm<alpha = 0.5, beta = 3.0>(x, w, k)",
        "a = Gemm<transB = 1>(x, wt, k)",
        "m = MatMul(x, w) a = Add(m, k)",
        "m = MatMul(x, w) a = Add(m, z)",
    ],
)
def test_out_of_dense_layers(layer: str) -> None:
    rows = twins(floats(8, 6) - 0.5)
    held = {
        "w": rows.T.copy(),
        "wt": rows,
        "k": twins(floats(8)),
        "z": np.zeros(8, np.float32),
        "v": floats(8, 4),
    }
    text = f"{layer} r = Relu(a) y = Gemm(r, v)"
    read = {name: array for name, array in held.items() if re.search(rf"\b{name}\b", text)}
    after, outcome = rewritten(build(f"g (float[N, 6] x) => (float[] y) {{ {text} }}", **read), PASS)
    assert outcome.edits == 2
    assert widths(after)["v"] == (6, 4)


def test_into_a_matmul_from_the_right() -> None:
    """Channels are rows, when the constant matrix is the first factor."""
    model = build(
        "g (float[N, 6, 5] x) => (float[] y) { m = MatMul(w1, x) a = Add(m, b1) b = Tanh(a) "
        "y = MatMul(w2, b) }",
        w1=twins(floats(8, 6) - 0.5),
        b1=twins(floats(8, 1)),
        w2=floats(3, 8),
    )
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 2
    assert widths(after) == {"w1": (6, 6), "b1": (6, 1), "w2": (3, 6)}


def test_into_dense_layers_over_tokens() -> None:
    """A feed-forward block on [N, tokens, features], whose features lie on the last axis."""
    model = build(
        "g (float[N, T, 6] x) => (float[] y) "
        "{ m = MatMul(x, w1) a = Add(m, b1) b = Gelu(a) o = MatMul(b, w2) y = Add(x, o) }",
        20,
        w1=twins(floats(8, 6) - 0.5).T.copy(),
        b1=twins(floats(8)),
        w2=floats(8, 6),
    )
    after, _ = rewritten(model, PASS)
    assert widths(after) == {"w1": (6, 7), "b1": (7,), "w2": (7, 6)}


def test_pixels_of_a_channel_are_told_apart() -> None:
    """Flattened, each pixel of a twin is like the same pixel of the other, and like no other pixel."""
    model = net("f = Flatten(a)", "y = Gemm(f, w)", w=floats(512, 4))
    (flat,) = [node.outputs[0] for node in model.graph if node.op_type == "Flatten"]
    alike = Copies.of(ChannelGraph.of(model.graph, 20)).known[Slot(flat, 1)]
    expected = np.arange(512)
    expected[5 * 64 :] = np.arange(3 * 64)
    np.testing.assert_array_equal(alike.like, expected)
    np.testing.assert_array_equal((alike.factors / alike.factors[alike.like])[5 * 64 :: 64], [1, 2, -1])


RESIDUAL = "c = Conv<pads = [1, 1, 1, 1]>(a, wr, br) s = Add(a, c) b = Relu(s)"


def test_a_residual_sum_of_terms_that_are_alike() -> None:
    model = net(RESIDUAL, wr=twins(floats(8, 8, 3, 3) - 0.5), br=twins(floats(8)))
    after = check_gone(model, POSITIVE)
    assert widths(after) | {"wr": (6, 6, 3, 3), "w2": (4, 6, 1, 1)} == widths(after)


def test_a_residual_sum_keeps_what_one_term_makes_different() -> None:
    assert refusal(net(RESIDUAL, wr=floats(8, 8, 3, 3), br=floats(8)), PASS) == ""


def test_every_reader_has_to_see_the_same() -> None:
    """One reader sees copies, the other sees them scaled."""
    middle = "d = Conv(a, wd) m = Mul(a, s) e = Conv(m, we) b = Concat<axis = 1>(d, e)"
    weights = {"wd": floats(4, 8, 1, 1), "we": floats(4, 8, 1, 1)}
    assert refusal(net(middle, s=floats(8, 1, 1), **weights), PASS) == ""
    after = check_gone(net(middle, s=twins(floats(8, 1, 1), -2, -2, -2), **weights), ALL)
    assert widths(after) | {"wd": (4, 5, 1, 1), "we": (4, 5, 1, 1)} == widths(after)


def test_a_cascade_goes_on_where_sums_of_columns_are_equal() -> None:
    """Two filters differ in the order of the columns that a copy was read by: added up they are equal."""
    middle = floats(6, 8, 1, 1)
    middle[1] = middle[0]
    middle[1, [0, 5]] = middle[0, [5, 0]]
    model = net("s = Sigmoid(a) c = Conv(s, wm) b = Relu(c)", wm=middle, w2=floats(4, 6, 1, 1))
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 2
    assert widths(after) | {"w1": (7, 3, 3, 3), "wm": (5, 7, 1, 1), "w2": (4, 5, 1, 1)} == widths(after)


def test_the_last_channel_stays() -> None:
    model = net("b = Relu(a)", w1=np.repeat(floats(1, 3, 3, 3), 8, 0), b1=np.repeat(floats(1), 8))
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 7
    assert not outcome.refused
    np.testing.assert_allclose(
        constants(after)["w2"], constants(model)["w2"].sum(1, keepdims=True), rtol=1e-6
    )


@pytest.mark.parametrize(("multiple", "left"), [(1, 5), (2, 6), (4, 8), (3, 6)])
def test_widths_that_kernels_like(multiple: int, left: int) -> None:
    after, _ = rewritten(net("b = Neg(a)"), MergeChannels(multiple))
    assert (widths(after)["w1"][0], widths(after)["w2"][1]) == (left, left)


def test_a_multiple_below_one() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        MergeChannels(0)


def test_grouped_convolution_loses_equal_parts() -> None:
    """Of either group one input and one output are twins of others in it."""
    first, bias = floats(8, 3, 3, 3), floats(8)
    first[[1, 7]], bias[[1, 7]] = 2 * first[[0, 4]], 2 * bias[[0, 4]]
    weight = floats(8, 4, 3, 3)
    weight[[3, 6]] = weight[[2, 5]]
    after = rewritten(net("c = Conv<group = 2>(a, wg) b = Relu(c)", w1=first, b1=bias, wg=weight), PASS)[0]
    np.testing.assert_array_equal(constants(after)["w1"], first[[0, 2, 3, 4, 5, 6]])
    grouped = by_output(after, "c")
    assert attribute(grouped, "group") == 2
    assert grouped.inputs[1].shape == (6, 3, 3, 3)
    assert widths(after)["w2"] == (4, 6, 1, 1)


def test_groups_that_read_the_same() -> None:
    """A depthwise layer with two outputs a channel: of a copy both are copies, in order."""
    weight = floats(8, 2, 1, 2, 2)
    weight = twins(weight, 1, 1, 1).reshape(16, 1, 2, 2)
    after = check_gone(net("b = Conv<group = 8>(a, wd)", wd=weight, w2=floats(4, 16, 1, 1)), ALL)
    assert widths(after) | {"wd": (10, 1, 2, 2), "w2": (4, 10, 1, 1)} == widths(after)


def test_weights_that_layers_share_stay_one() -> None:
    """Two branches of a siamese net: what both read with one weight, alike in both, leaves both."""
    text = "a = Conv(x, w1) b = Relu(a) e = Conv(b, w2) c = Conv(z, w1) d = Tanh(c) f = Conv(d, w2) "
    text += "y = Sub(e, f)"
    model = build(
        f"g (float[N, 3, 8, 8] x, float[N, 3, 8, 8] z) => (float[] y) {{ {text} }}",
        w1=twins(floats(8, 3, 3, 3) - 0.5),
        w2=floats(4, 8, 1, 1),
    )
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 1
    assert widths(after) == {"w1": (7, 3, 3, 3), "w2": (4, 7, 1, 1)}


def test_weights_that_layers_share_part_where_sums_differ() -> None:
    """What is twice as large in one branch is four times as large in the other."""
    text = "a = Conv(x, w1) c = Conv(x, w3) e = Conv(a, w2) f = Conv(c, w2) y = Sub(e, f)"
    model = build(
        f"g (float[N, 3, 8, 8] x) => (float[] y) {{ {text} }}",
        w1=twins(floats(8, 3, 3, 3)),
        w3=twins(floats(8, 3, 3, 3), 1, 4, 1),
        w2=floats(4, 8, 1, 1),
    )
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 6
    assert sorted(shape[1] for name, shape in widths(after).items() if name not in ("w1", "w3")) == [5, 5]


def test_weights_in_constant_nodes() -> None:
    model = build(
        "g (float[N, 3, 8, 8] x) => (float[] y) {"
        "w = Constant<value = float[2, 3, 1, 1] {3, 2, 1, -6, -4, -2}>() a = Conv(x, w) "
        "v = Constant<value = float[1, 2, 1, 1] {5, 1}>() y = Conv(a, v) }"
    )
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 1
    assert operators(after) == ["Conv", "Conv"]
    assert by_output(after, "y").inputs[1].const_value.numpy().ravel().tolist() == [3]


@pytest.mark.parametrize(("declared", "kind"), [("float16", np.float16), ("double", np.float64)])
def test_other_precisions(declared: str, kind: type) -> None:
    model = build(
        f"g ({declared}[N, 6] x) => ({declared}[] y) {{ a = MatMul(x, w1) b = Relu(a) y = Gemm(b, w2) }}",
        w1=twins(floats(8, 6).astype(kind)).T.copy(),
        w2=floats(8, 4).astype(kind),
    )
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 2
    assert {a.dtype for a in constants(after).values()} == {np.dtype(kind)}


def test_inside_a_branch() -> None:
    """Each graph of an If is worked on alone; weights may lie outside."""
    body = "c = Conv(x, w1, b1) d = Relu(c) {} = Conv(d, w2)"
    model = build(
        "g (bool c0, float[2, 3, 8, 8] x) => (float[] y) { y = If(c0) <"
        f"then_branch = g1 () => (float[2, 4, 6, 6] t) {{ {body.format('t')} }},"
        "else_branch = g2 () => (float[2, 4, 6, 6] e) { e = Conv(x, w3) }> }",
        w1=twins(floats(8, 3, 3, 3)),
        b1=twins(floats(8)),
        w2=floats(4, 8, 1, 1),
        w3=floats(4, 3, 3, 3),
    )
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 2
    assert after.graph.node(0).attributes["then_branch"].as_graph().node(0).outputs[0].shape[1] == 6


class Whole(Zeroed):
    """A net that keeps all of its filters."""

    def half(self, size: int) -> Array:
        return np.arange(0)


def widened(model: ir.Model) -> ir.Model:
    """Every channel twice, side by side, and every column halved (Net2WiderNet; Chen et al., 2016)."""
    wide = model.clone()
    graph = ChannelGraph.of(wide.graph, 17)
    groups = [group for group in graph.groups if not group.blocked.any()]
    arrays = {value: constants(wide)[name] for name, value in wide.graph.initializers.items()}
    for slot in (slot for group in groups for slot in group.members if slot.use is not None):
        arrays[slot.value] = np.repeat(arrays[slot.value], 2, slot.axis)
    for layer in mixings(graph).values():
        node = layer.node
        if graph.home[layer.source] in groups and len(layer.weight) > 1:
            node.attributes["group"] = ir.AttrInt64("group", 2 * len(layer.weight))
        elif graph.home[layer.source] in groups:
            arrays[node.inputs[1]] = arrays[node.inputs[1]] / 2
    for value, array in arrays.items():
        value.const_value, value.shape = ir.tensor(array, name=value.name), ir.Shape(array.shape)
    for value in (v for node in wide.graph for v in node.outputs if not v.is_graph_output()):
        value.shape = None
    return ShapeInferencePass()(wide).model


def parameters(model: ir.Model) -> int:
    return sum(array.size for array in constants(model).values())


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("name", BUILDERS)
def test_nets_of_twice_their_width_come_back(name: str, norms: bool) -> None:
    """To the last bit: halves of columns add up to the columns they were."""
    model = BUILDERS[name](Whole(np.random.default_rng(0), norms=norms), Value("x", 3, PIXELS))
    wide = widened(model)
    assert parameters(wide) > 2 * parameters(model)
    after, _ = rewritten(wide, PASS)
    feed = seeded_feed(input_specs(model), size=2)
    assert_equal(Evaluator(model).run(feed), Evaluator(wide).run(feed))
    for key, array in constants(model).items():
        np.testing.assert_array_equal(constants(after)[key], array)


@given(convolutions(), st.sampled_from(["Sigmoid", "Relu", "Neg"]), st.integers(0, 2**16))
@settings(max_examples=30)
def test_any_convolution(case: ConvCase, function: str, seed: int) -> None:
    """Between layers of kernel one: any rank, kernel, stride, dilation, padding, groups, and transposed."""
    rng = np.random.default_rng(seed)
    weights = dict(case.weights)
    deep = case.weights["w"].shape[1 if case.operator == "ConvTranspose" else 0]
    origin, factors = rng.integers(0, deep, deep), rng.choice([1, 2, -1], deep)
    axis = int(case.operator == "ConvTranspose")
    weights["w"] = scaled(weights["w"], origin, factors, axis)
    if "b" in weights and axis == 0:
        weights["b"] = scaled(weights["b"], origin, factors, 0)
    pointwise = (1,) * case.dims
    inner = rng.integers(0, case.inputs, case.inputs)
    front, back = (
        rng.standard_normal((*shape, *pointwise)) for shape in ((case.inputs, 2), (3, case.outputs))
    )
    front, back = front.astype(np.float32), back.astype(np.float32)
    front = scaled(front, inner, rng.choice([1, -4], case.inputs), 0)
    text = f"p = Conv(x, f) c = {case.text.format('p')} r = {function}(c) y = Conv(r, k)"
    model = build(f"g ({case.declared(2)} x) => (float[] y) {{ {text} }}", f=front, k=back, **weights)
    rewritten(model, PASS)


def scaled(array: Array, origin: Array, factors: Array, axis: int) -> Array:
    """Along an axis slice k is `factors[k]` times what slice `origin[k]` was."""
    shape = [-1 if i == axis else 1 for i in range(array.ndim)]
    return (array.take(origin, axis) * factors.reshape(shape)).astype(array.dtype)


OUTPUT_AXIS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0, "MatMul": 1}  # of the random nets' weights


def twinned(model: ir.Model, rng: np.random.Generator) -> ir.Model:
    """Every layer gets filters that are multiples of others, other parameters are equal for the same ones."""
    origins, factors = {}, {}
    for size in range(1, 64):
        origins[size] = np.where(rng.random(size) < 0.5, rng.integers(0, size, size), np.arange(size))
        factors[size] = rng.choice([1, 1, 2, -1], size)
    for node in model.graph:
        layer = node.op_type in OUTPUT_AXIS and not node.outputs[0].is_graph_output()
        for value in (v for v in node.inputs if v is not None and v.const_value is not None):
            array = value.const_value.numpy()
            axis = (
                OUTPUT_AXIS[node.op_type] if layer and array.ndim > 1 else int(np.argmax(array.shape or [0]))
            )
            if (
                array.dtype != np.float32
                or array.ndim == 0
                or (array.size != array.shape[axis] and not layer)
            ):
                continue
            size = array.shape[axis]
            given = factors[size] if layer else np.ones(size)
            if size in origins:
                value.const_value = ir.tensor(scaled(array, origins[size], given, axis), name=value.name)
    return model


@given(nets(), st.integers(0, 2**16))
@settings(max_examples=40)
def test_random_nets(model: ir.Model, seed: int) -> None:
    rewritten(twinned(model, np.random.default_rng(seed)), PASS)


@given(nets(), st.integers(0, 2**16))
@settings(max_examples=30)
def test_what_is_said_to_be_alike_is(model: ir.Model, seed: int) -> None:
    """In every value of a net, whether or not anything could be merged for it."""
    twinned(model, np.random.default_rng(seed))
    model.graph.outputs.extend(v for n in model.graph for v in n.outputs if not v.is_graph_output())
    values = Evaluator(model, optimize=False).run(seeded_feed(input_specs(model), size=2))
    for slot, alike in Copies.of(ChannelGraph.of(model.graph, 18)).known.items():
        slices = np.moveaxis(values[str(slot.value.name)].astype(np.float64), slot.axis, -1)
        expected = slices[..., alike.like] * (alike.factors / alike.factors[alike.like])
        np.testing.assert_allclose(slices, expected, rtol=1e-4, atol=1e-5 * np.abs(slices).max())


def fed(
    middle: str, given: str, last: str = "y = Conv(b, w2)", outputs: str = "float[] y", **weights: Array
) -> ir.Model:
    """As `net`, with a second graph input."""
    text = f"a = Conv(x, w1, b1) {middle} {last}"
    held = {"w1": twins(floats(8, 3, 3, 3)), "b1": twins(floats(8)), "w2": floats(4, 8, 1, 1), **weights}
    read = {name: array for name, array in held.items() if re.search(rf"\b{name}\b", text)}
    return build(f"g (float[N, 3, 8, 8] x, {given}) => ({outputs}) {{ {text} }}", 20, **read)


ANY = "float[?, ?, ?, ?] y"
BRANCHES = "y = If(c0) <then_branch = g1 () => (float[] t) { t = Conv(a, w2) }, "
BRANCHES += "else_branch = g2 () => (float[] e) { e = Conv(x, w3) }>"
BESIDE = "d = Conv(s, wd) e = Conv(a, we) b = Concat<axis = 1>(d, e)"
BESIDE_WEIGHTS = {"wd": floats(4, 8, 1, 1), "we": floats(4, 8, 1, 1)}
ONE_TWIN = {"w1": floats(8, 3, 3, 3), "b1": floats(8)}
ONE_TWIN["w1"][1], ONE_TWIN["b1"][1] = ONE_TWIN["w1"][0], ONE_TWIN["b1"][0]

REFUSED = [
    ("graph output", net("", "y = Relu(a)", y=ANY)),
    ("graph output", net("b = Relu(a)", y="float[] y, float[] b")),
    ("Softmax", net("b = Softmax<axis = 1>(a)")),
    ("Softmax", net(f"s = Softmax<axis = 1>(a) {BESIDE}", **BESIDE_WEIGHTS)),
    ("LayerNormalization", net("b = LayerNormalization<axis = 1>(a, s)", s=floats(8, 8, 8))),
    (
        "GroupNormalization",
        net("b = GroupNormalization<num_groups = 2>(a, s, s)", opset=21, y=ANY, s=floats(8)),
    ),
    ("LpNormalization", net("b = LpNormalization<axis = 1>(a)")),
    ("ReduceMax", net("b = ReduceMax(a, i)", i=ints(1), w2=floats(4, 1, 1, 1))),
    ("ArgMax", net("b = ArgMax<axis = 1>(a)", "y = Identity(b)", y="int64[?, ?, ?, ?] y")),
    ("Slice", net("b = Slice(a, i, j, k, l)", i=ints(7), j=ints(-9), k=ints(1), l=ints(-1))),
    ("control flow", fed("", "bool c0", BRANCHES, w3=floats(4, 3, 3, 3))),
    ("shared weight", net("b = Relu(a) k = Size(w1)")),
    ("weight is not constant", fed("b = Conv(a, k)", "float[8, 8, 1, 1] k")),
    ("Slice with computed starts", fed("b = Slice(a, s, s)", "int64[4] s")),
    (
        "groups of a Conv would become unequal",
        net("b = Conv<group = 2>(a, wg)", wg=floats(8, 4, 1, 1), **ONE_TWIN),
    ),
    (
        "merged weights would overflow",
        build(
            "g (float16[N, 6] x) => (float16[] y) { a = MatMul(x, w) y = MatMul(a, v) }",
            w=np.repeat(floats(1, 6), 2, 0).T.astype(np.float16),
            v=np.full((2, 3), 60000, np.float16),
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "model"), REFUSED)
def test_refused(reason: str, model: ir.Model) -> None:
    assert refusal(model, PASS) == reason


def test_every_channel_that_is_held_is_counted_once() -> None:
    _, outcome = rewritten(net("b = Relu(a)", y="float[] y, float[] a, float[] b"), PASS)
    assert dict(outcome.refused) == {"graph output": 2}


def nudged(array: Array, *index: int) -> Array:
    """The array with one number changed in its last bit."""
    found = array.copy()
    found[index] = np.nextafter(found[index], np.inf)
    return found


BASE, BASE_BIAS = twins(floats(8, 3, 3, 3), 1, 3, 5), twins(floats(8), 1, 3, 5)
ONLY_NEGATIVE = {"w1": twins(floats(8, 3, 3, 3), 3, 3, -1), "b1": twins(floats(8), 3, 3, -1)}
ONLY_DOUBLE = {"w1": twins(floats(8, 3, 3, 3), 3, 2, 3), "b1": twins(floats(8), 3, 2, 3)}
ROWS = build(
    "g (float[3, 6] x) => (float[] y) { a = Gemm(x, w, k) y = MatMul(a, v) }",
    w=twins(floats(8, 6)).T.copy(),
    k=twins(floats(8, 3)).T.copy(),
    v=floats(8, 4),
)

SILENT = {
    "an opset before 7": net("b = Relu(a)", opset=6),
    "nothing is alike": net("b = Relu(a)", w1=floats(8, 3, 3, 3), b1=floats(8)),
    "a bias differs in its last bit": net("b = Relu(a)", w1=BASE, b1=nudged(BASE_BIAS, 5)),
    "a weight differs in its last bit": net("b = Relu(a)", w1=nudged(BASE, 5, 2, 2, 2), b1=BASE_BIAS),
    "no bias but on one": net("b = Relu(a)", w1=BASE, b1=np.float32([0, 0, 0, 0, 0, 1, 0, 0])),
    "a factor of three": net("b = Neg(a)", w1=twins(BASE, 3, 3, 3), b1=twins(BASE_BIAS, 3, 3, 3)),
    "a negative behind Relu": net("b = Relu(a)", **ONLY_NEGATIVE),
    "a double behind Tanh": net("b = Tanh(a)", **ONLY_DOUBLE),
    "slopes": net("b = PRelu(a, s)", s=floats(8, 1, 1)),
    "scales": net("b = Mul(a, s)", s=floats(8, 1, 1)),
    "shifts": net("b = Add(a, s)", s=floats(8, 1, 1)),
    "maps that are added": net("b = Add(a, s)", s=floats(8, 8, 8)),
    "norms": net("b = BatchNormalization(a, s, t, m, v)", s=floats(8), t=floats(8), m=floats(8), v=equals(8)),
    "depthwise filters": net("b = Conv<group = 8>(a, wd)", wd=floats(8, 1, 3, 3)),
    "groups": net("b = Conv<group = 2>(a, wg)", wg=floats(8, 4, 1, 1)),
    "groups of equal filters": net(
        "b = Conv<group = 2>(a, wg)", wg=np.tile(floats(4, 4, 1, 1), (2, 1, 1, 1)), w1=floats(8, 3, 3, 3)
    ),
    "a term of a sum": fed("b = Add(a, z)", "float[N, 8, 6, 6] z"),
    "a bias of rows": ROWS,
    "integers": build(
        "g (int32[N, 6] x) => (int32[] y) { a = MatMul(x, w) y = MatMul(a, v) }",
        w=np.ones((6, 8), np.int32),
        v=np.ones((8, 4), np.int32),
    ),
    "no numbers": net("b = Relu(a)", w1=np.full((8, 3, 3, 3), np.nan, np.float32)),
}  # fmt: skip


@pytest.mark.parametrize("name", SILENT)
def test_nothing_to_merge(name: str) -> None:
    assert refusal(SILENT[name], PASS) == ""


@pytest.mark.parametrize("last", ["y = Conv(b, w2, b2)", "y = ConvTranspose(b, w3)"])
def test_large_weights_are_added_up_piece_by_piece(last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net("b = Relu(a)", last, w3=floats(8, 4, 2, 2))
    whole, _ = rewritten(model, PASS)
    monkeypatch.setattr(merge_channels, "_BLOCK", 1)
    pieces, _ = rewritten(model, PASS)
    assert serialize(pieces) == serialize(whole)
