"""insert-qdq: what a plan says is in the graph, and the graph computes what its integers stand for."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from quantized import decibels, feeds_of, inserted, planned, run
from rewrites import build, constants, operators

from edgewise.calibration.target import TENSORRT
from edgewise.passes import parse
from edgewise.passes.base import Contract, PassError
from edgewise.passes.insert_qdq import InsertQdq
from edgewise.passes.quant_plan import NodePlan, QuantPlan, ValuePlan
from edgewise.runtime.evaluate import Array
from edgewise.runtime.session import serialize

Q, DQ = "QuantizeLinear", "DequantizeLinear"


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed + len(shape)).standard_normal(shape).astype(np.float32)


def conv_relu(opset: int = 17) -> ir.Model:
    text = "g (float[N, 8, 6, 6] x) => (float[N, 16, 4, 4] y) { c = Conv(x, w, b) y = Relu(c) }"
    return build(text, opset, w=normal(16, 8, 3, 3) / 8, b=normal(16))


def producers(model: ir.Model, op_type: str) -> list[list[str]]:
    """For every node of a type, what makes its inputs."""
    return [
        [v.producer().op_type if v is not None and v.producer() else "" for v in n.inputs]
        for n in model.graph
        if n.op_type == op_type
    ]


class TestNothingToDo:
    def test_empty_plan(self) -> None:
        model = conv_relu()
        before = serialize(model)
        assert InsertQdq().apply(model).edits == 0
        assert serialize(model) == before

    def test_plan_with_floats_only(self) -> None:
        plan = QuantPlan(nodes=(NodePlan("c", "Conv", "float", "excluded"),))
        assert InsertQdq(plan).apply(conv_relu(opset=9)).edits == 0

    def test_old_opset(self) -> None:
        model = conv_relu(opset=12)
        with pytest.raises(PassError, match="opset 13, the model has 12: upgrade it first"):
            InsertQdq(planned(conv_relu())).apply(model)

    def test_node_of_another_model(self) -> None:
        plan = QuantPlan(nodes=(NodePlan("z", "Conv", "int8"), NodePlan("c", "Gemm", "int8")))
        outcome = InsertQdq(plan).apply(conv_relu())
        assert outcome.edits == 0
        assert dict(outcome.refused) == {"not in the model": 2}

    def test_second_run(self) -> None:
        model = conv_relu()
        plan = planned(model)
        assert InsertQdq(plan).apply(model).edits == 2
        outcome = InsertQdq(plan).apply(model)
        assert outcome.edits == 0
        assert outcome.refused["already quantized"] == 1


class TestSpec:
    def test_is_lossy_and_listed(self) -> None:
        assert parse("insert-qdq") == InsertQdq()
        assert InsertQdq().spec == "insert-qdq"
        assert InsertQdq.contract is Contract.LOSSY

    def test_round_trip(self) -> None:
        made = InsertQdq(planned(conv_relu()))
        assert parse(made.spec) == made

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("insert-qdq{bits: 8}", "no option 'bits'"),
            ("insert-qdq{plan: 8}", "keys target, values and nodes"),
            ("insert-qdq{plan: {nodes: [{output: y, op_type: Conv, form: int3}]}}", "form 'int3'"),
        ],
    )
    def test_nonsense(self, spec: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            parse(spec)


class TestConv:
    def test_graph(self) -> None:
        after = inserted(conv_relu(), planned(conv_relu()))
        assert operators(after).count(Q) == 2
        assert operators(after).count(DQ) == 4
        assert producers(after, "Conv") == [[DQ, DQ, DQ]]
        assert producers(after, "Relu") == [["Conv"]]  # nothing between what one kernel will do
        assert {a.dtype.name for a in constants(after).values()} == {"float32", "int8", "uint8", "int32"}
        assert {a.dtype for a in constants(after).values() if a.ndim == 4} == {np.dtype(np.int8)}
        assert after.graph.outputs[0].name == "y"

    def test_numbers_are_those_of_the_integers(self) -> None:
        """Every step by hand in float64; the runtime's float32 may round a tie to the other level."""
        model = conv_relu()
        plan = planned(model)
        x, y, w = (next(v for v in plan.values if v.name == n) for n in "xyw")
        feed = feeds_of(model)[0]

        def on_grid(array: Array, grid: ValuePlan, low: int, high: int) -> Array:
            q = np.rint(array / grid.scale[0]) + grid.zero_point
            return (q.clip(low, high) - grid.zero_point) * grid.scale[0]

        scale = np.array(w.scale)[:, None, None, None]
        kernel = np.rint(constants(model)["w"] / scale) * scale
        bias = (
            np.rint(constants(model)["b"] / (np.array(w.scale) * x.scale[0])) * np.array(w.scale) * x.scale[0]
        )
        windows = np.lib.stride_tricks.sliding_window_view(on_grid(feed["x"], x, 0, 255), (3, 3), axis=(2, 3))
        sums = np.einsum("nchwij,ocij->nohw", windows, kernel) + bias[:, None, None]
        expected = on_grid(sums, y, 0, 255)
        actual = run(inserted(model, plan), feed, optimize=False)
        assert np.abs(actual - expected).max() < 1.01 * y.scale[0]
        assert (np.abs(actual - expected) < 1e-4).mean() > 0.999

    def test_file_is_a_quarter(self) -> None:
        text = "g (float[N, 64] x) => (float[N, 64] y) { y = Gemm(x, w, b) }"
        model = build(text, w=normal(64, 64), b=normal(64))
        assert len(serialize(inserted(model, planned(model)))) < 0.4 * len(serialize(model))

    def test_close_to_float(self) -> None:
        model = conv_relu()
        after = inserted(model, planned(model))
        for feed in feeds_of(model):
            assert decibels(run(model, feed), run(after, feed)) > 35

    def test_per_tensor(self) -> None:
        after = inserted(conv_relu(), planned(conv_relu(), per_channel=False))
        assert all(a.ndim == 0 for a in constants(after).values() if a.dtype == np.float32)


class TestConstants:
    def test_shared_weight_is_stored_once(self) -> None:
        text = """g (float[N, 8, 6, 6] x) => (float[N, 8, 6, 6] y)
            { a = Conv<pads = [1, 1, 1, 1]>(x, w) b = Relu(a) y = Conv<pads = [1, 1, 1, 1]>(b, w) }"""
        model = build(text, w=normal(8, 8, 3, 3))
        after = inserted(model, planned(model))
        assert sum(a.ndim == 4 for a in constants(after).values()) == 1
        assert producers(after, "Conv") == [[DQ, DQ], [DQ, DQ]]

    def test_shared_bias_is_stored_in_the_units_of_each_user(self) -> None:
        text = "g (float[N, 8] x) => (float[N, 8] y) { a = Gemm(x, v, b) c = Relu(a) y = Gemm(c, w, b) }"
        model = build(text, v=normal(8, 8), w=normal(8, 8, seed=5) * 9, b=normal(8))
        after = inserted(model, planned(model))
        biases = [a for a in constants(after).values() if a.dtype == np.int32]
        assert len(biases) == 2
        assert not np.array_equal(*biases)

    def test_weight_that_floats_read_too_stays(self) -> None:
        text = "g (float[N, 8] x) => (float[N, 8] y, float[8, 8] z) { y = Gemm(x, w) z = Exp(w) }"
        model = build(text, w=normal(8, 8))
        after = inserted(model, planned(model))
        assert constants(after)["w"].dtype == np.float32
        np.testing.assert_array_equal(
            *(m.graph.node(-1).inputs[0].const_value.numpy() for m in (model, after))
        )

    def test_weight_in_a_constant_node(self) -> None:
        text = """g (float[N, 2] x) => (float[N, 2] y)
            { w = Constant<value = float[2, 2] {1.0, 2.0, 3.0, -4.0}>() y = Gemm(x, w) }"""
        after = inserted(build(text), planned(build(text)))
        assert "Constant" not in operators(after)
        assert producers(after, "Gemm") == [[DQ, DQ]]

    @pytest.mark.parametrize("shape", [(8,), (1, 8), (1,), ()])
    def test_bias_of_any_shape(self, shape: tuple[int, ...]) -> None:
        text = "g (float[N, 4] x) => (float[N, 8] y) { y = Gemm(x, w, b) }"
        model = build(text, w=normal(4, 8), b=np.full(shape, 0.7, np.float32))
        after = inserted(model, planned(model))
        feed = feeds_of(model)[0]
        assert decibels(run(model, feed), run(after, feed)) > 35

    def test_bias_behind_a_matmul(self) -> None:
        text = "g (float[2, 3, 4] x) => (float[2, 3, 8] y) { m = MatMul(x, w) a = Add(b, m) y = Exp(a) }"
        model = build(text, w=normal(4, 8) / 2, b=normal(8))
        after = inserted(model, planned(model))
        assert producers(after, "Add") == [[DQ, "MatMul"]]
        assert "int32" in {a.dtype.name for a in constants(after).values()}
        feed = feeds_of(model)[0]
        assert decibels(np.log(run(model, feed)), np.log(run(after, feed))) > 35

    def test_number(self) -> None:
        """8 bits hold a single number exactly."""
        text = """g (float[N, 8, 4, 4] x) => (float[N, 8, 4, 4] y)
            { c = Conv(x, w) d = Mul(c, k) y = Conv(d, w) }"""
        model = build(text, w=normal(8, 8, 1, 1), k=np.array([-1.7], np.float32))
        after = inserted(model, planned(model))
        (pair,) = (n for n in after.graph if n.op_type == DQ and n.inputs[0].name == "k.quantized")
        scale, zero_point = (float(v.const_value.numpy()) for v in pair.inputs[1:])
        (integer,) = constants(after)["k.quantized"].astype(float)
        assert scale * (integer - zero_point) == pytest.approx(-1.7, rel=1e-6)


class TestReaders:
    def test_floats_keep_reading_what_comes_out_of_float(self) -> None:
        text = "g (float[N, 4] x) => (float[N, 8] y, float[N, 4] z) { y = Gemm(x, w) z = Exp(x) }"
        model = build(text, w=normal(4, 8))
        assert producers(inserted(model, planned(model)), "Exp") == [[""]]

    def test_all_read_the_integers_that_come_out_of_int8(self) -> None:
        """Else the kernel would have to give its result twice."""
        text = """g (float[N, 8, 4, 4] x) => (float[N, 8, 4, 4] y, float[N, 8, 4, 4] z)
            { c = Conv(x, w) y = Exp(c) d = Relu(c) z = Conv(d, w) }"""
        model = build(text, w=normal(8, 8, 1, 1))
        after = inserted(model, planned(model))
        assert producers(after, "Exp") == [[DQ]]
        assert {
            use.node.op_type for use in next(n for n in after.graph if n.op_type == "Conv").outputs[0].uses()
        } == {Q}

    def test_output_that_is_read_as_well(self) -> None:
        text = """g (float[N, 8, 4, 4] x) => (float[N, 8, 4, 4] c, float[N, 8, 4, 4] y)
            { c = Conv(x, w) y = Conv(c, w) }"""
        model = build(text, w=normal(8, 8, 1, 1))
        after = inserted(model, planned(model))
        assert [o.name for o in after.graph.outputs] == ["c", "y"]
        assert [o.producer().op_type for o in after.graph.outputs] == [DQ, DQ]

    def test_reader_in_a_subgraph(self) -> None:
        text = """g (float[N, 8, 4, 4] x, bool k) => (float[N, 8, 4, 4] y) {
            c = Conv(x, w)
            y = If(k) <then_branch = t () => (float[N, 8, 4, 4] p) { p = Exp(c) },
                       else_branch = e () => (float[N, 8, 4, 4] q) { q = Abs(c) }>
        }"""
        model = build(text, w=normal(8, 8, 1, 1))
        after = inserted(model, planned(model))
        (branches,) = (n for n in after.graph if n.op_type == "If")
        for attr in branches.attributes.values():
            assert [n.inputs[0].producer().op_type for n in attr.as_graph()] == [DQ]

    def test_names_that_are_taken(self) -> None:
        text = """g (float[N, 8] x) => (float[N, 8] y)
            { a = Exp(x) b = Gemm(x, w) c = Add(a, b) y = Gemm(c, w) }"""
        model = build(text, w=normal(8, 8))
        for node, name in zip(model.graph, ("x.quantized", "x.dequantized", "w.quantized"), strict=False):
            node.outputs[0].name = name
        inserted(model, planned(model))


class TestMovedValues:
    def test_between_integers(self) -> None:
        text = """g (float[N, 8, 4, 4] x) => (float[N, 16] y)
            { c = Conv(x, w) m = MaxPool<kernel_shape = [4, 4]>(c) f = Flatten(m) y = Gemm(f, v) }"""
        model = build(text, w=normal(8, 8, 1, 1), v=normal(8, 16))
        plan = planned(model)
        grids = {v.name: (v.scale, v.zero_point) for v in plan.values}
        assert grids["c"] == grids["m"] == grids["f"]
        after = inserted(model, plan)
        assert producers(after, "MaxPool") == producers(after, "Flatten") == [[DQ]]

    def test_padding_is_done_on_integers(self) -> None:
        text = """g (float[N, 8, 4, 4] x) => (float[N, 8, 6, 6] y)
            { c = Conv(x, w) p = Pad(c, pads) y = Conv(p, w) }"""
        pads = np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64)
        model = build(text, w=normal(8, 8, 1, 1), pads=pads)
        plan = planned(model)
        after = inserted(model, plan)
        (pad,) = (n for n in after.graph if n.op_type == "Pad")
        assert pad.outputs[0].dtype == ir.DataType.UINT8
        assert (
            int(pad.inputs[2].const_value.numpy()) == next(v for v in plan.values if v.name == "c").zero_point
        )
        feed = feeds_of(model)[0]
        assert decibels(run(model, feed), run(after, feed)) > 30

    @pytest.mark.parametrize(
        ("cut", "bounds", "low", "high"),
        [
            ("Relu(c)", {}, 0, np.inf),
            ("Clip(c, l, h)", {"l": -0.4, "h": 0.5}, -0.4, 0.5),
            ("Clip(c, l)", {"l": 0.3}, 0.3, np.inf),
        ],
    )
    def test_cut_of_a_value_that_is_read_uncut(
        self, cut: str, bounds: dict[str, float], low: float, high: float
    ) -> None:
        text = f"""g (float[N, 8, 4, 4] x) => (float[N, 8, 4, 4] y)
            {{ c = Conv(x, w) r = {cut} d = Conv(r, w) y = Add(c, d) }}"""
        scalars = {name: np.array(b, np.float32) for name, b in bounds.items()}
        model = build(text, w=normal(8, 8, 1, 1) / 3, **scalars)
        plan = planned(model)
        assert next(n for n in plan.nodes if n.output == "r").form == "integer"
        after = inserted(model, plan)
        (clip,) = (n for n in after.graph if n.op_type == "Clip")
        assert clip.inputs[0].dtype == clip.outputs[0].dtype == ir.DataType.UINT8
        grid = next(v for v in plan.values if v.name == "c")
        ends = [grid.scale[0] * (float(v.const_value.numpy()) - grid.zero_point) for v in clip.inputs[1:]]
        expected = [low, high][: len(ends)]
        assert ends == pytest.approx(expected, abs=grid.scale[0] / 2 + 1e-6)
        feed = feeds_of(model)[0]
        assert decibels(run(model, feed), run(after, feed)) > 28

    def test_cut_behind_a_pool_vanishes(self) -> None:
        text = """g (float[N, 8, 4, 4] x) => (float[N, 8, 2, 2] y)
            { c = Conv(x, w) m = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(c)
              r = Relu(m) y = Conv(r, w) }"""
        model = build(text, w=normal(8, 8, 1, 1))
        plan = planned(model)
        assert {v.zero_point for v in plan.values if v.name in ("c", "m", "r")} == {0}
        after = inserted(model, plan)
        assert "Relu" not in operators(after)
        feed = feeds_of(model)[0]
        assert decibels(run(model, feed), run(after, feed)) > 30

    def test_vanished_cut_that_is_an_output(self) -> None:
        text = """g (float[N, 8, 4, 4] x) => (float[N, 8, 2, 2] y)
            { c = Conv(x, w) m = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(c) y = Relu(m) }"""
        model = build(text, w=normal(8, 8, 1, 1))
        assert run(inserted(model, planned(model)), feeds_of(model)[0]).min() == 0

    def test_space_to_depth_is_done_on_integers(self) -> None:
        text = """g (float[N, 8, 4, 4] x) => (float[N, 8, 2, 2] y)
            { c = Conv(x, w) s = SpaceToDepth<blocksize = 2>(c) y = Conv(s, v) }"""
        model = build(text, w=normal(8, 8, 1, 1), v=normal(8, 32, 1, 1))
        after = inserted(model, planned(model))
        (node,) = (n for n in after.graph if n.op_type == "SpaceToDepth")
        assert node.outputs[0].dtype == ir.DataType.UINT8
        assert node.attributes["blocksize"].value == 2

    def test_integers_as_output(self) -> None:
        text = "g (float[N, 8, 4, 4] x) => (float[N, 8, 6, 6] y) { c = Conv(x, w) y = Pad(c, pads) }"
        pads = np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64)
        model = build(text, w=normal(8, 8, 1, 1), pads=pads)
        assert run(inserted(model, planned(model)), feeds_of(model)[0]).dtype == np.float32


class TestOtherTargets:
    def test_symmetric_int8(self) -> None:
        model = conv_relu()
        plan = planned(model, TENSORRT)
        assert {v.dtype for v in plan.values} == {"int8"}
        assert {v.zero_point for v in plan.values} == {0}
        after = inserted(model, plan)
        assert {a.dtype.name for a in constants(after).values()} == {"float32", "int8"}
        assert producers(after, "Conv") == [[DQ, DQ, ""]]  # TensorRT wants the bias in float
        assert decibels(run(model, feeds_of(model)[0]), run(after, feeds_of(model)[0])) > 35


class TestEditedPlans:
    def test_value_left_out_stays_float(self) -> None:
        model = conv_relu()
        plan = planned(model)
        kept = tuple(v for v in plan.values if v.name != "w")
        after = model.clone()
        InsertQdq(dataclasses.replace(plan, values=kept)).apply(after)
        assert producers(after, "Conv") == [[DQ, "", ""]]  # no unit for the bias without the weight's

    def test_wider_scale_is_followed(self) -> None:
        model = conv_relu()
        plan = planned(model)
        values = tuple(
            dataclasses.replace(v, scale=tuple(4 * s for s in v.scale)) if v.name == "w" else v
            for v in plan.values
        )
        after = inserted(model, dataclasses.replace(plan, values=values))
        (weights,) = (a for a in constants(after).values() if a.ndim == 4)
        assert np.abs(weights).max() <= 32

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("w", {"scale": (0.1, 0.2)}, "2 scales for 'w' of shape"),
            ("w", {"axis": 7}, "16 scales for 'w' of shape"),
            ("x", {"scale": (0.1,) * 8, "axis": 1}, "axis for 'x', which is no constant"),
        ],
    )
    def test_scales_that_do_not_fit(self, name: str, change: dict[str, Any], message: str) -> None:
        plan = planned(conv_relu())
        values = tuple(dataclasses.replace(v, **change) if v.name == name else v for v in plan.values)
        with pytest.raises(PassError, match=message):
            InsertQdq(dataclasses.replace(plan, values=values)).apply(conv_relu())
