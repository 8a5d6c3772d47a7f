"""EqualizeChannels: the outputs stay the same bit by bit, the channels come together."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from collapsed import separable, watched
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import assert_equal, build, constants, operators, refusal, rewritten

from edgewise.calibration.channel_ranges import collect_channels
from edgewise.passes.base import Pass
from edgewise.passes.channel_ranges import STALE, ChannelRanges
from edgewise.passes.equalize_channels import EqualizeChannels
from edgewise.runtime.evaluate import Array, Evaluator, input_specs, seeded_feed

RNG = np.random.default_rng(0)
WILD = np.exp2([-6, 5, 0, 3]).astype(np.float32)  # factors of four channels
FEED = {"x": RNG.standard_normal((2, 4, 6, 6)).astype(np.float32)}


def drawn(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def spread(array: Array, axis: int = 0) -> float:
    """Binary orders between the largest and the smallest of the channels' largest magnitudes."""
    largest = np.abs(array).max(tuple(i for i in range(array.ndim) if i != axis))
    return float(np.log2(largest.max() / largest.min()))


def between(middle: str, **more: Array) -> ir.Model:
    """Two layers of which the first writes wild channels, with `middle` from `a` to `b` between."""
    text = f"""net (float[2, 4, 6, 6] x) => (y) {{
        a = Conv(x, v, c)  {middle}  y = Conv(b, w)
    }}"""
    v = drawn(4, 4, 3, 3) * WILD[:, None, None, None]
    w = drawn(3, 4, 1, 1) / WILD[:, None, None]
    return build(text, v=v, c=drawn(4) * WILD, w=w, **more)


def assert_bits(before: ir.Model, after: ir.Model) -> None:
    feed = seeded_feed(input_specs(before), size=2)
    a, b = (Evaluator(model, optimize=False).run(feed) for model in (before, after))
    assert all(np.array_equal(a[name], b[name]) for name in a)


HOMOGENEOUS = {
    "nothing": "b = Identity(a)",
    "Relu": "b = Relu(a)",
    "LeakyRelu": "b = LeakyRelu<alpha = 0.1>(a)",
    "PRelu": "b = PRelu(a, slope)",
    "Clip without an end": "b = Clip(a, zero)",
    "MaxPool": "b = MaxPool<kernel_shape = [2, 2], pads = [1, 1, 0, 0]>(a)",
    "AveragePool": "b = AveragePool<kernel_shape = [2, 2]>(a)",
    "Pad": "b = Pad(a, pads)",
    "two Transposes": "t = Transpose<perm = [0, 2, 3, 1]>(a) b = Transpose<perm = [0, 3, 1, 2]>(t)",
    "residual": "r = Relu(a) s = Conv(r, u) b = Add(r, s)",
    "depthwise": "r = Relu(a) b = Conv<group = 4>(r, d)",
    "grouped": "r = Relu(a) b = Conv<group = 2>(r, g)",
    "transposed": "r = Relu(a) b = ConvTranspose(r, u)",
    "gate": "p = GlobalAveragePool(x) q = Conv(p, u) s = Sigmoid(q) b = Mul(s, a)",
    "Concat": "r = Relu(a) t = Concat<axis = 1>(r, a) b = Conv(t, wide)",
    "bias": "b = Add(a, shift)",
}
MORE = {
    "slope": np.array([0.1, 0.2, 0.3, 0.4], np.float32).reshape(4, 1, 1),
    "zero": np.float32(0),
    "pads": np.array([0, 0, 1, 1, 0, 0, 0, 0]),
    "u": drawn(4, 4, 1, 1),
    "d": drawn(4, 1, 2, 2),
    "g": drawn(4, 2, 1, 1),
    "wide": drawn(4, 8, 1, 1),
    "shift": drawn(4, 1, 1),
}


@pytest.mark.parametrize("kind", HOMOGENEOUS)
def test_channels_come_together(kind: str) -> None:
    text = HOMOGENEOUS[kind]
    words = text.replace(",", " ").replace(")", " ").replace("(", " ").split()
    model = between(text, **{name: array for name, array in MORE.items() if name in words})
    after, outcome = rewritten(model, EqualizeChannels())
    assert outcome.edits > 0
    assert operators(after) == operators(model)
    assert_bits(model, after)
    assert spread(constants(after)["v"]) < spread(constants(model)["v"]) - 3


INHOMOGENEOUS = {
    "Sigmoid": "b = Sigmoid(a)",
    "HardSwish": "b = HardSwish(a)",
    "Pad": "b = Pad(a, pads, one)",
    "Clip may cut from above": "b = Clip(a, zero, six)",
    "Clip may cut at another number than zero": "b = Clip(a, one)",
    "Mul of a value and itself": "b = Mul(a, a)",
    "Add": "b = Add(a, one)",
    "Resize": "b = Resize(a, roi, scales)",
}
REASONS = {"Pad": "padding is not zero", "Resize": "Resize may fill in a number"}
NUMBERS = {
    "zero": np.float32(0),
    "one": np.float32(1),
    "six": np.float32(6),
    "pads": np.array([0, 0, 1, 1, 0, 0, 0, 0]),
    "roi": np.zeros(8, np.float32),
    "scales": np.ones(4, np.float32),
}


@pytest.mark.parametrize("kind", INHOMOGENEOUS)
def test_what_is_not_homogeneous_is_left_alone(kind: str) -> None:
    text = INHOMOGENEOUS[kind].replace(
        "Resize(", 'Resize<coordinate_transformation_mode = "tf_crop_and_resize">('
    )
    words = text.replace(",", " ").replace(")", " ").replace("(", " ").split()
    model = between(text, **{name: array for name, array in NUMBERS.items() if name in words})
    _, outcome = rewritten(model, EqualizeChannels())
    assert outcome.edits == 0
    assert REASONS.get(kind, kind) in outcome.refused


def test_a_graph_output_between_is_left_alone() -> None:
    model = build(
        "net (float[2, 4, 6, 6] x) => (a, y) { a = Conv(x, v)  b = Relu(a)  y = Conv(b, w) }",
        v=drawn(4, 4, 1, 1) * WILD[:, None, None, None],
        w=drawn(4, 4, 1, 1),
    )
    assert refusal(model, EqualizeChannels()) == "graph output"


def test_a_shared_weight_is_left_alone() -> None:
    model = build(
        "net (float[2, 4, 6, 6] x) => (y) { a = Conv(x, v)  y = Conv(a, v) }",
        v=drawn(4, 4, 1, 1) * WILD[:, None, None, None],
    )
    assert rewritten(model, EqualizeChannels())[1].edits == 0


def test_a_weight_in_float16_is_left_alone() -> None:
    model = build(
        "net (float16[2, 4, 6, 6] x) => (y) { a = Conv(x, v)  y = Conv(a, w) }",
        v=drawn(4, 4, 1, 1).astype(np.float16) * WILD[:, None, None, None].astype(np.float16),
        w=drawn(4, 4, 1, 1).astype(np.float16),
    )
    assert rewritten(model, EqualizeChannels())[1].edits == 0


def test_dead_and_enormous_channels_do_no_harm() -> None:
    v, w = drawn(4, 4, 1, 1), drawn(4, 4, 1, 1)
    v[0], v[1], w[:, 2], w[:, 3] = 0, v[1] * np.float32(2**40), 0, w[:, 3] * np.float32(2**-40)
    model = build(
        "net (float[2, 4, 6, 6] x) => (y) { a = Conv(x, v)  b = Relu(a)  y = Conv(b, w) }", v=v, w=w
    )
    after, _ = rewritten(model, EqualizeChannels())
    assert all(np.isfinite(array).all() for array in constants(after).values())
    assert_bits(model, after)


def test_even_channels_stay_as_they_are() -> None:
    even = np.ones((4, 4, 1, 1), np.float32)
    model = build(
        "net (float[2, 4, 6, 6] x) => (y) { a = Conv(x, v)  y = Conv(a, w) }", v=even, w=even.copy() * 5
    )
    assert rewritten(model, EqualizeChannels())[1].edits == 0


def matmuls() -> ir.Model:
    text = """net (float[2, 5, 4] x) => (y) {
        a = MatMul(x, v)  s = Add(a, c)  r = Relu(s)  y = MatMul(r, w)
    }"""
    return build(text, v=drawn(4, 4) * WILD, c=drawn(4) * WILD, w=drawn(4, 3) / WILD[:, None])


def test_matrix_products_with_their_bias() -> None:
    model = matmuls()
    after, outcome = rewritten(model, EqualizeChannels())
    assert outcome.edits == 3
    assert spread(constants(after)["v"], axis=1) < 3
    assert_bits(model, after)


@settings(max_examples=15)
@given(st.integers(0, 8), st.integers(0, 2**16), st.booleans())
def test_separable_nets(orders: int, seed: int, per_channel: bool) -> None:
    model = separable(spread=orders, seed=seed)
    after, _ = rewritten(model, EqualizeChannels(per_channel=per_channel))
    assert_bits(model, after)


def ranges_of(model: ir.Model, scale: float = 1.0) -> ChannelRanges:
    feeds = [
        {k: v * np.float32(scale) for k, v in seeded_feed(input_specs(model), seed=s).items()} for s in (0, 1)
    ]
    return collect_channels(model, feeds)


def ended(rule: Pass, model: ir.Model) -> tuple[ir.Model, int]:
    after = model.clone()
    return after, rule.apply(after).edits


def test_a_clip_is_passed_by_channels_that_stay_clear_of_it() -> None:
    model = between("b = Clip(a, zero, six)", zero=np.float32(0), six=np.float32(6))
    feed = seeded_feed(input_specs(model), seed=0)
    clipped = Evaluator(watched(model, "b")).run(feed)["b"]
    near = clipped.max((0, 2, 3)) > 3
    assert near.any()
    assert not near.all()
    after, edits = ended(EqualizeChannels(ranges=collect_channels(model, [feed])), model)
    assert edits > 0
    factors = np.abs(constants(after)["v"]).sum((1, 2, 3)) / np.abs(constants(model)["v"]).sum((1, 2, 3))
    assert (factors[near] == 1).all()
    assert (factors[~near] != 1).any()
    assert Evaluator(watched(after, "b")).run(feed)["b"].max() <= 6
    assert_equal(Evaluator(model).run(feed), Evaluator(after).run(feed))


def test_observed_values_count() -> None:
    """Samples show what weights do not: in the last channel the inputs add up, in the others they cancel."""
    v, w = np.ones((3, 2, 1, 1), np.float32), np.ones((2, 3, 1, 1), np.float32)
    v[:2, 1] = -1
    model = build("net (float[1, 2, 4, 4] x) => (y) { a = Conv(x, v)  y = Conv(a, w) }", v=v, w=w)
    feed = {"x": np.ones((1, 2, 4, 4), np.float32) + np.float32([[[[0]], [[1 / 64]]]])}
    assert ended(EqualizeChannels(), model)[1] == 0
    after, _ = ended(EqualizeChannels(ranges=collect_channels(model, [feed])), model)
    assert constants(after)["v"][0, 0, 0, 0] > constants(after)["v"][2, 0, 0, 0]


def test_a_channel_that_samples_missed_is_judged_by_its_weights() -> None:
    """Channel 0 is silent on the sample, though its weights are those of the others: it stays with them."""
    v, w = np.ones((4, 2, 1, 1), np.float32), np.ones((2, 4, 1, 1), np.float32)
    v[0, 1] = -1
    model = build("net (float[1, 2, 4, 4] x) => (y) { a = Conv(x, v)  y = Conv(a, w) }", v=v, w=w)
    feed = {"x": np.ones((1, 2, 4, 4), np.float32) + np.float32([[[[0]], [[1 / 64]]]])}
    assert ended(EqualizeChannels(ranges=collect_channels(model, [feed])), model)[1] == 0


def test_ranges_of_another_model_are_not_used() -> None:
    model = between("b = Relu(a)")
    rule = EqualizeChannels(ranges=ranges_of(model))
    after, edits = ended(rule, model)
    assert edits > 0
    assert dict(rule.apply(after).refused) == {STALE: 1}


def test_no_text_names_ranges() -> None:
    rule = EqualizeChannels(per_channel=True, ranges=ChannelRanges("f", {}))
    assert rule.spec == "equalize-channels{per_channel: true}"
