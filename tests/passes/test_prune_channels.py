"""prune-channels: what is zero, constant or unread leaves wherever it stands, and what must stay is named."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from channel_nets import nets
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import ConvCase, build, constants, convolutions, operators, refusal, rewritten
from zeroed_nets import zeroed

from edgewise.passes.graph import attribute
from edgewise.passes.prune_channels import ChannelCount, PruneChannels, removable_channels
from edgewise.runtime.evaluate import Array

PASS = PruneChannels()
RNG = np.random.default_rng(0)
ZERO = [1, 4, 5]  # of the eight channels of `a`
LIVE = [0, 2, 3, 6, 7]


def floats(*shape: int) -> Array:
    return RNG.uniform(0.2, 1.0, shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def half_zero(outputs: int = 8, inputs: int = 3, kernel: int = 3, zero: list[int] = ZERO) -> Array:
    weight = floats(outputs, inputs, kernel, kernel)
    weight[zero] = 0
    return weight


def vector(size: int = 8, zero: list[int] = ZERO) -> Array:
    numbers = floats(size)
    numbers[zero] = 0
    return numbers


def net(
    middle: str, last: str = "y = Conv(b, w2, b2)", opset: int = 20, y: str = "float[] y", **weights: Array
) -> ir.Model:
    """x -> Conv with five live filters of eight -> `middle`, from a to b -> `last`, with the weights read."""
    held = {"w1": half_zero(), "b1": vector(), "w2": floats(4, 8, 1, 1), "b2": floats(4), **weights}
    text = f"a = Conv<pads = [1, 1, 1, 1]>(x, w1, b1) {middle} {last}"
    read = {name: array for name, array in held.items() if re.search(rf"\b{name}\b", text)}
    return build(f"g (float[N, 3, 8, 8] x) => ({y}) {{ {text} }}", opset, **read)


def widths(model: ir.Model) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in constants(model).items()}


def by(operator: str, model: ir.Model) -> ir.Node:
    (node,) = [n for n in model.graph if n.op_type == operator]
    return node


UNARY = [
    "Abs", "Cast<to = 1>", "Celu<alpha = 0.5>", "Clip", "Dropout", "Elu", "Erf", "Exp", "Gelu",
    'Gelu<approximate = "tanh">', "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Mish", "Neg", "Relu",
    "Selu", "Sigmoid", "Softplus", "Softsign", "Tanh",
]  # fmt: skip


@pytest.mark.parametrize("function", UNARY)
def test_through_functions(function: str) -> None:
    after, outcome = rewritten(net(f"b = {function}(a)"), PASS)
    assert outcome.edits == 3
    assert not outcome.refused
    assert widths(after) == {"w1": (5, 3, 3, 3), "b1": (5,), "w2": (4, 5, 1, 1), "b2": (4,)}


BETWEEN = {
    "max pool": ("b = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(a)", {}),
    "average pool": ("b = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(a)", {}),
    "global average": ("b = GlobalAveragePool(a)", {}),
    "global maximum": ("b = GlobalMaxPool(a)", {}),
    "mean of pixels": ("b = ReduceMean<keepdims = 1>(a, axes)", {"axes": ints(2, 3)}),
    "sum of pixels": ("b = ReduceSum<keepdims = 1>(a, axes)", {"axes": ints(-1)}),
    "pad of pixels": ("b = Pad(a, p)", {"p": ints(0, 0, 1, 2, 0, 0, 0, 1)}),
    "reflected": ('b = Pad<mode = "reflect">(a, p)', {"p": ints(0, 0, 1, 2, 0, 0, 0, 1)}),
    "resize by scale": (
        'b = Resize<mode = "nearest">(a, , s)',
        {"s": np.array([1, 1, 2, 2], np.float32)},
    ),
    "resize of axes": (
        'b = Resize<mode = "linear", axes = [2, 3]>(a, , , s)',
        {"s": ints(5, 9)},
    ),
    "clip": ("b = Clip(a, low, high)", {"low": np.float32(0), "high": np.float32(6)}),
    "swish": ("s = Sigmoid(a) b = Mul(a, s)", {}),
    "hard swish written out": (
        "t = Add(a, three) c = Clip(t, low, six) m = Mul(a, c) b = Div(m, six)",
        {"three": np.float32(3), "low": np.float32(0), "six": np.float32(6)},
    ),
    "slope": ("b = PRelu(a, s)", {"s": floats(8, 1, 1)}),
    "one slope": ("b = PRelu(a, s)", {"s": floats(1)}),
    "scale": ("b = Mul(a, s)", {"s": floats(1, 8, 1, 1)}),
    "quotient": ("b = Div(a, s)", {"s": floats(8, 1, 1)}),
    "power": ("b = Pow(a, two)", {"two": np.float32(2)}),
    "shift": ("b = Sub(s, a)", {"s": floats(1, 8, 1, 1)}),
    "shift of pixels": ("m = Mul(a, s) b = Relu(m)", {"s": floats(8, 8, 8)}),
    "extremes": ("c = Max(a, s) b = Min(c, a)", {"s": floats(8, 1, 1)}),
    "choice": ("p = Greater(a, s) b = Where(p, a, a)", {"s": floats(8, 1, 1)}),
    "twice": ("b = Add(a, a)", {}),
    "sum and mean": ("c = Sum(a, a, s) b = Mean(a, c)", {"s": floats(8, 1, 1)}),
    "scalar": ("b = Mul(a, s)", {"s": np.float32(3)}),
    "transposed twice": (
        "t = Transpose<perm = [0, 2, 3, 1]>(a) r = Relu(t) b = Transpose<perm = [0, 3, 1, 2]>(r)",
        {},
    ),
    "channels of pixels": ("u = Unsqueeze(a, one) s = Squeeze(u, one) b = Relu(s)", {"one": ints(1)}),
    "batch norm": (
        "b = BatchNormalization(a, s, t, m, v)",
        {"s": floats(8), "t": floats(8), "m": floats(8), "v": floats(8)},
    ),
    "instance norm": ("b = InstanceNormalization(a, s, t)", {"s": floats(8), "t": floats(8)}),
    "softmax of pixels": ("s = Softmax<axis = 3>(a) b = Mul(s, a)", {}),
    "squeeze and excitation": (
        "p = GlobalAveragePool(a) f = Conv(p, wf) e = Conv(f, we, be) s = Sigmoid(e) b = Mul(a, s)",
        {"wf": floats(2, 8, 1, 1), "we": floats(8, 2, 1, 1), "be": floats(8)},
    ),
    "depthwise": (
        "b = Conv<group = 8, pads = [1, 1, 1, 1]>(a, wd, bd)",
        {"wd": floats(8, 1, 3, 3), "bd": floats(8)},
    ),
    "transposed depthwise": ("b = ConvTranspose<group = 8>(a, wd)", {"wd": floats(8, 1, 2, 2)}),
    "selected": ("b = Gather<axis = 1>(a, i)", {"i": ints(7, 6, 5, 4, 3, 2, 1, -8)}),
    "split and joined": (
        "c, d = Split<axis = 1>(a, sizes) b = Concat<axis = 1>(d, c)",
        {"sizes": ints(3, 5)},
    ),
    "halved and joined": (
        "c, d = Split<axis = 1, num_outputs = 2>(a) r = Relu(c) b = Concat<axis = 1>(d, r)",
        {},
    ),
    "shuffled": (
        "c = Reshape(a, four) t = Transpose<perm = [0, 2, 1, 3, 4]>(c) b = Reshape(t, one)",
        {"four": ints(0, 8, 1, 8, 8), "one": ints(-1, 8, 8, 8)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_through(name: str) -> None:
    middle, weights = BETWEEN[name]
    after, outcome = rewritten(net(middle, **weights), PASS)
    assert outcome.edits > 0
    assert widths(after)["w1"] == (5, 3, 3, 3)
    assert widths(after)["w2"] == (4, 5, 1, 1)
    assert all(
        8 not in array.shape[:2] for key, array in constants(after).items() if key[0] == "w" and key != "we"
    )
    assert not outcome.refused


def test_through_a_reshape_to_a_computed_shape() -> None:
    """Where the shape leaves the channels to be inferred, nothing has to be edited in it."""
    middle = "s = Shape(a) n = Gather(s, first) t = Concat<axis = 0>(n, rest) b = Reshape(a, t)"
    model = net(middle, first=ints(0), rest=ints(-1, 8, 8))
    by("Reshape", model).outputs[0].shape = ir.Shape(["N", 8, 8, 8])
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 3
    assert widths(after)["w2"] == (4, 5, 1, 1)


OLD = {
    "upsample": (9, "b = Upsample(a, s)", {"s": np.array([1, 1, 2, 2], np.float32)}),
    "resize": (10, "b = Resize(a, s)", {"s": np.array([1, 1, 2, 2], np.float32)}),
    "clip": (10, "b = Clip<min = 0.0, max = 6.0>(a)", {}),
    "pad": (10, "b = Pad<pads = [0, 0, 1, 1, 0, 0, 1, 1], value = 0.0>(a)", {}),
    "squeeze": (11, "u = Unsqueeze<axes = [1]>(a) b = Squeeze<axes = [1]>(u)", {}),
    "mean": (17, "b = ReduceMean<axes = [2, 3]>(a)", {}),
    "split": (12, "c, d = Split<axis = 1>(a) b = Concat<axis = 1>(c, d)", {}),
    "slice": (9, "c = Slice<axes = [1], starts = [0], ends = [1000]>(a) b = Relu(c)", {}),
}


@pytest.mark.parametrize("name", OLD)
def test_through_old_forms(name: str) -> None:
    opset, middle, weights = OLD[name]
    after, outcome = rewritten(net(middle, opset=opset, **weights), PASS)
    assert outcome.edits == 3
    assert widths(after)["w2"] == (4, 5, 1, 1)


def test_split_says_its_sizes_once_they_differ() -> None:
    after, _ = rewritten(net("c, d = Split<axis = 1, num_outputs = 2>(a) b = Concat<axis = 1>(c, d)"), PASS)
    split = by("Split", after)
    assert "num_outputs" not in split.attributes
    assert [v.shape[1] for v in split.outputs] == [3, 2]


def test_sizes_of_a_resize_follow() -> None:
    resize = 'b = Resize<mode = "linear">(a, , , s)'
    model = build(
        f"g (float[2, 3, 8, 8] x) => (float[] y) {{ a = Conv(x, w1) {resize} y = Conv(b, w2) }}",
        w1=half_zero(),
        w2=floats(4, 8, 1, 1),
        s=ints(2, 8, 12, 12),
    )
    after, _ = rewritten(model, PASS)
    assert constants(after)["s"].tolist() == [2, 5, 12, 12]


def test_a_window_follows() -> None:
    """Channels 2 to 6 are taken, and 0: nothing reads 7, and with 1 before the window it moves."""
    weights = {"s": ints(2), "e": ints(7), "one": ints(1), "none": ints(0), "w2": floats(4, 6, 1, 1)}
    middle = "c = Slice(a, s, e, one) d = Slice(a, none, one, one) b = Concat<axis = 1>(c, d)"
    after, outcome = rewritten(net(middle, **weights), PASS)
    assert outcome.edits == 4
    assert (constants(after)["s"].tolist(), constants(after)["e"].tolist()) == ([1], [4])
    assert widths(after) | {"w1": (4, 3, 3, 3), "w2": (4, 4, 1, 1)} == widths(after)


def test_padding_of_channels_becomes_narrower() -> None:
    """Zeros around the channels are as good as zero channels."""
    weights = {"p": ints(0, 2, 0, 0, 0, 1, 0, 0), "w2": floats(4, 11, 1, 1)}
    after, _ = rewritten(net("b = Pad(a, p)", **weights), PASS)
    assert constants(after)["p"].tolist() == [0] * 8
    assert widths(after)["w2"] == (4, 5, 1, 1)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space(mode: str) -> None:
    """Channel 1 of two leaves: the four that it is made of are zero."""
    zero = [1, 3, 5, 7] if mode == "DCR" else [4, 5, 6, 7]
    middle = f'b = DepthToSpace<blocksize = 2, mode = "{mode}">(a)'
    weights = {"w1": half_zero(zero=zero), "b1": vector(zero=zero), "w2": floats(4, 2, 1, 1)}
    after, outcome = rewritten(net(middle, **weights), PASS)
    assert outcome.edits == 1
    assert (widths(after)["w1"][0], widths(after)["w2"][1]) == (4, 1)


def test_space_to_depth() -> None:
    after, outcome = rewritten(net("b = SpaceToDepth<blocksize = 2>(a)", w2=floats(4, 32, 1, 1)), PASS)
    assert outcome.edits == 3
    assert widths(after)["w2"] == (4, 20, 1, 1)


def test_depthwise_with_several_outputs_a_channel() -> None:
    weights = {"wd": floats(16, 1, 3, 3), "bd": floats(16), "w2": floats(4, 16, 1, 1)}
    after, _ = rewritten(net("b = Conv<group = 8>(a, wd, bd)", **weights), PASS)
    assert widths(after) | {"wd": (10, 1, 3, 3), "bd": (10,), "w2": (4, 10, 1, 1)} == widths(after)
    (depthwise,) = [n for n in after.graph if attribute(n, "group")]
    assert attribute(depthwise, "group") == 5


FLATTENED = {
    "flatten": ("b = Flatten(a)", {}),
    "reshape": ("b = Reshape(a, s)", {"s": ints(0, -1)}),
    "reshape to a size": ("b = Reshape(a, s)", {"s": ints(-1, 512)}),
    "pixels first": ("t = Transpose<perm = [0, 2, 3, 1]>(a) b = Reshape(t, s)", {"s": ints(-1, 512)}),
    "squeezed": ("p = GlobalAveragePool(a) b = Squeeze(p, s)", {"s": ints(2, 3)}),
    "averaged": ("b = ReduceMean<keepdims = 0>(a, s)", {"s": ints(2, 3)}),
}
DENSE = {
    "gemm": "y = Gemm(b, w, k)",
    "transposed gemm": "y = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(b, wt, k)",
    "gemm without bias": "y = Gemm(b, w)",
    "matmul": "y = MatMul(b, w)",
    "matmul and bias": "m = MatMul(b, w) y = Add(m, k)",
}


@pytest.mark.parametrize("dense", DENSE)
@pytest.mark.parametrize("flat", FLATTENED)
@pytest.mark.parametrize("function", ["Relu", "Sigmoid"])
def test_into_dense_layers(flat: str, dense: str, function: str) -> None:
    """Relu keeps zeros, Sigmoid makes them constants of one half, which go into the bias."""
    middle, weights = FLATTENED[flat]
    size = 8 if flat in ("squeezed", "averaged") else 512
    weight = floats(size, 4)
    middle = f"f = {function}(a) " + middle.replace("(a", "(f")
    after, outcome = rewritten(
        net(middle, DENSE[dense], **weights, w=weight, wt=weight.T.copy(), k=floats(4)), PASS
    )
    assert outcome.edits == 3
    assert (
        max(max(a.shape, default=0) for name, a in constants(after).items() if name in ("w", "wt"))
        == size * 5 // 8
    )
    assert operators(after).count("Add") == (
        dense == "matmul and bias" or (dense == "matmul" and function == "Sigmoid")
    )


def test_constants_go_into_the_bias() -> None:
    """Filters of zero with a bias: relu(b) times the consumer's weights is added to the consumer's bias."""
    bias = np.array([1, 2, 3, 4, -5, 6, 7, 8], np.float32)
    model = net("b = Relu(a)", b1=bias)
    after, outcome = rewritten(model, PASS)
    w2, b2 = (constants(model)[n] for n in ("w2", "b2"))
    assert outcome.edits == 3
    np.testing.assert_allclose(constants(after)["b2"], b2 + w2[:, [1, 5], 0, 0] @ [2.0, 6.0], rtol=1e-6)


UNEVEN = {
    "padded": ("y = Conv<pads = [1, 1, 1, 1]>(b, k, b2)", (4, 8, 3, 3), (4, 6, 3, 3)),
    "padded on one side": (
        "y = Conv<pads = [0, 2, 0, 0], strides = [2, 1]>(b, k)",
        (4, 8, 2, 3),
        (4, 6, 2, 3),
    ),
    "as large as its input": ('y = Conv<auto_pad = "SAME_LOWER">(b, k)', (4, 8, 3, 2), (4, 6, 3, 2)),
    "transposed": ("y = ConvTranspose<strides = [2, 2]>(b, k)", (8, 4, 3, 3), (6, 4, 3, 3)),
}


@pytest.mark.parametrize("name", UNEVEN)
@pytest.mark.parametrize("function", ["Sigmoid", "Elu", "Softplus"])
def test_one_constant_stands_for_all_where_the_border_differs(name: str, function: str) -> None:
    """Three filters are zero, with biases of their own: what they give differs, but each is a multiple."""
    last, shape, narrow = UNEVEN[name]
    weights = {"b1": floats(8) * np.where(np.arange(8) == 4, -1, 1).astype(np.float32), "k": floats(*shape)}
    after, outcome = rewritten(net(f"b = {function}(a)", last, **weights), PASS)
    assert outcome.edits == 2
    assert widths(after)["k"] == narrow
    assert dict(outcome.refused) == {
        "ConvTranspose would spread a constant unevenly"
        if name == "transposed"
        else "padding would meet a constant": 1
    }


def test_the_largest_constant_stands_for_all() -> None:
    """A small one would have to carry large weights, and its own rounding error with them."""
    bias = vector()
    bias[ZERO] = 1e-6, 1000, -2
    after, _ = rewritten(net("", "y = Conv<pads = [1, 1, 1, 1]>(a, w2)", b1=bias), PASS)
    assert constants(after)["b1"].tolist() == bias[[0, 2, 3, 4, 6, 7]].tolist()


def test_zeros_need_no_stand_in() -> None:
    after, outcome = rewritten(net("b = Relu(a)", "y = Conv<pads = [1, 1, 1, 1]>(b, w2)"), PASS)
    assert outcome.edits == 3
    assert not outcome.refused
    assert widths(after)["w2"] == (4, 5, 1, 1)


NEVER = {
    "relu": ("b = Relu(d)", {}),
    "clip": ("b = Clip(d, l, h)", {"l": np.float32(0), "h": np.float32(6)}),
    "hard sigmoid": ("b = HardSigmoid(d)", {}),
    "hard swish": ("b = HardSwish(d)", {}),
    "maximum": ("b = Max(d, l)", {"l": np.float32(0)}),
}


@pytest.mark.parametrize("name", NEVER)
def test_filters_that_never_fire(name: str) -> None:
    """All weights negative on what a Relu gives, and the bias as well: zero for every input."""
    middle, weights = NEVER[name]
    negative = floats(8, 8, 1, 1)
    negative[ZERO] *= -1
    bias = floats(8)
    bias[ZERO] -= 9
    weights |= {"w1": floats(8, 3, 3, 3), "b1": floats(8), "wn": negative, "bn": bias}
    after, outcome = rewritten(net(f"r = Relu(a) d = Conv(r, wn, bn) {middle}", **weights), PASS)
    assert outcome.edits == 3
    assert widths(after) | {"wn": (5, 8, 1, 1), "w2": (4, 5, 1, 1)} == widths(after)


def test_filters_that_always_saturate() -> None:
    """Between 0 and 255 no pixel brings these below six, which goes into the bias of the next layer."""
    weight, bias = floats(8, 3, 1, 1), floats(8)
    bias[ZERO] = 7
    body = "c = Cast<to = 1>(x) a = Conv(c, w, k) b = Clip(a, l, h) y = Conv(b, v)"
    model = build(
        f"g (uint8[N, 3, 8, 8] x) => (float[] y) {{ {body} }}",
        20, w=weight, k=bias, l=np.float32(0), h=np.float32(6), v=floats(4, 8, 1, 1),
    )  # fmt: skip
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 3
    assert widths(after)["v"] == (4, 5, 1, 1)


def test_a_filter_that_may_fire_stays() -> None:
    negative = -floats(8, 8, 1, 1)
    negative[:, 0] = 0.001
    model = net(
        "r = Relu(a) d = Conv(r, wn, bn) b = Relu(d)",
        wn=negative,
        bn=-floats(8),
        w1=floats(8, 3, 3, 3),
        b1=floats(8),
    )
    assert refusal(model, PASS) == ""


def test_kept_for_width() -> None:
    """Three channels could leave of eight; a width of five is none that kernels like."""
    _, outcome = rewritten(net("b = Relu(a)"), PruneChannels(4))
    assert outcome.edits == 0
    assert dict(outcome.refused) == {"kept so that widths stay multiples of 4": 3}
    after, outcome = rewritten(net("b = Relu(a)"), PruneChannels(2))
    assert (outcome.edits, dict(outcome.refused)) == (2, {"kept so that widths stay multiples of 2": 1})
    assert widths(after)["w2"] == (4, 6, 1, 1)


def test_a_layer_without_bias_gains_one() -> None:
    after, _ = rewritten(net("b = Sigmoid(a)", "y = Conv(b, w2)"), PASS)
    assert len(by_output(after, "y").inputs) == 3


def by_output(model: ir.Model, name: str) -> ir.Node:
    (node,) = [n for n in model.graph if n.outputs[0].name == name]
    return node


def test_constants_out_of_a_dense_layer() -> None:
    """Rows of zero: what comes out is beta times the bias."""
    first = floats(6, 8)
    first[:, ZERO] = 0
    model = build(
        "g (float[N, 6] x) => (float[] y) { a = Gemm<alpha = 0.5, beta = 3.0>(x, w, k) y = Gemm(a, v) }",
        w=first,
        k=floats(8),
        v=floats(8, 4),
    )
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 3
    assert widths(after)["v"] == (5, 4)


def test_into_a_matmul_from_the_right() -> None:
    """Constants of rows, when the constant matrix is the first factor."""
    model = build(
        "g (float[N, 6, 5] x) => (float[] y) { a = MatMul(w1, x) b = Sigmoid(a) y = MatMul(w2, b) }",
        w1=np.where(np.arange(8)[:, None] % 2, floats(8, 6), 0).astype(np.float32),
        w2=floats(3, 8),
    )
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 4
    assert widths(after)["w1"] == (4, 6)
    assert widths(after)["w2"] == (3, 4)
    assert operators(after) == ["MatMul", "Sigmoid", "MatMul", "Add"]


def test_into_dense_layers_over_tokens() -> None:
    """A feed-forward block on [N, tokens, features], whose features lie on the last axis."""
    weights = {"w1": floats(6, 8), "b1": vector(), "w2": floats(8, 6)}
    weights["w1"][:, ZERO] = 0
    model = build(
        "g (float[N, T, 6] x) => (float[] y) "
        "{ m = MatMul(x, w1) a = Add(m, b1) b = Gelu(a) o = MatMul(b, w2) y = Add(x, o) }",
        20,
        **weights,
    )
    after, _ = rewritten(model, PASS)
    assert widths(after) == {"w1": (6, 5), "b1": (5,), "w2": (5, 6)}


def test_into_an_embedding() -> None:
    """Features that are zero for every token leave the table."""
    table = floats(10, 8)
    table[:, ZERO] = 0
    model = build(
        "g (int64[N, T] x) => (float[] y) { a = Gather(table, x) y = MatMul(a, w) }",
        table=table,
        w=floats(8, 4),
    )
    after, _ = rewritten(model, PASS)
    assert widths(after) == {"table": (10, 5), "w": (5, 4)}


def test_batch_norm_with_scale_and_shift_zero() -> None:
    """Nothing is zero before the norm; the filters in front of it are unread."""
    weights = {"s": vector(), "t": vector(), "m": floats(8), "v": floats(8)}
    model = net(
        "n = BatchNormalization(a, s, t, m, v) b = Relu(n)", w1=floats(8, 3, 3, 3), b1=floats(8), **weights
    )
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 3
    assert widths(after)["w1"] == (5, 3, 3, 3)
    assert widths(after)["v"] == (5,)


def test_unread_channels_leave_with_what_only_they_need() -> None:
    """Nothing reads channels 2 and 3 of b, so two filters go; then nothing reads channel 0 of a."""
    middle_weight = floats(6, 8, 1, 1)
    middle_weight[[0, 1, 4, 5], 0] = 0
    last = floats(4, 6, 1, 1)
    last[:, 2:4] = 0
    model = net("b = Conv(a, wm)", w1=floats(8, 3, 3, 3), b1=floats(8), wm=middle_weight, w2=last)
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 3
    assert widths(after) | {"w1": (7, 3, 3, 3), "wm": (4, 7, 1, 1), "w2": (4, 4, 1, 1)} == widths(after)


def test_multiplied_by_zero() -> None:
    """A mask on channels makes them zero whatever they were, and so unread in front of it."""
    after, _ = rewritten(
        net("b = Mul(a, k)", w1=floats(8, 3, 3, 3), b1=floats(8), k=vector().reshape(8, 1, 1)), PASS
    )
    assert widths(after)["w1"] == (5, 3, 3, 3)


RESIDUAL = "c = Conv<pads = [1, 1, 1, 1]>(a, wr, br) s = Add(a, c) b = Relu(s)"


def test_a_residual_sum_loses_what_is_zero_in_all_its_terms() -> None:
    weights = {"wr": half_zero(8, 8, zero=[1, 2, 4]), "br": vector(zero=[1, 2, 4])}
    after, outcome = rewritten(net(RESIDUAL, **weights), PASS)
    assert outcome.edits == 2
    assert widths(after) | {"w1": (6, 3, 3, 3), "wr": (6, 6, 3, 3), "w2": (4, 6, 1, 1)} == widths(after)


def test_a_residual_sum_keeps_what_one_term_brings() -> None:
    assert refusal(net(RESIDUAL, wr=floats(8, 8, 3, 3), br=floats(8)), PASS) == ""


def test_a_cascade_reaches_the_front() -> None:
    """Dead filters at the end of a chain make those before them unread, layer by layer."""
    last = floats(4, 8, 1, 1)
    last[:, 1:] = 0
    eye = np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1)
    chain = "c = Conv(a, i1) d = Relu(c) e = Conv(d, i2) b = Relu(e)"
    model = net(chain, w1=floats(8, 3, 3, 3), b1=floats(8), i1=eye, i2=eye, w2=last)
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 21
    assert widths(after)["w1"] == (1, 3, 3, 3)


def test_what_stays_keeps_its_numbers() -> None:
    """Nobody reads any channel of b. One has to stay, and with it all that it is computed from."""
    last = np.zeros((4, 8, 1, 1), np.float32)
    model = net("b = Conv(a, wm)", w1=floats(8, 3, 3, 3), b1=floats(8), wm=floats(8, 8, 1, 1), w2=last)
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 7
    assert widths(after)["wm"] == (1, 8, 1, 1)


def test_what_stays_for_an_early_reader_keeps_its_numbers() -> None:
    """Of the sum nobody reads channel 0; in front of it somebody does, so both of its terms stay whole."""
    last = floats(4, 8, 1, 1)
    last[:, 0] = 0
    term = np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1)
    middle = (
        "e = Conv(a, we) h = Conv<pads = [1, 1, 1, 1]>(x, w1) t = Conv(h, wt) s = Add(a, t) d = Conv(s, w2)"
    )
    weights = {"w1": floats(8, 3, 3, 3), "b1": floats(8), "we": floats(4, 8, 1, 1), "wt": term, "w2": last}
    assert refusal(net(middle, "y = Add(d, e)", **weights), PASS) == ""


def test_the_last_channel_stays() -> None:
    model = net("b = Relu(a)", w1=half_zero(zero=list(range(8))), b1=floats(8))
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 7
    assert dict(outcome.refused) == {"graph input": 3}, "which nothing reads either"
    assert widths(after)["w1"] == (1, 3, 3, 3)


@pytest.mark.parametrize(("multiple", "left"), [(1, 5), (2, 6), (4, 8), (3, 6)])
def test_widths_that_kernels_like(multiple: int, left: int) -> None:
    after, _ = rewritten(net("b = Relu(a)"), PruneChannels(multiple))
    assert (widths(after)["w1"][0], widths(after)["w2"][1]) == (left, left)


def test_a_multiple_below_one() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PruneChannels(0)


@pytest.mark.parametrize("whole", [[0, 1], []])
def test_grouped_convolution_loses_whole_groups_and_equal_parts(whole: list[int]) -> None:
    """Four groups of two: groups that are dead on both sides go, of the others one input each."""
    zero = [0, 1, 3, 4, 6] if whole else [1, 2, 5, 6]
    weight = floats(8, 2, 3, 3)
    weight[whole] = 0
    model = net(
        "c = Conv<group = 4>(a, wg) b = Relu(c)", w1=half_zero(zero=zero), b1=vector(zero=zero), wg=weight
    )
    after, _ = rewritten(model, PASS)
    grouped = by_output(after, "c")
    assert widths(after)["w1"][0] == (3 if whole else 4)
    assert attribute(grouped, "group") == (3 if whole else 4)
    assert grouped.inputs[1].shape == ((6, 1, 3, 3) if whole else (8, 1, 3, 3))


def test_vectors_that_layers_share_part() -> None:
    """Two layers read one bias; only one of them loses channels."""
    model = net("c = Conv(a, w, b1) b = Relu(c)", w=floats(8, 8, 1, 1))
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 3
    assert sorted(a.shape for a in constants(after).values() if a.ndim == 1) == [(4,), (5,), (8,)]


def test_weights_that_layers_share_stay_one() -> None:
    """Both branches lose the same filters, because their weight is the same."""
    model = net("c = Conv<pads = [1, 1, 1, 1]>(x, w1, b1) b = Add(a, c)")
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 3
    assert widths(after)["w1"] == (5, 3, 3, 3)
    assert sum(name.startswith("w1") for name in constants(after)) == 1


def test_weights_in_constant_nodes() -> None:
    model = build(
        "g (float[N, 3, 8, 8] x) => (float[] y) {"
        "w = Constant<value = float[2, 3, 1, 1] {0, 0, 0, 1, 2, 3}>() a = Conv(x, w) y = Conv(a, v) }",
        v=floats(4, 2, 1, 1),
    )
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 1
    assert operators(after) == ["Conv", "Conv"]


@pytest.mark.parametrize(("declared", "kind"), [("float16", np.float16), ("double", np.float64)])
def test_other_precisions(declared: str, kind: type) -> None:
    first = floats(6, 8)
    first[:, ZERO] = 0
    model = build(
        f"g ({declared}[N, 6] x) => ({declared}[] y) {{ a = MatMul(x, w1) b = Sigmoid(a) y = Gemm(b, w2) }}",
        w1=first.astype(kind),
        w2=floats(8, 4).astype(kind),
    )
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 3
    assert {a.dtype for a in constants(after).values()} == {np.dtype(kind)}


def test_inside_a_branch() -> None:
    """Each graph of an If is pruned on its own; weights may lie outside."""
    body = "c = Conv(x, w1, b1) d = Relu(c) {} = Conv(d, w2)"
    model = build(
        "g (bool c0, float[2, 3, 8, 8] x) => (float[] y) { y = If(c0) <"
        f"then_branch = g1 () => (float[2, 4, 6, 6] t) {{ {body.format('t')} }},"
        "else_branch = g2 () => (float[2, 4, 6, 6] e) { e = Conv(x, w3) }> }",
        w1=half_zero(),
        b1=vector(),
        w2=floats(4, 8, 1, 1),
        w3=floats(4, 3, 3, 3),
    )
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 3
    assert after.graph.node(0).attributes["then_branch"].as_graph().node(0).outputs[0].shape[1] == 5


@given(convolutions(), st.integers(0, 2**16))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_any_convolution(case: ConvCase, seed: int) -> None:
    """Between layers of kernel one: any rank, kernel, stride, dilation, padding, groups, and transposed."""
    rng = np.random.default_rng(seed)
    weights = {name: array.copy() for name, array in case.weights.items()}
    dead = rng.random(case.outputs) < 0.5
    for name, array in weights.items():
        if name == "b" or case.operator == "Conv":
            array[dead] = 0
    pointwise = (1,) * case.dims
    front, back = floats(case.inputs, 2, *pointwise), floats(3, case.outputs, *pointwise)
    front[rng.random(case.inputs) < 0.5] = 0
    text = f"p = Conv(x, f) c = {case.text.format('p')} r = Sigmoid(c) y = Conv(r, k)"
    model = build(f"g ({case.declared(2)} x) => (float[] y) {{ {text} }}", f=front, k=back, **weights)
    rewritten(model, PASS)


@given(nets())
@settings(deadline=None, derandomize=True, max_examples=60)
def test_random_nets(model: ir.Model) -> None:
    rewritten(model, PASS)


# What is provably removable of nets that have lost the first half of all filters, or any half of each layer.
# Residual sums lose a channel only if all their terms do: hence less of ResNet where halves are unrelated.
REMOVED = {
    ("resnet", True): 70,
    ("resnet", False): 45,
    ("mobilenet", True): 60,
    ("mobilenet", False): 60,
    ("c2f", True): 55,
    ("c2f", False): 55,
    ("squeeze", True): 55,
    ("squeeze", False): 55,
    ("unet", True): 70,
    ("unet", False): 70,
    ("densenet", True): 70,
    ("densenet", False): 70,
}  # percent of parameters


def parameters(model: ir.Model) -> int:
    return sum(array.size for array in constants(model).values())


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("name", "first"), REMOVED)
def test_nets_with_half_of_their_filters(name: str, first: bool, norms: bool) -> None:
    model = zeroed(name, first=first, norms=norms)
    after, _ = rewritten(model, PASS)
    removed = 100 * (1 - parameters(after) / parameters(model))
    assert removed >= REMOVED[name, first], removed


def fed(
    middle: str, given: str, last: str = "y = Conv(b, w2)", outputs: str = "float[] y", **weights: Array
) -> ir.Model:
    """As `net`, with a second graph input."""
    text = f"a = Conv(x, w1, b1) {middle} {last}"
    held = {"w1": half_zero(), "b1": vector(), "w2": floats(4, 8, 1, 1), **weights}
    read = {name: array for name, array in held.items() if re.search(rf"\b{name}\b", text)}
    return build(f"g (float[N, 3, 8, 8] x, {given}) => ({outputs}) {{ {text} }}", 20, **read)


SIGMOID = "b = Sigmoid(a)"
SINGLE = {"w1": half_zero(zero=[1]), "b1": vector(zero=[1])}
UNPADDED = "y = ConvTranspose(b, w3)"
PARAMETERS = {"s": floats(8), "t": floats(8), "m": floats(8), "v": floats(8)}
TWICE = "c = Conv<group = 2>(a, wg) d = Conv<group = 2>(a, wg) b = Add(c, d)"
BRANCHES = "y = If(c0) <then_branch = g1 () => (float[] t) { t = Conv(a, w2) }, "
BRANCHES += "else_branch = g2 () => (float[] e) { e = Conv(x, w3) }>"
ANY = "float[?, ?, ?, ?] y"
UNREAD = floats(2, 3, 1, 1) * np.array([0, 1, 1], np.float32).reshape(1, 3, 1, 1)

REFUSED = [
    ("Softmax", net("b = Softmax<axis = 1>(a)")),
    ("Softmax", net("b = Softmax<axis = 1>(a)", opset=12)),
    ("Softmax", net("b = Softmax<axis = 0>(a)", opset=12)),
    ("LRN", net("b = LRN<size = 3>(a)")),
    ("ArgMax", net("b = Relu(a) m = ArgMax<axis = 1>(b)")),
    ("ReduceMax", net("b = ReduceMax<axes = [1]>(a)", "y = Conv(b, w2)", 17, w2=floats(4, 1, 1, 1))),
    ("LayerNormalization", net("b = LayerNormalization<axis = 1>(a, s)", s=floats(8, 8, 8))),
    (
        "GroupNormalization",
        net("b = GroupNormalization<num_groups = 2>(a, s, t)", opset=21, y=ANY, **PARAMETERS),
    ),
    ("graph output", net("y = Relu(a)", "")),
    ("graph input", build("g (float[N, 3, 4, 4] x) => (float[] y) { y = Conv(x, w) }", w=UNREAD)),
    ("control flow", fed("", "bool c0", BRANCHES, w3=floats(4, 3, 3, 3))),
    ("Reshape", net("b = Reshape(a, s)", "y = Relu(b)", s=ints(-1, 8, 8))),
    ("Reshape to a computed shape", fed("b = Reshape(a, s)", "int64[4] s")),
    ("Shape", net("b = Relu(a) s = Shape(a) k = Neg(s)")),
    ("Shape", net("b = Relu(a) s = Shape(a) k = Gather(s, i) j = Neg(k)", i=ints(-3))),
    ("Shape", net("b = Relu(a) s = Shape<start = 1>(a) k = Gather(s, i) j = Neg(k)", i=ints(0))),
    ("Shape", net("b = Relu(a) s = Shape(a)", y="float[] y, int64[4] s")),
    ("Pad", net("b = Pad(a, p)", p=ints(0, 1, 0, 0, 0, -1, 0, 0))),
    ("Add", fed("b = Add(a, z)", "float[?, ?, ?, ?] z")),
    ("shared weight", net("b = Relu(a) k = Size(w1)")),
    ("shared weight", net(TWICE, wg=floats(8, 4, 1, 1))),
    ("weight is not constant", fed("b = Conv(a, k)", "float[8, 8, 1, 1] k")),
    ("bias is not constant", fed("b = Conv(a, w, k)", "float[8] k", w=floats(8, 8, 1, 1))),
    ("parameter is not constant", fed("b = BatchNormalization(a, s, t, m, k)", "float[8] k", **PARAMETERS)),
    (
        "BatchNormalization in training mode",
        net("b, i, j = BatchNormalization<training_mode = 1>(a, s, t, m, v)", **PARAMETERS),
    ),
    ("Dropout mask is read", net("b, k = Dropout(a) n = Not(k)")),
    ("Dropout in training mode", net("b = Dropout(a, r, t)", r=np.float32(0.5), t=np.array(True))),
    ("MaxPool indices are read", net("b, i = MaxPool<kernel_shape = [2, 2]>(a) j = Neg(i)")),
    (
        "LayerNormalization statistics are read",
        net("b, i = LayerNormalization<axis = 3>(a, s) j = Neg(i)", s=floats(8)),
    ),
    ("padding would meet a constant", net(SIGMOID, "y = Conv<pads = [1, 0, 0, 0]>(b, w2)", **SINGLE)),
    (
        "padding would meet a constant",
        net(SIGMOID, 'y = Conv<auto_pad = "SAME_UPPER">(b, w2)', w2=floats(4, 8, 3, 3), **SINGLE),
    ),
    (
        "ConvTranspose would spread a constant unevenly",
        net(SIGMOID, UNPADDED, w3=floats(8, 4, 2, 2), **SINGLE),
    ),
    (
        "padding would meet a constant",
        net("s = Sigmoid(a) b = Conv<group = 2, pads = [1, 1, 1, 1]>(s, wd)", wd=floats(8, 4, 3, 3)),
    ),
    (
        "padding would meet a constant",
        net(
            f"{SIGMOID} c = Conv<pads = [1, 1, 1, 1]>(b, w3)",
            "d = Conv(b, w3) y = Flatten(d) z = Flatten(c)",
            y="float[] y, float[] z",
            w3=floats(4, 8, 3, 3),
        ),
    ),
    ("grouped ConvTranspose", net("b = ConvTranspose<group = 2>(a, w3)", w3=floats(8, 4, 2, 2))),
    (
        "groups of a Conv would become unequal",
        net(
            "b = Conv<group = 2>(a, wg)",
            w1=half_zero(zero=[0, 1]),
            b1=vector(zero=[0, 1]),
            wg=floats(8, 4, 1, 1),
        ),
    ),
    ("MatMul of a value and itself", net("b = MatMul(a, a)")),
    (
        "bias is not per channel",
        net("f = Flatten(a) y = Gemm(f, w, k)", "", w=floats(512, 1), k=floats(1, 4)),
    ),
    ("Squeeze without axes", net("p = GlobalAveragePool(a) b = Squeeze(p)", "y = Relu(b)", y=ANY)),
    (
        "Resize with a region of interest",
        net(
            'b = Resize<coordinate_transformation_mode = "tf_crop_and_resize">(a, r, s)',
            r=np.array([0, 0, 0, 0, 1, 1, 1, 1], np.float32),
            s=np.array([1, 1, 2, 2], np.float32),
        ),
    ),
    (
        "Resize that keeps the aspect ratio",
        net('b = Resize<axes = [2, 3], keep_aspect_ratio_policy = "not_larger">(a, , , s)', s=ints(4, 6)),
    ),
    ("Resize by a computed scale", fed("b = Resize(a, , s)", "float[4] s")),
    ("Resize to a computed size", fed("b = Resize(a, , , s)", "int64[4] s")),
    ("Pad with computed pads", fed("b = Pad(a, s)", "int64[8] s")),
    ("Slice with computed starts", fed("b = Slice(a, s, s)", "int64[4] s")),
    ("ReduceSum with computed axes", fed("b = ReduceSum(a, s)", "int64[2] s", outputs=ANY)),
]


@pytest.mark.parametrize(("reason", "model"), REFUSED)
def test_refused(reason: str, model: ir.Model) -> None:
    assert refusal(model, PASS) == reason


def test_refused_without_shapes() -> None:
    model = net("b = Relu(a)")
    by("Relu", model).outputs[0].shape = None
    assert refusal(model, PASS) == "shape is unknown"


def test_refused_where_a_computed_shape_may_name_the_channels() -> None:
    model = fed("t = Concat<axis = 0>(n, c, hw) b = Reshape(a, t)", "int64[1] c", n=ints(-1), hw=ints(6, 6))
    by("Reshape", model).outputs[0].shape = ir.Shape(["N", 8, 6, 6])
    assert refusal(model, PASS) == "Reshape"


SILENT = {
    "an opset before 7": net("b = Relu(a)", opset=6),
    "nothing is zero": net("b = Relu(a)", w1=floats(8, 3, 3, 3), b1=floats(8)),
    "zero filters of a live sum": net("b = Add(a, x1)", x1=floats(1, 1, 8, 8)),
    "a function that is not known": net("b = Cos(a)"),
    "zero over an unknown": net("s = Sigmoid(x) r = ReduceMean<axes = [1]>(s) b = Div(a, r)", opset=17),
    "an average over padding": net(
        "s = Sigmoid(a) b = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1>(s)"
    ),
    "a pad of another number": net("s = Sigmoid(a) b = Pad(s, p)", p=ints(0, 0, 1, 1, 0, 0, 1, 1)),
    "numbers that are rounded": net("s = Sigmoid(a) b = Round(s)"),
    "numbers that are cut off": net("s = Sigmoid(a) i = Cast<to = 7>(s) b = Cast<to = 1>(i)"),
    "a weight that is no number": net("b = Relu(a)", w1=half_zero() * np.float32(np.nan)),
}


@pytest.mark.parametrize("name", SILENT)
def test_nothing_to_remove(name: str) -> None:
    """Channels that an output depends on, as far as anybody can tell: no edit and no refusal."""
    assert refusal(SILENT[name], PASS) == ""


def test_counts_of_channels() -> None:
    """Three filters are zero; Sigmoid makes constants of them; of the second layer nobody reads one."""
    last = floats(4, 8, 1, 1)
    last[:, 0] = 0
    model = net("s = Sigmoid(a) b = Conv(s, w)", w=floats(8, 8, 1, 1), w2=last)
    assert removable_channels(model) == (
        ChannelCount("a", 1, 8, zero=3, constant=0, unread=0, removable=3),
        ChannelCount("s", 1, 8, zero=0, constant=3, unread=0, removable=3),
        ChannelCount("b", 1, 8, zero=0, constant=0, unread=1, removable=1),
    )
    assert removable_channels(SILENT["nothing is zero"]) == ()
