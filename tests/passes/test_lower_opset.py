"""lower-opset: an operator of any newer form gives the same numbers in the older one, or nothing changes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from rewrites import assert_equal, build, constants, operators

from edgewise.passes import EXACT_CHAIN, parse
from edgewise.passes.base import Outcome
from edgewise.passes.lower_opset import LowerOpset
from edgewise.passes.verify import Signature, check
from edgewise.runtime.evaluate import Array, Evaluator, Feed, input_specs, seeded_feed
from edgewise.runtime.session import serialize

F = np.float32
IMAGE = "float[2, 4, 6, 5] x"
RNG = np.random.default_rng(0)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def lowered(model: ir.Model, to: int, feed: Feed | None = None) -> ir.Model:
    """The model after the pass, which is valid, settled and equal, the original being untouched."""
    before, after, rule = serialize(model), model.clone(), LowerOpset(to)
    outcome = rule.apply(after)
    assert outcome == Outcome(1)
    assert serialize(model) == before
    check(after, Signature.of(model))
    assert after.opset_imports[""] == to
    assert rule.apply(after.clone()) == Outcome()
    if all(v.shape is not None for v in after.graph.outputs):  # else it is no use asking
        onnx.checker.check_model(ir.to_proto(after), full_check=True)
    feed = feed or seeded_feed(input_specs(model), size=3)
    assert_equal(Evaluator(model, optimize=False).run(feed), Evaluator(after, optimize=False).run(feed))
    return after


def one(node: str, opset: int, inputs: str = IMAGE, kind: str = "float", **weights: Array) -> ir.Model:
    return build(f"g ({inputs}) => ({kind}[] y) {{ {node} }}", opset, **weights)


NORM = {"s": F([1, 2, 3, -1]), "b": F([0, 1, 2, 3])}
LSTM = {"w": RNG.standard_normal((1, 8, 4)).astype(F), "r": RNG.standard_normal((1, 8, 2)).astype(F)}
GRID = {"k": RNG.uniform(-1.2, 1.2, (2, 3, 3, 2)).astype(F)}
ROIS = {"r": F([[0, 0, 3, 3], [1, 1, 4, 4]]), "i": ints(0, 1)}

CASES: Mapping[str, tuple[str, int, int, Mapping[str, Array]]] = {
    "gelu": ("y = Gelu(x)", 20, 17, {}),
    "gelu by tanh": ('y = Gelu<approximate = "tanh">(x)', 20, 19, {}),
    "hard swish": ("y = HardSwish(x)", 14, 13, {}),
    "hard swish of newer types": ("y = HardSwish(x)", 22, 13, {}),
    "mish": ("y = Mish(x)", 22, 17, {}),
    "swish": ("y = Swish(x)", 24, 17, {}),
    "swish with a factor": ("y = Swish<alpha = 0.5>(x)", 24, 23, {}),
    "layer norm": (
        "y = LayerNormalization(x, v, w)",
        17,
        16,
        {"v": F([1, 2, 3, 4, 5]), "w": F([5, 4, 3, 2, 1])},
    ),
    "layer norm of two axes": (
        "y = LayerNormalization<axis = 2, epsilon = 0.1>(x, v)",
        18,
        13,
        {"v": RNG.standard_normal((6, 5)).astype(F)},
    ),
    "rms norm": ("y = RMSNormalization(x, v)", 23, 18, {"v": F([1, 2, 3, 4, 5])}),
    "rms norm, axes as an attribute": (
        "y = RMSNormalization<axis = -2, epsilon = 0.1>(x, v)",
        23,
        17,
        {"v": RNG.standard_normal((6, 5)).astype(F)},
    ),
    "group norm": ("y = GroupNormalization<num_groups = 2, epsilon = 0.1>(x, s, b)", 21, 17, NORM),
    "group norm, one step": ("y = GroupNormalization<num_groups = 4>(x, s, b)", 21, 20, NORM),
    "cast like": ("h = CastLike(x, z) y = Cast<to = 1>(h)", 15, 13, {"z": ints(1)}),
    "a part of the shape": ("n = Shape<start = 1, end = -1>(x) y = Cast<to = 1>(n)", 15, 13, {}),
    "the last of the shape": ("n = Shape<start = -1>(x) y = Cast<to = 1>(n)", 19, 14, {}),
    "the whole shape": ("n = Shape<start = 0>(x) y = Cast<to = 1>(n)", 15, 13, {}),
    "region align": (
        'y = RoiAlign<coordinate_transformation_mode = "output_half_pixel", output_height = 2>(x, r, i)',
        16,
        15,
        ROIS,
    ),
    "split into unequal parts": ("a, y = Split<axis = -1, num_outputs = 2>(x)", 18, 17, {}),
    "split by sizes": ("a, y = Split<axis = 2>(x, k)", 18, 13, {"k": ints(2, 4)}),
    "pad of some axes": ("y = Pad(x, p, , k)", 18, 17, {"p": ints(1, 0, 2, 3), "k": ints(-1, 2)}),
    "pad with a value": ("y = Pad(x, p, v)", 19, 13, {"p": ints(0, 0, 1, 2, 0, 0, 0, 3), "v": F(2.5)}),
    "resize of some axes": ("y = Resize<axes = [2, 3]>(x, , k)", 18, 17, {"k": F([2, 0.6])}),
    "resize to sizes": (
        'y = Resize<axes = [-1, -2], mode = "linear">(x, , , k)',
        19,
        13,
        {"k": ints(9, 4)},
    ),
    "resize of all axes": ("y = Resize(x, , k)", 19, 13, {"k": F([1, 1, 2, 1.5])}),
    "grid sample": ("y = GridSample(x, k)", 20, 16, GRID),
    "grid sample, cubic": ('y = GridSample<mode = "cubic", padding_mode = "border">(x, k)', 22, 19, GRID),
    "grid sample, nearest": ('y = GridSample<mode = "nearest">(x, k)', 20, 16, GRID),
    "average pool": (
        "y = AveragePool<kernel_shape = [2, 2], dilations = [1, 1], pads = [1, 1, 0, 0]>(x)",
        19,
        13,
        {},
    ),
    "lp pool": ("y = LpPool<kernel_shape = [2, 2]>(x)", 18, 13, {}),
    "only types": ("a = Relu(x) b = Add(a, x) c = Sin(b) d = Softplus(c) y = Mul(d, d)", 22, 13, {}),
    "convolution": ("y = Conv<pads = [1, 1, 1, 1]>(x, w)", 22, 13, {"w": np.ones((2, 4, 3, 3), F)}),
    "options at their default": (
        "a = Reshape<allowzero = 0>(x, k) b = Cast<to = 1, saturate = 1>(a) y = Identity(b)",
        19,
        13,
        {"k": ints(2, -1)},
    ),
    "a shape without zeros": ("y = Reshape<allowzero = 1>(x, k)", 20, 13, {"k": ints(2, -1)}),
    "batch norm": (
        "y = BatchNormalization<training_mode = 0>(x, s, b, b, v)",
        15,
        13,
        {**NORM, "v": F([1, 2, 3, 4])},
    ),
    "scatter": (
        "y = ScatterElements<axis = 2>(x, i, u)",
        18,
        13,
        {"i": np.ones((2, 4, 1, 5), np.int64), "u": np.ones((2, 4, 1, 5), F)},
    ),
    "quantized": (
        "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)",
        21,
        13,
        {"s": F(0.1), "z": np.uint8(128)},
    ),
    "quantized to a type that is named": (
        "q = QuantizeLinear<output_dtype = 3>(x, s) y = DequantizeLinear(q, s)",
        21,
        19,
        {"s": F(0.1)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operator(name: str) -> None:
    text, start, to, weights = CASES[name]
    after = lowered(one(text, start, **weights), to)
    known = [n for n in after.graph.all_nodes() if onnx.defs.has(n.op_type, to, "")]
    assert len(known) == len(list(after.graph.all_nodes()))


@pytest.mark.parametrize("name", ["L1", "L2", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare"])
@pytest.mark.parametrize("options", ["<keepdims = 0>", "<noop_with_empty_axes = 1>", ""])
def test_axes_of_reductions_become_an_attribute(name: str, options: str) -> None:
    after = lowered(one(f"y = Reduce{name}{options}(x, k)", 18, k=ints(1, -1)), 17)
    (node,) = after.graph
    assert node.attributes["axes"].value == (1, -1)
    assert len(node.inputs) == 1
    assert not constants(after)


def test_reductions_over_everything() -> None:
    lowered(one("y = ReduceMean(x)", 18), 17)
    lowered(one("y = ReduceMax(x, k)", 20, k=ints()), 13)


def test_what_did_not_change_stays() -> None:
    model = one("y = Relu(x)", 18)
    model.graph.node(0).name, model.graph.node(0).metadata_props["pkg.origin"] = "the relu", "here"
    model.metadata_props["author"] = "me"
    model.opset_imports["com.microsoft"] = 1
    after = lowered(model, 17)
    assert (after.graph.node(0).name, after.graph.node(0).metadata_props) == (
        "the relu",
        {"pkg.origin": "here"},
    )
    assert after.metadata_props == {"author": "me"}
    assert after.opset_imports == {"": 17, "com.microsoft": 1}


def test_names_of_what_is_rewritten_stay() -> None:
    model = one("a = Gelu(x) y = Neg(a)", 20)
    model.graph.node(0).name = "act"
    after = lowered(model, 17)
    last = next(n for n in after.graph if n.name == "act")
    assert [v.name for v in last.outputs] == ["a"]
    assert last.outputs[0].shape == model.graph.node(0).outputs[0].shape


def test_inside_branches() -> None:
    model = build(
        """g (bool c, float[2, 3] x) => (float[2, 3] y) {
            y = If(c) <then_branch = t () => (float[2, 3] a) { a = Gelu(x) },
                       else_branch = e () => (float[2, 3] b) { b = Mish(x) }>
        }""",
        20,
    )
    for taken in (True, False):
        lowered(model, 16, {"c": np.array(taken), "x": RNG.standard_normal((2, 3)).astype(F)})


@pytest.mark.parametrize("text", ["y = LayerNormalization(x, v)", "y = Gelu(x)"])
def test_half_precision(text: str) -> None:
    model = one(text, 20, "float16[2, 3, 8] x", "float16", v=np.arange(8).astype(np.float16))
    lowered(model, 16)


def test_recurrent() -> None:
    lowered(one("y = LSTM<hidden_size = 2, layout = 0>(x, w, r)", 22, "float[4, 2, 4] x", **LSTM), 13)


def test_transform() -> None:
    model = one("y = DFT(x, , k)", 20, "float[2, 8, 3, 1] x", k=np.int64(1))
    lowered(model, 17)


def test_the_chain_goes_on_from_there() -> None:
    model = one("a = LayerNormalization(x, v) y = Gelu(a)", 20, v=F([1, 2, 3, 4, 5]))
    after = lowered(model, 16)
    for spec in EXACT_CHAIN:
        parse(spec).apply(after)
    assert after.opset_imports[""] == 16
    feed = seeded_feed(input_specs(model))
    assert_equal(Evaluator(model).run(feed), Evaluator(after).run(feed))


def test_functions_are_inlined() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 20, "mine" : 1]>
        g (float[2] x) => (float[2] y) { y = mine.act (x) }
        <domain: "mine", opset_import: ["" : 20]> act (a) => (b) { b = Gelu (a) }"""
    )
    after = lowered(ir.from_proto(proto), 17)
    assert not after.functions
    assert "Erf" in operators(after)


def test_functions_of_another_operator_set() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 20, "mine" : 1]>
        g (float[2] x) => (float[2] y) { y = mine.act (x) }
        <domain: "mine", opset_import: ["" : 18]> act (a) => (b) { b = Mish (a) }"""
    )
    reason = "functions of the model have an operator set of their own"
    assert LowerOpset().apply(ir.from_proto(proto)) == Outcome(0, {reason: 1})


REFUSED: Mapping[str, tuple[str, int, int, str, Mapping[str, Array], str]] = {
    "new operator": (
        "y = Attention(x, x, x)",
        23,
        19,
        IMAGE,
        {},
        "Attention of operator set 23 has no older form",
    ),
    "triangle": ("y = Trilu(x)", 14, 13, IMAGE, {}, "Trilu of operator set 14 has no older form"),
    "type": (
        "q = QuantizeLinear(x, s, z) y = Cast<to = 1>(q)",
        21,
        19,
        IMAGE,
        {"s": F(0.1), "z": np.uint16(128)},
        "QuantizeLinear of uint16 has no older form",
    ),
    "blocks": (
        "q = QuantizeLinear<axis = 3, block_size = 5>(x, s) y = Cast<to = 1>(q)",
        21,
        20,
        IMAGE,
        {"s": np.ones((2, 4, 6, 1), F)},
        "QuantizeLinear with block_size has no older form",
    ),
    "option": (
        "y = Reshape<allowzero = 1>(x, k)",
        14,
        13,
        "float[0, 4] x",
        {"k": ints(3, 0)},
        "Reshape with allowzero has no older form",
    ),
    "samples first": (
        "y = LSTM<hidden_size = 2, layout = 1>(x, w, r)",
        14,
        13,
        "float[2, 4, 4] x",
        LSTM,
        "LSTM with layout has no older form",
    ),
    "antialias": (
        'y = Resize<antialias = 1, mode = "linear">(x, , k)',
        18,
        17,
        IMAGE,
        {"k": F([1, 1, 0.5, 0.5])},
        "Resize with antialias has no older form",
    ),
    "symmetric": (
        'y = Resize<coordinate_transformation_mode = "half_pixel_symmetric">(x, , k)',
        19,
        18,
        IMAGE,
        {"k": F([1, 1, 0.5, 0.5])},
        "Resize by symmetric half pixels has no older form",
    ),
    "unknown sizes": (
        "y = Resize<axes = [3]>(x, , , k)",
        18,
        17,
        "float[n, 4, 6, 5] x",
        {"k": ints(9)},
        "Resize of some axes where others have no known size has no older form",
    ),
    "computed axes": (
        "k = Cast<to = 7>(v) y = ReduceMean(x, k)",
        18,
        17,
        IMAGE,
        {"v": F([1])},
        "ReduceMean with computed axes has no older form",
    ),
    "no axes": (
        "y = ReduceSumSquare<noop_with_empty_axes = 1>(x)",
        18,
        17,
        IMAGE,
        {},
        "ReduceSumSquare over no axes has no older form",
    ),
    "wrap": (
        'y = Pad<mode = "wrap">(x, p)',
        19,
        18,
        IMAGE,
        {"p": ints(0, 0, 1, 2, 0, 0, 0, 3)},
        "Pad that wraps around has no older form",
    ),
    "pads that are computed": (
        "p = Cast<to = 7>(v) y = Pad(x, p, , k)",
        18,
        17,
        IMAGE,
        {"v": F([1, 1]), "k": ints(3)},
        "Pad of some axes by computed amounts has no older form",
    ),
    "unknown parts": (
        "a, y = Split<num_outputs = 2>(x)",
        18,
        17,
        "float[n, 4, 6, 5] x",
        {},
        "Split of an unknown size into equal parts has no older form",
    ),
    "volume": (
        "y = GridSample(x, k)",
        20,
        19,
        "float[1, 1, 3, 3, 3] x",
        {"k": np.zeros((1, 2, 2, 2, 3), F)},
        "GridSample of volumes has no older form",
    ),
    "maximum": (
        'y = ScatterElements<reduction = "max">(x, i, u)',
        18,
        17,
        IMAGE,
        {"i": np.ones((2, 4, 1, 5), np.int64), "u": np.ones((2, 4, 1, 5), F)},
        "ScatterElements by max has no older form",
    ),
    "sum": (
        'y = ScatterElements<reduction = "add">(x, i, u)',
        16,
        15,
        IMAGE,
        {"i": np.ones((2, 4, 1, 5), np.int64), "u": np.ones((2, 4, 1, 5), F)},
        "ScatterElements with reduction has no older form",
    ),
    "mean": (
        "y, m = LayerNormalization(x, v) z = Neg(m)",
        17,
        16,
        IMAGE,
        {"v": np.ones(5, F)},
        "LayerNormalization that hands out its mean has no older form",
    ),
    "half pixels": (
        "y = RoiAlign(x, r, i)",
        16,
        15,
        IMAGE,
        ROIS,
        "RoiAlign by half pixels has no older form",
    ),
    "holes": (
        "y = AveragePool<kernel_shape = [2, 2], dilations = [2, 1]>(x)",
        19,
        18,
        IMAGE,
        {},
        "AveragePool with dilations has no older form",
    ),
    "windows over the border": (
        "y = AveragePool<kernel_shape = [2, 2], ceil_mode = 1>(x)",
        19,
        18,
        IMAGE,
        {},
        "AveragePool with ceil_mode had another meaning",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_all_or_nothing(name: str) -> None:
    """What stands beside it could be lowered, but is not where something else cannot be."""
    text, start, to, inputs, weights, reason = REFUSED[name]
    model = build(
        f"g ({inputs}) => (float[] y, float[] other) {{ {text} other = Relu(x) }}", start, **weights
    )
    model.ir_version = 10
    before = serialize(model)
    assert LowerOpset(to, ir_version=8).apply(model) == Outcome(0, {reason: 1})
    assert serialize(model) == before


def test_models_that_are_old_enough() -> None:
    for version in (13, 16, 17):
        model = one("y = Relu(x)", version)
        before = serialize(model)
        assert LowerOpset(17).apply(model) == Outcome()
        assert serialize(model) == before


def test_the_version_of_the_file() -> None:
    model = one("y = Relu(x)", 17)
    model.ir_version = 11
    step = LowerOpset(17, ir_version=8)
    assert step.apply(model) == Outcome(1)
    assert model.ir_version == 8
    assert step.apply(model) == Outcome()
    assert LowerOpset(17, ir_version=9).apply(model) == Outcome()
    assert model.ir_version == 8


def test_types_that_older_files_do_not_have() -> None:
    text = "g (float8e4m3fn[2] x) => (float8e4m3fn[2] y) { y = Identity(x) }"
    model = build(text, 21)
    model.ir_version = 10
    reasons = {"Identity of float8e4m3fn has no older form": 1, "its types or functions need IR version 9": 1}
    assert LowerOpset(17, ir_version=8).apply(model) == Outcome(0, reasons)
    assert LowerOpset(19, ir_version=9).apply(model) == Outcome(2)


def test_the_other_name_of_the_standard_domain() -> None:
    model = one("y = Relu(x)", 18)
    model.opset_imports["ai.onnx"] = model.opset_imports.pop("")
    assert LowerOpset(17).apply(model) == Outcome(1)
    assert model.opset_imports == {"": 17}


def test_targets_that_are_not_offered() -> None:
    with pytest.raises(ValueError, match="starts at 13"):
        LowerOpset(to=12)


def test_every_operator_set_that_only_grew_a_type() -> None:
    """The newest one there is, down to each one below."""
    newest = max(version for _, _, version, *_ in helper.VERSION_TABLE if version <= 23)
    model = one("a = Softmax(x) b = Sqrt(a) y = Transpose<perm = [1, 0, 2, 3]>(b)", newest)
    for to in range(13, newest):
        lowered(model, to)
