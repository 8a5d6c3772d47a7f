"""Gradients against central differences, in float64."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from rewrites import build, normal

from edgewise.runtime.evaluate import Array
from edgewise.training.graph_module import GraphModule

X, IMAGE = normal(3, 4), normal(2, 4, 5, 5)
CHANNELS = {"scale": normal(4, seed=1), "shift": normal(4, seed=2)}
STATISTICS = {"mean": normal(4, seed=3), "var": np.abs(normal(4, seed=4)) + 0.5}
KERNEL = {"w": normal(4, 2, 3, 3, seed=5), "b": normal(4, seed=6)}

CASES: dict[str, tuple[str, Array, dict[str, Array]]] = {
    "conv": ('Conv <group = 2, auto_pad = "SAME_LOWER", strides = [2, 2]> (x, w, b)', IMAGE, KERNEL),
    "conv-transpose": (
        "ConvTranspose <strides = [2, 2], pads = [0, 1, 1, 0], output_padding = [1, 0]> (x, w)",
        IMAGE,
        {"w": KERNEL["w"]},
    ),
    "max-pool": ("MaxPool <kernel_shape = [3, 3], pads = [2, 2, 0, 0], strides = [2, 2]> (x)", IMAGE, {}),
    "average-pool": (
        "AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 0, 0, 1], ceil_mode = 1> (x)",
        IMAGE,
        {},
    ),
    "lp-pool": ("LpPool <kernel_shape = [2, 2], p = 3> (x)", IMAGE, {}),
    "batch-norm": ("BatchNormalization (x, scale, shift, mean, var)", IMAGE, {**CHANNELS, **STATISTICS}),
    "instance-norm": ("InstanceNormalization (x, scale, shift)", IMAGE, CHANNELS),
    "group-norm": ("GroupNormalization <num_groups = 2> (x, scale, shift)", IMAGE, CHANNELS),
    "layer-norm": ("LayerNormalization (x, scale, shift)", X, CHANNELS),
    "rms-norm": ("RMSNormalization (x, scale)", X, {"scale": CHANNELS["scale"]}),
    "lrn": ("LRN <size = 4> (x)", IMAGE, {}),
    "gemm": ("Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, c)", X, {"w": normal(2, 4), "c": normal(2)}),
    "matmul": ("MatMul (x, w)", X, {"w": normal(5, 4, 2)}),
    "div": ("Div (x, w)", X, {"w": np.abs(normal(4, seed=1)) + 1}),
    "max": ("Max (x, w)", X, {"w": normal(3, 1, seed=1)}),
    "mean": ("Mean (x, w)", X, {"w": normal(1, 4, seed=1)}),
    "prelu": ("PRelu (x, w)", X, {"w": normal(4, seed=1)}),
    "prelu-by-channel": ("PRelu (x, w)", IMAGE, {"w": normal(4, 1, 1, seed=1)}),
    "softmax": ("Softmax <axis = 0> (x)", X, {}),
    **{
        name.lower(): (f"{name} (x)", X, {})
        for name in (
            *("Abs", "Celu", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu"),
            *("LogSoftmax", "Mish", "Neg", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign"),
            *("Tanh", "ThresholdedRelu"),
        )
    },
}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_gradients_are_differences(case: str, training: bool) -> None:
    text, x, weights = CASES[case]
    ranks = ", ".join("ABCD"[: x.ndim])
    model = build(f"f (float[{ranks}] x) => (float y) {{ y = {text} }}", opset=23, shapes=False, **weights)
    module = GraphModule(model).double().train(training)

    def function(given: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return module({"x": given})["y"]

    inputs = torch.from_numpy(x).double().requires_grad_()
    assert torch.autograd.gradcheck(function, (inputs, *module.parameters()), fast_mode=True)
