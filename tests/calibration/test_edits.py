"""Constants get new numbers in a clone, and nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import inserted, planned
from rewrites import build, constants

from edgewise.calibration.edits import anchors, nearest, with_weights
from edgewise.passes.quant_plan import ValuePlan
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Array, Evaluator, input_specs, seeded_feed
from edgewise.runtime.session import serialize

NET = "g (float[N, 4, 6, 6] x) => (float[N, 32, 6, 6] y) { y = Conv (x, w, b) }"


def net(**more: Array) -> ir.Model:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((32, 4, 1, 1)).astype(np.float32)
    return build(NET, **({"w": w, "b": np.zeros(32, np.float32)} | more))


def test_only_the_clone_changes() -> None:
    model = net()
    before = serialize(model)
    edited = with_weights(model, {"b": np.arange(32, dtype=np.float32)})
    assert serialize(model) == before
    assert (constants(edited)["b"] == np.arange(32)).all()
    assert (constants(edited)["w"] == constants(model)["w"]).all()


def test_a_constant_node_is_edited_too() -> None:
    body = "b = Constant <value_floats = [1.0, 2.0, 3.0]> () y = Add (x, b)"
    model = build(f"g (float[N, 3] x) => (float[N, 3] y) {{ {body} }}")
    edited = with_weights(model, {"b": np.float32([4, 5, 6])})
    feed = seeded_feed(input_specs(model))
    assert np.allclose(Evaluator(edited).run(feed)["y"], feed["x"] + [4, 5, 6])
    assert np.allclose(Evaluator(model).run(feed)["y"], feed["x"] + [1, 2, 3])


def test_one_number_becomes_one_for_each_channel() -> None:
    body = "g (float[N, 4] x) => (float[N, 3] y) { y = Gemm (x, w, b) }"
    model = build(body, w=np.ones((4, 3), np.float32), b=np.ones(1, np.float32))
    edited = with_weights(model, {"b": np.float32([1, 2, 3])})
    assert np.allclose(Evaluator(edited).run({"x": np.zeros((1, 4), np.float32)})["y"], [[1, 2, 3]])


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("nothing", np.zeros(4, np.float32), "no constant named 'nothing'"),
        ("y", np.zeros(4, np.float32), "no constant named 'y'"),
        ("w", np.zeros((2, 2), np.float32), "has shape"),
    ],
)
def test_what_cannot_be_edited_is_named(name: str, array: Array, message: str) -> None:
    with pytest.raises(InputError, match=message):
        with_weights(net(), {name: array})


def test_a_shared_constant_is_refused() -> None:
    model = build(
        "g (float[N, 4] x) => (float[N, 4] y) { a = MatMul (x, w) y = MatMul (a, w) }",
        w=np.eye(4, dtype=np.float32),
    )
    with pytest.raises(InputError, match="'w' is read more than once"):
        with_weights(model, {"w": np.zeros((4, 4), np.float32)})


@settings(deadline=None, max_examples=20, derandomize=True)
@given(seed=st.integers(0, 2**16))
def test_nearest_is_what_the_quantizer_writes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = net(w=(rng.standard_normal((32, 4, 1, 1)) * 10.0 ** rng.integers(-3, 3)).astype(np.float32))
    made = planned(model)
    (anchor,) = anchors(model, made)
    written = constants(inserted(model, made))["w.quantized"]
    scale = np.array(anchor.grid.scale).reshape(-1, 1, 1, 1)
    assert (nearest(anchor.weights.array, anchor.grid) == written * scale).all()


def test_a_correction_too_large_for_int32_is_left_out() -> None:
    model = net()
    (anchor,) = anchors(model, planned(model))
    change = np.zeros(32)
    change[:3] = 1.0, 1e12, np.nan
    (edit,) = anchor.corrected_bias(change).values()
    assert edit[0] == 1.0
    assert (edit[1:] == 0).all()


def test_a_grid_with_a_zero_point() -> None:
    grid = ValuePlan("w", "uint8", (0.5,), zero_point=128)
    assert nearest(np.array([0.6, -0.8, 1000.0]), grid).tolist() == [0.5, -1.0, 63.5]
