"""write-fills: large constants of one number are written as that number and a shape."""

import numpy as np
import pytest
from rewrites import build, constants, operators, rewritten

from edgewise.passes.graph import Array
from edgewise.passes.write_fills import WriteFills

LARGE = (40, 30)  # 4,800 bytes of float32


@pytest.mark.parametrize("number", [0.0, -0.0, 2.5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_fill_is_written_as_number_and_shape(number: float, dtype: type) -> None:
    kind = np.dtype(dtype).name.replace("float64", "double").replace("float32", "float")
    text = f"agraph ({kind}[40, 30] x) => ({kind}[40, 30] y) {{ y = Mul(x, w) }}"
    model, outcome = rewritten(build(text, w=np.full(LARGE, number, dtype)), WriteFills())
    assert outcome.edits == 1
    assert operators(model) == ["ConstantOfShape", "Mul"]
    fill = model.graph[0].outputs[0]
    assert fill.name == "w"
    assert {name: array.tolist() for name, array in constants(model).items()} == {"w.shape": [40, 30]}


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.bool_, np.float16])
def test_other_types(dtype: type) -> None:
    kind = {"int64": "int64", "int8": "int8", "bool": "bool", "float16": "float16"}[np.dtype(dtype).name]
    text = f"agraph ({kind}[N] x) => (float[2] y) {{ m = Expand(w, s) n = Shape(m) y = Cast<to = 1>(n) }}"
    weights = {"w": np.ones((100, 60), dtype), "s": np.array([100, 60])}
    model, outcome = rewritten(build(text, **weights), WriteFills())
    assert outcome.edits == 1
    assert operators(model)[0] == "ConstantOfShape"


def other(array: Array) -> int:
    text = "agraph (float[N, 30] x) => (float[N, 30] y) { y = Mul(x, w) }"
    return rewritten(build(text, shapes=False, w=array), WriteFills(), {"x": np.ones((1, 30), np.float32)})[
        1
    ].edits


def test_what_is_small_or_varies_stays() -> None:
    one_differs = np.ones(LARGE, np.float32)
    one_differs[-1, -1] = 2
    signs = np.zeros(LARGE, np.float32)
    signs[-1, -1] = -0.0
    assert other(one_differs) == other(signs) == other(np.ones((34, 30), np.float32)) == 0
    assert other(np.ones(LARGE, np.float32)) == 1


def test_weights_of_quantized_layers_stay_initializers() -> None:
    text = "agraph (float[40, 30] x) => (float[40, 30] y) { d = DequantizeLinear(w, s) y = Mul(x, d) }"
    weights = {"w": np.zeros((90, 60), np.int8)[:40, :30], "s": np.float32(0.1).reshape(())}
    weights["w"] = np.zeros(LARGE, np.int8)
    model = build(text, **weights)
    assert rewritten(model, WriteFills(over=64))[1].edits == 0


def test_what_a_caller_sees_stays() -> None:
    text = "agraph (float[40, 30] x, float[40, 30] w) => (float[40, 30] y) { y = Mul(x, w) }"
    feed = {"x": np.ones(LARGE, np.float32)}
    assert rewritten(build(text, w=np.ones(LARGE, np.float32)), WriteFills(), feed)[1].edits == 0
