"""Learned rounding never costs, never saturates, and ends in exactly the integers it chose."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import inserted, planned
from rewrites import build, constants

from edgewise.calibration.edits import anchors, nearest, with_weights
from edgewise.calibration.kernels import kernel_rows
from edgewise.calibration.moments import collect_moments
from edgewise.calibration.rounding import quadratic, round_rows, round_weights
from edgewise.calibration.target import X86, X86_VNNI
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Array, Evaluator, Feed


def second_moment(rng: np.random.Generator, groups: int, k: int, count: int) -> Array:
    """Of `count` correlated patches; singular where they are fewer than k."""
    mixing = rng.standard_normal((groups, k, k)) * rng.exponential(1, (groups, 1, k)) + 1
    patches = rng.standard_normal((groups, count, k)) @ mixing
    second: Array = patches.transpose(0, 2, 1) @ patches / count
    return second


def problem(rng: np.random.Generator, k: int, count: int, *, groups: int = 2) -> tuple[Array, ...]:
    """Rows with scales that no pair of nearest integers saturates under, and a second moment."""
    rows = rng.standard_normal((groups, 3, k)) * rng.exponential(1, (groups, 3, 1))
    padded = np.pad(rows, ((0, 0), (0, 0), (0, k % 2)))
    pairs = np.abs(padded[..., ::2] + padded[..., 1::2]).max(axis=-1)
    scale = np.maximum(np.abs(rows).max(axis=-1), pairs) / 127
    start = np.rint(rows / scale[..., None]) * scale[..., None]
    return rows, start, scale, second_moment(rng, groups, k, count)


def saturating(integers: Array) -> int:
    """Pairs whose products with 255 leave 16 bits."""
    even = integers[..., : integers.shape[-1] // 2 * 2]
    return int((np.abs(even[..., ::2] + even[..., 1::2]) > 128).sum())


@settings(deadline=None, max_examples=60, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 140), count=st.integers(1, 200))
def test_no_row_gets_worse_and_no_pair_saturates(seed: int, k: int, count: int) -> None:
    rows, start, scale, second = problem(np.random.default_rng(seed), k, count)
    chosen = round_rows(rows, start, scale, second, in_pairs=True)
    slack = 1e-9 * quadratic(rows, second).max()
    assert (quadratic(chosen - rows, second) <= quadratic(start - rows, second) + slack).all()
    integers = np.rint(chosen / scale[..., None])
    assert np.allclose(integers * scale[..., None], chosen, rtol=1e-12, atol=0)
    assert np.abs(integers).max() <= 127
    assert saturating(integers) == 0


def test_a_start_that_saturates_is_left_without_new_pairs() -> None:
    rows = np.full((1, 1, 6), 1.0)
    scale = np.full((1, 1), 1 / 127)
    second = second_moment(np.random.default_rng(0), 1, 6, 50)
    assert (round_rows(rows, rows, scale, second, in_pairs=True) == rows).all()


def test_it_comes_near_the_best_of_all_choices() -> None:
    rng = np.random.default_rng(5)
    ratios = []
    for _ in range(20):
        rows, start, scale, second = problem(rng, 5, 100, groups=1)
        floor = np.floor(rows[0, 0] / scale[0, 0])
        every = np.array(list(itertools.product(*((f - 1, f, f + 1, f + 2) for f in floor)))) * scale[0, 0]
        best = quadratic((every - rows[0, 0])[None], second).min()
        chosen = round_rows(rows[:, :1], start[:, :1], scale[:, :1], second, in_pairs=False)
        ratios.append(float(quadratic(chosen - rows[:, :1], second)[0, 0] / best))
    assert min(ratios) > 1 - 1e-9
    assert np.median(ratios) < 1.3


def test_what_never_varies_is_rounded_to_nearest() -> None:
    rows, start, scale, second = problem(np.random.default_rng(0), 8, 10)
    assert (round_rows(rows, start, scale, np.zeros_like(second), in_pairs=False) == start).all()


CONV = "g (float[N, 32, 6, 6] x) => (float[N, c, h, w] y) {{ y = Conv <{}> (x, w, b) }}"
MATRIX = "g (float[N, 32] x) => (float[N, c] y) {{ {} }}"
LAYERS = {
    "1x1": (CONV.format("pads = [0, 0, 0, 0]"), (32, 32, 1, 1)),
    "3x3": (CONV.format("pads = [1, 1, 1, 1]"), (32, 32, 3, 3)),
    "depthwise": (CONV.format("group = 32, pads = [1, 1, 1, 1]"), (32, 1, 3, 3)),
    "grouped": (CONV.format("group = 2"), (32, 16, 3, 3)),
    "gemm": (MATRIX.format("y = Gemm (x, w, b)"), (32, 32)),
    "gemm transposed": (MATRIX.format("y = Gemm <transB = 1> (x, w, b)"), (32, 32)),
    "matmul": (MATRIX.format("m = MatMul (x, w) y = Add (m, b)"), (32, 32)),
    "no bias": (MATRIX.format("y = MatMul (x, w)"), (32, 32)),
}


def layer(name: str) -> ir.Model:
    text, shape = LAYERS[name]
    rng = np.random.default_rng(7)
    weights = {"w": rng.standard_normal(shape).astype(np.float32)}
    if name != "no bias":
        weights["b"] = rng.standard_normal(32).astype(np.float32)
    return build(text, **weights)


def correlated(model: ir.Model, count: int, seed: int) -> list[Feed]:
    """Positive inputs whose channels, and neighbours in space, have much in common."""
    rng = np.random.default_rng(seed)
    shape = tuple(model.graph.inputs[0].shape or ())[1:]
    mixing = np.random.default_rng(0).standard_normal((6, 32))
    feeds = []
    for _ in range(count):
        x = np.tensordot(rng.standard_normal((4, *[1] * (len(shape) - 1), 6)), mixing, axes=1)
        x = np.moveaxis(x, -1, 1) + 0.3 * rng.standard_normal((4, *shape)) + 1
        feeds.append({"x": np.maximum(x, 0).astype(np.float32)})
    return feeds


def error(model: ir.Model, edited: ir.Model, feeds: list[Feed]) -> float:
    before, after = Evaluator(model), Evaluator(edited)
    return float(sum(((before.run(f)["y"] - after.run(f)["y"]) ** 2).sum() for f in feeds))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gains_on_samples_it_has_not_seen(name: str) -> None:
    model = layer(name)
    feeds = correlated(model, 24, seed=1)
    made = planned(model, X86_VNNI, feeds)
    edits = round_weights(model, made, collect_moments(model, feeds, made, threads=1))
    (anchor,) = anchors(model, made)
    plain = with_weights(model, {"w": nearest(anchor.weights.array, anchor.grid).astype(np.float32)})
    fresh = correlated(model, 12, seed=2)
    assert error(model, with_weights(model, edits), fresh) < 0.8 * error(model, plain, fresh)
    assert set(edits) == ({"w"} if name == "no bias" else {"w", "b"})


@pytest.mark.parametrize("name", LAYERS)
def test_the_quantizer_ends_with_the_integers_chosen(name: str) -> None:
    model = layer(name)
    feeds = correlated(model, 4, seed=1)
    made = planned(model, X86, feeds)
    edits = round_weights(model, made, collect_moments(model, feeds, made, threads=1))
    (anchor,) = anchors(model, made)
    written = constants(inserted(with_weights(model, edits), made))["w.quantized"]
    scale = np.expand_dims(
        np.array(anchor.grid.scale), [i for i in range(written.ndim) if i != anchor.grid.axis]
    )
    assert ((written * scale).astype(np.float32) == edits["w"]).all()
    rows = kernel_rows(anchor.node, written.astype(np.int64))
    assert name == "depthwise" or saturating(rows) == 0
    plain = nearest(anchor.weights.array, anchor.grid).astype(np.float32)
    assert (edits["w"] != plain).any()


def test_weights_on_their_grid_are_left_alone() -> None:
    rng = np.random.default_rng(0)
    w = rng.integers(-60, 60, (32, 32, 1, 1)).astype(np.float32)
    w[:, 0] = 127
    model = build(CONV.format("group = 1"), w=w, b=np.zeros(32, np.float32))
    feeds = correlated(model, 4, seed=1)
    made = planned(model, X86_VNNI, feeds)
    assert round_weights(model, made, collect_moments(model, feeds, made, threads=1)) == {}


def test_one_scale_for_all_channels() -> None:
    model = layer("3x3")
    feeds = correlated(model, 8, seed=1)
    made = planned(model, X86_VNNI, feeds, per_channel=False)
    edits = round_weights(model, made, collect_moments(model, feeds, made, threads=1))
    (anchor,) = anchors(model, made)
    plain = with_weights(model, {"w": nearest(anchor.weights.array, anchor.grid).astype(np.float32)})
    assert error(model, with_weights(model, edits), feeds) < error(model, plain, feeds)


def test_blocks_are_rounded_too() -> None:
    model = layer("3x3")
    feeds = correlated(model, 24, seed=1)
    made = planned(model, X86_VNNI, feeds)
    moments = collect_moments(model, feeds, made, threads=1, memory=1 << 20)
    assert len(moments.layers["y"].blocks) > 1
    (anchor,) = anchors(model, made)
    plain = with_weights(model, {"w": nearest(anchor.weights.array, anchor.grid).astype(np.float32)})
    edited = with_weights(model, round_weights(model, made, moments))
    assert error(model, edited, feeds) < error(model, plain, feeds)


def test_moments_of_another_model() -> None:
    model, other = layer("gemm"), layer("matmul")
    feeds = correlated(model, 2, seed=1)
    made = planned(model, X86, feeds)
    with pytest.raises(InputError, match="another model"):
        round_weights(other, made, collect_moments(model, feeds, made, threads=1))


@pytest.mark.parametrize("spoiled", [np.nan, np.inf, -1e6])
def test_a_moment_that_makes_no_sense_changes_nothing(spoiled: float) -> None:
    rows, start, scale, second = problem(np.random.default_rng(0), 8, 40)
    second[:, 2, 2] = spoiled
    assert (round_rows(rows, start, scale, second, in_pairs=True) == start).all()
