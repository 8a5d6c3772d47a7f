"""SmoothInputs: outliers move into the weights, and norms or layers before take the division in."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from collapsed import watched
from rewrites import build, constants, operators

from edgewise.calibration.channel_ranges import collect_channels
from edgewise.passes.base import Outcome
from edgewise.passes.channel_ranges import STALE
from edgewise.passes.smooth_inputs import SmoothInputs
from edgewise.passes.verify import Signature, check
from edgewise.runtime.evaluate import Array, Evaluator, input_specs, seeded_feed

RNG = np.random.default_rng(0)
OUTLIERS = np.array([1, 64, 1, 1, 1 / 8, 1, 1, 1], np.float32)
FORMS = {
    "LayerNormalization": "n = LayerNormalization<axis = -1>(x, g, h)",
    "written out": """m = ReduceMean<axes = [-1]>(x) d = Sub(x, m) e = Mul(d, d)
        q = ReduceMean<axes = [-1]>(e) r = Sqrt(q) z = Div(d, r) k = Mul(z, g) n = Add(k, h)""",
    "a layer": "l = MatMul(x, u) n = Add(l, h)",
    "a product": "t = Tanh(x) n = Mul(t, g)",
}


def drawn(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def model_of(form: str) -> ir.Model:
    """Two products that read eight channels with outliers."""
    text = f"net (float[2, 5, 8] x) => (y, z2) {{ {FORMS[form]} y = MatMul(n, v) z2 = MatMul(n, w) }}"
    given = {"g": OUTLIERS, "h": drawn(8) * OUTLIERS, "u": drawn(8, 8) * OUTLIERS}
    used = {name: a for name, a in given.items() if f" {name})" in text or f" {name}," in text}
    return build(text, v=drawn(8, 6), w=drawn(8, 3), **used)


def smoothed(model: ir.Model, strength: float = 0.5) -> tuple[ir.Model, Outcome]:
    feed = seeded_feed(input_specs(model), size=2)
    rule = SmoothInputs(strength=strength, ranges=collect_channels(model, [feed]))
    after = model.clone()
    outcome = rule.apply(after)
    check(after, Signature.of(model))
    a, b = (Evaluator(m, optimize=False).run(feed) for m in (model, after))
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert rule.apply(after).edits == 0
    return after, outcome


def spread(model: ir.Model) -> float:
    """Binary orders between the channels of what the products read."""
    read = Evaluator(watched(model, "n")).run(seeded_feed(input_specs(model), size=2))["n"]
    largest = np.abs(read).max((0, 1))
    return float(np.log2(largest.max() / largest.min()))


@pytest.mark.parametrize("form", FORMS)
def test_outliers_move(form: str) -> None:
    model = model_of(form)
    after, outcome = smoothed(model)
    assert outcome.edits > 0
    assert operators(after) == operators(model)
    assert spread(after) < spread(model) - 2


def test_strength_says_how_far() -> None:
    model = model_of("LayerNormalization")
    spreads = [spread(smoothed(model, strength)[0]) for strength in (0.3, 0.6, 1.0)]
    assert sorted(spreads, reverse=True) == spreads
    assert spreads[-1] < 2  # nothing but rounding to powers of two is left


def test_what_cannot_take_the_division_in_is_left_alone() -> None:
    model = build("net (float[2, 5, 8] x) => (y) { n = Sigmoid(x) y = MatMul(n, v) }", v=drawn(8, 6))
    assert dict(smoothed(model)[1].refused) == {"Sigmoid": 1}


def test_another_reader_that_cannot_is_in_the_way() -> None:
    text = """net (float[2, 5, 8] x) => (y, e) {
        n = LayerNormalization<axis = -1>(x, g) y = MatMul(n, v) e = Erf(n)
    }"""
    assert dict(smoothed(build(text, g=OUTLIERS, v=drawn(8, 6)))[1].refused) == {"Erf": 1}


def test_windows_are_not_its_business() -> None:
    model = build(
        "net (float[1, 8, 6, 6] x) => (y) { n = Conv(x, u) y = Conv(n, w) }",
        u=drawn(8, 8, 1, 1) * OUTLIERS[:, None, None, None],
        w=drawn(4, 8, 3, 3),
    )
    assert smoothed(model)[1].edits == 0


def test_nothing_without_ranges_or_with_those_of_another_model() -> None:
    model = model_of("LayerNormalization")
    assert SmoothInputs().apply(model.clone()).edits == 0
    ranges = collect_channels(model, [seeded_feed(input_specs(model))])
    other = model_of("a layer")
    assert dict(SmoothInputs(ranges=ranges).apply(other).refused) == {STALE: 1}


def test_strength_is_a_share() -> None:
    with pytest.raises(ValueError, match="strength must be from 0 to 1"):
        SmoothInputs(strength=1.5)


def test_norms_with_shared_parameters_part() -> None:
    """Two norms read one scale: each gets its own, as the two products ask for."""
    text = """net (float[2, 5, 8] x) => (y, z) {
        n = LayerNormalization<axis = -1>(x, g) y = MatMul(n, v)
        m = LayerNormalization<axis = -1>(x, g) z = MatMul(m, w)
    }"""
    after, outcome = smoothed(build(text, g=OUTLIERS, v=drawn(8, 6), w=drawn(8, 6) * 3))
    assert outcome.edits == 4
    assert len(constants(after)) == 4
