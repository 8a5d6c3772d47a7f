"""A channel is worth what the others cannot rebuild of the outputs of its readers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build, normal

from edgewise.calibration.data import Samples, from_arrays
from edgewise.runtime.evaluate import Array, input_specs
from edgewise.training.reconstruction import reconstruction_scores


def samples_of(model: ir.Model, count: int = 128) -> Samples:
    (spec,) = input_specs(model)
    shape = [d if isinstance(d, int) else count for d in spec.shape]
    array = np.random.default_rng(5).standard_normal((count, *shape[1:])).astype(np.float32)
    return from_arrays({spec.name: array}, [spec])


def scored(model: ir.Model, **options: int) -> dict[str, Array]:
    return reconstruction_scores(model, samples_of(model), threads=1, **options)


LINEAR = "g (float[N, 6] x) => (float[N, 4] y) { h = Gemm (x, w) y = Gemm (h, v) }"


def test_the_loss_is_that_of_a_least_squares_fit() -> None:
    """Against the residual of a regression on the channels that stay."""
    model = build(LINEAR, w=normal(6, 5) + 0.3, v=normal(5, 4, seed=1))
    samples = samples_of(model, 4000)
    scores = reconstruction_scores(model, samples, threads=1)["h[1]"]
    x = next(iter(samples.batches(4000)))["x"].astype(np.float64)
    h = x @ (normal(6, 5) + 0.3)
    h -= h.mean(0)
    y = h @ normal(5, 4, seed=1)
    order = np.argsort(scores)
    lost = []
    for count in range(1, 5):
        rest = h[:, order[count:]]
        fitted = rest @ np.linalg.lstsq(rest, y, rcond=None)[0]
        lost.append(((y - fitted) ** 2).sum() / (y**2).sum())
    assert np.allclose(np.cumsum(scores[order])[:4], lost, rtol=0.2)  # damping is one hundredth
    singles = [1 - _explained(np.delete(h, i, 1), y) for i in range(5)]
    assert order[0] == np.argmin(singles)


def _explained(x: Array, y: Array) -> float:
    return float(((x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2).sum() / (y**2).sum())


NET = """g (float[N, 3, 8, 8] x) => (float[N, 8, 4, 4] y) {
    h = Conv (x, w) r = Relu (h) y = Conv <group = groups> (r, v) }"""


def net(weight: Array, groups: int = 1) -> ir.Model:
    body = NET.replace("groups", str(groups))
    return build(body, w=weight, v=normal(8, 8 // groups, 3, 3, seed=1))


@pytest.mark.parametrize("groups", [1, 2])
def test_of_equal_channels_all_but_one_fall_first(groups: int) -> None:
    """Within a group of the reader: no group sees the channels of another."""
    weight = normal(8, 3, 3, 3)
    weight[1] = weight[0]
    weight[2] = 2 * weight[0]
    weight[5] = 0
    found = scored(net(weight, groups))
    scores = next(score for name, score in found.items() if name in ("h[1]", "r[1]"))
    order = np.argsort(scores)
    assert set(order[:3]) < {0, 1, 2, 5}
    assert scores[order[2]] < 0.1 * scores[order[3]]


def test_groups_that_fit_in_no_memory_together() -> None:
    """Part by part, and over blocks in the end."""
    model = build(
        """g (float[N, 3, 9, 9] x) => (float[N, 4, 3, 3] y) {
        h = Conv (x, w0) i = Conv (h, w1) y = Conv (i, w2) }""",
        w0=normal(8, 3, 3, 3),
        w1=normal(8, 8, 3, 3, seed=1),
        w2=normal(4, 8, 3, 3, seed=2),
    )
    whole, apart = scored(model), scored(model, memory=90_000)
    assert all(np.allclose(whole[name], apart[name], rtol=1e-4) for name in whole)
    blocks = scored(model, memory=30_000)
    assert all(np.isfinite(blocks[name]).all() for name in whole)


def test_channels_of_a_sum_are_worth_it_to_all_their_readers() -> None:
    model = build(
        """g (float[N, 3, 6, 6] x) => (float[N, 8, 6, 6] y, float[N, 4, 6, 6] z) {
        a = Conv (x, w0) b = Conv (a, w1) s = Add (a, b) y = Conv (s, w2) z = Conv (s, w3) }""",
        w0=normal(8, 3, 1, 1),
        w1=normal(8, 8, 1, 1, seed=1),
        w2=normal(8, 8, 1, 1, seed=2),
        w3=normal(4, 8, 1, 1, seed=3),
    )
    scores = scored(model)["a[1]"]
    assert 1 < scores.sum() < 3.1  # all of three readers, and a little for the damping


def test_a_small_branch_matters_as_little_as_it_is() -> None:
    """Directly in front of the sum, and one layer further up."""

    def branch(size: float) -> dict[str, Array]:
        model = build(
            """g (float[N, 8, 6, 6] x) => (float[N, 8, 6, 6] y) {
            a = Conv (x, w0) b = Conv (a, w1) c = Conv (b, w2)
            n = BatchNormalization (c, s, o, o, s) y = Add (n, x) }""",
            **{f"w{i}": normal(8, 8, 1, 1, seed=i) for i in range(3)},
            s=np.full(8, size, np.float32),
            o=np.zeros(8, np.float32),
        )
        return scored(model)

    large, small = branch(1.0), branch(1e-4)  # of a variance that is as small: a factor of one hundredth
    for name in ("a[1]", "b[1]"):
        assert 0 < small[name].sum() < 0.5 * large[name].sum()


def test_what_no_layer_reads_and_what_is_constant() -> None:
    model = net(np.zeros((8, 3, 3, 3), np.float32))
    scores = scored(model)
    assert (scores["y[1]"] == 1).all()
    assert np.isfinite(scores["h[1]"]).all()


def test_a_depthwise_conv_is_no_reader() -> None:
    """Its output leaves with its input: the layer behind it says what that is worth."""
    model = build(
        """g (float[N, 3, 8, 8] x) => (float[N, 4, 6, 6] y) {
        h = Conv (x, w) d = Conv <group = 8> (h, u) y = Conv (d, v) }""",
        w=normal(8, 3, 1, 1),
        u=normal(8, 1, 3, 3, seed=1),
        v=normal(4, 8, 1, 1, seed=2),
    )
    scores = scored(model)["h[1]"]
    assert 0.9 < scores.sum() < 1.03  # the damping counts too


def test_one_sample() -> None:
    model = net(normal(8, 3, 3, 3))
    one = reconstruction_scores(model, samples_of(model, 1), threads=1)
    assert all(np.isfinite(score).all() and (score >= 0).all() for score in one.values())


def test_torch_is_not_needed() -> None:
    code = (
        "import sys, edgewise.training.reconstruction, edgewise.training.refit; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
