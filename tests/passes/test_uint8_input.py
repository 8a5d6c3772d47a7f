"""uint8-input: raw pixels give what normalized ones gave, borders included, in either layout."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import TOLERANCES, assert_equal, build, constants, operators

from edgewise.passes import EXACT_CHAIN, parse
from edgewise.passes.base import Outcome, PassError
from edgewise.passes.uint8_input import Uint8Input
from edgewise.passes.verify import Signature, check
from edgewise.runtime.evaluate import Array, Evaluator

IMAGENET = {"scale": 255.0, "mean": "0.485/0.456/0.406", "std": "0.229/0.224/0.225"}
CENTERED = {"scale": 1.0, "mean": 127, "std": 128}
RNG = np.random.default_rng(0)
W, B = (RNG.standard_normal(s).astype(np.float32) for s in ((4, 3, 3, 3), (4,)))
NOT_ONE_BYTE = "padding would meet the mean, which is not one byte in all channels"
NOT_ALONE = "no layer alone reads the image"


def conv(
    attributes: str = "", inputs: str = "x, w, b", opset: int = 17, declared: str = "n, 3, 7, 6"
) -> ir.Model:
    weights = {"w": W, "b": B} if inputs.endswith("b") else {"w": W}
    text = f"g (float[{declared}] x) => (float[] y) {{ c = Conv{attributes}({inputs}) y = Relu(c) }}"
    return build(text, opset, **weights)


def taken(model: ir.Model, step: Uint8Input) -> tuple[ir.Model, Outcome]:
    """The model after the pass, checked to be sound and to give for pixels what it gave for their floats."""
    before, after = Signature.of(model), model.clone()
    outcome = step.apply(after)
    assert Signature.of(model) == before
    check(after, Signature.of(after))
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    with pytest.raises(PassError):
        step.apply(after.clone())
    size = (2, 7, 6, 3) if step.layout == "nhwc" else (2, 3, 7, 6)
    pixels = np.random.default_rng(1).integers(0, 256, size).astype(np.uint8)
    name = step.image_of(model).name or ""
    expected = Evaluator(model, optimize=False).run({name: step.float_pixels(model, pixels)})
    assert_equal(expected, Evaluator(after, optimize=False).run({name: pixels}))
    return after, outcome


def image(model: ir.Model) -> str:
    value = model.graph.inputs[0]
    return f"{value.type} {value.shape}"


@pytest.mark.parametrize("options", [IMAGENET, CENTERED])
@pytest.mark.parametrize("attributes", ["", "<auto_pad = 'VALID'>", "<strides = [2, 1], dilations = [2, 1]>"])
def test_into_a_convolution_without_padding(options: dict[str, object], attributes: str) -> None:
    step = Uint8Input("nchw", **options)
    after, outcome = taken(conv(attributes.replace("'", '"')), step)
    assert operators(after) == ["Cast", "Conv", "Relu"]
    assert image(after) == "UINT8 [n,3,7,6]"
    assert set(constants(after)) == {"w", "b"}
    assert not outcome.refused


def test_nhwc() -> None:
    after, _ = taken(conv(), Uint8Input("nhwc", **IMAGENET))
    assert operators(after) == ["Cast", "Transpose", "Conv", "Relu"]
    assert image(after) == "UINT8 [n,7,6,3]"


def test_a_layer_without_bias_gets_one() -> None:
    after, _ = taken(conv(inputs="x, w"), Uint8Input("nchw", **IMAGENET))
    assert operators(after) == ["Cast", "Conv", "Relu"]
    assert len(constants(after)) == 2


PADDED = ["<pads = [1, 1, 1, 1]>", "<pads = [0, 2, 1, 0], strides = [2, 2]>"]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("attributes", PADDED)
@pytest.mark.parametrize("mean", [127, "127/127/127"])
def test_a_border_of_the_mean_where_it_is_a_byte(attributes: str, layout: str, mean: str | int) -> None:
    after, outcome = taken(conv(attributes), Uint8Input(layout, mean=mean, std=128))
    between = ["Transpose"] if layout == "nhwc" else []
    assert operators(after) == ["Pad", "Cast", *between, "Conv", "Relu"]
    assert not outcome.refused
    assert after.graph.node(0).outputs[0].dtype == ir.DataType.UINT8


def test_a_byte_written_as_a_fraction() -> None:
    """128/255, as people round it to ten digits."""
    after, _ = taken(conv(PADDED[0]), Uint8Input("nchw", scale=255.0, mean=0.5019607843, std=0.5))
    assert operators(after) == ["Pad", "Cast", "Conv", "Relu"]


@pytest.mark.parametrize("attributes", [*PADDED, '<auto_pad = "SAME_UPPER">'])
def test_no_border_is_needed_where_nothing_is_subtracted(attributes: str) -> None:
    after, outcome = taken(conv(attributes), Uint8Input("nchw", scale=255.0))
    assert operators(after) == ["Cast", "Conv", "Relu"]
    assert not outcome.refused


@pytest.mark.parametrize(
    "options",
    [
        IMAGENET,
        {"mean": "123/117/104"},  # bytes, but Pad knows one value only
        {"scale": 255.0, "mean": 0.5, "std": 0.5},  # 127.5
        {"mean": -1},
        {"mean": 256},
    ],
)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_padding_keeps_the_mean_outside(options: dict[str, object], layout: str) -> None:
    """The factor still goes into the weights."""
    after, outcome = taken(conv(PADDED[0]), Uint8Input(layout, **options))
    between = ["Transpose"] if layout == "nhwc" else []
    assert operators(after) == ["Cast", *between, "Sub", "Conv", "Relu"]
    assert outcome.refused == {NOT_ONE_BYTE: 1}


def test_padding_that_depends_on_the_size() -> None:
    after, outcome = taken(conv('<auto_pad = "SAME_LOWER">'), Uint8Input("nchw", **CENTERED))
    assert operators(after) == ["Cast", "Sub", "Conv", "Relu"]
    assert outcome.refused == {"padding would meet the shift": 1}


def test_padding_of_an_old_operator_set() -> None:
    after, outcome = taken(conv(PADDED[0], opset=10), Uint8Input("nchw", **CENTERED))
    assert operators(after) == ["Cast", "Sub", "Conv", "Relu"]
    assert outcome.refused == {"Pad takes no bytes before operator set 11": 1}


def test_the_naive_fold_would_be_seen() -> None:
    """The comparison of these tests is sharp enough for borders: a wrong one moves the outputs a lot."""
    model, step = conv(PADDED[0]), Uint8Input("nchw", **CENTERED)
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 7, 6)).astype(np.uint8)
    expected = Evaluator(model).run({"x": step.float_pixels(model, pixels)})["y"]
    wrong = conv(PADDED[0], inputs="x, w, b")
    shift = (W.astype(np.float64) * 127 / 128).sum((1, 2, 3))
    tensors = {"w": W / 128, "b": (B - shift).astype(np.float32)}
    for name, array in tensors.items():
        wrong.graph.initializers[name].const_value = ir.tensor(array, name=name)
    actual = Evaluator(wrong).run({"x": pixels.astype(np.float32)})["y"]
    assert np.abs(actual - expected).max() > 1000 * TOLERANCES["float32"] * np.abs(expected).max()


@given(
    st.sampled_from(["nchw", "nhwc"]),
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
    st.sampled_from([1.0, 255.0]),
    st.lists(st.integers(0, 255), min_size=1, max_size=3).filter(lambda m: len(m) != 2),
    st.lists(st.floats(0.1, 2), min_size=1, max_size=3).filter(lambda s: len(s) != 2),
    st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_any_normalization(
    layout: str, pads: list[int], scale: float, means: list[int], stds: list[float], grouped: bool
) -> None:
    weights: dict[str, Array] = {"w": W[:3, :1] if grouped else W}
    attributes = f"pads = {pads}, group = {3 if grouped else 1}"
    text = f"g (float[n, 3, 7, 6] x) => (float[] y) {{ y = Conv<{attributes}>(x, w) }}"
    mean = "/".join(str(m / scale) for m in means)
    std = "/".join(map(str, stds))
    taken(build(text, **weights), Uint8Input(layout, scale=scale, mean=mean, std=std))


def test_no_normalization_at_all() -> None:
    after, outcome = taken(conv(PADDED[0]), Uint8Input("nchw"))
    assert operators(after) == ["Cast", "Conv", "Relu"]
    assert outcome == Outcome(1)


OTHERS = [
    ("y = Relu(x)", ["Relu"]),
    ("c = Conv(x, w) d = Conv(x, w) y = Add(c, d)", ["Conv", "Conv", "Add"]),
    ("a = Abs(x) y = Conv(a, w)", ["Abs", "Conv"]),
    ("y = Conv(w, x)", ["Conv"]),
]


@pytest.mark.parametrize(("body", "rest"), OTHERS)
def test_without_a_layer_that_alone_reads_the_image(body: str, rest: list[str]) -> None:
    model = build(
        f"g (float[n, 3, 7, 6] x) => (float[] y) {{ {body} }}",
        w=RNG.standard_normal((1, 3, 7, 6)).astype(np.float32),
    )
    after, outcome = taken(model, Uint8Input("nchw", **IMAGENET))
    assert operators(after) == ["Cast", "Sub", "Mul", *rest]
    assert outcome.refused == {NOT_ALONE: 1}
    assert outcome.edits == 1


def test_one_number_for_all_channels_is_a_scalar() -> None:
    model = build("g (float[n, 3, 7, 6] x) => (float[] y) { y = Relu(x) }")
    after, _ = taken(model, Uint8Input("nchw", scale=255.0, mean=0.5, std=0.5))
    assert [a.shape for a in constants(after).values()] == [(), ()]


def test_a_layer_whose_channels_are_others() -> None:
    model = build(
        "g (float[n, 3, 7, 6] x) => (float[] y) { y = MatMul(x, w) }",
        w=RNG.standard_normal((6, 2)).astype(np.float32),
    )
    after, outcome = taken(model, Uint8Input("nchw", **IMAGENET))
    assert operators(after) == ["Cast", "Sub", "Mul", "MatMul"]
    assert outcome.refused == {"the layer's channels are not those of the image": 1}


def test_computed_weights() -> None:
    text = "g (float[n, 3, 7, 6] x) => (float[] y) { v = Exp(w) y = Conv(x, v) }"
    after, outcome = taken(build(text, w=W), Uint8Input("nchw", **IMAGENET))
    assert operators(after) == ["Cast", "Sub", "Mul", "Exp", "Conv"]
    assert outcome.refused == {"weight is not constant": 1}


def test_float16() -> None:
    text = "g (float16[n, 3, 7, 6] x) => (float16[] y) { y = Conv(x, w) }"
    after, _ = taken(build(text, w=W.astype(np.float16)), Uint8Input("nchw", scale=255.0, mean=0.5, std=0.25))
    assert operators(after) == ["Cast", "Conv"]


def test_float64() -> None:
    """onnxruntime convolves none on CPUs, so nothing is folded."""
    after, _ = taken(
        build("g (double[n, 3, 7, 6] x) => (double[] y) { y = Relu(x) }"), Uint8Input("nchw", **IMAGENET)
    )
    assert operators(after) == ["Cast", "Sub", "Mul", "Relu"]
    assert {a.dtype for a in constants(after).values()} == {np.dtype(np.float64)}


NHWC = "g (float[n, 7, 6, 3] x) => (float[] y) { t = Transpose<perm = [0, 3, 1, 2]>(x) y = Conv(t, w) }"


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_model_that_transposes_by_itself(layout: str) -> None:
    after, _ = taken(build(NHWC, w=W), Uint8Input(layout, **IMAGENET))
    assert operators(after) == (["Cast", "Conv"] if layout == "nchw" else ["Cast", "Transpose", "Conv"])
    assert image(after) == f"UINT8 {'[n,3,7,6]' if layout == 'nchw' else '[n,7,6,3]'}"


def test_an_image_of_several_inputs() -> None:
    text = (
        "g (float[n, 3, 7, 6] x, float[n, 3, 7, 6] z) => (float[] y)"
        "{ c = Conv(x, w) d = Conv(z, w) y = Add(c, d) }"
    )
    model = build(text, w=W)
    step = Uint8Input("nchw", input="z", **IMAGENET)
    after = model.clone()
    step.apply(after)
    assert [str(v.type) for v in after.graph.inputs] == ["FLOAT", "UINT8"]
    x = RNG.standard_normal((1, 3, 7, 6)).astype(np.float32)
    z = RNG.integers(0, 256, (1, 3, 7, 6)).astype(np.uint8)
    expected = Evaluator(model).run({"x": x, "z": step.float_pixels(model, z)})
    assert_equal(expected, Evaluator(after).run({"x": x, "z": z}))
    np.testing.assert_array_equal(constants(model)["w"], W)


def test_an_image_that_a_body_reads() -> None:
    text = (
        "g (float[n, 3, 7, 6] x) => (float[n, 3, 7, 6] y) { c = Constant<value = bool {1}>() y = If(c) <"
        "then_branch = t () => (float[n, 3, 7, 6] p) { p = Neg(x) },"
        "else_branch = e () => (float[n, 3, 7, 6] r) { r = Abs(x) }> }"
    )
    after, _ = taken(build(text), Uint8Input("nhwc", **IMAGENET))
    assert operators(after) == ["Cast", "Transpose", "Sub", "Mul", "Constant", "If"]


def test_an_old_file_whose_weights_are_inputs() -> None:
    model = build("g (float[n, 3, 7, 6] x, float[4, 3, 3, 3] w) => (float[] y) { y = Conv(x, w) }", 9, w=W)
    model.ir_version = 3
    after, _ = taken(model, Uint8Input("nchw", **IMAGENET))
    assert operators(after) == ["Cast", "Conv"]
    assert after.ir_version == 4


def test_the_chain_goes_on_from_there() -> None:
    model, step = conv(PADDED[0]), Uint8Input("nhwc", **IMAGENET)
    after = model.clone()
    step.apply(after)
    pixels = RNG.integers(0, 256, (2, 7, 6, 3)).astype(np.uint8)
    expected = Evaluator(model).run({"x": step.float_pixels(model, pixels)})
    for spec in EXACT_CHAIN:
        parse(spec).apply(after)
    assert_equal(expected, Evaluator(after).run({"x": pixels}))


def test_without_a_layout_nothing_happens() -> None:
    model = conv()
    before = Signature.of(model)
    assert Uint8Input(**IMAGENET).apply(model) == Outcome()
    assert Signature.of(model) == before


MODELS = {
    "float[n, 3, 7, 6] x": "y = Relu(x)",
    "float[n, 3] x": "y = Relu(x)",
    "float[n, 3, 7, 6] x, float[n, 3, 7, 6] z": "y = Add(x, z)",
    "int64[n, 3, 7, 6] x": "y = Neg(x)",
    "float[n, 5, 7, 6] x": "y = Relu(x)",
    "float[n, 7, 6, 3] x": "y = Relu(x)",
    "float[n, 3, 3, 3] x": "y = Relu(x)",
    "float[n, 3, 7, 6] x, float[n] z": "y = Relu(z)",
}


@pytest.mark.parametrize(
    ("declared", "options", "message"),
    [
        ("float[n, 3, 7, 6] x", {"layout": "chw"}, "layout is nchw or nhwc, not 'chw'"),
        ("float[n, 3, 7, 6] x", {"mean": "0.5/0.5"}, "mean has 2 numbers for 3 channels"),
        ("float[n, 3, 7, 6] x", {"std": "1/1/1/1"}, "std has 4 numbers for 3 channels"),
        ("float[n, 3, 7, 6] x", {"mean": "gray"}, "mean is one number, or one a channel"),
        ("float[n, 3, 7, 6] x", {"mean": ".nan"}, "mean is one number, or one a channel"),
        ("float[n, 3, 7, 6] x", {"mean": "nan"}, "finite"),
        ("float[n, 3, 7, 6] x", {"scale": float("inf")}, "finite"),
        ("float[n, 3, 7, 6] x", {"scale": 0.0}, "scale and std are above zero"),
        ("float[n, 3, 7, 6] x", {"std": "1/0/1"}, "scale and std are above zero"),
        ("float[n, 3, 7, 6] x", {"input": "z"}, "there is no input 'z', only x"),
        ("float[n, 3] x", {}, "there are none"),
        ("float[n, 3] x", {"input": "x"}, "input 'x' is no float image of rank 4 but FLOAT [n,3]"),
        ("float[n, 3, 7, 6] x, float[n, 3, 7, 6] z", {}, "there are x, z: choose with input"),
        ("int64[n, 3, 7, 6] x", {}, "there are none"),
        ("float[n, 5, 7, 6] x", {}, "not clear which axis of input 'x'"),
        ("float[n, 7, 6, 3] x", {}, "not clear which axis of input 'x'"),
        ("float[n, 3, 3, 3] x", {}, "not clear which axis of input 'x'"),
        ("float[n, 3, 7, 6] x, float[n] z", {}, "nothing reads input x"),
    ],
)
def test_what_cannot_take_pixels(declared: str, options: dict[str, object], message: str) -> None:
    kind = "int64" if declared.startswith("int64") else "float"
    model = build(f"g ({declared}) => ({kind}[] y) {{ {MODELS[declared]} }}")
    before = Signature.of(model)
    with pytest.raises(PassError) as raised:
        Uint8Input(**{"layout": "nchw", **options}).apply(model)
    assert message in str(raised.value)
    assert Signature.of(model) == before


def test_an_image_that_is_an_output() -> None:
    model = build("g (float[n, 3, 7, 6] x) => (float[] y, float[] z) { y = Relu(x) z = Neg(y) }")
    model.graph.outputs[1] = model.graph.inputs[0]
    with pytest.raises(PassError, match="input 'x' is an output as well"):
        Uint8Input("nchw").apply(model)


def test_operators_too_old_to_broadcast() -> None:
    model = build("g (float[n, 3, 7, 6] x) => (float[] y) { y = Relu(x) }", 6)
    with pytest.raises(PassError, match="operator sets before 7"):
        Uint8Input("nchw").apply(model)


def test_spec_round_trips() -> None:
    step = Uint8Input("nhwc", input="image", **IMAGENET)
    assert parse(step.spec) == step
    written = (
        "uint8-input{layout: nhwc, scale: 255, mean: 0.485/0.456/0.406, std: 0.229/0.224/0.225, input: image}"
    )
    assert parse(written) == step
    assert parse("uint8-input{layout: nchw, mean: 127, std: 127.5}") == Uint8Input(
        "nchw", mean=127, std=127.5
    )
