"""What conformance cases do not show, against onnxruntime: forms of older opsets, and modes by the dozen."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

pytest.importorskip("torch")

import torch

from edgewise.runtime.evaluate import Array, Evaluator
from edgewise.training.graph_module import GraphModule, as_tensors

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4, 6)).astype(np.float32)


def single(
    opset: int, op: str, inputs: list[Array | None], outputs: int = 1, fed: int = 1, **attributes: Any
) -> tuple[ir.Model, dict[str, Array]]:
    """A model of one node; the first `fed` inputs are fed, the others initializers, None is left out."""
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], **attributes)
    given = {name: x for name, x in zip(names, inputs, strict=True) if x is not None}
    feed = {name: given.pop(name) for name in names[:fed]}
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for name, x in feed.items()
        ],
        [onnx.ValueInfoProto(name=f"y{i}") for i in range(outputs)],
        [numpy_helper.from_array(x, name) for name, x in given.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model)), feed


def agree(model: ir.Model, feed: dict[str, Array]) -> None:
    expected = Evaluator(model, threads=1, optimize=False).run(feed)
    with torch.no_grad():
        outputs = GraphModule(model).eval()(as_tensors(feed))
    for name, wanted in expected.items():
        got = outputs[name].numpy()
        assert got.dtype == wanted.dtype
        # Both weigh in float32, onnxruntime's places of a Resize included.
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5)


def ints(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


@pytest.mark.parametrize(
    ("opset", "op", "inputs", "attributes"),
    [
        (9, "Slice", [X], {"starts": [0, -3], "ends": [9, -1], "axes": [2, 3]}),
        (9, "Slice", [X], {"starts": [1], "ends": [2]}),
        (13, "Slice", [X, ints(-1), ints(np.iinfo(np.int64).min), ints(3), ints(-2)], {}),
        (9, "Pad", [X], {"pads": [0, 0, 1, 2, 0, 0, -1, 1], "value": 0.5}),
        (9, "Squeeze", [X[:, :1]], {"axes": [1]}),
        (9, "Squeeze", [X[:1, :1]], {}),
        (9, "Unsqueeze", [X], {"axes": [0, 2]}),
        (9, "ReduceSum", [X], {"axes": [1, 3], "keepdims": 0}),
        (11, "ReduceMean", [X], {"axes": [-1]}),
        (13, "ReduceMax", [X], {}),
        (13, "ReduceLogSumExp", [X], {"axes": [2]}),
        (9, "ArgMax", [X], {"axis": 1, "keepdims": 0}),
        (9, "Flatten", [X], {"axis": 3}),
        (9, "OneHot", [ints(1, 0, 2), np.array(3, np.int64), np.array([2, 5], np.float32)], {}),
        (9, "Scatter", [X, np.zeros((2, 3, 4, 1), np.int64), X[..., :1]], {"axis": 3}),
        (9, "Cast", [X], {"to": 6}),
        (9, "Upsample", [X, np.array([1, 1, 2, 3], np.float32)], {"mode": "nearest"}),
        (9, "Upsample", [X, np.array([1, 1, 2, 2], np.float32)], {"mode": "linear"}),
        (10, "Resize", [X, np.array([1, 1, 0.5, 2], np.float32)], {"mode": "nearest"}),
        (10, "Resize", [X, np.array([1, 1, 2, 1.5], np.float32)], {"mode": "linear"}),
        (
            12,
            "DepthToSpace",
            [RNG.standard_normal((1, 8, 2, 3)).astype(np.float32)],
            {"blocksize": 2, "mode": "CRD"},
        ),
        (11, "CumSum", [X, np.array(2, np.int32)], {"exclusive": 1, "reverse": 1}),
        (11, "GatherND", [X, np.array([[0, 1], [1, -1]], np.int64)], {}),
        (12, "GatherND", [X, np.array([[[0], [2]], [[1], [1]]], np.int64)], {"batch_dims": 1}),
        (12, "Einsum", [X[0], X[1]], {"equation": "cij,ckj->cik"}),
        (10, "QuantizeLinear", [X, np.float32([0.1]).reshape(()), np.array(3, np.uint8)], {}),
        (13, "Expand", [X[:, :, :1], ints(4, 1)], {}),
        (9, "Tile", [X, ints(1, 2, 1, 2)], {}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_form(opset: int, op: str, inputs: list[Array | None], attributes: dict[str, Any]) -> None:
    agree(*single(opset, op, inputs, **attributes))


@pytest.mark.parametrize("opset", [9, 10, 11])
def test_top_k(opset: int) -> None:
    given: dict[str, int] = {"k": 2} if opset == 9 else {}
    agree(*single(opset, "TopK", [X] if given else [X, ints(2)], 2, axis=3, **given))


@pytest.mark.parametrize("opset", [9, 13, 18])
def test_split_into_equal_parts(opset: int) -> None:
    attributes = {"num_outputs": 2} if opset == 18 else {}
    agree(*single(opset, "Split", [X], 2, axis=2, **attributes))


def test_split_by_attribute() -> None:
    agree(*single(9, "Split", [X], 2, axis=3, split=[1, 5]))


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pad(mode: str) -> None:
    agree(*single(19, "Pad", [X, ints(1, 2, 3, 0), None, ints(2, 3)], mode=mode))


@pytest.mark.parametrize(
    "transform",
    [
        "half_pixel",
        "half_pixel_symmetric",
        "pytorch_half_pixel",
        "asymmetric",
        "align_corners",
        "tf_crop_and_resize",
    ],
)
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_resize(mode: str, transform: str) -> None:
    roi = np.array([0.1, 0.0, 0.8, 1.2], np.float32) if transform == "tf_crop_and_resize" else None
    axes = {"axes": [2, 3]}
    agree(
        *single(
            19,
            "Resize",
            [X, roi, None, ints(7, 4)],
            mode=mode,
            coordinate_transformation_mode=transform,
            extrapolation_value=0.25,
            **axes,
        )
    )


@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
def test_nearest(rounding: str) -> None:
    scales = np.array([1, 1, 1.5, 0.5], np.float32)
    agree(*single(13, "Resize", [X, None, scales], mode="nearest", nearest_mode=rounding))


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_resize_against_aliasing(mode: str) -> None:
    agree(*single(18, "Resize", [X, None, None, ints(2, 3, 2, 3)], mode=mode, antialias=1))


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_recurrent(op: str, direction: str) -> None:
    """Sequences of several lengths, a bias and first states; what an LSTM's peepholes add."""
    gates, ways = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 2 if direction == "bidirectional" else 1

    def numbers(*shape: int) -> Array:
        return RNG.standard_normal(shape).astype(np.float32) / 2

    x, state = numbers(5, 3, 4), numbers(ways, 3, 2)
    inputs = [x, numbers(ways, gates * 2, 4), numbers(ways, gates * 2, 2), numbers(ways, gates * 4)]
    inputs += [np.array([5, 2, 4], np.int32), state]
    inputs += [state, numbers(ways, 6)] if op == "LSTM" else []
    attributes = {"linear_before_reset": 1} if op == "GRU" else {}
    outputs = 3 if op == "LSTM" else 2
    agree(*single(14, op, inputs, outputs, hidden_size=2, direction=direction, **attributes))


def test_the_module_has_gradients_where_the_net_does() -> None:
    model, feed = single(13, "Slice", [X, ints(1), ints(3), ints(3)])
    x = as_tensors(feed)["x0"].requires_grad_()

    GraphModule(model)({"x0": x})["y0"].sum().backward()

    assert torch.equal(x.grad, torch.zeros(x.shape).index_fill(3, torch.tensor([1, 2]), 1.0))
