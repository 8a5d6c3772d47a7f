"""Weights no kernel was made for: whatever they hold, no file with a scale that float32 cannot hold."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from quantized import feeds_of, inserted, planned, run
from rewrites import build, constants

from edgewise.calibration.plan_check import check_plan
from edgewise.calibration.target import ARM, X86
from edgewise.passes.quant_plan import SMALLEST
from edgewise.runtime.evaluate import Array

NET = "g (float[N, 16, 6, 6] x) => (float[N, 16, 4, 4] y) { y = Conv(x, w, b) }"


def model_of(change: dict[str, tuple[int, float]], factor: float = 1.0) -> ir.Model:
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((16, 16, 3, 3)).astype(np.float32) * np.float32(factor),
        "b": rng.standard_normal(16).astype(np.float32) * np.float32(factor),
    }
    for name, (channel, number) in change.items():
        weights[name][channel] = number
    return build(NET, **weights)


CASES: dict[str, ir.Model] = {
    "dead channel": model_of({"w": (3, 0.0)}),
    "dead channel and bias": model_of({"w": (3, 0.0), "b": (3, 0.0)}),
    "dead channel with a large bias": model_of({"w": (3, 0.0), "b": (3, 1e6)}),
    "enormous channel": model_of({"w": (3, 1e30)}),
    "enormous bias": model_of({"b": (3, 1e20)}),
    "tiny channel": model_of({"w": (3, 1e-38)}),
    "below normal": model_of({"w": (3, 1e-43)}),
    "all below normal": model_of({}, 1e-43),
    "all tiny": model_of({}, 1e-30),
    "all dead": model_of({}, 0.0),
}


@pytest.mark.parametrize("target", [X86, ARM], ids=lambda t: t.name)
@pytest.mark.parametrize("model", CASES.values(), ids=CASES)
@pytest.mark.parametrize("size", [1.0, 1e-25, 0.0, 1e4], ids=lambda s: f"inputs of {s:g}")
def test_no_bad_file(model: ir.Model, target: object, size: float) -> None:
    feeds = [{"x": (feed["x"] * np.float32(size))} for feed in feeds_of(model)]
    plan = planned(model, target, feeds)  # type: ignore[arg-type]
    check_plan(plan, model)
    after = inserted(model, plan)
    for array in constants(after).values():
        if array.dtype == np.float32:
            assert np.isfinite(array).all()
            assert (np.abs(array) >= SMALLEST).all()
    expected, actual = run(model, feeds[0]), run(after, feeds[0], optimize=False)
    assert np.isfinite(run(after, feeds[0])).all()
    # a bias smaller than a product of an enormous channel is lost, and weights below 2**-100 count as zero
    if size:
        assert np.abs(expected - actual).max() <= 0.05 * np.abs(expected).max() + 1e-20


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_stay_in_float(number: float) -> None:
    model = model_of({"w": (3, number)})
    reasons = planned(model, feeds=feeds_of(model)).reasons
    assert set(reasons) & {"weight is empty, NaN or infinite", "NaN or infinity was seen"}


def biases(model: ir.Model) -> list[Array]:
    return [a for a in constants(model).values() if a.dtype == np.int32]


def test_bias_has_room_for_the_products() -> None:
    model = model_of({"w": (3, 1e-6), "b": (3, 1e6)})
    (bias,) = biases(inserted(model, planned(model)))
    assert np.abs(bias.astype(np.int64)).max() <= 2**30
