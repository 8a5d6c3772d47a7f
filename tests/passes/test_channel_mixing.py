"""What layers say of their inputs is what their weights say, which they do not keep in memory."""

from __future__ import annotations

import weakref

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build

from edgewise.passes import channel_mixing
from edgewise.passes.channel_constants import Constants
from edgewise.passes.channel_mixing import Mixing, mixings
from edgewise.passes.channels import ChannelGraph
from edgewise.runtime.evaluate import Array

LAYERS = {
    "Conv": ("float[N, 20, 5, 5] x", "Conv(x, w)", (12, 20, 3, 3)),
    "Conv in groups": ("float[N, 20, 5, 5] x", "Conv<group = 2>(x, w)", (12, 10, 3, 3)),
    "ConvTranspose": ("float[N, 20, 5, 5] x", "ConvTranspose(x, w)", (20, 12, 2, 2)),
    "Gemm": ("float[N, 20] x", "Gemm<transB = 1, alpha = 0.5>(x, w)", (12, 20)),
    "MatMul": ("float[N, 20] x", "MatMul(x, w)", (20, 12)),
    "MatMul from the left": ("float[N, 20, 7] x", "MatMul(w, x)", (12, 20)),
}


def model_of(kind: str, sparse: bool = True) -> ir.Model:
    """One layer of 20 inputs and 12 outputs, most of its weights zero."""
    declared, layer, shape = LAYERS[kind]
    rng = np.random.default_rng(2)
    weight = rng.standard_normal(shape).astype(np.float32)
    if sparse:
        weight *= rng.random(shape) < 0.05
    return build(f"g ({declared}) => (float[] z) {{ r = Relu(x) y = {layer} z = Relu(y) }}", 20, w=weight)


def layer_of(kind: str) -> Mixing:
    (layer,) = mixings(ChannelGraph.of(model_of(kind).graph, 20)).values()
    return layer


def dense(layer: Mixing) -> Array:
    """The sums over taps between every output and every input, [output, input]."""
    groups, outputs, inputs, _ = layer.weight.shape
    matrix = np.zeros((groups, outputs, groups, inputs))
    for g in range(groups):
        matrix[g, :, g] = layer.weight[g].astype(np.float64).sum(2) * layer.factor
    return matrix.reshape(groups * outputs, groups * inputs)


@pytest.mark.parametrize("block", [1, 2**22])
@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_read_and_what_comes_out(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_mixing, "_BLOCK", block)
    layer = layer_of(kind)
    matrix, rng = dense(layer), np.random.default_rng(3)
    assert matrix.shape == (12, 20)
    wanted = rng.random(12) < 0.5
    np.testing.assert_array_equal(layer.read(wanted), (matrix[wanted] != 0).any(0))
    known = np.zeros(20) if layer.uneven else rng.standard_normal(20)
    unknown = np.flatnonzero((matrix != 0).any(0))[0]
    known[unknown] = np.nan
    lost = matrix[:, unknown] != 0
    assert not lost.all()
    expected = np.where(lost, np.nan, matrix @ np.nan_to_num(known))
    np.testing.assert_allclose(layer.constants(known), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_weight_is_let_go_of_once_it_was_looked_at(kind: str) -> None:
    """Of mapped files all that was looked at would stay in memory."""
    model = model_of(kind, sparse=False)
    value, looks = model.graph.initializers["w"], []
    stored = value.const_value
    assert stored is not None

    def read() -> ir.Tensor:
        array = stored.numpy().copy()
        looks.append(weakref.ref(array))
        return ir.Tensor(array)

    value.const_value = ir.LazyTensor(read, stored.dtype, ir.Shape(stored.shape))
    constants = Constants.of(ChannelGraph.of(model.graph, 20))
    (layer,) = constants.layers
    assert layer.needed(np.full(20, np.nan), np.ones(12, np.bool_)).all()
    assert looks
    assert not [look for look in looks if look() is not None]
