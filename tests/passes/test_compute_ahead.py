"""compute-ahead: constants through onnxruntime, and the node that it stumbles over."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build

from edgewise.passes import compute_ahead
from edgewise.passes.compute_ahead import compute, first_failure
from edgewise.runtime.errors import InputError

W = np.float32([[1, 2], [3, 4]])


def nodes_of(model: ir.Model, count: int) -> list[ir.Node]:
    return list(model.graph)[:count]


@pytest.mark.parametrize("large", [0, 2**20])
def test_values_in_the_order_asked_for(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large constants go to onnxruntime another way than small ones."""
    monkeypatch.setattr(compute_ahead, "_LARGE", large)
    text = (
        "g (float[2, 2] x) => (float[2, 2] y) { a = Neg(w) b = Transpose(a) s = Shape(b) y = Sum(x, a, b) }"
    )
    model = build(text, w=W)
    nodes = nodes_of(model, 3)
    b, s, a = nodes[1].outputs[0], nodes[2].outputs[0], nodes[0].outputs[0]
    results = compute(model, nodes, [b, s, a])
    np.testing.assert_array_equal(results[0], -W.T)
    np.testing.assert_array_equal(results[1], [2, 2])
    np.testing.assert_array_equal(results[2], -W)
    assert [v.name for v in (a, b, s)] == ["a", "b", "s"]


def test_nothing_asked_for() -> None:
    assert compute(build("g (float x) => (float y) { y = Neg(x) }"), [], []) == []


def test_left_out_inputs_and_outputs() -> None:
    body = "c = Clip(w, , h) v, i = MaxPool<kernel_shape = [1]>(u) y = Add(x, c)"
    text = f"g (float[2, 2] x) => (float[2, 2] y) {{ {body} }}"
    model = build(text, w=W, h=np.float32(2.5), u=np.ones((1, 1, 3), np.float32))
    pool = model.graph.node(1)
    pool.outputs[1].name = ""
    clipped, pooled = compute(model, nodes_of(model, 2), [model.graph.node(0).outputs[0], pool.outputs[0]])
    np.testing.assert_array_equal(clipped, np.minimum(W, 2.5))
    assert pooled.shape == (1, 1, 3)


def test_the_tensors_of_the_model_keep_their_names() -> None:
    model = build("g (float[2, 2] x) => (float[2, 2] y) { a = Neg(w) y = Add(x, a) }", w=W)
    compute(model, nodes_of(model, 1), [model.graph.node(0).outputs[0]])
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.name == "w"


def test_a_scalar_is_an_array() -> None:
    model = build("g (float x) => (float y) { a = Neg(w) y = Add(x, a) }", w=np.float32(1))
    (result,) = compute(model, nodes_of(model, 1), [model.graph.node(0).outputs[0]])
    assert isinstance(result, np.ndarray)
    assert result.shape == ()


@pytest.mark.parametrize("bad", range(5))
def test_the_node_that_fails(bad: int) -> None:
    """A chain of five, one of which divides by zero, which onnxruntime refuses for integers."""
    names = ["one"] * 5
    names[bad] = "zero"
    steps = " ".join(f"a{i + 1} = Div(a{i}, {name})" for i, name in enumerate(names))
    text = f"g (int64[2] x) => (int64[2] y) {{ a0 = Neg(w) {steps} y = Add(x, a5) }}"
    model = build(text, w=np.int64([1, 2]), one=np.int64([1, 1]), zero=np.int64([0, 1]))
    nodes = nodes_of(model, 6)
    with pytest.raises(InputError, match="zero"):
        compute(model, nodes, [nodes[-1].outputs[0]])
    assert first_failure(model, nodes) is nodes[bad + 1]
