"""store-weights: small in the file, floats again when it is loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from rewrites import build, decibels_kept, normal, operators, settled

from edgewise.passes.base import Outcome
from edgewise.passes.store_weights import StoreWeights
from edgewise.runtime.session import serialize

CONV = "g (float[1, 16, 8, 8] x) => (float[1, 32, 6, 6] y) { y = Conv(x, w, b) }"


def stored(model: ir.Model, bits: int = 8) -> tuple[ir.Model, Outcome]:
    return settled(model, StoreWeights(bits))


@pytest.mark.parametrize(
    ("bits", "chain", "share", "least"),
    [(8, ["Cast", "Mul", "Conv"], 0.3, 38), (16, ["Cast", "Conv"], 0.53, 65)],
)
def test_conv(bits: int, chain: list[str], share: float, least: float) -> None:
    """6 dB a bit: 7 and a sign, or 11."""
    model = build(CONV, w=normal(32, 16, 3, 3), b=normal(32))
    after, outcome = stored(model, bits)
    assert operators(after) == chain
    assert outcome.edits == 1
    assert decibels_kept(model, after) > least
    assert len(serialize(after)) < share * len(serialize(model))


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        ("MatMul(x, w)", (64, 96), 1),
        ("Gemm(x, w)", (64, 96), 1),
        ("Gemm<transB = 1>(x, w)", (96, 64), 0),
    ],
)
def test_every_output_channel_has_its_scale(layer: str, shape: tuple[int, int], axis: int) -> None:
    sizes = (1, 96) if axis else (96, 1)
    weight = normal(*shape) * np.logspace(-3, 3, 96, dtype=np.float32).reshape(sizes)
    model = build(f"g (float[2, 64] x) => (float[2, 96] y) {{ y = {layer} }}", w=weight)
    after, _ = stored(model)
    assert after.graph.initializers["w.scale"].shape == sizes
    integers, scale = (after.graph.initializers[n].const_value.numpy() for n in ("w.stored", "w.scale"))
    assert np.all(np.abs(integers * scale - weight) <= np.abs(weight).max(1 - axis, keepdims=True) / 250)


def test_the_table_of_a_gather() -> None:
    text = "g (int64[5] x) => (float[5, 16] y) { y = Gather(w, x) }"
    model = build(text, w=normal(100, 16))
    after, _ = stored(model, 16)
    assert operators(after) == ["Cast", "Gather"]
    assert decibels_kept(model, after) > 65


def test_folded_at_loading(tmp_path: Path) -> None:
    """What onnxruntime runs is the layer alone."""
    model = build(CONV, w=normal(32, 16, 3, 3), b=normal(32))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = f"{tmp_path}/loaded.onnx"
    options.log_severity_level = 3
    onnxruntime.InferenceSession(serialize(stored(model)[0]), options, providers=["CPUExecutionProvider"])
    ran = {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}
    assert "Conv" in ran
    assert not ran & {"Cast", "Mul"}


def test_refusals() -> None:
    text = "g (float[40, 40] x) => (float[40, 40] y) {{ y = {}(x, w) }}"
    add, product = text.format("Add"), text.format("MatMul")
    for model, bits, reason in (
        (build(add, w=normal(40, 40)), 8, "a reader is no layer"),
        (build(product, w=normal(40, 40) * np.float32(np.nan)), 8, "weight is NaN or infinite"),
        (build(product, w=normal(40, 40) * np.float32(1e5)), 16, "weight exceeds float16"),
    ):
        after, outcome = stored(model, bits)
        assert dict(outcome.refused) == {reason: 1}
        assert operators(after) == operators(model)


def test_small_weights_and_biases_stay() -> None:
    text = "g (float[2, 16] x) => (float[2, 16] y) { y = Gemm(x, w, b) }"
    assert stored(build(text, w=normal(16, 16), b=normal(16)))[1] == Outcome()


def test_options() -> None:
    with pytest.raises(ValueError, match="one of"):
        StoreWeights(4)
