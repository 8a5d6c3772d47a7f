"""Convolution and pooling with any strides, dilations and paddings: onnxruntime's numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

import torch
from rewrites import normal

from edgewise.runtime.evaluate import Array, Evaluator
from edgewise.training.graph_module import GraphModule, as_tensors

CLOSE = 1e-5  # of the largest output: float32 sums of some hundred products, in another order

small = st.integers(1, 3)


def model(op_type: str, rank: int, outputs: int, weights: dict[str, Array], **attributes: Any) -> ir.Model:
    """One node on an input of two channels, 7 + axis elements along an axis."""
    x = ir.Value(name="x", shape=ir.Shape([2, 4, *range(7, 7 + rank)]), type=ir.TensorType(ir.DataType.FLOAT))
    constants = [
        ir.Value(
            name=name,
            const_value=ir.Tensor(array, name=name),
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape(array.shape),
        )
        for name, array in weights.items()
    ]
    types = (ir.DataType.FLOAT, ir.DataType.INT64)[:outputs]
    results = [ir.Value(name=f"y{i}", type=ir.TensorType(dtype)) for i, dtype in enumerate(types)]
    node = ir.node(op_type, [x, *constants], attributes, outputs=results)
    graph = ir.Graph([x], results, nodes=[node], initializers=constants, opset_imports={"": 19}, name="g")
    return ir.Model(graph, ir_version=9)


def assert_same(built: ir.Model, rank: int) -> None:
    feed = {"x": normal(2, 4, *range(7, 7 + rank))}
    wanted = Evaluator(built, threads=1, optimize=False).run(feed)
    with torch.no_grad():
        found = GraphModule(built)(as_tensors(feed))
    for name, want in wanted.items():
        np.testing.assert_allclose(
            found[name].numpy(), want, rtol=0, atol=CLOSE * max(1, np.abs(want).max(initial=0))
        )


@st.composite
def windows(draw: st.DrawFn, pad: int = 2) -> tuple[int, dict[str, Any]]:
    """A rank and what a node says of its windows."""
    rank = draw(small)
    attributes: dict[str, Any] = {
        "strides": [draw(small) for _ in range(rank)],
        "dilations": [draw(st.integers(1, 2)) for _ in range(rank)],
        "kernel_shape": [draw(small) for _ in range(rank)],
    }
    automatic = draw(st.sampled_from(["NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if automatic == "NOTSET":
        attributes["pads"] = [
            draw(st.integers(0, min(pad, attributes["kernel_shape"][i % rank] - 1))) for i in range(2 * rank)
        ]
    else:
        attributes["auto_pad"] = automatic
    if automatic.startswith("SAME"):  # onnxruntime forgets dilations where it pools, and pads below zero
        attributes["dilations"] = [1] * rank
        attributes["kernel_shape"] = list(map(max, attributes["kernel_shape"], attributes["strides"]))
    return rank, attributes


@given(windows(), st.sampled_from([1, 2, 4]), st.booleans())
@settings(max_examples=25)
def test_conv(drawn: tuple[int, dict[str, Any]], group: int, biased: bool) -> None:
    rank, attributes = drawn
    weights = {"w": normal(8, 4 // group, *attributes["kernel_shape"], seed=1)}
    if biased:
        weights["b"] = normal(8, seed=2)
    assert_same(model("Conv", rank, 1, weights, **attributes, group=group), rank)


@given(windows(), st.sampled_from([1, 2, 4]), st.booleans(), st.booleans())
@settings(max_examples=25)
def test_conv_transpose(drawn: tuple[int, dict[str, Any]], group: int, biased: bool, more: bool) -> None:
    rank, attributes = drawn
    weights = {"w": normal(4, 2, *attributes["kernel_shape"], seed=1)}
    if biased:
        weights["b"] = normal(2 * group, seed=2)
    if more and attributes.get("auto_pad") is None:
        attributes["output_padding"] = [s - 1 for s in attributes["strides"]]
    assert_same(model("ConvTranspose", rank, 1, weights, **attributes, group=group), rank)


@given(windows(), st.booleans(), st.sampled_from([1, 2]))
@settings(max_examples=25)
def test_max_pool(drawn: tuple[int, dict[str, Any]], ceil: bool, outputs: int) -> None:
    rank, attributes = drawn
    assert_same(model("MaxPool", rank, outputs, {}, **attributes, ceil_mode=int(ceil)), rank)


@given(windows(), st.booleans(), st.booleans())
@settings(max_examples=25)
def test_average_pool(drawn: tuple[int, dict[str, Any]], ceil: bool, counts: bool) -> None:
    rank, attributes = drawn
    attributes.update(ceil_mode=int(ceil), count_include_pad=int(counts))
    assert_same(model("AveragePool", rank, 1, {}, **attributes), rank)


@given(windows(), st.booleans(), st.integers(1, 3))
@settings(max_examples=25)
def test_lp_pool(drawn: tuple[int, dict[str, Any]], ceil: bool, p: int) -> None:
    rank, attributes = drawn
    assert_same(model("LpPool", rank, 1, {}, **attributes, ceil_mode=int(ceil), p=p), rank)
