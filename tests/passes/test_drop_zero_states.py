"""drop-zero-states: a recurrent layer that begins with zeros says nothing of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build, operators, rewritten

from edgewise.passes.drop_dead_nodes import DropDeadNodes
from edgewise.passes.drop_zero_states import DropZeroStates
from edgewise.runtime.evaluate import Array

PASS = DropZeroStates()
RNG = np.random.default_rng(0)
ZERO, ONE = np.zeros(1, np.float32), np.ones(1, np.float32)
SIZE = "s = Shape(x) n = Gather(s, second) size = Concat<axis = 0>(one, n, four)"


def net(states: str, layer: str = "LSTM", inputs: str = "h, h", last: str = "", **weights: Array) -> ir.Model:
    rows = {"LSTM": 16, "GRU": 12, "RNN": 4}[layer]
    held = {
        "w": RNG.standard_normal((1, rows, 3)).astype(np.float32),
        "r": RNG.standard_normal((1, rows, 4)).astype(np.float32),
        "second": np.array([1]),
        "one": np.array([1]),
        "twice": np.array([2, 1, 1]),
        "none": np.array([0]),
        "four": np.array([4]),
        **weights,
    }
    text = f"{states} y = {layer}<hidden_size = 4>(x, w, r, , , {inputs}) {last}"
    words = text.replace(",", " ").replace("(", " ").replace(")", " ").split()
    read = {name: array for name, array in held.items() if name in words}
    return build(f"g (float[T, N, 3] x, float[1, N, 4] z) => (float[] y) {{ {text} }}", **read)


ZEROS = {
    "constant": "h = Identity(k)",
    "fill": f"{SIZE} h = ConstantOfShape(size)",
    "negative fill": f"{SIZE} h = ConstantOfShape<value = float[1] {{-0.0}}>(size)",
    "expanded": f"{SIZE} h = Expand(zero, size)",
    "cut": f"{SIZE} e = Expand(zero, size) d = Tile(e, twice) h = Slice(d, none, one, none)",
    "turned": f"{SIZE} e = Expand(zero, size) t = Transpose<perm = [1, 0, 2]>(e) "
    "h = Transpose<perm = [1, 0, 2]>(t)",
}


@pytest.mark.parametrize("name", ZEROS)
def test_zeros(name: str) -> None:
    model = net(ZEROS[name], zero=ZERO, k=np.zeros((1, 3, 4), np.float32))
    after, outcome = rewritten(model, PASS)
    assert outcome.edits == 1
    DropDeadNodes().apply(after)
    assert operators(after) == ["LSTM"]


@pytest.mark.parametrize("layer", ["GRU", "RNN"])
def test_layers_of_one_state(layer: str) -> None:
    after, outcome = rewritten(net(f"{SIZE} h = Expand(zero, size)", layer, "h", zero=ZERO), PASS)
    assert outcome.edits == 1
    DropDeadNodes().apply(after)
    assert operators(after) == [layer]


def test_an_initializer_goes() -> None:
    after, _ = rewritten(net("", inputs="k, k", k=np.zeros((1, 3, 4), np.float32)), PASS)
    assert sorted(after.graph.initializers) == ["r", "w"]


@pytest.mark.parametrize("inputs", ["h, z", "z, h"])
def test_one_of_two(inputs: str) -> None:
    after, outcome = rewritten(net(f"{SIZE} h = Expand(zero, size)", inputs=inputs, zero=ZERO), PASS)
    assert outcome.edits == 1
    layer = after.graph[-1]
    given = [None if v is None else v.name for v in layer.inputs[5:]]
    assert given == [None if name == "h" else name for name in inputs.split(", ")]


OTHERS = {
    "a fill of ones": f"{SIZE} h = ConstantOfShape<value = float[1] {{1}}>(size)",
    "ones": f"{SIZE} h = Expand(ones, size)",
    "computed": "h = Relu(z)",
    "from outside": "h = Identity(z)",
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_stay(name: str) -> None:
    _, outcome = rewritten(net(OTHERS[name], ones=ONE), PASS)
    assert outcome.edits == 0
