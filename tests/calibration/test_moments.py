"""Moments are those of what the kernels multiply, for every layer, whatever the order or the memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import feeds_of, planned
from rewrites import build

from edgewise.calibration.edits import anchors
from edgewise.calibration.kernels import kernel_rows
from edgewise.calibration.moments import Moments, collect_moments
from edgewise.calibration.patches import Reader, sampled
from edgewise.calibration.target import X86_VNNI
from edgewise.passes.quant_plan import QuantPlan
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Array, Evaluator, Feed, input_specs, seeded_feed


def conv(attributes: str, shape: Sequence[int], weight: Sequence[int]) -> ir.Model:
    dims = ", ".join(map(str, shape))
    outs = ", ".join(f"o{i}" for i in range(len(shape)))
    w = np.random.default_rng(1).standard_normal(weight).astype(np.float32)
    return build(f"g (float[{dims}] x) => (float[{outs}] y) {{ y = Conv <{attributes}> (x, w) }}", w=w)


LAYERS = {
    "padded": conv("pads = [1, 1, 1, 1]", (1, 16, 7, 5), (32, 16, 3, 3)),
    "uneven": conv(
        "pads = [0, 1, 2, 0], strides = [2, 1], dilations = [1, 2]", (2, 16, 7, 5), (32, 16, 3, 2)
    ),
    "same upper": conv('auto_pad = "SAME_UPPER", strides = [2, 2]', (1, 16, 8, 6), (32, 16, 3, 3)),
    "same lower": conv('auto_pad = "SAME_LOWER", strides = [2, 2]', (1, 16, 8, 6), (32, 16, 3, 3)),
    "depthwise": conv("group = 16, pads = [1, 1, 1, 1]", (1, 16, 4, 4), (16, 1, 3, 3)),
    "grouped": conv("group = 2", (1, 32, 5, 5), (64, 16, 3, 3)),
    "one axis": conv("pads = [2, 0]", (2, 16, 20), (32, 16, 3)),
    "three axes": conv("strides = [1, 2, 1]", (1, 16, 4, 5, 3), (32, 16, 2, 2, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_patches_times_weights_is_the_convolution(name: str) -> None:
    model = LAYERS[name]
    (anchor,) = anchors(model, planned(model))
    feed = seeded_feed(input_specs(model))
    output = Evaluator(model).run(feed)["y"]
    rows = kernel_rows(anchor.node, anchor.weights.array)
    rows = rows.reshape(anchor.groups, -1, rows.shape[1])
    seen = sampled(
        Reader.of(anchor.node, anchor.weights.array), feed["x"], start=0.3
    )  # so few positions that all are taken
    product = (rows @ seen.transpose(0, 2, 1)).reshape(rows.shape[0] * rows.shape[1], -1)
    expected = np.moveaxis(output, 1, 0).reshape(product.shape)
    assert np.allclose(product, expected, atol=1e-4 * np.abs(expected).max())


NET = """g (float[N, 16, 9, 9] x) => (float[N, 8] y) {
    c = Conv <pads = [1, 1, 1, 1]> (x, w, b) r = Relu (c) p = GlobalAveragePool (r) f = Flatten (p)
    y = MatMul (f, v) }"""


def net() -> ir.Model:
    rng = np.random.default_rng(2)
    w = (rng.standard_normal((32, 16, 3, 3)) / 12).astype(np.float32)
    v = rng.standard_normal((32, 8)).astype(np.float32)
    return build(NET, w=w, b=rng.standard_normal(32).astype(np.float32), v=v)


def collected(feeds: Sequence[Feed], memory: int = 1 << 29) -> Moments:
    return collect_moments(net(), feeds, PLAN, threads=1, memory=memory)


FEEDS = feeds_of(net(), 6)
PLAN = planned(net(), X86_VNNI)


def test_every_layer_has_its_moments() -> None:
    moments = collected(FEEDS)
    assert moments.samples == 6
    assert set(moments.layers) == {"c", "y"}
    tapped = net()
    tapped.graph.outputs.append(next(v for n in tapped.graph for v in n.outputs if v.name == "f"))
    rows = np.concatenate([Evaluator(tapped).run(feed)["f"] for feed in FEEDS]).astype(np.float64)
    seen = moments.layers["y"]
    assert seen.count == len(rows)
    assert np.allclose(seen.mean[0], rows.mean(axis=0))
    assert np.allclose(seen.second[0][0] / seen.count, rows.T @ rows / len(rows), rtol=1e-5)
    assert np.allclose(seen.covariance(0)[0], np.cov(rows.T, bias=True), atol=1e-5 * rows.var())


def test_a_subsample_is_spread_over_the_whole_image() -> None:
    """81 positions of 2 images a sample, 64 taken: the mean is near that of all."""
    rows = np.concatenate([feed["x"].transpose(0, 2, 3, 1).reshape(-1, 16) for feed in FEEDS])
    center = collected(FEEDS).layers["c"].mean[0].reshape(9, 16)[4]
    assert collected(FEEDS).layers["c"].count == 64 * len(FEEDS)
    assert np.abs(center - rows.mean(axis=0)).max() < 4 * rows.std() / np.sqrt(64 * len(FEEDS))


@settings(deadline=None, max_examples=5, derandomize=True)
@given(order=st.permutations(range(6)), cut=st.integers(1, 5))
def test_order_and_split_do_not_matter(order: list[int], cut: int) -> None:
    whole = collected(FEEDS)
    shuffled = [FEEDS[i] for i in order]
    merged = collected(shuffled[:cut]).merge(collected(shuffled[cut:]))
    assert merged.samples == whole.samples
    for name, layer in whole.layers.items():
        other = merged.layers[name]
        assert other.count == layer.count
        assert np.allclose(other.first, layer.first, rtol=1e-12, atol=1e-12)
        for a, b in zip(layer.second, other.second, strict=True):
            assert np.allclose(a, b, atol=1e-5 * np.abs(a).max())  # products of float32 blocks


def test_little_memory_makes_blocks_of_whole_pairs() -> None:
    whole, little = collected(FEEDS).layers["c"], collected(FEEDS, memory=1 << 18).layers["c"]
    assert len(whole.blocks) == 1
    assert len(little.blocks) > 1
    assert [b.start % 2 for b in little.blocks] == [0] * len(little.blocks)
    assert (little.first == whole.first).all()
    for number, block in enumerate(little.blocks):
        expected = whole.second[0][:, block, block]
        assert np.allclose(little.second[number], expected, atol=1e-5 * np.abs(expected).max())
        assert little.covariance(number).shape == expected.shape


def test_progress_hears_of_every_sample() -> None:
    heard: list[int] = []
    collect_moments(net(), FEEDS, PLAN, threads=1, progress=heard.append)
    assert heard == [1, 2, 3, 4, 5, 6]


def test_no_samples() -> None:
    with pytest.raises(InputError, match="no samples"):
        collected([])


def test_a_plan_without_layers_has_no_moments() -> None:
    assert collect_moments(net(), FEEDS, QuantPlan(), threads=1).layers == {}


def test_moments_that_do_not_belong_together() -> None:
    one, other = collected(FEEDS), collected(FEEDS, memory=1 << 18)
    with pytest.raises(InputError, match="blocks"):
        one.merge(other)
    with pytest.raises(InputError, match="two different models"):
        one.merge(Moments("another", 1, {}))


def test_a_shared_weight_is_left_out() -> None:
    body = "a = Conv (x, w) r = Relu (a) y = Conv (r, w)"
    w: Array = np.random.default_rng(0).standard_normal((16, 16, 1, 1)).astype(np.float32)
    model = build(f"g (float[N, 16, 4, 4] x) => (float[N, 16, 4, 4] y) {{ {body} }}", w=w)
    assert collect_moments(model, feeds_of(model), planned(model), threads=1).layers == {}
