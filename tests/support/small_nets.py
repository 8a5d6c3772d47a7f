"""Small nets and samples that train within a second."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from edgewise.calibration.data import Samples, from_arrays
from edgewise.passes.infer_shapes import InferShapes
from edgewise.runtime.evaluate import input_specs

Array = npt.NDArray[Any]


def classifier(
    width: int = 8, *, classes: int = 4, softmax: bool = False, batch: str = "N", seed: int = 0
) -> ir.Model:
    """Two convolutions with batch norms, a mean over pixels, a Gemm: scores of images 1 x 8 x 8."""
    rng = np.random.default_rng(seed)

    def normal(name: str, *shape: int) -> onnx.TensorProto:
        fan_in = max(int(np.prod(shape[1:])), 1)
        return onnx.numpy_helper.from_array(
            (rng.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32), name
        )

    def filled(name: str, number: float, size: int) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(np.full(size, number, np.float32), name)

    text = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    net (float[{batch}, 1, 8, 8] x) => (float[{batch}, {classes}] y) {{
        c1 = Conv<pads = [1, 1, 1, 1]>(x, w1)
        n1 = BatchNormalization(c1, g1, b1, m1, v1)
        r1 = Relu(n1)
        c2 = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(r1, w2)
        n2 = BatchNormalization(c2, g2, b2, m2, v2)
        r2 = Relu(n2)
        p = GlobalAveragePool(r2)
        f = Flatten(p)
        {"z = Gemm<transB = 1>(f, w3, b3) y = Softmax(z)" if softmax else "y = Gemm<transB = 1>(f, w3, b3)"}
    }}"""
    proto = onnx.parser.parse_model(text)
    norms = [
        filled(f"{name}{i}", number, width)
        for i in (1, 2)
        for name, number in (("g", 1.0), ("b", 0.1), ("m", 0.0), ("v", 1.0))
    ]
    weights = [normal("w1", width, 1, 3, 3), normal("w2", width, width, 3, 3), normal("w3", classes, width)]
    proto.graph.initializer.extend([*weights, *norms, filled("b3", 0.0, classes)])
    model = ir.from_proto(proto)
    InferShapes().apply(model)
    return model


def images(model: ir.Model, count: int, *, seed: int = 1, classes: int | None = None) -> Samples:
    """Noisy bars: the class of an image is where its bright rows are."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes or 4, count)
    pixels = 0.3 * rng.standard_normal((count, 1, 8, 8))
    for row in range(2):
        pixels[np.arange(count), 0, 2 * labels + row] += 1.5
    specs = input_specs(model)
    return from_arrays({"x": pixels.astype(np.float32)}, specs, None if classes is None else labels)


def disturbed(model: ir.Model, amount: float, seed: int = 5) -> ir.Model:
    """A copy whose matrices and filters have noise of `amount` times their own size."""
    rng = np.random.default_rng(seed)
    copy = model.clone()
    for name, value in copy.graph.initializers.items():
        assert value.const_value is not None
        array = value.const_value.numpy()
        if array.ndim > 1:
            noisy = array + amount * array.std() * rng.standard_normal(array.shape)
            value.const_value = ir.Tensor(noisy.astype(np.float32), name=name)
    return copy


def constants(model: ir.Model) -> dict[str, Array]:
    """The initializers by name."""
    found = {}
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        found[name] = value.const_value.numpy()
    return found
