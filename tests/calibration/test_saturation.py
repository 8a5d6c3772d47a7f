"""The emulated kernels give onnxruntime's integers; what is widened is what saturates, and no more."""

from __future__ import annotations

import dataclasses
import math
import platform

import numpy as np
import onnx_ir as ir
import pytest
from quantized import decibels, inserted, planned, run
from rewrites import build

from edgewise.calibration.emulation import Emulator
from edgewise.calibration.integer_products import excess, products
from edgewise.calibration.kernels import weights_of
from edgewise.calibration.saturation import portable, saturation, unsigned_weights
from edgewise.calibration.target import X86_VNNI
from edgewise.passes.quant_plan import QuantPlan
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Array

RNG = np.random.default_rng(0)


def saturating_processor() -> bool:
    """Whether onnxruntime's kernels for u8 x s8 add pairs in 16 bits here: one pair tells."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    model = integer_product(np.full((2, 1), 127, np.int8))
    return bool(run(model, {"x": np.full((1, 2), 255, np.uint8)})[0, 0] < 2 * 255 * 127)


def integer_product(weights: Array, zero_point: int = 0, leading: str = "") -> ir.Model:
    """Integers in, integers out: all scales are 1."""
    graph = f"""g (uint8[{leading}P, K] x) => (float[{leading}P, M] y) {{
        a = DequantizeLinear (x, one, z)
        b = DequantizeLinear (w, one, wz)
        y = MatMul (a, b)
    }}"""
    one, z = np.float32(1).reshape(()), np.uint8(zero_point).reshape(())
    return build(graph, one=one, z=z, w=weights, wz=np.int8(0).reshape(()))


def integer_layer(op: str, weights: Array, zero_point: int, signature: str) -> ir.Model:
    """A layer whose output scale is a power of two, so that nothing but its sums decides on a level."""
    graph = f"""g (uint8[{signature}] x) => (uint8[{signature}] y) {{
        a = DequantizeLinear (x, one, z)
        b = DequantizeLinear (w, one, wz)
        c = {op} (a, b)
        y = QuantizeLinear (c, step, middle)
    }}"""
    scalars = {"one": np.float32(1), "z": np.uint8(zero_point), "wz": np.int8(0)}
    scalars |= {"step": np.float32(4096), "middle": np.uint8(128)}
    return build(graph, shapes=False, w=weights, **{k: v.reshape(()) for k, v in scalars.items()})


def weights(*shape: int) -> Array:
    return RNG.integers(-127, 128, shape).astype(np.int8)


def large(*shape: int) -> Array:
    """Activations of which most pairs saturate with large weights."""
    return RNG.integers(120, 256, shape).astype(np.uint8)


LAYERS = {
    "pointwise": ("Conv <kernel_shape = [1, 1]>", (24, 16, 1, 1), (2, 16, 6, 6)),
    "odd width, strided": ("Conv <strides = [2, 2]>", (9, 17, 1, 1), (1, 17, 7, 7)),
    "padded": ("Conv <pads = [1, 1, 1, 1]>", (16, 32, 3, 3), (1, 32, 6, 6)),
    "padded on one side": ("Conv <pads = [0, 2, 1, 0]>", (16, 15, 3, 3), (1, 15, 6, 6)),
    "three channels": ("Conv <strides = [2, 2], pads = [1, 1, 1, 1]>", (16, 3, 3, 3), (1, 3, 9, 9)),
    "same, upper": ('Conv <auto_pad = "SAME_UPPER", strides = [2, 2]>', (16, 8, 3, 3), (1, 8, 8, 8)),
    "same, lower": ('Conv <auto_pad = "SAME_LOWER", strides = [2, 2]>', (16, 8, 3, 3), (1, 8, 8, 8)),
    "dilated": ("Conv <dilations = [2, 2], pads = [2, 2, 2, 2]>", (8, 16, 3, 3), (1, 16, 9, 9)),
    "grouped": ("Conv <group = 4, pads = [1, 1, 1, 1]>", (24, 8, 3, 3), (1, 32, 6, 6)),
    "odd groups": ("Conv <group = 3>", (6, 5, 3, 3), (1, 15, 6, 6)),
    "two filters a channel": ("Conv <group = 16>", (32, 1, 3, 3), (1, 16, 6, 6)),
    "deep": ("Conv <pads = [1, 1, 1, 1]>", (8, 128, 3, 3), (1, 128, 4, 4)),
    "one axis": ("Conv <pads = [1, 1]>", (16, 12, 3), (2, 12, 9)),
    "three axes": ("Conv", (8, 6, 2, 2, 2), (1, 6, 4, 4, 4)),
    "fully connected": ("Gemm", (65, 33), (7, 65)),
    "fully connected, transposed": ("Gemm <transB = 1>", (33, 64), (7, 64)),
    "a single row": ("Gemm", (64, 33), (1, 64)),
}


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("zero_point", [0, 77])
def test_layers_give_the_integers_of_the_kernels(case: str, zero_point: int) -> None:
    if not saturating_processor():
        pytest.skip("this processor adds products in 32 bits: nothing to compare with")
    op, shape, size = LAYERS[case]
    model = integer_layer(op, weights(*shape), zero_point, ", ".join("NCABD"[: len(size)]))
    feed = {"x": large(*size)}
    emulator = Emulator(model, threads=1)
    assert len(emulator.layers) == 1
    expected = run(model, feed)
    np.testing.assert_array_equal(emulator.run(feed)["y"], expected)
    assert (emulator.run(feed, saturating=False)["y"] != expected).any()


@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_products_give_the_sums_of_the_kernels(leading: tuple[int, ...]) -> None:
    if not saturating_processor():
        pytest.skip("this processor adds products in 32 bits: nothing to compare with")
    model = integer_product(weights(1025, 33), 13, "A, B, " if leading else "")
    feed = {"x": large(*leading, 5, 1025)}
    np.testing.assert_array_equal(Emulator(model, threads=1).run(feed)["y"], run(model, feed))


@pytest.mark.parametrize(
    "kind", ["one filter a channel", "unsigned weights", "signed activations", "small weights"]
)
def test_what_cannot_saturate_is_left_to_the_runtime(kind: str) -> None:
    depthwise = kind == "one filter a channel"
    op = "Conv <group = 16>" if depthwise else "Conv"
    made = weights(16, 1 if depthwise else 16, 3, 3)
    made = made // 2 if kind == "small weights" else made
    model = integer_layer(op, made, 0, "N, C, A, B")
    given = model.graph.initializers
    if kind == "unsigned weights":
        given["w"].const_value = ir.tensor((made.astype(int) + 128).astype(np.uint8), name="w")
        given["wz"].const_value = ir.tensor(np.uint8(128).reshape(()), name="wz")
    if kind == "signed activations":
        given["z"].const_value = ir.tensor(np.int8(0).reshape(()), name="z")
        model.graph.inputs[0].type = ir.TensorType(ir.DataType.INT8)
    for name in ("w", "wz", "z"):
        given[name].type = ir.TensorType(given[name].const_value.dtype)  # type: ignore[union-attr]
    assert not Emulator(model, threads=1).layers
    x = large(1, 16, 8, 8)
    feed = {"x": (x.astype(int) - 128).astype(np.int8) if kind == "signed activations" else x}
    plain = Emulator(
        integer_layer(op, made, 0 if kind != "signed activations" else 128, "N, C, A, B"), threads=1
    )
    np.testing.assert_array_equal(run(model, feed), plain.run({"x": x}, saturating=False)["y"])


def test_excess_is_what_clipping_every_pair_takes() -> None:
    columns = RNG.integers(0, 256, (40, 31)).astype(np.uint8)
    rows = RNG.integers(-128, 128, (9, 31)).astype(np.int8)
    terms = np.pad(columns[:, None].astype(int) * rows, ((0, 0), (0, 0), (0, 1)))
    pairs = terms.reshape(40, 9, -1, 2).sum(-1)
    np.testing.assert_array_equal(products(columns, rows), pairs.sum(-1))
    np.testing.assert_array_equal(excess(columns, rows), (pairs - pairs.clip(-(2**15), 2**15 - 1)).sum(-1))


# --- whole nets


def net() -> ir.Model:
    """Two convolutions and a product; in the first, one channel of 16 holds large weights side by side."""
    one = (RNG.standard_normal((16, 16, 1, 1)) * 0.05).astype(np.float32)
    wide = (RNG.standard_normal((16, 16, 3, 3)) * 0.05).astype(np.float32)
    one[:, 0] = 1.0  # fixes the scale of every channel
    one[3] = 1.0
    last = (RNG.standard_normal((16, 4)) * 0.1).astype(np.float32)
    body = """g (float[N, 16, 6, 6] x) => (float[N, 4] y) {
        a = Conv (x, one)
        b = Relu (a)
        c = Conv <pads = [1, 1, 1, 1], kernel_shape = [3, 3]> (b, wide)
        d = Relu (c)
        e = GlobalAveragePool (d)
        f = Flatten (e)
        y = MatMul (f, last)
    }"""
    return build(body, one=one, wide=wide, last=last)


def feeds(count: int, largest: float = 1.0) -> list[dict[str, Array]]:
    return [{"x": (RNG.random((1, 16, 6, 6)) * largest).astype(np.float32)} for _ in range(count)]


def made() -> tuple[ir.Model, QuantPlan, list[dict[str, Array]]]:
    model, samples = net(), feeds(8)
    return model, planned(model, X86_VNNI, samples), samples


def joined(model: ir.Model, samples: list[dict[str, Array]]) -> Array:
    return np.concatenate([run(model, feed) for feed in samples])


def test_report_names_the_channel_that_saturates() -> None:
    model, plan, samples = made()
    report = saturation(model, plan, samples, threads=1)
    node = next(n for n in report.nodes if n.output == "a")
    assert (node.weights, node.channels, node.op_type) == ("one", 16, "Conv")
    assert node.widening[3] > 1.9  # two weights of 127 meet activations of up to 255
    assert 1 <= node.does <= node.at_risk <= node.can <= 16
    assert node.share > 0
    assert report.loss < 30
    assert not report.safe
    assert "dB" in report.verdict
    assert "a     Conv" in str(report)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.samples = 0  # type: ignore[misc]


def test_report_foretells_what_this_processor_does() -> None:
    if not saturating_processor():
        pytest.skip("this processor adds products in 32 bits: nothing to compare with")
    model, plan, samples = made()
    exact = joined(inserted(model, unsigned_weights(plan, model)), samples)
    cut = joined(inserted(model, plan), samples)
    noise = 10 * np.log10((exact**2).sum() / ((exact - cut) ** 2).sum())
    assert saturation(model, plan, samples, threads=1).loss == pytest.approx(noise, abs=0.05)


def test_portable_plan_is_safe_and_costs_little() -> None:
    model, plan, samples = made()
    repaired = portable(plan, saturation(model, plan, samples, threads=1))
    after = saturation(model, repaired, samples, threads=1)
    assert all(n.does == 0 for n in after.nodes)
    assert after.loss == math.inf
    new = feeds(8)
    expected = joined(model, new)
    result, before = (joined(inserted(model, unsigned_weights(p, model)), new) for p in (repaired, plan))
    assert decibels(expected, result) > decibels(expected, before) - 1.5  # one channel of 16 lost a bit


def test_portable_widens_no_more_than_is_at_risk() -> None:
    model, plan, samples = made()
    report = saturation(model, plan, samples, threads=1)
    repaired = portable(plan, report)
    for old, new in zip(plan.values, repaired.values, strict=True):
        node = next((n for n in report.nodes if n.weights == old.name and n.at_risk), None)
        if node is None:
            assert new == old
        else:
            factors = np.divide(new.scale, old.scale)
            np.testing.assert_allclose(factors, node.widening, rtol=1e-6)
            assert f"{node.at_risk} of 16 channels widened" in new.why
    assert portable(repaired, dataclasses.replace(report, nodes=())) == repaired


def test_small_activations_leave_large_weights_alone() -> None:
    """What the grid allows and no input reaches costs nothing: the same weights, but dim neighbours."""
    model, plan, _ = made()
    dim = feeds(8)
    for feed in dim:
        feed["x"][:, 1::2] *= 0.001
    report = saturation(model, plan, dim, threads=1)
    node = next(n for n in report.nodes if n.output == "a")
    assert node.can > 0
    assert node.at_risk == node.does == 0


def test_endless_margin_is_safe_for_every_input() -> None:
    model, plan, samples = made()
    everywhere = portable(plan, saturation(model, plan, samples, margin=math.inf, threads=1))
    report = saturation(model, everywhere, samples, threads=1)
    assert report.safe
    assert str(report).startswith("safe everywhere")


def test_unsigned_weights_change_weights_only() -> None:
    model, plan, _ = made()
    stored = {w.value.name for n in model.graph if (w := weights_of(n)) is not None}
    for old, new in zip(plan.values, unsigned_weights(plan, model).values, strict=True):
        assert (new.dtype, new.zero_point) == ("uint8", 128 if old.name in stored else old.zero_point)
        assert new.scale == old.scale


def test_no_samples() -> None:
    model, plan, _ = made()
    with pytest.raises(InputError, match="no samples"):
        saturation(model, plan, [])


def test_plan_of_floats_is_safe() -> None:
    assert saturation(net(), QuantPlan(), []).safe
