"""A small trained-looking classifier, as a model and as a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N,3,8,8] image) => (float[N,5] scores)
{
    c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, conv_w, conv_b)
    n = BatchNormalization (c, scale, shift, mean, variance)
    r = Relu (n)
    p = GlobalAveragePool (r)
    f = Flatten (p)
    d = Identity (f)
    scores = Gemm <transB = 1> (d, fc_w, fc_b)
}
"""

SHAPES = {
    "conv_w": (16, 3, 3, 3),
    "conv_b": (16,),
    "scale": (16,),
    "shift": (16,),
    "mean": (16,),
    "variance": (16,),
    "fc_w": (5, 16),
    "fc_b": (5,),
}


def classifier() -> onnx.ModelProto:
    """Conv, norm, Relu, pool, Gemm; the last four channels of the norm are zero."""
    rng = np.random.default_rng(7)
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    weights["variance"] = np.abs(weights["variance"]) + np.float32(0.5)
    weights["scale"][-4:] = 0
    weights["shift"][-4:] = 0
    proto = onnx.parser.parse_model(TEXT)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in weights.items())
    return proto


@pytest.fixture
def model() -> ir.Model:
    """The classifier: float32 (N, 3, 8, 8) -> (N, 5)."""
    return ir.from_proto(classifier())


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    """The classifier in a file."""
    path = tmp_path / "net.onnx"
    onnx.save(classifier(), path)
    return path


@pytest.fixture
def images() -> np.ndarray:
    """64 samples for the classifier."""
    return np.random.default_rng(3).standard_normal((64, 3, 8, 8)).astype(np.float32)
