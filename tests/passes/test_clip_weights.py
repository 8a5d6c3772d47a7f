"""clip-weights: small weights become zero, by a threshold, a share or a pattern."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import assert_equal, build, constants, normal, refusal, settled

from edgewise.optimizer.compressed_size import compressed_bytes
from edgewise.passes import parse
from edgewise.passes.base import Pass
from edgewise.passes.clip_weights import ClipWeights
from edgewise.passes.prune_channels import PruneChannels
from edgewise.runtime.evaluate import Array, Evaluator, input_specs, seeded_feed

CHAIN = """g (float[2, 8, 6, 6] x) => (float[2, 5] y) {
    c = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    n = BatchNormalization (c, g, b1, b1, v)
    r = Relu (n)
    p = GlobalAveragePool (r)
    f = Flatten (p)
    y = Gemm <transB = 1> (f, w2, b2) }"""


def chain(**more: Array) -> ir.Model:
    own = {"w1": normal(16, 8, 3, 3), "w2": normal(5, 16, seed=1), "g": normal(16, seed=2)}
    vectors = {"b1": normal(16, seed=3), "b2": normal(5, seed=4), "v": np.ones(16, np.float32)}
    return build(CHAIN, **(own | vectors | more))


def clipped(model: ir.Model, clip: Pass) -> dict[str, Array]:
    after, outcome = settled(model, clip)
    assert outcome.edits
    return constants(after)


def layer(text: str, weight: Array, shape: tuple[int, ...]) -> ir.Model:
    return build(f"g (float{list(shape)} x) => (y) {{ y = {text} }}", w=weight)


def test_threshold() -> None:
    model = chain()
    after, before = clipped(model, ClipWeights(threshold=0.5)), constants(model)
    for name in ("w1", "w2"):
        small = np.abs(before[name]) < 0.5
        assert 0.2 < small.mean() < 0.6
        assert np.array_equal(after[name], np.where(small, 0, before[name]))
    for name in ("b1", "b2", "g", "v"):
        assert np.array_equal(after[name], before[name])


def test_share_of_every_layer() -> None:
    model = chain()
    after = clipped(model, ClipWeights(share=0.3))
    for name in ("w1", "w2"):
        before = constants(model)[name]
        order = np.sort(np.abs(before), axis=None)
        count = int(0.3 * before.size)
        assert np.array_equal(after[name] == 0, np.abs(before) < order[count])


def test_share_of_all_layers() -> None:
    """The smaller weights lie in one layer, which gives nearly all there is to give."""
    model = chain(w2=1e-3 * normal(5, 16))
    after = clipped(model, ClipWeights(share=0.25, scope="global"))
    zeros = {name: int((after[name] == 0).sum()) for name in ("w1", "w2")}
    assert sum(zeros.values()) == int(0.25 * (16 * 8 * 9 + 5 * 16))
    assert zeros["w2"] == 80


def test_equal_weights_go_in_their_order() -> None:
    """Weights on a grid: exactly the share, and no more the next time."""
    weight = np.tile(np.array([1, -1, 2, -2], np.float32), (4, 1))
    after = clipped(layer("MatMul(x, w)", weight, (1, 4)), ClipWeights(share=0.25))["w"]
    assert np.array_equal(np.flatnonzero(after.ravel() == 0), [0, 1, 4, 5])


def test_zeros_count() -> None:
    weight = normal(8, 8)
    weight[:4] = 0
    _, outcome = settled(layer("MatMul(x, w)", weight, (1, 8)), ClipWeights(share=0.5))
    assert outcome.edits == 0


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40),
    st.floats(0.01, 0.99),
    st.sampled_from(["float16", "float32", "float64"]),
)
def test_a_share_is_made_of_the_smallest(numbers: list[float], share: float, dtype: str) -> None:
    """Infinities, NaN, zeros and equal numbers included."""
    with np.errstate(over="ignore"):
        weight = np.array(numbers, dtype)[:, np.newaxis]
    model = layer("MatMul(x, w)", weight, (1, len(numbers)))
    model.graph.inputs[0].type = ir.TensorType(ir.DataType.from_numpy(weight.dtype))
    after = ClipWeights(share=share).on(model)
    array, count = constants(after)["w"], int(share * len(numbers))
    assert (array == 0).sum() == max(count, (weight == 0).sum())
    largest = np.sort(np.abs(weight), axis=None)[count:]
    assert np.array_equal(np.sort(np.abs(array), axis=None)[count:], largest, equal_nan=True)
    assert ClipWeights(share=share).apply(after).edits == 0


@pytest.mark.parametrize(
    ("text", "weight", "shape", "axis"),
    [
        ("Conv(x, w)", (6, 8, 3, 3), (1, 8, 5, 5), 1),
        ("Conv<group = 2>(x, w)", (6, 4, 3, 3), (1, 8, 5, 5), 1),
        ("ConvTranspose<group = 2>(x, w)", (8, 3, 2, 2), (1, 8, 5, 5), 0),
        ("Gemm(x, w)", (8, 5), (2, 8), 0),
        ("Gemm<transB = 1>(x, w)", (5, 8), (2, 8), 1),
        ("Gemm(w, x)", (5, 8), (8, 3), 1),
        ("Gemm<transA = 1>(w, x)", (8, 5), (8, 3), 0),
        ("MatMul(x, w)", (3, 8, 5), (3, 2, 8), 1),
        ("MatMul(x, w)", (8,), (2, 8), 0),
        ("MatMul(w, x)", (5, 8), (8, 2), 1),
    ],
)
def test_two_of_four_inputs_stay(
    text: str, weight: tuple[int, ...], shape: tuple[int, ...], axis: int
) -> None:
    before = normal(*weight)
    after = clipped(layer(text, before, shape), ClipWeights(pattern="2:4"))["w"]
    runs, kept = (np.moveaxis(a, axis, -1).reshape(-1, 4) for a in (before, after))
    assert ((kept != 0).sum(1) == 2).all()
    largest = np.sort(np.abs(runs), axis=1)[:, 2:]
    assert np.array_equal(np.sort(np.abs(kept), axis=1)[:, 2:], largest)
    assert np.array_equal(kept[kept != 0], runs[kept != 0])


def test_recurrent_weights() -> None:
    text = "g (float[3, 2, 8] x) => (y) { y, h = GRU <hidden_size = 4> (x, w, r, b) }"
    weights = {"w": normal(1, 12, 8), "r": normal(1, 12, 4), "b": normal(1, 24)}
    after = clipped(build(text, **weights), ClipWeights(pattern="1:4"))
    assert (after["w"] != 0).sum() == 12 * 2
    assert (after["r"] != 0).sum() == 12
    assert np.array_equal(after["b"], weights["b"])


def test_a_shared_weight_counts_once() -> None:
    text = (
        "g (float[2, 8] x) => (float[2, 8] y) { a = MatMul(x, w) b = Relu(a) c = MatMul(b, w) y = Add(c, x) }"
    )
    after = clipped(build(text, w=normal(8, 8)), ClipWeights(share=0.25, scope="global"))
    assert list(after) == ["w"]
    assert (after["w"] == 0).sum() == 16


def test_a_weight_of_a_body_and_a_constant_node() -> None:
    text = """g (bool c, float[2, 4] x) => (float[2, 4] y) {
        k = Constant <value = float[4, 4] {1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4}> ()
        a = MatMul(x, k)
        y = If (c) <then_branch = t () => (float[2, 4] p) { p = MatMul(a, w) },
                    else_branch = e () => (float[2, 4] q) { q = Relu(a) }> }"""
    after = clipped(build(text, w=normal(4, 4)), ClipWeights(share=0.5))
    assert [int((array == 0).sum()) for array in after.values()] == [8, 8]


@pytest.mark.parametrize(
    ("text", "clip", "reason"),
    [
        (
            "g (int64[3] x) => (y) { e = Gather(w, x) t = Gemm<transB = 1>(e, w) y = Relu(t) }",
            ClipWeights(share=0.5),
            "weight has another reader",
        ),
        (
            "g (float[8, 8] x) => (y) { a = MatMul(x, w) b = MatMul(w, x) y = Add(a, b) }",
            ClipWeights(pattern="2:4"),
            "readers sum over different axes of one weight",
        ),
        (
            "g (float[2, 8] x) => (y) { y = MatMul(x, w) }",
            ClipWeights(pattern="2:5"),
            "inputs of a layer are no multiple of the pattern",
        ),
    ],
)
def test_refusals(text: str, clip: ClipWeights, reason: str) -> None:
    assert refusal(build(text, w=normal(8, 8)), clip) == reason


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ("{share: 1.0}", "below 1"),
        ("{share: .nan}", "below 1"),
        ("{threshold: -1.0}", "magnitude"),
        ("{threshold: .inf}", "magnitude"),
        ("{share: 0.5, threshold: 0.1}", "one of share, threshold and pattern"),
        ("{share: 0.5, scope: net}", "layer, global"),
        ("{pattern: '4:4'}", "clips nothing"),
        ("{pattern: half}", "such as 2:4"),
        ("{pattern: 2:4}", "quotes"),
    ],
)
def test_options_that_make_no_sense(options: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        parse(f"clip-weights{options}")


def test_spec() -> None:
    clip = ClipWeights(pattern="2:4")
    assert parse(clip.spec) == clip


def test_no_criterion_no_edit() -> None:
    assert settled(chain(), ClipWeights())[1].edits == 0


def test_channels_of_which_nothing_is_left_leave() -> None:
    """Clipping comes before structured removal: half of the filters are small, and half of them go."""
    weight = normal(16, 8, 3, 3)
    weight[::2] *= 1e-4
    model = chain(w1=weight)
    zeros = ClipWeights(threshold=0.01).on(model)
    assert zeros.graph.initializers["w1"].shape == (16, 8, 3, 3)
    small = PruneChannels().on(zeros)
    assert small.graph.initializers["w1"].shape == (8, 8, 3, 3)
    assert small.graph.initializers["w2"].shape == (5, 8)
    feed = seeded_feed(input_specs(model), size=2)
    assert_equal(Evaluator(zeros, optimize=False).run(feed), Evaluator(small, optimize=False).run(feed))


def test_zeros_take_no_room_once_compressed() -> None:
    """Noise does not compress; without nine tenths of it a bit map and the tenth remain."""
    model = layer("MatMul(x, w)", normal(256, 256), (1, 256))
    whole, small = compressed_bytes(model), compressed_bytes(ClipWeights(share=0.9).on(model))
    assert 0.85 * 4 * 256**2 < whole <= 1.01 * 4 * 256**2
    assert small < 0.25 * whole
