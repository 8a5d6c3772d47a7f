"""Ranges of channels: what runs lies in them, and what they decide is decided with a margin."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from channel_nets import nets
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import build

from edgewise.passes.channel_bounds import Bounds, Range
from edgewise.passes.channel_mixing import mixings
from edgewise.passes.channels import ChannelGraph
from edgewise.runtime.evaluate import Array, Evaluator, input_specs, seeded_feed

OPSET = 20


def bounds_of(model: ir.Model, opset: int = OPSET) -> Bounds:
    graph = ChannelGraph.of(model.graph, opset)
    return Bounds.of(graph, mixings(graph))


def all_values(model: ir.Model, feed: dict[str, Array]) -> dict[str, Array]:
    """Everything that a run computes, by name."""
    open_ = model.clone()
    for node in open_.graph:
        open_.graph.outputs.extend(v for v in node.outputs if v.name and not v.is_graph_output())
    return Evaluator(open_, optimize=False).run(feed)


@given(nets(), st.sampled_from([0.0, 1.0, 30.0]), st.integers(0, 2**16))
@settings(max_examples=60)
def test_whatever_runs_lies_in_its_range(model: ir.Model, size: float, seed: int) -> None:
    feed = {k: np.float32(size) * a for k, a in seeded_feed(input_specs(model), seed=seed).items()}
    values, bounds = all_values(model, feed), bounds_of(model, 18)
    for slot, (low, high) in bounds.known.items():
        array = values[slot.value.name or ""]
        slices = np.moveaxis(array, slot.axis, 0).reshape(array.shape[slot.axis], -1)
        assert (slices.min(1) >= low).all(), (slot.value.name, slices.min(1) - low)
        assert (slices.max(1) <= high).all(), (slot.value.name, slices.max(1) - high)


def range_of(
    middle: str, opset: int = OPSET, declared: str = "float[N, 2, 4, 4] x", **weights: Array
) -> Range:
    """The range of y's two channels, which a layer makes narrow and another one reads."""
    one = np.ones((2, 2, 1, 1), np.float32)
    model = build(f"g ({declared}) => (float[] z) {{ {middle} z = Conv(y, w) }}", opset, w=one, **weights)
    (slot,) = [
        s for g in ChannelGraph.of(model.graph, opset).groups for s in g.members if s.value.name == "y"
    ]
    found = bounds_of(model, opset)
    (named,) = [s for s in (*found.known, slot) if s.value.name == "y" and s.axis == 1][:1]
    return found.at(named)


def vector(*numbers: float) -> Array:
    return np.array(numbers, np.float32)


def channels(*numbers: float) -> Array:
    return vector(*numbers).reshape(-1, 1, 1)


POINT = vector(1, -2, 3, 0).reshape(2, 2, 1, 1)  # y0 = x0 - 2 x1, y1 = 3 x0
OF_SIGMOID = {
    "r": ("y = Identity(s)", {}, (0, 1), (0, 1)),
    "conv": ("y = Conv(s, p, b)", {"p": POINT, "b": vector(1, -1)}, (-1, 2), (-1, 2)),
    "padded conv": (
        "t = Add(s, one) y = Conv<pads = [1, 1, 1, 1]>(t, p)",
        {"p": POINT, "one": vector(1)},
        (-4, 2),
        (0, 6),
    ),
    "transposed conv": (
        "t = Add(s, one) y = ConvTranspose(t, p)",
        {"p": POINT, "one": vector(1)},
        (0, 8),
        (-4, 0),
    ),
    "depthwise": ("y = Conv<group = 2>(s, p)", {"p": POINT[:, :1]}, (0, 1), (0, 3)),
    "affine": ("m = Mul(s, k) y = Add(m, t)", {"k": channels(2, -2), "t": channels(5, 0)}, (5, 7), (-2, 0)),
    "quotient": ("y = Div(s, k)", {"k": channels(2, -2)}, (0, 0.5), (-0.5, 0)),
    "quotient by what may be zero": ("y = Div(s, s)", {}, (-math.inf, math.inf), (-math.inf, math.inf)),
    "difference": ("y = Sub(k, s)", {"k": channels(2, 3)}, (1, 2), (2, 3)),
    "extremes": (
        "m = Max(s, k) y = Min(m, t)",
        {"k": channels(0.5, 0.5), "t": vector(0.75)},
        (0.5, 0.75),
        (0.5, 0.75),
    ),
    "sum and mean": ("m = Sum(s, s, k) y = Mean(m, s)", {"k": channels(2, 4)}, (1, 2.5), (2, 3.5)),
    "clip": ("y = Clip(s, l, h)", {"l": np.float32(0.25), "h": np.float32(0.5)}, (0.25, 0.5), (0.25, 0.5)),
    "slope": (
        "d = Sub(s, k) y = PRelu(d, a)",
        {"k": channels(0.5, 1), "a": channels(-2, 3)},
        (0, 1),
        (-3, 0),
    ),
    "turning": ("d = Sub(s, k) y = Abs(d)", {"k": channels(0.5, 3)}, (0, 0.5), (2, 3)),
    "least": (
        "d = Sub(s, k) e = Mul(d, c) y = HardSwish(e)",
        {"k": channels(0.5, 1), "c": channels(4, 6)},
        (-0.375, 5 / 3),
        (-0.375, 0),
    ),
    "norm": (
        "y = BatchNormalization<epsilon = 0.0>(s, k, t, m, v)",
        {"k": vector(2, -2), "t": vector(1, 1), "m": vector(0, 0.5), "v": vector(4, 1)},
        (1, 2),
        (0, 2),
    ),
    "pooled": ("m = MaxPool<kernel_shape = [2, 2]>(s) y = GlobalAveragePool(m)", {}, (0, 1), (0, 1)),
    "averaged over the border": (
        "t = Add(s, one) "
        "y = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1>(t)",
        {"one": vector(1)},
        (0, 2),
        (0, 2),
    ),
    "pad": (
        "t = Add(s, one) y = Pad(t, p)",
        {"one": vector(1), "p": np.array([0, 0, 1, 0, 0, 0, 0, 0])},
        (0, 2),
        (0, 2),
    ),
    "pad of channels": (
        "t = Conv(s, k) y = Pad(t, p, seven)",
        {
            "k": vector(1, 1).reshape(1, 2, 1, 1),
            "p": np.array([0, 1, 0, 0, 0, 0, 0, 0]),
            "seven": np.float32(7),
        },
        (7, 7),
        (0, 2),
    ),
    "choice": ("c = Greater(x, s) t = Add(s, one) y = Where(c, s, t)", {"one": vector(1)}, (0, 2), (0, 2)),
    "joined": (
        "t = Add(s, one) a, b = Split<axis = 1, num_outputs = 2>(t) y = Concat<axis = 1>(b, a)",
        {"one": vector(1)},
        (1, 2),
        (1, 2),
    ),
    "linear interpolation": (
        'y = Resize<mode = "linear">(s, , k)',
        {"k": vector(1, 1, 2, 2)},
        (0, 1),
        (0, 1),
    ),
    "cubic interpolation": (
        'y = Resize<mode = "cubic">(s, , k)',
        {"k": vector(1, 1, 2, 2)},
        (-math.inf, math.inf),
        (-math.inf, math.inf),
    ),
    "cast": ("c = Cast<to = 10>(s) y = Cast<to = 1>(c)", {}, (0, 1), (0, 1)),
}


@pytest.mark.parametrize("name", OF_SIGMOID)
def test_ranges(name: str) -> None:
    """Of what follows a Sigmoid; the margin is a few units in the last place, or half a percent of a mean."""
    middle, weights, first, second = OF_SIGMOID[name]
    low, high = range_of(f"s = Sigmoid(x) {middle}", **weights)
    rough = "cast" in name or "pooled" in name
    for found, expected in zip((low, high), zip(first, second, strict=True), strict=True):
        np.testing.assert_allclose(found, expected, rtol=5e-3 if rough else 1e-4, atol=1e-5)
    assert (low <= np.array([first[0], second[0]])).all()
    assert (high >= np.array([first[1], second[1]])).all()


SOURCES = {
    "Softmax<axis = 1>": (0, 1),
    "LogSoftmax<axis = 1>": (-math.inf, 0),
    "Tanh": (-1, 1),
    "Relu": (0, math.inf),
    "Elu<alpha = 2.0>": (-2, math.inf),
    "HardSigmoid": (0, 1),
    "Gelu": (-0.17, math.inf),
    "Mish": (-0.31, math.inf),
    "Exp": (0, math.inf),
    "Log": (-math.inf, math.inf),
    "Cos": (-1, 1),
    "Neg": (-math.inf, math.inf),
}


@pytest.mark.parametrize("source", SOURCES)
def test_where_ranges_start(source: str) -> None:
    low, high = range_of(f"y = {source}(x)")
    np.testing.assert_allclose([*low, *high], np.repeat(SOURCES[source], 2), rtol=5e-3)


def test_integers() -> None:
    """Pixels, and pixels that are normalized."""
    low, high = range_of("y = Cast<to = 1>(x)", declared="uint8[N, 2, 4, 4] x")
    assert (low.tolist(), high.tolist()) == ([0, 0], [255, 255])
    middle = "c = Cast<to = 1>(x) d = Sub(c, m) y = Div(d, s)"
    weights = {"m": channels(100, 0), "s": channels(50, 255)}
    low, high = range_of(middle, declared="uint8[N, 2, 4, 4] x", **weights)
    np.testing.assert_allclose([low, high], [[-2, 0], [3.1, 1]], rtol=1e-5)


def test_old_limits() -> None:
    low, high = range_of("y = Clip<min = -1.0, max = 6.0>(x)", 10)
    assert (low.tolist(), high.tolist()) == ([-1, -1], [6, 6])


def fixed(middle: str, **weights: Array) -> list[float]:
    """What is known of the channels of `y` behind a Relu of x."""
    one = np.ones((2, 2, 1, 1), np.float32)
    body = f"r = Relu(x) {middle} z = Conv(y, one)"
    model = build(f"g (float[N, 2, 4, 4] x) => (float[] z) {{ {body} }}", OPSET, one=one, **weights)
    bounds = bounds_of(model)
    (slot,) = [s for s in bounds.known if s.value.name == "y" and s.axis == 1]
    found = bounds.fixed(slot)
    return [math.nan] * 2 if found is None else found.tolist()


def test_the_sign_of_a_sum_survives_rounding() -> None:
    """All weights at or below zero, and the bias: whatever comes out, Relu makes zero of it."""
    weight = vector(-1, -2, 0, -3).reshape(2, 2, 1, 1)
    assert fixed("c = Conv(r, w, b) y = Relu(c)", w=weight, b=vector(0, -1)) == [0, 0]


@pytest.mark.parametrize(("bias", "zero"), [(-2.001, True), (-2.0, False), (-1.9999999, False)])
def test_a_bound_that_is_only_just_below_zero(bias: float, zero: bool) -> None:
    """The largest sum is 2: rounded, it may exceed a bias of -2."""
    weight = vector(1, 1, 1, 1).reshape(2, 2, 1, 1)
    found = fixed("s = Sigmoid(r) c = Conv(s, w, b) y = Relu(c)", w=weight, b=vector(bias, 1))
    assert (found[0] == 0) == zero
    assert math.isnan(found[1])


@pytest.mark.parametrize(
    ("function", "bias", "number"),
    [("HardSigmoid", 9, 1), ("HardSigmoid", -9, 0), ("HardSwish", -9, 0), ("Clip", 9, 6), ("Clip", -9, -1)],
)
def test_functions_that_saturate(function: str, bias: float, number: float) -> None:
    limits = ", low, high" if function == "Clip" else ""
    weights = {"low": np.float32(-1), "high": np.float32(6)} if limits else {}
    weight = vector(1, 0, 0, 1).reshape(2, 2, 1, 1)
    middle = f"t = Tanh(r) c = Conv(t, w, b) y = {function}(c{limits})"
    assert fixed(middle, w=weight, b=vector(bias, bias), **weights) == [number, number]


def test_a_layer_without_bounds_has_none() -> None:
    """Both signs on inputs that grow without end; and a filter of zeros, which has only its bias."""
    low, high = range_of("r = Relu(x) y = Conv(r, p, b)", p=POINT * channels(1, 0)[..., None], b=vector(1, 2))
    np.testing.assert_allclose(low, [-math.inf, 2], rtol=1e-5)
    np.testing.assert_allclose(high, [math.inf, 2], rtol=1e-5)


def test_many_blocks_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"p": np.random.default_rng(0).standard_normal((2, 2, 3, 3)).astype(np.float32)}
    whole = range_of("s = Sigmoid(x) y = Conv(s, p)", **weights)
    monkeypatch.setattr("edgewise.passes.channel_bounds._BLOCK", 1)
    parts = range_of("s = Sigmoid(x) y = Conv(s, p)", **weights)
    np.testing.assert_allclose(whole, parts, rtol=1e-12)


def test_half_precision_keeps_signs() -> None:
    """Sums of thousands of numbers in float16 have no bound worth the name, but their sign is safe."""
    weight = np.full((2, 2, 30, 30), -1, np.float16)
    model = build(
        "g (float16[N, 2, 32, 32] x) => (float16[] z) "
        "{ s = Sigmoid(x) c = Conv(s, w) y = Relu(c) z = Conv(y, o) }",
        OPSET,
        w=weight,
        o=np.ones((1, 2, 1, 1), np.float16),
    )
    bounds = bounds_of(model)
    ranges = {s.value.name: bounds.known[s] for s in bounds.known if s.axis == 1}
    assert ranges["c"].low.tolist() == [-math.inf] * 2
    assert ranges["y"].high.tolist() == [0, 0]
