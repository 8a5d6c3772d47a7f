"""split-conv-transpose: the very same numbers, for any stride, kernel, padding, dilation and group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import ShapeInferencePass
from rewrites import build, constants, operators, refusal, rewritten

from edgewise.calibration.regions import find_regions
from edgewise.calibration.target import X86
from edgewise.passes.graph import attribute
from edgewise.passes.split_conv_transpose import SplitConvTranspose
from edgewise.runtime.evaluate import Array, Evaluator

RULE = SplitConvTranspose()
LAST = SplitConvTranspose(channels_last=True)
SHUFFLE = ["Transpose", "Reshape", "Transpose", "Reshape", "Reshape"]


def numbers(*shape: int, seed: int = 0, dtype: type = np.float32) -> Array:
    """Small integers: their products and sums are exact in every order and in every float type."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(dtype)


def layer(attributes: str = "", x: str = "float[2, 2, 5, 5]", **weights: Array) -> ir.Model:
    """y = ConvTranspose(x, w) with a kernel of 4 x 4 from 2 to 3 channels, or with `weights` w and b."""
    weights = weights or {"w": numbers(2, 3, 4, 4)}
    written = f"<{attributes}>" if attributes else ""
    return build(
        f"g ({x} x) => (float[] y) {{ y = ConvTranspose{written}(x, {', '.join(weights)}) }}", **weights
    )


def assert_same_numbers(before: ir.Model, after: ir.Model, feed: Mapping[str, Array]) -> None:
    """Integers below 2**24 are exact in float32: nothing may differ at all."""
    expected, actual = Evaluator(before).run(feed), Evaluator(after).run(feed)
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, strict=True)


def split(model: ir.Model, rule: SplitConvTranspose = RULE, **feed: Array) -> ir.Model:
    """The model after the rule, found to give the very same numbers."""
    (x,) = model.graph.inputs
    feed = feed or {"x": numbers(*(d if isinstance(d, int) else 3 for d in x.shape or ()), seed=1)}
    after, outcome = rewritten(model, rule, feed)
    assert outcome.edits == 1
    assert_same_numbers(model, after, feed)
    return after


@dataclass(frozen=True)
class Case:
    """A transposed convolution of any kind: attributes, weights, and the lengths of its input."""

    attributes: Mapping[str, Any]
    weights: Mapping[str, Array]
    lengths: tuple[int, ...]

    @property
    def channels(self) -> int:
        return len(self.weights["w"])

    def model(self, lengths: tuple[int | str, ...]) -> ir.Model:
        text = ", ".join(f"{key} = {value}" for key, value in self.attributes.items())
        x = f"float[N, {self.channels}, {', '.join(map(str, lengths))}]"
        return layer(text, x, **self.weights)

    def feed(self) -> Array:
        return numbers(2, self.channels, *self.lengths, seed=3)


@st.composite
def cases(draw: st.DrawFn, length: int | None = None) -> Case:
    """One or two axes; groups with equal strides only. Every output has at least one position."""
    dims = draw(st.integers(1, 2))

    def per_axis(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims))

    groups, wide, deep = (draw(st.integers(1, 3)) for _ in range(3))
    strides = per_axis(1, 4) if groups == 1 else [draw(st.integers(1, 4))] * dims
    kernel, dilations = per_axis(1, 5), per_axis(1, 1) if draw(st.booleans()) else per_axis(1, 3)
    lengths = per_axis(1, 5) if length is None else [length] * dims
    extents = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    pads = [draw(st.integers(0, e)) for e in extents * 2]
    added = [draw(st.integers(0, s - 1)) for s in strides]  # onnxruntime takes no more
    for i in range(dims):
        assume(strides[i] * (lengths[i] - 1) + extents[i] + added[i] - pads[i] - pads[i + dims] > 0)
    weights = {"w": numbers(groups * wide, deep, *kernel)}
    if draw(st.booleans()):
        weights["b"] = numbers(groups * deep, seed=2)
    attributes = {
        "group": groups,
        "strides": strides,
        "dilations": dilations,
        "pads": pads,
        "output_padding": added,
    }
    return Case(attributes, weights, tuple(lengths))


@given(cases(), st.booleans())
@settings(deadline=None, max_examples=120)
def test_same_numbers(case: Case, channels_last: bool) -> None:
    after = split(case.model(case.lengths), SplitConvTranspose(channels_last), x=case.feed())
    assert "ConvTranspose" not in operators(after)


@given(cases(), st.booleans())
@settings(deadline=None, max_examples=40)
def test_whatever_the_size(case: Case, channels_last: bool) -> None:
    """Batch and spatial sizes are only known when it runs; one model takes them all."""
    model = case.model(("H", "W")[: len(case.lengths)])
    after = split(model, SplitConvTranspose(channels_last), x=case.feed())
    larger = numbers(3, case.channels, *(n + 2 for n in case.lengths), seed=4)
    assert_same_numbers(model, after, {"x": larger})


@given(cases(length=1), st.booleans())
@settings(deadline=None, max_examples=30)
def test_one_position(case: Case, channels_last: bool) -> None:
    split(case.model(case.lengths), SplitConvTranspose(channels_last), x=case.feed())


@pytest.mark.parametrize("lengths", [(5, 6), (5,)])
@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"])
@pytest.mark.parametrize(("kernel", "stride"), [(4, 2), (3, 2), (5, 3), (3, 1)])
def test_auto_pad(mode: str, kernel: int, stride: int, lengths: tuple[int, ...]) -> None:
    dims = len(lengths)
    attributes = f'auto_pad = "{mode}", strides = {[stride] * dims}'
    x = f"float[2, 2, {', '.join(map(str, lengths))}]"
    split(layer(attributes, x, w=numbers(2, 3, *[kernel] * dims)))


@pytest.mark.parametrize("mode", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("lengths", [[10, 9], [11, 10], [9, 12]])
def test_output_shape(mode: str, lengths: list[int]) -> None:
    after = split(layer(f'auto_pad = "{mode}", strides = [2, 2], output_shape = {lengths}'))
    assert Evaluator(after).run({"x": numbers(2, 2, 5, 5)})["y"].shape == (2, 3, *lengths)


# What is left of the layers that generators and decoders are made of.
FORMS: tuple[tuple[str, int, list[str], tuple[int, ...], list[int]], ...] = (
    ("strides = [2, 2]", 2, ["Conv", "DepthToSpace"], (12, 2, 1, 1), [0, 0, 0, 0]),
    (
        "strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 1]",
        3,
        ["Conv", "DepthToSpace"],
        (12, 2, 2, 2),
        [0, 0, 1, 1],
    ),
    (
        "strides = [2, 2], pads = [1, 1, 1, 1]",
        4,
        ["Conv", "DepthToSpace", "Slice"],
        (12, 2, 2, 2),
        [1, 1, 1, 1],
    ),
    ("strides = [4, 4]", 4, ["Conv", "DepthToSpace"], (48, 2, 1, 1), [0, 0, 0, 0]),
    ("strides = [1, 1]", 4, ["Conv"], (3, 2, 4, 4), [3, 3, 3, 3]),
    ("pads = [1, 0, 2, 3]", 4, ["Conv"], (3, 2, 4, 4), [2, 3, 1, 0]),
    ("dilations = [2, 2]", 3, ["Conv"], (3, 2, 3, 3), [4, 4, 4, 4]),
)


@pytest.mark.parametrize(("attributes", "kernel", "left", "shape", "pads"), FORMS)
def test_forms(
    attributes: str, kernel: int, left: list[str], shape: tuple[int, ...], pads: list[int]
) -> None:
    after = split(layer(attributes, w=numbers(2, 3, kernel, kernel)))
    assert operators(after) == left
    assert constants(after)["y.weight"].shape == shape
    assert list(attribute(after.graph.node(0), "pads")) == pads


def test_a_latent_of_one_position() -> None:
    """What ConvTranspose multiplies once is not multiplied sixteen times by a padded Conv."""
    after = split(layer("strides = [1, 1]", x="float[N, 2, 1, 1]"))
    assert operators(after) == ["Conv", "DepthToSpace"]
    assert constants(after)["y.weight"].shape == (48, 2, 1, 1)


def test_the_bias_reaches_every_phase() -> None:
    bias = numbers(3, seed=5)
    after = split(layer("strides = [2, 2]", w=numbers(2, 3, 2, 2), b=bias))
    np.testing.assert_array_equal(constants(after)["y.bias"], np.repeat(bias, 4))
    after = split(layer("strides = [2, 2]", w=numbers(2, 3, 2, 2), b=bias), LAST)
    np.testing.assert_array_equal(constants(after)["y.bias"], np.tile(bias, 4))


@pytest.mark.parametrize("rule", [RULE, LAST])
def test_depthwise(rule: SplitConvTranspose) -> None:
    """Groups stay side by side where the phases of a channel do."""
    after = split(layer("group = 2, strides = [2, 2]", w=numbers(2, 1, 2, 2)), rule)
    assert operators(after) == ["Conv", "DepthToSpace"]
    assert attribute(after.graph.node(0), "group") == 2


def test_channels_last() -> None:
    after = split(layer("strides = [2, 2], pads = [1, 1, 1, 1]"), LAST)
    assert operators(after) == ["Conv", *SHUFFLE, "Slice", "Transpose"]


@pytest.mark.parametrize(
    ("strides", "left"),
    [([2, 1], ["Conv", *SHUFFLE, "Transpose"]), ([1, 2], ["Conv", "Transpose", "Reshape", "Transpose"])],
)
def test_strides_that_differ(strides: list[int], left: list[str]) -> None:
    kernel = numbers(2, 3, *strides)
    assert operators(split(layer(f"strides = {strides}", w=kernel))) == left


@pytest.mark.parametrize(
    ("rule", "left"),
    [(RULE, ["Reshape", "Transpose", "Reshape"]), (LAST, ["Transpose", "Reshape", "Transpose"])],
)
def test_one_axis(rule: SplitConvTranspose, left: list[str]) -> None:
    """As vocoders raise the rate: 16 taps, 8 steps."""
    after = split(layer("strides = [8], pads = [4, 4]", "float[1, 2, L]", w=numbers(2, 3, 16)), rule)
    assert sorted(operators(after)) == sorted(["Conv", *left, "Slice"])
    assert constants(after)["y.weight"].shape == (24, 2, 2)


@pytest.mark.parametrize(("kind", "dtype"), [("float16", np.float16), ("double", np.float64)])
@pytest.mark.parametrize("rule", [RULE, LAST])
def test_other_float_types(rule: SplitConvTranspose, kind: str, dtype: type) -> None:
    """By onnx's own reference: not every type has kernels everywhere. Weights are moved, not computed."""
    text = f"g ({kind}[2, 4, 3, 3] x) => ({kind}[] y) {{ y = ConvTranspose<strides = [2, 2]>(x, w, b) }}"
    weights = {"w": numbers(4, 2, 4, 4, dtype=dtype), "b": numbers(2, dtype=dtype)}
    model = build(text, **weights)
    after = model.clone()
    assert rule.apply(after).edits == 1
    feed = {"x": numbers(2, 4, 3, 3, seed=1, dtype=dtype)}
    (expected,), (actual,) = (
        ReferenceEvaluator(onnx.load_from_string(ir.to_proto(m).SerializeToString())).run(None, feed)
        for m in (model, after)
    )
    np.testing.assert_array_equal(actual, expected, strict=True)


@pytest.mark.parametrize("rule", [RULE, LAST])
@pytest.mark.parametrize("x", ["float[N, 2, 5, 5]", "float[N, 2, H, W]"])
def test_shapes_and_types(rule: SplitConvTranspose, x: str) -> None:
    """Every value has its type; what has a shape has the one that inference gives it."""
    text = (
        f"g ({x} x) => (float[] y)"
        "{ c = ConvTranspose<strides = [2, 2], pads = [1, 1, 1, 1]>(x, w) y = Relu(c) }"
    )
    model = build(text, w=numbers(2, 3, 4, 4))
    known = model.graph.node(0).outputs[0].shape
    after = split(model, rule)
    source = after.graph.node(-1).inputs[0]
    assert source is not None
    assert source.shape == known
    inferred = ShapeInferencePass()(after.clone()).model
    for ours, theirs in zip(after.graph, inferred.graph, strict=True):
        value = ours.outputs[0]
        assert value.dtype == ir.DataType.FLOAT or value.is_graph_output()
        assert value.shape in (None, theirs.outputs[0].shape)


@pytest.mark.parametrize("rule", [RULE, LAST])
def test_all_of_it_can_be_int8(rule: SplitConvTranspose) -> None:
    text = (
        "g (float[1, 32, 5, 5] x) => (float[] y)"
        "{ c = ConvTranspose<strides = [2, 2], pads = [1, 1, 1, 1]>(x, w) r = Relu(c) y = Conv(r, v) }"
    )
    after = split(build(text, w=numbers(32, 32, 4, 4), v=numbers(32, 32, 1, 1)), rule)
    assert {n.op_type for n in find_regions(after, X86).forms} == set(operators(after))


def test_weights_of_others_stay() -> None:
    text = (
        "g (float[1, 2, 5, 5] x) => (float[] y, float[] z)"
        "{ y = ConvTranspose<strides = [2, 2]>(x, w) z = Conv(x, w) }"
    )
    after = split(build(text, w=numbers(2, 2, 2, 2)))
    assert operators(after) == ["Conv", "DepthToSpace", "Conv"]
    assert set(constants(after)) == {"w", "y.weight"}


def test_two_in_a_row() -> None:
    text = (
        "g (float[1, 2, 3, 3] x) => (float[] y)"
        "{ c = ConvTranspose<strides = [2, 2]>(x, w) y = ConvTranspose<strides = [2, 2]>(c, w) }"
    )
    after, outcome = rewritten(build(text, w=numbers(2, 2, 2, 2)), RULE)
    assert operators(after) == ["Conv", "DepthToSpace"] * 2
    assert outcome.edits == 2


def test_inside_a_subgraph_with_weights_from_outside() -> None:
    branch = "{{ c{0} = ConvTranspose<strides = [2, 2]>(x, w) o{0} = Relu(c{0}) }}"
    text = (
        "g (float[N, 2, 3, 3] x, bool f) => (float[N, 3, 8, 8] y) { y = If (f) <"
        f"then_branch = t () => (float[N, 3, 8, 8] o1) {branch.format(1)},"
        f"else_branch = e () => (float[N, 3, 8, 8] o2) {branch.format(2)}> }}"
    )
    after, outcome = rewritten(build(text, w=numbers(2, 3, 4, 4)), RULE)
    assert outcome.edits == 2
    left = ["Conv", "DepthToSpace", "Relu"]
    assert [[n.op_type for n in g] for g in after.graph.subgraphs()] == [left, left]


REFUSALS = {
    "weight is not of a float type": lambda: build(
        "g (bfloat16[2, 2, 5, 5] x) => (bfloat16[] y) { y = ConvTranspose(x, w) }",
        22,
        w=numbers(2, 3, 4, 4, dtype=ml_dtypes.bfloat16),
    ),
    "neither one nor two spatial axes": lambda: layer(x="float[2, 2, 3, 3, 3]", w=numbers(2, 3, 2, 2, 2)),
    "strides differ and there are groups": lambda: layer("group = 2, strides = [2, 1]"),
    "auto_pad and output_padding": lambda: layer(
        'strides = [2, 2], auto_pad = "SAME_LOWER", output_padding = [1, 0]'
    ),
    "output_shape for an input of unknown size": lambda: layer(
        "strides = [2, 2], output_shape = [10, 10]", x="float[2, 2, H, 5]"
    ),
    "the output is longer than the kernel reaches": lambda: layer(
        "strides = [2, 2], output_shape = [13, 12]"
    ),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_refusals(reason: str) -> None:
    assert refusal(REFUSALS[reason](), RULE) == reason


def test_same_padding_of_a_kernel_shorter_than_the_stride() -> None:
    model = layer('strides = [3, 3], auto_pad = "SAME_UPPER"', w=numbers(2, 3, 2, 2))
    assert refusal(model, RULE) == "the output is longer than the kernel reaches"


@pytest.mark.parametrize(
    "body",
    [
        "y = ConvTranspose(x, v)",
        "w = DequantizeLinear(q, s) y = ConvTranspose(x, w)",
        "w = Relu(v) y = ConvTranspose(x, w)",
    ],
)
def test_weight_that_is_not_constant(body: str) -> None:
    text = f"g (float[2, 2, 5, 5] x, float[2, 3, 4, 4] v) => (float[] y) {{ {body} }}"
    quantized = {"q": numbers(2, 3, 4, 4, dtype=np.int8), "s": np.float32(0.5)}
    held = {name: np.asarray(a) for name, a in quantized.items() if "Dequantize" in body}
    assert refusal(build(text, **held), RULE) == "weight is not constant"


def test_bias_that_is_not_constant() -> None:
    text = "g (float[2, 2, 5, 5] x, float[3] b) => (float[] y) { y = ConvTranspose(x, w, b) }"
    assert refusal(build(text, w=numbers(2, 3, 4, 4)), RULE) == "bias is not constant"


def test_old_operator_sets() -> None:
    model = build(
        "g (float[2, 2, 5, 5] x) => (float[] y) { y = ConvTranspose(x, w) }", 10, w=numbers(2, 3, 4, 4)
    )
    assert refusal(model, RULE) == "opset below 11: upgrade it first"
    plain = build("g (float[2, 2, 5, 5] x) => (float[] y) { y = Conv(x, w) }", 10, w=numbers(3, 2, 4, 4))
    assert refusal(plain, RULE) == ""


def test_other_convolutions_stay() -> None:
    text = "g (float[2, 2, 5, 5] x) => (float[] y) { y = Conv<strides = [2, 2]>(x, w) }"
    assert refusal(build(text, w=numbers(3, 2, 4, 4)), RULE) == ""


def test_operators_of_other_domains_stay() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "mine" : 1]>
        g (float[2, 2, 5, 5] x) => (float[2, 2, 5, 5] y) { y = mine.ConvTranspose(x, x) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    outcome = RULE.apply(model)
    assert (outcome.edits, dict(outcome.refused)) == (0, {})


def test_no_more_taps_than_phases_times_shifts() -> None:
    """A kernel as long as two strides fills two taps of every phase: no zero is stored."""
    after = split(layer("strides = [2, 2], pads = [1, 1, 1, 1]", w=np.abs(numbers(2, 3, 4, 4)) + 1))
    weight = constants(after)["y.weight"]
    assert weight.size == 2 * 3 * 4 * 4
    assert weight.all()
