"""Ranges of channels: what they are, and that int8 of a collapsed network comes back with them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from collapsed import separable
from quantized import inserted, planned
from rewrites import build

from edgewise.calibration.channel_ranges import collect_channels
from edgewise.passes.channel_ranges import ChannelRanges
from edgewise.passes.equalize_channels import EqualizeChannels
from edgewise.passes.fingerprint import fingerprint
from edgewise.passes.smooth_inputs import SmoothInputs
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Array, Evaluator, Feed

RNG = np.random.default_rng(0)
FEEDS = [{"x": RNG.standard_normal((1, 3, 12, 12)).astype(np.float32)} for _ in range(24)]


def shifted(opset: int) -> ir.Model:
    return build("net (float[N, 3, 12, 12] x) => (y) { y = Mul(x, f) }", opset, f=np.float32(2))


@pytest.mark.parametrize("opset", [13, 18, 21])
def test_ranges_are_those_of_all_samples(opset: int) -> None:
    model = shifted(opset)
    ranges = collect_channels(model, FEEDS, {"y": 1})
    every = 2 * np.concatenate([feed["x"] for feed in FEEDS])
    own = ranges.values["y"]
    assert ranges.fingerprint == fingerprint(model)
    assert np.array_equal(own.low, every.min((0, 2, 3)))
    assert np.array_equal(own.high, every.max((0, 2, 3)))
    assert np.array_equal(own.magnitude, np.abs(every).max((0, 2, 3)))
    np.testing.assert_allclose(own.mean, np.abs(every).mean((0, 2, 3)), rtol=1e-5)  # float32 sums of 144


def test_order_does_not_matter() -> None:
    a, b = (collect_channels(shifted(17), feeds, {"y": 1}).values["y"] for feeds in (FEEDS, FEEDS[::-1]))
    assert np.array_equal(a.low, b.low)
    assert np.array_equal(a.high, b.high)


def test_nan_leaves_a_value_out() -> None:
    bad = {"x": np.full((1, 3, 12, 12), np.nan, np.float32)}
    assert not collect_channels(shifted(17), [FEEDS[0], bad], {"y": 1}).values


def test_progress_and_errors() -> None:
    heard: list[int] = []
    collect_channels(shifted(17), FEEDS[:3], {"y": 1}, progress=heard.append)
    assert heard == [1, 2, 3]
    with pytest.raises(InputError, match="no samples"):
        collect_channels(shifted(17), [], {"y": 1})
    with pytest.raises(InputError, match="no value named 'nobody'"):
        collect_channels(shifted(17), FEEDS, {"nobody": 1})


def test_a_model_of_which_nothing_is_wanted() -> None:
    assert not collect_channels(shifted(17), FEEDS).values


def test_by_default_what_layers_read() -> None:
    found = collect_channels(separable("Clip({}, zero, six)".replace("zero, six", "")), FEEDS[:1]).values
    assert set(found) == {"a1", "d1", "f"}


def said(model: ir.Model, feeds: Sequence[Feed] = FEEDS) -> Array:
    evaluator = Evaluator(model)
    return np.concatenate([evaluator.run(feed)["y"] for feed in feeds])


def decibels(reference: Array, other: Array) -> float:
    return float(10 * np.log10(np.square(reference).sum() / np.square(reference - other).sum()))


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_collapsed_network_comes_back(per_channel: bool) -> None:
    """int8 loses what the rescaled channels held, and after equalizing no more than of the even network."""

    def quality(model: ir.Model) -> float:
        made = inserted(model, planned(model, feeds=FEEDS, per_channel=per_channel))
        return decibels(said(model), said(made))

    even, broken = separable(), separable(spread=6)
    np.testing.assert_array_equal(said(even), said(broken))
    repaired = broken.clone()
    ranges: ChannelRanges = collect_channels(broken, FEEDS)
    EqualizeChannels(per_channel=per_channel, ranges=ranges).apply(repaired)
    assert quality(broken) < 10
    # A factor, as a power of two, may be off by half a bit, and a depthwise weight takes two of them.
    assert quality(repaired) > quality(even) - (3 if per_channel else 7)


def test_outliers_of_a_norm_cost_int8_less_once_they_are_smoothed() -> None:
    """A feed-forward block behind a norm of which two channels are 100 times as large as the others."""
    text = """net (float[1, 16, 32] x) => (y) {
        n = LayerNormalization<axis = -1>(x, g, h) a = MatMul(n, v) b = Add(a, c) r = Relu(b) y = MatMul(r, w)
    }"""
    g = np.ones(32, np.float32)
    g[[3, 17]] = 100
    rng = np.random.default_rng(0)
    drawn = {k: rng.standard_normal(s).astype(np.float32) for k, s in (("v", (32, 64)), ("w", (64, 32)))}
    drawn["v"] /= g[:, None]  # the large channels say no more than the others
    model = build(text, g=g, h=0.1 * g, c=rng.standard_normal(64).astype(np.float32), **drawn)
    feeds = [{"x": rng.standard_normal((1, 16, 32)).astype(np.float32)} for _ in range(16)]
    smoothed = model.clone()
    assert SmoothInputs(ranges=collect_channels(model, feeds)).apply(smoothed).edits > 0
    reference = said(model, feeds)
    np.testing.assert_array_equal(reference, said(smoothed, feeds))
    before, after = (
        decibels(reference, said(inserted(m, planned(m, feeds=feeds)), feeds)) for m in (model, smoothed)
    )
    assert after > before + 10, (before, after)
