"""upgrade-opset: an operator of any old form gives the same numbers in the new one, or nothing is touched."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from rewrites import assert_equal, build, operators

from edgewise.passes.base import Outcome
from edgewise.passes.graph import attribute
from edgewise.passes.upgrade_opset import UpgradeOpset
from edgewise.passes.verify import Signature, check
from edgewise.runtime.evaluate import Array, Evaluator, Feed, input_specs, seeded_feed
from edgewise.runtime.session import serialize

RULE = UpgradeOpset()
IMAGE = "float[2, 3, 4, 5]"
F = np.float32
NORM = {"g": F([1, 2, 3]), "s": F([0, 1, 2]), "m": F([1, 0, 1]), "v": F([1, 2, 4])}


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def upgraded(
    model: ir.Model, feed: Feed | None = None, rule: UpgradeOpset = RULE
) -> tuple[ir.Model, Outcome]:
    """The model after the pass, which is valid, settled and equal, the original being untouched."""
    before, after = serialize(model), model.clone()
    outcome = rule.apply(after)
    assert serialize(model) == before
    check(after, Signature.of(model))
    assert rule.apply(after.clone()).edits == 0
    if not outcome.edits:
        assert serialize(after) == before
        return after, outcome
    assert after.opset_imports[""] == rule.to
    if all(v.shape is not None for v in after.graph.outputs):  # else it is no use asking
        onnx.checker.check_model(ir.to_proto(after))
    feed = feed or seeded_feed(input_specs(model), size=3)
    assert_equal(Evaluator(model, optimize=False).run(feed), Evaluator(after, optimize=False).run(feed))
    return after, outcome


def one(node: str, opset: int, inputs: str = f"{IMAGE} x", kind: str = "float", **weights: Array) -> ir.Model:
    return build(f"g ({inputs}) => ({kind}[] y) {{ {node} }}", opset, **weights)


CASES: Mapping[str, tuple[str, tuple[int, ...], Mapping[str, Array]]] = {
    "batch norm": ("y = BatchNormalization<epsilon = 0.1>(x, g, s, m, v)", (7, 9, 13, 14, 15), NORM),
    "batch norm, spatial": ("y = BatchNormalization<spatial = 1>(x, g, s, m, v)", (7, 8), NORM),
    "clip": ("y = Clip<min = -0.5, max = 0.25>(x)", (7, 10), {}),
    "clip from above": ("y = Clip<max = 0.25>(x)", (7, 10), {}),
    "clip from below": ("y = Clip<min = 0.25>(x)", (10,), {}),
    "clip without bounds": ("y = Clip(x)", (10, 11, 12), {}),
    "clip by inputs": ("y = Clip(x, b)", (11, 12), {"b": F(0.25)}),
    "dropout": ("y = Dropout<ratio = 0.3>(x)", (7, 10, 11), {}),
    "dropout with a mask nobody reads": ("y, m = Dropout(x)", (7, 10, 11), {}),
    "dropout by inputs": ("y = Dropout(x, r)", (12, 13), {"r": F(0.3)}),
    "pad": ("y = Pad<pads = [0, 0, 1, 2, 0, 0, 0, 3]>(x)", (7, 10), {}),
    "pad with a value": ("y = Pad<value = 2.5, pads = [0, 0, 1, 2, 0, 0, 0, 3]>(x)", (7, 10), {}),
    "pad by reflection": ('y = Pad<mode = "reflect", pads = [0, 0, 1, 2, 0, 0, 0, 3]>(x)', (7, 10), {}),
    "slice": ("y = Slice<starts = [1, -3], ends = [100, -1], axes = [2, 3]>(x)", (7, 9), {}),
    "slice of the first axes": ("y = Slice<starts = [1, 1], ends = [2, 2]>(x)", (7, 9), {}),
    "top k": ("y, i = TopK<k = 2, axis = 2>(x)", (7, 9), {}),
    "squeeze": ("u = Unsqueeze<axes = [0, 3]>(x) y = Squeeze<axes = [3]>(u)", (7, 11, 12), {}),
    "squeeze of all": ("u = Unsqueeze<axes = [0, 3]>(x) y = Squeeze(u)", (7, 12), {}),
    "unsqueeze from behind": ("y = Unsqueeze<axes = [-1, 1]>(x)", (11, 12), {}),
    "sum": ("y = ReduceSum<axes = [1, 3], keepdims = 0>(x)", (7, 11, 12), {}),
    "sum of all": ("y = ReduceSum(x)", (7, 12), {}),
    "mean, whose axes stay": ("y = ReduceMean<axes = [1, 3], keepdims = 0>(x)", (7, 11, 13), {}),
    "split": ("a, y = Split<axis = 3, split = [2, 3]>(x)", (7, 11, 12), {}),
    "split into equal parts": ("a, y = Split<axis = 2>(x)", (7, 12), {}),
    "scatter": (
        "y = Scatter<axis = 2>(x, i, u)",
        (9, 10),
        {"i": np.ones((2, 3, 1, 5), np.int64), "u": np.ones((2, 3, 1, 5), F)},
    ),
    "upsample": ("y = Upsample<scales = [1.0, 1.0, 2.5, 1.7]>(x)", (7, 8), {}),
    "upsample, linear": ('y = Upsample<mode = "linear", scales = [1.0, 1.0, 2.5, 1.7]>(x)', (7, 8), {}),
    "upsample by an input": ("y = Upsample(x, k)", (9,), {"k": F([1, 1, 2.5, 1.7])}),
    "upsample by an input, linear": ('y = Upsample<mode = "linear">(x, k)', (9,), {"k": F([1, 1, 2.5, 1.7])}),
    "resize that grows": ("y = Resize(x, k)", (10,), {"k": F([1, 1, 2.5, 1.7])}),
    "resize that shrinks": ("y = Resize(x, k)", (10,), {"k": F([1, 1, 0.6, 0.45])}),
    "resize, linear": ('y = Resize<mode = "linear">(x, k)', (10,), {"k": F([1, 1, 2.5, 0.45])}),
    "resize of a later form": (
        'y = Resize<mode = "cubic">(x, r, k)',
        (11,),
        {"k": F([1, 1, 2.5, 1.7]), "r": F(range(8))},
    ),
    "max pool": ("y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)", (7, 8, 10, 11, 12), {}),
    "average pool": ("y = AveragePool<kernel_shape = [2, 2], pads = [1, 1, 0, 0]>(x)", (7, 10, 11), {}),
    "convolution": ("y = Conv<pads = [1, 1, 1, 1]>(x, w)", (7, 11), {"w": np.ones((2, 3, 3, 3), F)}),
    "arithmetic": (
        "a = Mul(x, g) b = Pow(a, two) c = Sum(b, x) d = Max(c, x) y = Sub(d, x)",
        (7, 8, 12),
        {"g": F(3), "two": F(2)},
    ),
    "prelu": ("y = PRelu(x, k)", (7, 9), {"k": F([0.5])}),
    "flatten and gemm": (
        "a = Flatten<axis = 1>(x) y = Gemm(a, w, c)",
        (7, 9, 11),
        {"w": np.ones((60, 2), F), "c": F([1, 2])},
    ),
    "one hot": ("i = ArgMax<axis = 1>(x) y = OneHot(i, d, p)", (9, 10, 11), {"d": ints(4), "p": F([0, 1])}),
    "one hot from behind": (
        "y = OneHot(i, d, p)",
        (9, 10),
        {"d": ints(4), "p": F([0, 1]), "i": ints(-1, 2, -9)},
    ),
    "casts and comparisons": (
        "a = Cast<to = 6>(x) b = Cast<to = 1>(a) c = Greater(x, b) y = Where(c, x, b)",
        (9, 15),
        {},
    ),
    "shapes": (
        "s = Shape(x) n = Gather(s, i) t = Concat<axis = 0>(n, k) y = Reshape(x, t)",
        (7, 12),
        {"i": ints(0), "k": ints(-1)},
    ),
    "region align": (
        "y = RoiAlign<output_height = 2, output_width = 2>(x, r, i)",
        (10, 15),
        {"r": F([[0, 0, 3, 3]]), "i": ints(0)},
    ),
    "depth to space": (
        "a = Concat<axis = 1>(x, x, x, x) y = DepthToSpace<blocksize = 2>(a)",
        (7, 10, 11),
        {},
    ),
    "quantized": (
        "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)",
        (10, 12),
        {"s": F(0.1), "z": np.uint8(128)},
    ),
}


@pytest.mark.parametrize(
    ("name", "opset"), [(name, v) for name, (_, versions, _) in CASES.items() for v in versions]
)
def test_operator(name: str, opset: int) -> None:
    text, _, weights = CASES[name]
    after, outcome = upgraded(one(text, opset, **weights))
    assert outcome.edits > 0
    assert not {"Upsample", "Scatter"} & set(operators(after))


@pytest.mark.parametrize("operator", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("opset", [7, 11, 12])
@pytest.mark.parametrize(
    ("shape", "axis", "new_axis"),
    [
        ("2, 3, 4, 5", None, None),
        ("2, 3, 4, 5", 2, None),
        ("2, 3, 4, 5", 0, None),
        ("2, 3, 4, 5", 3, 3),
        ("2, 3", None, 1),
        ("2, 3, 1, 1", 1, 1),
        ("2, 1, 1, 5", 1, 3),
        ("2, 1, 1, 1", 1, 3),
        ("N, 3, M", 1, None),
        ("N, 3, 1", 1, 1),
    ],
)
def test_normal_exponential(
    operator: str, opset: int, shape: str, axis: int | None, new_axis: int | None
) -> None:
    """It went over all axes from the given one on together."""
    written = "" if axis is None else f"<axis = {axis}>"
    after, _ = upgraded(one(f"a = Neg(x) y = {operator}{written}(a)", opset, f"float[{shape}] x"))
    if new_axis is None:
        assert operators(after) == ["Neg", "Shape", "Flatten", operator, "Reshape"]
    else:
        assert operators(after) == ["Neg", operator]
        assert attribute(after.graph.node(1), "axis") == new_axis


@pytest.mark.parametrize("axis", [-1, -2])
def test_normal_exponential_from_behind(axis: int) -> None:
    after, _ = upgraded(one(f"y = Softmax<axis = {axis}>(x)", 11))
    assert operators(after) == (["Softmax"] if axis == -1 else ["Shape", "Flatten", "Softmax", "Reshape"])


def test_normal_exponential_of_unknown_rank() -> None:
    model = build(
        "g (float[2, 3, 4] x, int64[R] s) => (float[A, B] y) { a = Reshape(x, s) y = Softmax(a) }", 11
    )
    after, _ = upgraded(model, {"x": np.ones((2, 3, 4), F), "s": ints(6, 4)})
    assert operators(after) == ["Reshape", "Shape", "Flatten", "Softmax", "Reshape"]


@pytest.mark.parametrize(
    ("kind", "node"),
    [
        ("float16", "Clip<min = 0.0, max = 0.5>"),
        ("float16", "Pad<value = 1.0, pads = [1, 1]>"),
        ("double", "Pad<value = 1.0, pads = [1, 1]>"),
        ("double", "Dropout<ratio = 0.3>"),
    ],
)
def test_other_precisions(kind: str, node: str) -> None:
    """The bounds and the value have to be of the type of the data."""
    upgraded(one(f"y = {node}(x)", 10, f"{kind}[5] x", kind))


def test_recurrent() -> None:
    rng = np.random.default_rng(0)
    for operator, gates in (("RNN", 1), ("GRU", 3), ("LSTM", 4)):
        weights = {"w": rng.standard_normal((1, 2 * gates, 3)), "r": rng.standard_normal((1, 2 * gates, 2))}
        floats = {name: a.astype(F) for name, a in weights.items()}
        upgraded(one(f"y = {operator}<hidden_size = 2>(x, w, r)", 7, "float[4, 2, 3] x", **floats))


def test_inside_branches() -> None:
    model = build(
        """g (bool c, float[2, 3] x) => (float[] y) {
            y = If(c) <then_branch = t () => (float[] a) { a = Clip<min = 0.0>(x) },
                       else_branch = e () => (float[] b) { b = Slice<starts = [0], ends = [9]>(x) }>
        }""",
        9,
    )
    for taken in (True, False):
        upgraded(model, {"c": np.array(taken), "x": np.ones((2, 3), F)})


def test_weights_of_old_files_stay_constant() -> None:
    """In a newer file an input with a value may be overridden, in an old one it may not."""
    model = build("g (float[2] x, float[2] w) => (float[2] y) { y = Mul(x, w) }", 8, w=F([3, 4]))
    model.ir_version = 3
    after, _ = upgraded(model)
    assert after.ir_version == 8
    assert [v.name for v in after.graph.inputs] == ["x"]


def test_the_rest_of_the_file_stays() -> None:
    model = one("y = Clip<min = 0.0>(x)", 10)
    model.metadata_props["author"] = "me"
    model.graph.node(0).metadata_props["origin"] = "here"
    model.graph.node(0).name = "the clip"
    model.opset_imports["com.microsoft"] = 1
    after, _ = upgraded(model)
    assert after.metadata_props == {"author": "me"}
    assert after.graph.node(0).metadata_props == {"origin": "here"}
    assert after.graph.node(0).name == "the clip"
    assert after.opset_imports == {"": 16, "com.microsoft": 1}


def test_the_other_name_of_the_standard_domain() -> None:
    model = one("y = Clip<min = 0.0>(x)", 10)
    model.opset_imports["ai.onnx"] = model.opset_imports.pop("")
    assert RULE.apply(model).edits == 2
    assert model.opset_imports == {"": 16}


def test_other_targets() -> None:
    model = one("y = Softmax(x)", 7)
    for to in range(13, 18):
        after, _ = upgraded(model, rule=UpgradeOpset(to=to))
        assert after.ir_version >= helper.find_min_ir_version_for([helper.make_opsetid("", to)])


@pytest.mark.parametrize("to", [7, 12, 18])
def test_targets_that_are_not_offered(to: int) -> None:
    with pytest.raises(ValueError, match="13 to 17"):
        UpgradeOpset(to=to)


@pytest.mark.parametrize("opset", [16, 17, 19])
def test_newer_files_are_left_alone(opset: int) -> None:
    _, outcome = upgraded(build("g (float[2] x) => (float[2] y) { y = Neg(x) }", opset))
    assert outcome == Outcome()


def test_a_scan_over_batches() -> None:
    """Up to version 8 it ran over samples as well, and began with an input for their lengths."""
    text = """g (float[1, 4, 3] x) => (float[1, 4, 3] y) {
        y = Scan<num_scan_inputs = 1, body = b (float[3] i) => (float[3] o) { o = Neg(i) }>(, x)
    }"""
    assert RULE.apply(build(text, 8, shapes=False)).refused == {
        "there is no upgrade for Scan over batches": 1
    }


REFUSED: Mapping[str, tuple[str, int, Mapping[str, Array], str]] = {
    "not spatial": (
        "y = BatchNormalization<spatial = 0>(x, g, s, m, v)",
        7,
        NORM,
        "there is no upgrade for BatchNormalization<spatial = 0>",
    ),
    "training": (
        "y, a, b = BatchNormalization(x, g, s, m, v)",
        9,
        NORM,
        "there is no upgrade for BatchNormalization in training",
    ),
    "mask": (
        "a, m = Dropout(x) n = Not(m) y = Cast<to = 1>(n)",
        10,
        {},
        "the mask of the Dropout is used and changes its meaning",
    ),
    "both ways": (
        "y = Resize(x, k)",
        10,
        {"k": F([1, 1, 2, 0.5])},
        "the Resize may grow one axis and shrink another",
    ),
    "removed": ("y = Frobnicate(x)", 11, {}, "Frobnicate is not in operator set 11"),
    "not yet there": (
        "y = LayerNormalization(x, v)",
        11,
        {"v": np.ones(5, F)},
        "LayerNormalization is not in operator set 11",
    ),
    "too old": ("y = Neg(x)", 6, {}, "operator sets before 7 are not upgraded"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_all_or_nothing(name: str) -> None:
    """The Unsqueeze could be upgraded, but is not where something else cannot be."""
    text, opset, weights, reason = REFUSED[name]
    text = f"g ({IMAGE} x) => (float[] y, float[] z) {{ {text} z = Unsqueeze<axes = [0]>(x) }}"
    model = build(text, opset, shapes=False, **weights)
    before = serialize(model)
    outcome = RULE.apply(model)
    assert outcome == Outcome(0, {reason: 1})
    assert serialize(model) == before


def test_an_attribute_that_went_away() -> None:
    model = one("y = Neg(x)", 12)
    model.graph.node(0).attributes.add(ir.AttrInt64("broadcast", 1))
    assert RULE.apply(model).refused == {"there is no upgrade for Neg": 1}


def test_functions_of_the_model() -> None:
    model = one("y = Neg(x)", 12)
    inner = one("y = Neg(x)", 12)
    function = ir.Function("mine", "f", graph=inner.graph, attributes=())
    model.functions[function.identifier()] = function
    reason = "functions of the model have an operator set of their own"
    assert RULE.apply(model) == Outcome(0, {reason: 1})
