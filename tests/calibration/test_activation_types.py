"""Activations of 8 or 16 bits, with or without sign: the same numbers, on other integers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
import pytest
from quantized import decibels, feeds_of, inserted, kernels, run
from rewrites import build, constants

from edgewise.calibration.collect import collect
from edgewise.calibration.plan import QuantOptions, observed_values, plan
from edgewise.calibration.plan_check import check_plan
from edgewise.calibration.target import CUDA, TENSORRT, X86, X86_VNNI, Target
from edgewise.passes.quant_plan import LIMITS, QuantPlan
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Array

TYPES = ("uint8", "int8", "uint16", "int16")
NET = """g (float[N, 16, 8, 8] x) => (float[N, 16, 10, 10] y)
    { c = Conv<pads = [1, 1, 1, 1]>(x, w, b) k = Clip(c, l, h) a = Conv(k, v) s = Sigmoid(a) m = Mul(a, s)
      p = Pad(m, q) t = Conv(p, v) y = Relu(t) }"""


def normal(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def net() -> ir.Model:
    weights = {"w": normal(16, 16, 3, 3) / 12, "b": normal(16), "v": normal(16, 16, 1, 1) / 4}
    return build(NET, q=np.array([0, 0, 1, 1, 0, 0, 1, 1]), l=np.float32(-0.5), h=np.float32(2.0), **weights)


def planned(model: ir.Model, activations: Any, target: Target = X86_VNNI) -> QuantPlan:
    options = QuantOptions(activations=activations)
    table = collect(model, feeds_of(model), observed_values(model, options, target), threads=1)
    return plan(model, table, options, target)


def grids(model: ir.Model, activations: Any) -> dict[str, Any]:
    return {v.name: v for v in planned(model, activations).values}


@pytest.mark.parametrize("dtype", TYPES)
def test_ranges_are_those_of_the_values(dtype: str) -> None:
    """Analytic, cut and seen: one range, whatever the integers."""
    model = net()
    found, plain = grids(model, dtype), grids(model, None)
    levels = LIMITS[dtype][1] - LIMITS[dtype][0]
    for name, value in plain.items():
        if value.dtype == "uint8":
            step = max(found[name].scale[0], value.scale[0])
            assert found[name].dtype == dtype
            assert found[name].range == pytest.approx(value.range, abs=step)
    assert found["s"].scale[0] == pytest.approx(1 / levels)
    assert found["s"].zero_point == LIMITS[dtype][0]
    assert found["k"].scale[0] * levels == pytest.approx(2.5)
    assert {found[n].dtype for n in "wv"} == {"int8"}


@pytest.mark.parametrize("dtype", TYPES)
def test_comes_close_to_float(dtype: str) -> None:
    model = net()
    made = planned(model, dtype)
    check_plan(made, model)
    after = inserted(model, made)
    assert ("com.microsoft" in after.opset_imports) == dtype.endswith("16")
    plain = inserted(model, planned(model, None))
    for feed in feeds_of(model):  # unfused: kernels may saturate
        signal = run(model, feed)
        in_uint8 = decibels(signal, run(plain, feed, optimize=False))
        better = decibels(signal, run(after, feed, optimize=False)) - in_uint8
        assert better > (3 if dtype.endswith("16") else -1)


@pytest.mark.parametrize("dtype", ["uint16", "int16"])
def test_operators_of_the_standard_where_it_has_them(dtype: str) -> None:
    proto = onnx.version_converter.convert_version(ir.to_proto(net()), 21)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    after = inserted(model, planned(model, dtype))
    assert "com.microsoft" not in after.opset_imports
    assert np.isfinite(run(after, feeds_of(model)[0])).all()


@pytest.mark.parametrize("dtype", ["uint16", "int16"])
def test_sixteen_bits_run_in_float(dtype: str, tmp_path: Path) -> None:
    """onnxruntime has no kernels for them on a processor: weights are small, the time is that of float."""
    ran = kernels(inserted(net(), planned(net(), dtype)), tmp_path)
    assert not any(op.startswith("QLinear") for op in ran)
    assert ran["Conv"] + ran["FusedConv"] == 3


def test_uint8_is_fused_int8_is_not_everywhere(tmp_path: Path) -> None:
    ran: dict[str, Counter[str]] = {
        dtype: kernels(inserted(net(), planned(net(), dtype)), tmp_path) for dtype in ("uint8", "int8")
    }
    assert ran["uint8"]["QLinearConv"] == 3
    assert ran["int8"]["QLinearConv"] <= 3


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_padding_and_cuts_are_written_as_integers(dtype: str) -> None:
    model = net()
    made = planned(model, dtype)
    after = inserted(model, made)
    pad = next(n for n in after.graph if n.op_type == "Pad")
    filler = constants(after)[pad.inputs[2].name or ""]  # type: ignore[union-attr]
    assert filler.dtype == dtype
    assert int(filler) == next(v.zero_point for v in made.values if v.name == "m")


def test_sixteen_bits_do_not_saturate() -> None:
    """What is multiplied in float needs no room for pairs of products."""
    wide = X86.with_activations("int16")
    assert (X86.saturates, wide.saturates) == (True, False)
    assert not wide.integer_movers
    assert X86.with_activations("int8").saturates


def test_what_a_target_does_not_take() -> None:
    with pytest.raises(InputError, match="tensorrt takes activations in int8 only, not in uint16"):
        TENSORRT.with_activations("uint16")
    assert TENSORRT.with_activations("int8") is TENSORRT
    assert CUDA.with_activations(None) is CUDA
