"""Every planned node becomes an integer kernel, no grid lies, and every float node has its reason."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from quantized import decibels, feeds_of, inserted, kernels, optimized, planned, run
from rewrites import build, constants

from edgewise.calibration.collect import collect
from edgewise.calibration.plan import QuantOptions, observed_values, plan
from edgewise.calibration.sketch import Sketch
from edgewise.calibration.table import CalibrationTable
from edgewise.calibration.target import ARM, CUDA, TARGETS, TENSORRT, X86, X86_VNNI, Target, target_of
from edgewise.passes.fingerprint import fingerprint
from edgewise.passes.quant_plan import LIMITS, QuantPlan, ValuePlan
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Array
from edgewise.runtime.session import serialize

KERNELS = {"Conv": "QLinearConv", "Gemm": "QGemm", "MaxPool": "NhwcMaxPool", "MatMul": "MatMulIntegerToFloat"}
KERNELS |= {name: f"QLinear{name}" for name in ("Add", "Mul", "Concat", "GlobalAveragePool", "AveragePool")}
KERNELS |= {name: f"QLinear{name}" for name in ("LeakyRelu", "Sigmoid")}

X = "float[N, 16, 8, 8] x"
Y = "float[N, c, h, w] y"


def weights(*names: str, kernel: int = 1) -> dict[str, Array]:
    """A weight of 16 x 16 channels for each name."""
    rng = np.random.default_rng(3)
    size = 16 * kernel**2
    return {n: (rng.standard_normal((16, 16, kernel, kernel)) / size**0.5).astype(np.float32) for n in names}


def net(body: str, *names: str, opset: int = 17, outputs: str = Y, **constants: Array) -> ir.Model:
    return build(f"g ({X}) => ({outputs}) {{ {body} }}", opset, **weights(*names), **constants)


def value(plan: QuantPlan, name: str) -> ValuePlan:
    return next(v for v in plan.values if v.name == name)


def forms(plan: QuantPlan) -> dict[str, str]:
    return {n.output: n.form for n in plan.nodes}


def reason(plan: QuantPlan, output: str) -> str:
    return next(n.why for n in plan.nodes if n.output == output)


def assert_fused(model: ir.Model, plan: QuantPlan, folder: Path) -> Counter[str]:
    """onnxruntime runs every planned node in integers, and quantizes and dequantizes at the borders only."""
    ran = kernels(inserted(model, plan), folder)
    planned_types = [n.op_type for n in plan.nodes if n.form == "int8" and n.op_type != "Transpose"]
    wanted = Counter(KERNELS.get(op_type, op_type) for op_type in planned_types)
    assert {kernel: ran[kernel] for kernel in wanted} == wanted
    written = {v.name: n for n in model.graph for v in n.outputs}
    form = forms(plan)
    grids = {v.name for v in plan.values if v.dtype == "uint8"} - set(model.graph.initializers)
    entering = [g for g in grids if g not in written or form[written[g].outputs[0].name] == "float"]
    assert ran["QuantizeLinear"] == len(entering)
    outputs = {v.name for v in model.graph.outputs}
    read_in_float = {v.name for n in model.graph if form[n.outputs[0].name] == "float" for v in n.inputs if v}
    leaving = (grids - set(entering)) & (outputs | read_in_float)
    assert ran["DequantizeLinear"] == len(leaving)
    return ran


class TestKernels:
    """Small nets of what real ones are made of."""

    @pytest.mark.parametrize("opset", [13, 15, 18, 19, 21, 22, 23])
    def test_residual_block(self, opset: int, tmp_path: Path) -> None:
        body = """a = Conv(x, u) r = Relu(a) b = Conv(r, v) s = Add(r, b) t = Relu(s)
                  p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(t) y = Conv(p, w)"""
        model = net(body, "u", "v", "w", opset=opset)
        ran = assert_fused(model, planned(model), tmp_path)
        assert ran == Counter(
            QLinearConv=3, QLinearAdd=1, NhwcMaxPool=1, QuantizeLinear=1, DequantizeLinear=1
        )

    @pytest.mark.parametrize(
        "body",
        [
            "a = Conv(x, u) r = Clip(a, lo, hi) y = Conv(r, v)",
            "a = Conv(x, u) r = LeakyRelu<alpha = 0.1>(a) y = Conv(r, v)",
            "a = Conv(x, u) g = Sigmoid(a) m = Mul(a, g) y = Conv(m, v)",
            "a = Conv(x, u) g = GlobalAveragePool(a) h = Conv(g, v) s = Sigmoid(h) y = Mul(a, s)",
            "a = Conv(x, u) b = Add(a, three) c = Clip(b, lo, hi) d = Mul(a, c) e = Mul(d, sixth)"
            " y = Conv(e, v)",
            "a = Conv(x, u) d = Add(a, a) y = Conv(d, v)",
            "a = Conv(x, u) b = Relu(a) c = Conv(x, v) d = Concat<axis = 1>(b, c) y = Conv(d, wide)",
            "a = Conv(x, u) p = AveragePool<kernel_shape = [8, 8]>(a) y = Conv(p, v)",
            "a = Conv(x, u) e = Exp(a) y = Conv(e, v)",
            "a = Conv(x, u) r = Relu(a) e = Exp(r) y = Conv(e, v)",
            "t = Transpose<perm = [0, 1, 3, 2]>(x) a = Conv(t, u) y = Conv(a, v)",
            "y = Conv<group = 16, pads = [1, 1, 1, 1]>(x, depthwise)",
        ],
    )
    def test_pieces(self, body: str, tmp_path: Path) -> None:
        pieces = {
            "lo": np.array(0, np.float32),
            "hi": np.array(6, np.float32),
            "three": np.array(3, np.float32),
            "sixth": np.array(1 / 6, np.float32),
            "wide": weights("w")["w"].repeat(2, axis=1) / 2,
            "depthwise": weights("w", kernel=3)["w"][:, :1],
        }
        model = net(body, "u", "v", **pieces)
        made = planned(model)
        assert not {n.op_type for n in made.nodes if n.form == "float"} - {"Exp"}
        assert_fused(model, made, tmp_path)
        for feed in feeds_of(model):
            assert decibels(run(model, feed), run(inserted(model, made), feed)) > 20  # Exp amplifies errors

    @pytest.mark.parametrize(
        "moved",
        [
            "Transpose<perm = [0, 1, 3, 2]>(a)",
            "Reshape(a, same)",
            "Slice(a, zero, four, two)",
            "Gather<axis = 2>(a, picked)",
            "Resize<mode = \"nearest\">(a, , scales)",
            "DepthToSpace<blocksize = 1>(a)",
            "SpaceToDepth<blocksize = 1>(a)",
            "Pad(a, pads)",
            "Pad<mode = \"edge\">(a, pads)",
            "Tile(a, repeats)",
            "Identity(a)",
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("opset", [13, 17, 22])
    def test_moved_values_stay_integers(self, moved: str, opset: int, tmp_path: Path) -> None:
        operands = {
            "same": np.array([0, 0, 0, -1], np.int64),
            "zero": np.array([0], np.int64),
            "four": np.array([4], np.int64),
            "two": np.array([2], np.int64),
            "picked": np.array([1, 0, 5], np.int64),
            "scales": np.array([1, 1, 2, 2], np.float32),
            "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
            "repeats": np.array([1, 1, 2, 1], np.int64),
        }
        used = {name: array for name, array in operands.items() if name in moved}
        model = net(f"a = Conv(x, u) m = {moved} y = Conv(m, v)", "u", "v", opset=opset, **used)
        made = planned(model)
        assert value(made, "a").scale == value(made, "m").scale
        ran = kernels(inserted(model, made), tmp_path)
        assert ran["QLinearConv"] == 2
        assert ran["QuantizeLinear"] == ran["DequantizeLinear"] == 1
        feed = feeds_of(model)[0]
        assert decibels(run(model, feed), run(inserted(model, made), feed)) > 30

    def test_split(self, tmp_path: Path) -> None:
        body = """a = Conv(x, u) l, r = Split<axis = 1>(a, half) b = Conv(l, v) c = Conv(r, v)
                  y = Concat<axis = 1>(b, c)"""
        half = np.array([8, 8], np.int64)
        model = build(
            f"g ({X}) => ({Y}) {{ {body} }}", half=half, u=weights("u")["u"], v=weights("v")["v"][:, :8]
        )
        ran = kernels(inserted(model, planned(model)), tmp_path)
        assert ran["QLinearConv"] == 3
        assert ran["QLinearConcat"] == ran["QuantizeLinear"] == ran["DequantizeLinear"] == 1

    @pytest.mark.parametrize("dims", [1, 3])
    def test_other_convolutions(self, dims: int, tmp_path: Path) -> None:
        spatial = ", 6" * dims
        w = np.random.default_rng(0).standard_normal((16, 16, *(3,) * dims)).astype(np.float32)
        text = f"""g (float[2, 16{spatial}] x) => (float[2, 16{", 4" * dims}] y)
            {{ a = Conv(x, w) y = Relu(a) }}"""
        model = build(text, w=w / 16)
        ran = assert_fused(model, planned(model), tmp_path)
        assert ran["QLinearConv"] == 1

    @pytest.mark.parametrize("text", ["Gemm<transA = 1>(x, m)", "Gemm<transB = 1>(x, m)"])
    def test_transposed_gemm(self, text: str, tmp_path: Path) -> None:
        model = build(
            f"g (float[16, 16] x) => (float[16, 16] y) {{ y = {text} }}", m=weights("m")["m"][:, :, 0, 0]
        )
        after = inserted(model, planned(model))
        assert kernels(after, tmp_path) == Counter(QuantizeLinear=1, QGemm=1)
        assert decibels(run(model, feeds_of(model)[0]), run(after, feeds_of(model)[0])) > 30

    @pytest.mark.parametrize("shape", ["N, 16", "3, 16", "2, 3, 16", "N, 3, 16"])
    @pytest.mark.parametrize("tail", ["y = Add(p, b)", "a = Add(p, b) r = Relu(a) y = Exp(r)", "y = Exp(p)"])
    def test_product_with_a_bias(self, shape: str, tail: str, tmp_path: Path) -> None:
        """A fused float Gemm on what was just dequantized is the trap here."""
        text = f"g (float[{shape}] x) => (float[{shape}] y) {{ p = MatMul(x, m) {tail} }}"
        model = build(text, m=weights("m")["m"][:, :, 0, 0], b=np.linspace(-1, 1, 16, dtype=np.float32))
        after = inserted(model, planned(model))
        ran = kernels(after, tmp_path)
        assert ran["QGemm"] + ran["MatMulIntegerToFloat"] + ran["QLinearMatMul"] == 1
        assert not ran["Gemm"] + ran["MatMul"] + ran["FusedGemm"]
        feed = feeds_of(model)[0]
        assert decibels(run(model, feed), run(after, feed)) > 30

    @pytest.mark.parametrize(
        "tail",
        ["y = Gemm(x, m, b)", "a = Gemm(x, m, b) y = Relu(a)", "a = Gemm(x, m) r = Relu(a) y = Exp(r)"],
    )
    def test_gemm_that_ends_in_float(self, tail: str, tmp_path: Path) -> None:
        text = f"g (float[N, 16] x) => (float[N, 16] y) {{ {tail} }}"
        model = build(text, m=weights("m")["m"][:, :, 0, 0], b=np.linspace(-1, 1, 16, dtype=np.float32))
        ran = kernels(inserted(model, planned(model)), tmp_path)
        assert ran["QGemm"] == 1
        assert not ran["Gemm"] + ran["FusedGemm"]

    def test_scores_are_not_rounded(self, tmp_path: Path) -> None:
        """A last Gemm gives float at no cost: 8 bits would make ties of close scores."""
        text = "g (float[N, 16] x) => (float[N, 16] y) { a = Gemm(x, m) r = Relu(a) y = Gemm(r, m) }"
        model = build(text, m=weights("m")["m"][:, :, 0, 0])
        made = planned(model)
        assert "y" not in {v.name for v in made.values}
        assert kernels(inserted(model, made), tmp_path) == Counter(QuantizeLinear=1, QGemm=2)


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: list[dict[str, Array]]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._feeds, None)


def static(model: ir.Model, folder: Path) -> ir.Model:
    """onnxruntime's own quantizer on the same samples."""
    source, out = folder / "float.onnx", folder / "static.onnx"
    source.write_bytes(serialize(model))
    quantize_static(
        source,
        out,
        Reader(feeds_of(model)),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    return ir.load(out)


class TestAgainstQuantizeStatic:
    BODY = """a = Conv(x, u) r = Relu(a) b = Conv(r, v) s = Add(r, b) t = Relu(s)
              g = GlobalAveragePool(t) f = Flatten(g) y = Gemm(f, m, c)"""

    def model(self) -> ir.Model:
        operands = {"m": weights("m")["m"][:, :, 0, 0], "c": np.linspace(-1, 1, 16, dtype=np.float32)}
        return net(self.BODY, "u", "v", outputs="float[N, 16] y", **operands)

    def test_as_many_integer_kernels_and_no_more_conversions(self, tmp_path: Path) -> None:
        model = self.model()
        ours = kernels(inserted(model, planned(model)), tmp_path)
        theirs = kernels(static(model, tmp_path), tmp_path)

        def integer(ran: Counter[str]) -> int:
            return sum(n for kernel, n in ran.items() if kernel.startswith(("QLinear", "QGemm")))

        assert integer(ours) >= integer(theirs) == 5
        for conversion in ("QuantizeLinear", "DequantizeLinear"):
            assert ours[conversion] <= theirs[conversion]

    def test_as_close_to_float(self, tmp_path: Path) -> None:
        model = self.model()
        ours, theirs = inserted(model, planned(model)), static(model, tmp_path)
        expected = np.concatenate([run(model, feed) for feed in feeds_of(model)])
        found = [
            decibels(expected, np.concatenate([run(m, f) for f in feeds_of(model)])) for m in (ours, theirs)
        ]
        assert found[0] > found[1] - 1  # rounding alone moves either by some tenths


class TestForms:
    def test_relu_that_only_one_reader_sees_is_no_fold(self) -> None:
        made = planned(net("a = Conv(x, u) r = Relu(a) b = Conv(r, v) y = Add(a, b)", "u", "v"))
        assert forms(made)["r"] == "integer"
        assert value(made, "a").zero_point > 0

    def test_fold_cuts_the_range(self) -> None:
        made = planned(net("a = Conv(x, u) r = Relu(a) y = Conv(r, v)", "u", "v"))
        assert forms(made)["r"] == "folded"
        assert value(made, "r").zero_point == 0
        assert "a" not in {v.name for v in made.values}

    def test_upper_bound(self) -> None:
        bounds = {"lo": np.array(0, np.float32), "hi": np.array(0.25, np.float32)}
        made = planned(net("a = Conv(x, u) r = Clip(a, lo, hi) y = Conv(r, v)", "u", "v", **bounds))
        assert value(made, "r").range == pytest.approx((0, 0.25))

    def test_zero_has_to_stay_inside(self) -> None:
        bounds = {"lo": np.array(0.1, np.float32)}
        made = planned(net("a = Conv(x, u) r = Clip(a, lo) y = Conv(r, v)", "u", "v", **bounds))
        assert forms(made)["r"] == "integer"

    def test_integers_are_for_runtimes_that_take_them(self) -> None:
        model = net("a = Conv(x, u) r = Relu(a) b = Conv(r, v) y = Add(a, b)", "u", "v")
        assert forms(planned(model, TENSORRT))["r"] == "int8"

    def test_follower_needs_a_neighbour(self) -> None:
        made = planned(net("e = Exp(x) s = Sigmoid(e) f = Exp(s) y = Conv(f, u)", "u"))
        assert forms(made) == {"e": "float", "s": "float", "f": "float", "y": "int8"}
        assert reason(made, "s") == "its neighbours are in float"

    def test_sum_that_goes_back_to_float(self) -> None:
        """Integers would have to be made for it, and floats again behind it."""
        made = planned(net("a = Conv(x, u) e = Exp(x) s = Add(a, e) y = Exp(s)", "u"))
        assert forms(made)["s"] == "float"
        made = planned(net("a = Conv(x, u) e = Exp(x) s = Add(a, e) y = Conv(s, u)", "u"))
        assert forms(made)["s"] == "int8"

    def test_average_that_floats_read_keeps_its_digits(self) -> None:
        body = "a = Conv(x, u) g = GlobalAveragePool(a) "
        assert forms(planned(net(body + "y = Softmax<axis = 1>(g)", "u")))["g"] == "float"
        assert forms(planned(net(body + "y = Conv(g, v)", "u", "v")))["g"] == "int8"

    def test_pool_behind_float_hands_on_less(self) -> None:
        body = """e = Exp(x) p = MaxPool<kernel_shape = [2, 2]>(e)
                  t = Transpose<perm = [0, 1, 3, 2]>(p) y = Conv(t, u)"""
        assert forms(planned(net(body, "u"))) == {"e": "float", "p": "float", "t": "int8", "y": "int8"}


class TestGroups:
    def test_concat_inputs_lie_on_the_grid_of_its_output(self) -> None:
        body = "a = Conv(x, u) b = Conv(x, v) c = Concat<axis = 1>(a, b) y = Conv(c, w)"
        made = planned(net(body, "u", "v", w=weights("w")["w"].repeat(2, axis=1)))
        assert value(made, "a").scale == value(made, "b").scale == value(made, "c").scale
        assert value(made, "a").why == "as c"

    def test_but_not_where_others_read_them(self) -> None:
        body = "a = Conv(x, u) e = Exp(a) b = Conv(x, v) c = Concat<axis = 1>(a, b, e) y = Conv(c, w)"
        made = planned(net(body, "u", "v", w=weights("w")["w"].repeat(3, axis=1)))
        assert value(made, "a").why != "as c"
        assert value(made, "b").why == "as c"

    def test_nor_where_a_cut_would_be_lost(self) -> None:
        body = "a = Conv(x, u) r = Relu(a) b = Conv(x, v) c = Concat<axis = 1>(r, b) y = Conv(c, w)"
        made = planned(net(body, "u", "v", w=weights("w")["w"].repeat(2, axis=1)))
        assert value(made, "r").zero_point == 0
        assert value(made, "b").why == "as c"
        both = body.replace("c = Concat<axis = 1>(r, b)", "s = Relu(b) c = Concat<axis = 1>(r, s)")
        made = planned(net(both, "u", "v", w=weights("w")["w"].repeat(2, axis=1)))
        assert value(made, "r").why == value(made, "s").why == "as c"
        assert value(made, "c").zero_point == 0


BARE = "a = Conv(x, u) {} y = Conv(b, v)"


class TestReasons:
    @pytest.mark.parametrize(
        ("middle", "why"),
        [
            ("b = ConvTranspose(a, u)", "ConvTranspose has no int8 kernel on x86"),
            ("b = Softmax(a)", "Softmax is slower in int8 than in float on x86"),
            (
                "b = AveragePool<kernel_shape = [3, 3]>(a)",
                "AveragePool is slower in int8 than in float on x86",
            ),
            ('b = Resize<mode = "linear">(a, , scales)', "interpolation has no int8 kernel"),
            ("b = Add(a, many)", "an operand is constant"),
            ("b = Pad(a, pads, one)", "padding is not zero"),
            ("e = Exp(x) b = Conv(e, a)", "weight is not constant"),
            ("b = Conv<group = 4>(a, grouped)", "few channels are slower in int8 than in float on x86"),
            ("b = Conv(a, broken)", "weight is empty, NaN or infinite"),
            ("m = ReduceMax<keepdims = 0>(a) b = Clip(a, m)", "bounds are not constant"),
            ("b, i = MaxPool<kernel_shape = [2, 2]>(a)", "indices are wanted too"),
        ],
    )
    def test_of_a_node(self, middle: str, why: str) -> None:
        operands = {
            "scales": np.array([1, 1, 2, 2], np.float32),
            "many": np.linspace(-1, 1, 16, dtype=np.float32).reshape(16, 1, 1),
            "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
            "one": np.array(1, np.float32),
            "grouped": weights("u")["u"][:, :4],
            "broken": np.full((16, 16, 1, 1), np.nan, np.float32),
        }
        used = {name: array for name, array in operands.items() if name in middle}
        model = build(f"g ({X}) => ({Y}) {{ {BARE.format(middle)} }}", **weights("u", "v"), **used)
        table = CalibrationTable(fingerprint(model), 1, {})
        made = plan(model, table, QuantOptions(), X86)
        assert reason(made, "b") == why

    @pytest.mark.parametrize(
        ("node", "why"),
        [
            ("y = Gemm<alpha = 0.5>(x, m)", "alpha or beta is not 1"),
            ("y = Gemm(x, m, x)", "bias is not constant"),
            ("y = Gemm(x, m, m)", "bias is not one number a channel"),
            ("y = MatMul(x, x)", "two activations are multiplied no faster in int8 on x86"),
            ("y = MatMul(m, x)", "an operand is constant"),
            ("y = MatMul(x, cube)", "weight is no matrix"),
        ],
    )
    def test_of_a_product(self, node: str, why: str) -> None:
        cube = {"cube": np.ones((2, 16, 16), np.float32)} if "cube" in node else {}
        model = build(
            f"g (float[16, 16] x) => (float[a, b] y) {{ {node} }}", m=np.ones((16, 16), np.float32), **cube
        )
        assert reason(planned(model), "y") == why

    def test_of_types(self) -> None:
        text = "g (float16[N, 16] x) => (float16[N, 16] y) { y = MatMul(x, m) }"
        model = build(text, m=np.ones((16, 16), np.float16))
        assert reason(planned(model), "y") == "not float32"

    def test_of_unknown_types(self) -> None:
        """A weight tells the type of what it is multiplied with, a sum tells nothing."""
        text = "g (float[N, 16] x) => (float[N, 16] y) { a = MatMul(x, m) b = MatMul(a, m) y = Add(a, b) }"
        made = planned(build(text, m=np.eye(16, dtype=np.float32), shapes=False))
        assert forms(made) == {"a": "int8", "b": "int8", "y": "float"}
        assert reason(made, "y") == "type unknown: infer shapes first"

    def test_of_weights_that_callers_may_replace(self) -> None:
        model = net("y = Conv(x, u)", "u")
        model.graph.inputs.append(model.graph.initializers["u"])
        table = CalibrationTable(fingerprint(model), 1, {})
        made = plan(model, table, QuantOptions(), X86)
        assert reason(made, "y") == "an operand may be replaced by the caller"

    def test_of_old_models(self) -> None:
        made = planned(net("y = Conv(x, u)", "u", opset=11))
        assert made.reasons == {"opset below 13: upgrade the model first": 1}
        assert made.values == ()

    def test_of_quantized_models(self) -> None:
        model = net("a = Conv(x, u) r = Relu(a) y = Conv(r, v)", "u", "v")
        after = inserted(model, planned(model))
        assert planned(after).reasons == {"already quantized": len(list(after.graph))}

    def test_exclude(self) -> None:
        model = net("a = Conv(x, u) r = Relu(a) y = Conv(r, v)", "u", "v")
        for number, node in enumerate(model.graph):
            node.name = f"layer{number}"
        assert forms(planned(model, exclude=("layer2",))) == {"a": "int8", "r": "folded", "y": "float"}
        assert reason(planned(model, exclude=("layer2",)), "y") == "excluded"
        assert planned(model, exclude=("Conv",)).quantized == ()

    def test_of_unknown_ranges(self) -> None:
        model = net("a = Conv(x, u) r = Relu(a) b = Conv(r, v) y = Relu(b)", "u", "v")
        full = collect(model, feeds_of(model), observed_values(model), threads=1)
        assert set(full.sketches) == {"x", "r", "y"}
        part = dataclasses.replace(full, sketches={k: v for k, v in full.sketches.items() if k != "r"})
        made = plan(model, part, QuantOptions(), X86)
        assert made.quantized == ()
        assert reason(made, "a") == reason(made, "b") == "range unknown"

    def test_of_what_is_not_finite(self) -> None:
        model = net("a = Conv(x, u) y = Conv(a, v)", "u", "v")
        full = collect(model, feeds_of(model), observed_values(model), threads=1)
        bad = Sketch.of(np.array([1.0, np.nan], np.float32))
        made = plan(
            model, dataclasses.replace(full, sketches={**full.sketches, "x": bad}), QuantOptions(), X86
        )
        assert forms(made) == {"a": "float", "y": "int8"}
        assert reason(made, "a") == "NaN or infinity was seen"

    def test_cuda(self) -> None:
        made = planned(net("y = Conv(x, u)", "u"), CUDA)
        assert made.reasons == {"Conv has no int8 kernel on cuda": 1}


class TestGrids:
    def grid(self, low: float, high: float, target: Target = X86) -> ValuePlan:
        model = net("y = Conv(x, u)", "u")
        seen = Sketch.of(np.array([low, high], np.float32))
        table = CalibrationTable(fingerprint(model), 1, {"x": seen, "y": seen})
        return value(plan(model, table, QuantOptions("minmax"), target), "x")

    @given(low=st.floats(-1e6, 1e6, width=32), high=st.floats(-1e6, 1e6, width=32))
    @settings(deadline=None, max_examples=50)
    def test_covers_what_was_seen_and_holds_zero(self, low: float, high: float) -> None:
        grid = self.grid(min(low, high), max(low, high))
        assert 0 <= grid.zero_point <= 255
        first, last = grid.range
        half = grid.scale[0] * 0.5001  # a zero point is rounded
        assert first - half <= min(low, high, 0)
        assert max(low, high, 0) <= last + half
        grid = self.grid(min(low, high), max(low, high), TENSORRT)
        assert (grid.dtype, grid.zero_point) == ("int8", 0)
        assert grid.scale[0] * 127 >= max(abs(low), abs(high)) * (1 - 1e-6)

    def test_nothing_but_zero(self) -> None:
        assert (self.grid(0, 0).scale, self.grid(0, 0).zero_point) == ((1.0,), 0)

    @pytest.mark.parametrize(
        ("op", "low", "high"), [("Sigmoid", 0, 1), ("Tanh", -1, 1), ("HardSigmoid", 0, 1)]
    )
    def test_known_without_samples(self, op: str, low: float, high: float) -> None:
        model = net(f"s = {op}(x) y = Conv(s, u)", "u")
        assert "s" not in observed_values(model)
        grid = value(planned(model), "s")
        assert grid.range == pytest.approx((low, high), abs=grid.scale[0])
        assert grid.why == f"range of {op}"


def stored_weights(model: ir.Model, made: QuantPlan) -> Array:
    return next(a for a in constants(inserted(model, made)).values() if a.dtype == np.int8 and a.ndim > 1)


class TestWeights:
    @given(seed=st.integers(0, 1000), channels=st.integers(1, 5), kernel=st.integers(1, 3))
    @settings(deadline=None, max_examples=25)
    def test_no_pair_can_saturate(self, seed: int, channels: int, kernel: int) -> None:
        """255 * |q0 + q1| < 2**15 for the neighbours that a kernel adds in 16 bits."""
        rng = np.random.default_rng(seed)
        w = rng.standard_t(2, (32, channels, kernel, kernel)).astype(np.float32)
        model = build(f"g (float[1, {channels}, 8, 8] x) => (float[1, 32, h, w] y) {{ y = Conv(x, w) }}", w=w)
        rows = stored_weights(model, planned(model)).astype(int).transpose(0, 2, 3, 1).reshape(32, -1)
        pairs = rows[:, : rows.shape[1] // 2 * 2].reshape(32, -1, 2).sum(axis=2)
        assert 255 * np.abs(pairs).max(initial=0) < 2**15
        full = stored_weights(model, planned(model, X86_VNNI)).astype(int)
        assert (np.abs(full.reshape(32, -1)).max(axis=1) > 63).all()  # 127, or half of it and exact

    def test_nothing_is_lost_where_large_weights_are_apart(self) -> None:
        w = np.zeros((16, 16), np.float32)
        w[0::2] = np.random.default_rng(0).standard_normal((8, 16))
        model = build("g (float[N, 16] x) => (float[N, 16] y) { y = Gemm(x, w) }", w=w)
        made = planned(model)
        assert value(made, "w").why == "largest weight"
        assert (np.abs(stored_weights(model, made)).max(axis=0) == 127).all()

    @given(seed=st.integers(0, 1000), largest=st.integers(1, 60), step=st.floats(1e-4, 10))
    @settings(deadline=None, max_examples=25)
    def test_weights_that_were_integers_once_stay_exact(self, seed: int, largest: int, step: float) -> None:
        """Up to 60: two neighbours stay below 128 however they fall."""
        rng = np.random.default_rng(seed)
        w = (rng.integers(-largest, largest + 1, (16, 32)) * np.float32(step)).astype(np.float32)
        w[:, 0] = step * largest
        w[:, 1] = step * (largest - 1)  # the gap that shows the step
        model = build("g (float[N, 32] x) => (float[N, 16] y) { y = Gemm<transB = 1>(x, w) }", w=w)
        made = planned(model)
        q, scale = stored_weights(model, made).astype(float), np.array(value(made, "w").scale)
        assert "of 16 channels were on a grid already" in value(made, "w").why
        np.testing.assert_allclose(q * scale[:, None], w, rtol=1e-5, atol=1e-6 * step)
        assert (np.abs(q).max(axis=1) > 31).all()  # and is as fine as the integers allow

    def test_dead_weights_are_on_no_grid(self) -> None:
        model = build(
            "g (float[N, 16] x) => (float[N, 16] y) { y = Gemm(x, w) }", w=np.zeros((16, 16), np.float32)
        )
        assert set(value(planned(model), "w").scale) == {1.0}

    def test_depthwise_is_added_in_32_bits(self) -> None:
        w = np.ones((16, 1, 3, 3), np.float32)
        made = planned(net("y = Conv<group = 16>(x, w)", w=w))
        assert value(made, "w").scale == pytest.approx([1 / 127] * 16)

    def test_same_result_with_and_without_saturating_kernels(self, tmp_path: Path) -> None:
        """onnxruntime can be told to use kernels that do not saturate: they must agree with the fast ones.

        On a processor with 32-bit sums both are exact and so are the full 8 bits.
        """
        w = np.abs(weights("w", kernel=3)["w"]) + 0.2
        model = net("y = Conv(x, w)", w=w)
        feed = {"x": np.full((2, 16, 8, 8), 3, np.float32)}
        after = inserted(model, planned(model, feeds=[feed]))
        assert any(n.op_type == "QLinearConv" for n in optimized(after, tmp_path).graph.node)
        precise = ir.from_proto(optimized(after, tmp_path, x64quantprecision="1"))
        np.testing.assert_array_equal(run(after, feed), run(precise, feed, optimize=False))
        np.testing.assert_allclose(run(after, feed), run(model, feed), rtol=0.01)

    def test_bias_fits_its_integers(self) -> None:
        """A channel of tiny weights and a large bias."""
        w = np.ones((16, 16), np.float32)
        w[3] = 1e-9
        b = np.full(16, 5.0, np.float32)
        text = "g (float[N, 16] x) => (float[N, 16] y) { y = Gemm<transB = 1>(x, w, b) }"
        model = build(text, w=w, b=b)
        after = inserted(model, planned(model))
        biases = next(a for a in constants(after).values() if a.dtype == np.int32)
        assert np.abs(biases.astype(float)).max() < 2**30 * 1.000001  # scales are float32
        feed = feeds_of(model)[0]
        np.testing.assert_allclose(run(after, feed)[:, 3], 5.0, rtol=1e-5)

    @pytest.mark.parametrize("bias", [0.0, 0.3])
    def test_dead_channel(self, bias: float) -> None:
        w = weights("w")["w"][:, :, 0, 0].copy()
        w[7] = 0
        b = np.full(16, bias, np.float32)
        text = "g (float[N, 16] x) => (float[N, 16] y) { y = Gemm<transB = 1>(x, w, b) }"
        model = build(text, w=w, b=b)
        out = run(inserted(model, planned(model)), feeds_of(model)[0])
        np.testing.assert_allclose(out[:, 7], bias, rtol=1e-5)

    def test_weight_shared_along_two_axes(self) -> None:
        text = "g (float[N, 16] x) => (float[N, 16] y) { a = Gemm(x, w) y = Gemm<transB = 1>(a, w) }"
        model = build(text, w=weights("w")["w"][:, :, 0, 0])
        made = planned(model)
        assert value(made, "w").axis is None
        feed = feeds_of(model)[0]
        assert decibels(run(model, feed), run(inserted(model, made), feed)) > 25


class TestPlan:
    MODEL = "a = Conv(x, u) r = Relu(a) p = MaxPool<kernel_shape = [2, 2]>(r) b = Conv(p, v) y = Add(p, b)"

    def test_is_pure_and_deterministic(self) -> None:
        model = net(self.MODEL, "u", "v")
        before = serialize(model)
        assert planned(model) == planned(model) == planned(model.clone())
        assert serialize(model) == before

    def test_survives_a_file(self) -> None:
        made = planned(net(self.MODEL, "u", "v"))
        assert QuantPlan.from_dict(made.to_dict()) == made

    def test_entry_for_every_node(self) -> None:
        model = net(self.MODEL, "u", "v")
        assert [n.output for n in planned(model).nodes] == ["a", "r", "p", "b", "y"]
        assert all(v.dtype in LIMITS and v.why for v in planned(model).values)

    def test_table_of_another_model(self) -> None:
        model, other = net("y = Conv(x, u)", "u"), net("y = Conv(x, v)", "v")
        table = collect(other, feeds_of(other), observed_values(other), threads=1)
        with pytest.raises(InputError, match="another model"):
            plan(model, table, QuantOptions(), X86)

    def test_unknown_method(self) -> None:
        with pytest.raises(InputError, match="unknown range method 'best'"):
            planned(net("y = Conv(x, u)", "u"), method="best")

    @pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
    def test_every_method(self, method: str) -> None:
        model = net(self.MODEL, "u", "v")
        feed = feeds_of(model)[0]
        made = planned(model, method=method)
        assert method in value(made, "x").why
        assert decibels(run(model, feed), run(inserted(model, made), feed)) > 15

    def test_one_table_serves_every_target_and_every_exclusion(self) -> None:
        body = "a = Conv(x, u) b = Conv(x, v) c = Concat<axis = 1>(a, b) s = Sigmoid(c) y = Conv(s, w)"
        model = net(body, "u", "v", w=weights("w")["w"].repeat(2, axis=1))
        for node in model.graph:
            node.name = f"node {node.outputs[0].name}"
        table = collect(model, feeds_of(model), observed_values(model), threads=1)
        for target in TARGETS.values():
            for exclude in ((), *((n.name,) for n in model.graph)):
                made = plan(model, table, QuantOptions("minmax", exclude=exclude), target)
                assert "range unknown" not in made.reasons

    def test_values_that_only_move_data_are_not_observed(self) -> None:
        assert set(observed_values(net(self.MODEL, "u", "v"), target=X86)) == {"x", "r", "b", "y"}


class TestTargets:
    @pytest.mark.parametrize(
        ("machine", "target"), [("x86_64", X86), ("AMD64", X86), ("aarch64", ARM), ("arm64", ARM)]
    )
    def test_cpu_is_what_the_machine_is(self, machine: str, target: Target) -> None:
        assert target_of("cpu", machine) is target

    def test_by_name(self) -> None:
        assert [target_of(name) for name in TARGETS] == list(TARGETS.values())
        with pytest.raises(InputError, match="unknown target 'tpu'"):
            target_of("tpu")

    def test_products_of_activations(self) -> None:
        text = "g (float[2, 16, 16] x) => (float[2, 16, 16] y) { y = MatMul(x, x) }"
        assert forms(planned(build(text), X86)) == {"y": "float"}
        made = planned(build(text), ARM)
        assert forms(made) == {"y": "int8"}
        feed = feeds_of(build(text))[0]
        assert decibels(run(build(text), feed), run(inserted(build(text), made), feed)) > 30


def test_real_model_is_fused_and_agrees(corpus: Path, tmp_path: Path) -> None:
    """A trained residual net on coarse random images: integers throughout, and the same classes."""
    model = ir.load(corpus / "models" / "mlperftiny_ic_resnet8.onnx")
    images = np.random.default_rng(0).integers(0, 256, (16, 1, 4, 4, 3)).repeat(8, 2).repeat(8, 3)
    feeds = [{model.graph.inputs[0].name or "": image.astype(np.float32)} for image in images]
    made = planned(model, feeds=feeds)
    after = inserted(model, made)
    convolutions = sum(n.op_type == "Conv" and n.form == "int8" for n in made.nodes)
    assert kernels(after, tmp_path)["QLinearConv"] == convolutions == 8
    assert sum(run(model, f).argmax() == run(after, f).argmax() for f in feeds) >= 14
