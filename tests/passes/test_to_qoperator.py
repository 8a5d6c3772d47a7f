"""to-qoperator: groups of QDQ become operators on integers, and onnxruntime computes what it did."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from quantized import feeds_of, inserted, run
from rewrites import build, operators

from edgewise.calibration.collect import collect
from edgewise.calibration.plan import QuantOptions, observed_values, plan
from edgewise.calibration.target import ARM, X86, Target
from edgewise.passes import parse
from edgewise.passes.base import Contract
from edgewise.passes.to_qoperator import ToQOperator
from edgewise.passes.verify import Signature, check
from edgewise.runtime.evaluate import Array

Q, DQ = "QuantizeLinear", "DequantizeLinear"


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed + len(shape)).standard_normal(shape).astype(np.float32)


def in_int8(model: ir.Model, target: Target = X86, activations: str | None = None) -> ir.Model:
    """The QDQ model of `model`."""
    options = QuantOptions(activations=activations)  # type: ignore[arg-type]
    table = collect(model, feeds_of(model), observed_values(model, options, target), threads=1)
    return inserted(model, plan(model, table, options, target))


def rewritten(qdq: ir.Model) -> ir.Model:
    """`qdq` after the pass: sound, settled, and what onnxruntime computes is the same to the last bit."""
    after = qdq.clone()
    outcome = ToQOperator().apply(after)
    check(after, Signature.of(qdq))
    onnx.checker.check_model(ir.to_proto(after))
    assert ToQOperator().apply(after.clone()).edits == 0
    assert outcome.edits
    assert ("com.microsoft" in after.opset_imports) == any(n.domain for n in after.graph)
    for feed in feeds_of(qdq):
        np.testing.assert_allclose(run(qdq, feed), run(after, feed), rtol=1e-6, atol=1e-7)
    return after


IMAGE, POOLED = "float[N, 16, 8, 8]", "float[N, 16, 1, 1]"
NETS: dict[str, tuple[str, dict[str, Array], list[str]]] = {
    "conv": (
        f"g ({IMAGE} x) => (float[N, 16, 6, 6] y) {{ y = Conv(x, w, b) }}",
        {"w": normal(16, 16, 3, 3) / 9, "b": normal(16)},
        ["QLinearConv"],
    ),
    "conv, relu": (
        f"g ({IMAGE} x) => (float[N, 16, 6, 6] y) {{ c = Conv(x, w) y = Relu(c) }}",
        {"w": normal(16, 16, 3, 3) / 9},
        ["QLinearConv"],
    ),
    "gemm": (
        "g (float[N, 16] x) => (float[N, 8] y) { y = Gemm<transB = 1>(x, w, b) }",
        {"w": normal(8, 16), "b": normal(8)},
        ["QGemm"],
    ),
    "two gemms": (
        "g (float[N, 16] x) => (float[N, 8] y) { h = Gemm(x, v, b) r = Relu(h) y = Gemm(r, w, c) }",
        {"v": normal(16, 16), "b": normal(16), "w": normal(16, 8), "c": normal(8)},
        ["QGemm", "QGemm"],
    ),
    "matmul": (
        "g (float[N, 16] x) => (float[N, 8] y) { y = MatMul(x, w) }",
        {"w": normal(16, 8)},
        ["MatMulIntegerToFloat"],
    ),
    "two matmuls": (
        "g (float[N, 16] x) => (float[N, 8] y) { h = MatMul(x, v) y = MatMul(h, w) }",
        {"v": normal(16, 16), "w": normal(16, 8)},
        ["QLinearMatMul", "MatMulIntegerToFloat"],
    ),
    "matmul with bias": (
        "g (float[N, 16] x) => (float[N, 8] y) { h = MatMul(x, v) a = Add(h, b) y = MatMul(a, w) }",
        {"v": normal(16, 16), "b": normal(16), "w": normal(16, 8)},
        ["QGemm", "MatMulIntegerToFloat"],
    ),
    "matmul with bias over rows": (
        "g (float[N, 5, 16] x) => (float[N, 5, 8] y) { h = MatMul(x, v) a = Add(b, h) y = MatMul(a, w) }",
        {"v": normal(16, 16), "b": normal(16), "w": normal(16, 8)},
        ["Reshape", "QGemm", "Reshape", "MatMulIntegerToFloat"],
    ),
    "residual": (
        f"g ({IMAGE} x) => ({IMAGE} y) {{ a = Conv<pads = [1, 1, 1, 1]>(x, w) r = Relu(a) "
        "b = Conv<pads = [1, 1, 1, 1]>(r, w) s = Add(r, b) t = Relu(s) "
        "y = Conv<pads = [1, 1, 1, 1]>(t, w) }",
        {"w": normal(16, 16, 3, 3) / 9},
        ["QLinearConv", "QLinearConv", "QLinearAdd", "QLinearConv"],
    ),
    "concat": (
        f"g ({IMAGE} x) => (float[N, 16, 8, 8] y) {{ a = Conv(x, v) b = Conv(x, u) "
        "c = Concat<axis = 1>(a, b) y = Conv(c, w) }",
        {"v": normal(16, 16, 1, 1), "u": normal(16, 16, 1, 1, seed=3), "w": normal(16, 32, 1, 1)},
        ["QLinearConv", "QLinearConv", "QLinearConcat", "QLinearConv"],
    ),
    "swish": (
        f"g ({IMAGE} x) => ({IMAGE} y) {{ a = Conv(x, w) s = Sigmoid(a) m = Mul(a, s) y = Conv(m, w) }}",
        {"w": normal(16, 16, 1, 1)},
        ["QLinearConv", "QLinearSigmoid", "QLinearMul", "QLinearConv"],
    ),
    "leaky relu": (
        f"g ({IMAGE} x) => ({IMAGE} y) {{ a = Conv(x, w) s = LeakyRelu<alpha = 0.1>(a) y = Conv(s, w) }}",
        {"w": normal(16, 16, 1, 1)},
        ["QLinearConv", "QLinearLeakyRelu", "QLinearConv"],
    ),
    "global average": (
        f"g ({IMAGE} x) => ({POOLED} y) {{ a = Conv(x, w) s = GlobalAveragePool(a) y = Conv(s, w) }}",
        {"w": normal(16, 16, 1, 1)},
        ["QLinearConv", "QLinearGlobalAveragePool", "QLinearConv"],
    ),
    "movers": (
        f"g ({IMAGE} x) => (float[N, 16, 4, 4] y) {{ a = Conv(x, w) p = MaxPool<kernel_shape = [2, 2], "
        "strides = [2, 2]>(a) t = Transpose<perm = [0, 1, 3, 2]>(p) y = Conv(t, w) }",
        {"w": normal(16, 16, 1, 1)},
        ["QLinearConv", "MaxPool", "Transpose", "QLinearConv"],
    ),
    "split": (
        f"g ({IMAGE} x) => (float[N, 16, 8, 8] y, float[N, 16, 8, 8] z) {{ a = Conv(x, w) "
        "p, q = Split<axis = 1>(a, s) y = Conv(p, v) z = Conv(q, v) }",
        {"w": normal(32, 16, 1, 1), "v": normal(16, 16, 1, 1), "s": np.array([16, 16])},
        ["QLinearConv", "Split", "QLinearConv", "QLinearConv"],
    ),
    "clip that cuts more than the grid": (
        f"g ({IMAGE} x) => ({IMAGE} y) {{ a = Conv(x, w) c = Clip(a, l, h) y = Conv(c, w) }}",
        {"w": normal(16, 16, 1, 1), "l": np.float32(0.5), "h": np.float32(0.9)},
        ["QLinearConv", "Clip", "QLinearConv"],
    ),
    "pad": (
        f"g ({IMAGE} x) => (float[N, 16, 10, 10] y) {{ a = Conv(x, w) c = Pad(a, p) y = Conv(c, w) }}",
        {"w": normal(16, 16, 1, 1), "p": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
        ["QLinearConv", "Pad", "QLinearConv"],
    ),
}


@pytest.mark.parametrize(("text", "weights", "expected"), NETS.values(), ids=NETS)
def test_becomes(text: str, weights: dict[str, Array], expected: list[str]) -> None:
    after = rewritten(in_int8(build(text, **weights)))
    found = [o for o in operators(after) if o not in (Q, DQ)]
    assert found == expected


def test_average_pool() -> None:
    text, weights, _ = NETS["global average"]
    text = text.replace("GlobalAveragePool(a)", "AveragePool<kernel_shape = [8, 8]>(a)")
    after = rewritten(in_int8(build(text, **weights)))
    assert "QLinearAveragePool" in operators(after)


def test_only_the_ends_are_left() -> None:
    text, weights, _ = NETS["residual"]
    after = rewritten(in_int8(build(text, **weights)))
    assert (operators(after).count(Q), operators(after).count(DQ)) == (1, 1)


def test_plain_conv_needs_no_domain_of_onnxruntime() -> None:
    text, weights, _ = NETS["conv, relu"]
    assert "com.microsoft" not in rewritten(in_int8(build(text, **weights))).opset_imports


def test_two_activations() -> None:
    text = "g (float[N, 8, 16] x, float[N, 16, 8] z) => (float[N, 8, 8] y) { y = MatMul(x, z) }"
    after = rewritten(in_int8(build(text), ARM))
    assert "MatMulIntegerToFloat" in operators(after)


def test_int8_activations() -> None:
    """onnxruntime does not fuse all of these on x86, and computes in float: within a level of the output."""
    text, weights, expected = NETS["residual"]
    qdq = in_int8(build(text, **weights), activations="int8")
    after = qdq.clone()
    ToQOperator().apply(after)
    assert [o for o in operators(after) if o not in (Q, DQ)] == expected
    (last,) = (n for n in after.graph if n.op_type == DQ)
    level = float(last.inputs[1].const_value.numpy())  # type: ignore[union-attr]
    for feed in feeds_of(qdq):
        assert np.abs(run(qdq, feed) - run(after, feed)).max() <= 3.01 * level


class TestRefusals:
    def refused(self, qdq: ir.Model) -> dict[str, int]:
        after = qdq.clone()
        return dict(ToQOperator().apply(after).refused)

    def test_float_model(self) -> None:
        text, weights, _ = NETS["conv"]
        model = build(text, **weights)
        outcome = ToQOperator().apply(model)
        assert (outcome.edits, dict(outcome.refused)) == (0, {})

    def test_sixteen_bits(self) -> None:
        text, weights, _ = NETS["conv"]
        qdq = in_int8(build(text, **weights), activations="uint16")
        assert self.refused(qdq) == {"only 8 bits have such an operator": 1}

    def test_read_in_float_as_well(self) -> None:
        text, weights, _ = NETS["conv"]
        qdq = in_int8(build(text, **weights))
        conv = next(n for n in qdq.graph if n.op_type == "Conv")
        qdq.graph.outputs.append(conv.outputs[0])
        assert self.refused(qdq) == {"its result is read as floats": 1}

    def test_bias_in_other_units(self) -> None:
        text, weights, _ = NETS["conv"]
        qdq = in_int8(build(text, **weights))
        conv = next(n for n in qdq.graph if n.op_type == "Conv")
        bias = conv.inputs[2].producer()  # type: ignore[union-attr]
        units = ir.Value(name="units", const_value=ir.tensor(np.full(16, 0.5, np.float32), name="units"))
        qdq.graph.register_initializer(units)
        bias.replace_input_with(1, units)  # type: ignore[union-attr]
        assert self.refused(qdq) == {"bias is not in units of input and weight": 1}

    def test_float_bias(self) -> None:
        text, weights, _ = NETS["conv"]
        qdq = in_int8(build(text, **weights))
        conv = next(n for n in qdq.graph if n.op_type == "Conv")
        conv.replace_input_with(2, qdq.graph.inputs[0])
        assert self.refused(qdq) == {"bias is not int32": 1}

    def test_mover_to_another_grid(self) -> None:
        text, weights, _ = NETS["movers"]
        qdq = in_int8(build(text, **weights))
        pool = next(n for n in qdq.graph if n.op_type == "MaxPool")
        (use,) = pool.outputs[0].uses()
        scale = ir.Value(name="other", const_value=ir.tensor(np.float32(0.5), name="other"))
        qdq.graph.register_initializer(scale)
        use.node.replace_input_with(1, scale)
        assert self.refused(qdq) == {"it moves elements to another grid": 1}


def test_zero_points_may_be_left_out() -> None:
    """As in models of others: the default is zero."""
    text = """g (int8[1, 4] x) => (int8[1, 4] y)
        { a = DequantizeLinear(x, s) b = Sigmoid(a) y = QuantizeLinear(b, s, z) }"""
    model = build(text, s=np.float32(0.1), z=np.int8(0))
    after = model.clone()
    assert ToQOperator().apply(after).edits == 1
    feed = {"x": np.array([[-100, -3, 0, 90]], np.int8)}
    np.testing.assert_array_equal(run(model, feed), run(after, feed))
    assert operators(after) == ["QLinearSigmoid"]


def test_is_lossy_and_listed() -> None:
    assert parse("to-qoperator") == ToQOperator()
    assert ToQOperator.contract is Contract.LOSSY
