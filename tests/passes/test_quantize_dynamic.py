"""quantize-dynamic: large products and LSTMs on integers, small ones and the rest as they were."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from rewrites import build, decibels_kept, normal, operators, settled

from edgewise.passes.base import Outcome
from edgewise.passes.quantize_dynamic import QuantizeDynamic
from edgewise.runtime.evaluate import Evaluator

FIVE = ["DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul", "Mul"]


def quantized(model: ir.Model, rule: QuantizeDynamic | None = None) -> tuple[ir.Model, Outcome]:
    return settled(model, rule or QuantizeDynamic())


def reason(model: ir.Model) -> str:
    after, outcome = quantized(model)
    assert outcome.edits == 0
    assert operators(after) == operators(model)
    (text,) = outcome.refused
    return text


PRODUCT = "g (float[N, 256] x) => (float[N, 256] y) { y = MatMul(x, w) }"


def test_product() -> None:
    model = build(PRODUCT, w=normal(256, 256))
    after, outcome = quantized(model)
    assert operators(after) == FIVE
    assert outcome.edits == 1
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    assert decibels_kept(model, after) > 35  # 8 bits on both sides; kernels that saturate reach 26 to 32


def test_weights_are_unsigned() -> None:
    after, _ = quantized(build(PRODUCT, w=normal(256, 256)))
    (integers,) = [v for v in after.graph.initializers.values() if v.shape == (256, 256)]
    assert integers.dtype == ir.DataType.UINT8


def test_channels_have_scales_of_their_own() -> None:
    weight = normal(256, 256) * np.logspace(-4, 4, 256, dtype=np.float32)
    model = build(PRODUCT, w=weight)
    after, _ = quantized(model)
    x = normal(3, 256, seed=1)
    y, z = (next(iter(Evaluator(m).run({"x": x}).values())) for m in (model, after))
    noise = ((y - z) ** 2).sum(0) / (y**2).sum(0)
    assert noise.max() < 0.01  # every channel at 20 dB, from the weakest on


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm(transposed: int) -> None:
    text = (
        f"g (float[N, 256] x) => (float[N, 320] y){{ y = Gemm<alpha = 0.5, transB = {transposed}>(x, w, b) }}"
    )
    weight = normal(320, 256) if transposed else normal(256, 320)
    model = build(text, w=weight, b=normal(320))
    after, _ = quantized(model)
    assert operators(after) == [*FIVE, "Add"]
    assert decibels_kept(model, after) > 35


def test_readers_share_the_integers_of_a_value() -> None:
    text = "g (float[N, 256] x) => (float[N, 256] y, float[N, 256] z) { y = MatMul(x, w) z = MatMul(x, v) }"
    after, outcome = quantized(build(text, w=normal(256, 256), v=normal(256, 256, seed=1)))
    assert outcome.edits == 2
    assert operators(after).count("DynamicQuantizeLinear") == 1


def test_nodes_share_the_integers_of_a_weight() -> None:
    text = "g (float[N, 256] x) => (float[N, 256] y) { h = MatMul(x, w) y = MatMul(h, w) }"
    after, _ = quantized(build(text, w=normal(256, 256)))
    assert sum(v.shape == (256, 256) for v in after.graph.initializers.values()) == 1


def test_inside_a_branch() -> None:
    text = """g (bool c, float[2, 256] x) => (float[2, 256] y) { y = If(c) <
        then_branch = t () => (float[2, 256] p) { p = MatMul(x, w) },
        else_branch = e () => (float[2, 256] q) { q = Relu(x) } > }"""
    model = build(text, w=normal(256, 256))
    after, outcome = quantized(model)
    assert outcome.edits == 1
    assert decibels_kept(model, after, {"c": np.array(True), "x": normal(2, 256)}) > 35


LSTM = """g (float[5, 1, {i}] x, float[1, 1, {h}] s) => (float[5, 1, 1, {h}] y, float[1, 1, {h}] last)
    {{ y, last = LSTM<hidden_size = {h}{more}>(x, W, R, b, , s, s) }}"""


def lstm(inputs: int, units: int, more: str = "") -> ir.Model:
    return build(
        LSTM.format(i=inputs, h=units, more=more),
        W=normal(1, 4 * units, inputs) / 16,
        R=normal(1, 4 * units, units, seed=1) / 16,
        b=normal(1, 8 * units) / 16,
    )


def test_lstm() -> None:
    model = lstm(160, 128)
    after, outcome = quantized(model)
    assert operators(after) == ["DynamicQuantizeLSTM"]
    assert outcome.edits == 1
    assert decibels_kept(model, after) > 30  # kernels that saturate reach 15


def test_small_layers_stay() -> None:
    few = "few weights are slower in integers than in float"
    assert reason(lstm(32, 32)) == few
    text = "g (float[N, 64] x) => (float[N, 64] y) { y = MatMul(x, w) }"
    assert reason(build(text, w=normal(64, 64))) == few
    text = "g (float[N, 8192] x) => (float[N, 16] y) { y = MatMul(x, w) }"
    assert reason(build(text, w=normal(8192, 16))) == few


def test_small_layers_are_taken_where_asked_for() -> None:
    model = lstm(32, 32)
    after, _ = quantized(model, QuantizeDynamic(everything=True))
    assert operators(after) == ["DynamicQuantizeLSTM"]
    assert decibels_kept(model, after) > 30


def test_refusals() -> None:
    w = normal(256, 256)
    for node, weight, expected in (
        ("Gemm<transA = 1>(x, w)", w, "the first factor of Gemm is transposed"),
        ("Gemm<beta = 0.5>(x, w, w)", w, "beta of Gemm is not 1"),
        ("MatMul(x, w)", np.full_like(w, np.nan), "weight is empty, NaN or infinite"),
        ("MatMul(w, w)", w, "both factors are constant"),
    ):
        text = f"g (float[256, 256] x) => (float[256, 256] y) {{ y = {node} }}"
        assert reason(build(text, w=weight)) == expected
    text = "g (float[2, 3, 256] x) => (float[2, 3, 256] y) { y = MatMul(x, w) }"
    assert reason(build(text, w=normal(2, 256, 256))) == "weight is no matrix"
    text = "g (double[2, 256] x) => (double[2, 256] y) { y = MatMul(x, w) }"
    assert reason(build(text, w=w.astype(np.float64))) == "weight is not float32"
    assert reason(build(PRODUCT, opset=10, w=w)) == "needs opset 11"


def test_lstm_refusals() -> None:
    text = """g (float[5, 1, 160] x, float[1, 512, 160] W) => (float[5, 1, 1, 128] y)
        { y = LSTM<hidden_size = 128>(x, W, R) }"""
    assert reason(build(text, R=normal(1, 512, 128))) == "weight is not constant"
    text = """g (float[1, 5, 160] x) => (float[1, 5, 1, 128] y)
        { y = LSTM<hidden_size = 128, layout = 1>(x, W, R) }"""
    model = build(text, W=normal(1, 512, 160), R=normal(1, 512, 128))
    assert reason(model) == "LSTM has the batch in front"
    model = build(text.replace(", layout = 1", ""), W=normal(1, 512, 160) * np.inf, R=normal(1, 512, 128))
    assert reason(model) == "weight is not float32, or NaN or infinite"


def test_activations_on_both_sides_are_left_alone() -> None:
    text = "g (float[4, 256] x, float[256, 256] z) => (float[4, 256] y) { y = MatMul(x, z) }"
    _, outcome = quantized(build(text))
    assert (outcome.edits, dict(outcome.refused)) == (0, {})
