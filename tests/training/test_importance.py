"""Scores: each is what its definition says, and means the same in every layer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build, constants, normal

from edgewise.calibration.data import Samples, from_arrays
from edgewise.passes.channels import ChannelGraph
from edgewise.passes.graph import Array, opset
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Evaluator, input_specs
from edgewise.training.channel_reads import channel_reads
from edgewise.training.importance import METHODS, score

FROM_SAMPLES = [
    name
    for name in METHODS
    if name.startswith(("activation", "gradient", "taylor", "fisher", "reconstruction"))
]
BY_GRADIENTS = ["gradient", "taylor", "fisher"]

RESIDUAL = """g (float[N, 3, 6, 6] x) => (float[N, 5] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w0, b0)
    c = Conv<pads = [1, 1, 1, 1]>(a, w1)
    d = BatchNormalization(c, scale, shift, mean, variance)
    e = Relu(d)
    f = Conv(e, w2)
    h = Add(a, f)
    r = Relu(h)
    p = GlobalAveragePool(r)
    q = Flatten(p)
    z = Gemm<transB = 1>(q, w3, b3)
    y = Softmax(z)
}"""
TRUNK, INNER, BRANCH = "a[1]", "c[1]", "h"


def residual(**changed: Array) -> ir.Model:
    """A trunk of eight channels, read before and after the sum, and six inside the block."""
    weights = {
        "w0": normal(8, 3, 3, 3, seed=1),
        "b0": normal(8, seed=2),
        "w1": normal(6, 8, 3, 3, seed=3) / 4,
        "scale": np.linspace(-2, 1, 6, dtype=np.float32),
        "shift": normal(6, seed=4),
        "mean": normal(6, seed=5),
        "variance": np.linspace(1, 2, 6, dtype=np.float32),
        "w2": normal(8, 6, 1, 1, seed=6),
        "w3": normal(5, 8, seed=7),
        "b3": normal(5, seed=8),
    }
    return build(RESIDUAL, 17, **{**weights, **changed})


def samples_of(model: ir.Model, count: int = 6, *, labels: bool = False, seed: int = 9) -> Samples:
    (spec,) = input_specs(model)
    shape = [d for d in spec.shape[1:] if isinstance(d, int)]
    classes = np.arange(count) % 5 if labels else None
    return from_arrays({spec.name: normal(count, *shape, seed=seed)}, [spec], labels=classes)


def values(model: ir.Model, samples: Samples, name: str) -> Array:
    """A value of the model on all samples."""
    tapped = model.clone()
    tapped.graph.outputs.extend(v for n in tapped.graph for v in n.outputs if v.name == name)
    (spec,) = samples.specs
    whole = np.concatenate([feed[spec.name] for feed in samples])
    found: Array = Evaluator(tapped, outputs=[name]).run({spec.name: whole})[name]
    return found


def norms(array: Array, axis: int, order: int = 2) -> Array:
    others = tuple(i for i in range(array.ndim) if i != axis)
    total = (np.abs(array.astype(np.float64)) ** order).sum(others) ** (1 / order)
    shares: Array = total / total.mean()
    return shares


def test_a_channel_is_read_where_nothing_shares_it_on() -> None:
    model = residual()
    reads = channel_reads(ChannelGraph.of(model.graph, opset(model)))
    assert [(r.value, r.node.op_type, r.group.name) for r in reads] == [
        ("a", "Conv", TRUNK),
        ("e", "Conv", INNER),
        ("q", "Gemm", TRUNK),
    ]


def test_indices_of_one_channel_are_summed() -> None:
    """A Flatten of 2 x 2 pixels makes four indices of a channel."""
    model = build(
        "g (float[N, 2, 2, 2] x) => (float[N, 1] y) { a = Conv(x, w) f = Flatten(a) y = Gemm(f, v) }",
        w=normal(3, 2, 1, 1),
        v=normal(12, 1),
    )
    (read,) = channel_reads(ChannelGraph.of(model.graph, opset(model)))
    numbers = np.arange(24.0).reshape(2, 12)
    assert np.array_equal(read.sums(numbers), numbers.reshape(2, 3, 4).sum(2))


@pytest.mark.parametrize(("method", "order"), [("magnitude-l1", 1), ("magnitude-l2", 2)])
def test_magnitude_sums_the_norms_of_all_slices(method: str, order: int) -> None:
    model = residual()
    held, scores = constants(model), score(model, method)
    trunk = sum(
        norms(held[name], axis, order)
        for name, axis in [("w0", 0), ("b0", 0), ("w1", 1), ("w2", 0), ("w3", 1)]
    )
    inner = sum(norms(held[n], axis, order) for n, axis in [("w1", 0), ("w2", 1), ("scale", 0), ("shift", 0)])
    np.testing.assert_allclose(scores[TRUNK], trunk, rtol=1e-12)
    np.testing.assert_allclose(scores[INNER], inner, rtol=1e-12)


def test_magnitude_knows_grouped_convolutions() -> None:
    model = build(
        "g (float[N, 2, 4, 4] x) => (float[N, 3, 4, 4] y) "
        "{ a = Conv(x, u) c = Conv<group = 2>(a, w) y = Conv(c, v) }",
        u=normal(6, 2, 1, 1, seed=1),
        w=normal(4, 3, 1, 1, seed=2),
        v=normal(3, 4, 1, 1, seed=3),
    )
    held, scores = constants(model), score(model, "magnitude-l2")
    columns = held["w"].reshape(2, 2, 3)  # group, output, input
    expected = norms(held["u"], 0) + norms(np.moveaxis(columns, 1, 2).reshape(6, 2), 0)
    np.testing.assert_allclose(scores["a[1]"], expected, rtol=1e-6)
    np.testing.assert_allclose(scores["c[1]"], norms(held["w"], 0) + norms(held["v"], 1), rtol=1e-12)


@pytest.mark.parametrize("method", ["magnitude-l2", "activation-mean", "activation-energy", *BY_GRADIENTS])
def test_scores_are_blind_to_the_scale_of_a_layer(method: str) -> None:
    """Sixteen times the trunk and a sixteenth of what reads it is the same network."""
    held = constants(residual())
    scaled = residual(
        w0=held["w0"] * 16, b0=held["b0"] * 16, w1=held["w1"] / 16, w2=held["w2"] * 16, w3=held["w3"] / 16
    )
    samples = samples_of(scaled)
    before, after = (score(model, method, samples, threads=1) for model in (residual(), scaled))
    for name in (TRUNK, INNER):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-4)


def test_scales_of_batch_norms_are_taken_as_they_are() -> None:
    scores = score(residual(), "bn-scale")
    np.testing.assert_allclose(scores[INNER], np.abs(np.linspace(-2, 1, 6, dtype=np.float32)))
    assert np.isinf(scores[TRUNK]).all()


def test_without_batch_norms_there_are_no_scales() -> None:
    model = build(
        "g (float[N, 2, 4, 4] x) => (float[N, 3, 4, 4] y) { a = Conv(x, u) y = Conv(a, v) }",
        u=normal(6, 2, 1, 1),
        v=normal(3, 6, 1, 1),
    )
    with pytest.raises(InputError, match="bn-scale needs batch norms"):
        score(model, "bn-scale")


@pytest.mark.parametrize(
    ("method", "statistic"),
    [("activation-mean", np.abs), ("activation-energy", np.square), ("activation-zeros", lambda a: a != 0)],
)
def test_activations_are_averaged_where_they_are_read(
    method: str, statistic: Callable[[Array], Array]
) -> None:
    model = residual()
    samples = samples_of(model)

    def typical(name: str) -> Array:
        array = values(model, samples, name)
        mean = statistic(array).mean(tuple(i for i in range(array.ndim) if i != 1))
        shares: Array = mean if method == "activation-zeros" else mean / mean.mean()
        return shares

    scores = score(model, method, samples, threads=1, memory=1)  # each value in a run of its own
    np.testing.assert_allclose(scores[TRUNK], typical("a") + typical("q"), rtol=1e-5)
    np.testing.assert_allclose(scores[INNER], typical("e"), rtol=1e-5)


def cross_entropies(model: ir.Model, samples: Samples) -> Array:
    """Of each sample."""
    assert samples.labels is not None
    chances = values(model, samples, "y").astype(np.float64)
    losses: Array = -np.log(chances[np.arange(len(samples)), samples.labels])
    return losses


def gated(channel: int, gate: float) -> ir.Model:
    """The trunk's channel times `gate` wherever weights read it."""
    held = constants(residual())
    w1, w3 = held["w1"].copy(), held["w3"].copy()
    w1[:, channel] *= gate
    w3[:, channel] *= gate
    return residual(w1=w1, w3=w3)


@pytest.mark.parametrize(
    ("method", "statistic"),
    [("taylor", lambda s: np.abs(s).mean() ** 2), ("fisher", lambda s: np.square(s).mean() / 2)],
)
def test_gradients_are_those_of_a_gate_on_all_reads(method: str, statistic: Callable[[Array], float]) -> None:
    """Held against differences of the loss, whose steps of a percent meet the kinks of Relus: 5 %."""
    samples = samples_of(residual(), labels=True)
    slopes = [
        (cross_entropies(gated(c, 1.01), samples) - cross_entropies(gated(c, 0.99), samples)) / 0.02
        for c in range(8)
    ]
    scores = score(residual(), method, samples, threads=1)
    np.testing.assert_allclose(scores[TRUNK], [statistic(s) for s in slopes], rtol=5e-2, atol=1e-4)


def test_a_branch_is_worth_what_a_gate_on_all_of_it_changes() -> None:
    samples, w2 = samples_of(residual(), labels=True), constants(residual())["w2"]
    more, less = (cross_entropies(residual(w2=w2 * gate), samples) for gate in (1.01, 0.99))
    slopes = (more - less) / 0.02
    (found,) = score(residual(), "fisher", samples, threads=1)[BRANCH]
    assert found == pytest.approx(np.square(slopes).mean() / 2, rel=5e-2)  # steps of a percent meet kinks


@pytest.mark.parametrize("method", BY_GRADIENTS)
def test_samples_joined_count_as_samples_alone(method: str) -> None:
    model = residual()
    samples = samples_of(model, labels=True)
    joined, alone = (score(model, method, samples, threads=1, memory=memory) for memory in (1 << 30, 1))
    for name in (TRUNK, INNER, BRANCH):
        np.testing.assert_allclose(joined[name], alone[name], rtol=1e-4)


def test_rows_that_are_not_kept_apart_go_alone() -> None:
    """Channels in front of the rows: a joined run could not tell whose gradient it is."""
    text = "g (float[N, 4] x) => (float[N, 2] y) {{ a = MatMul(x, u) r = Relu(a) {} }}"
    weights = {"u": normal(4, 6, seed=1), "v": normal(6, 2, seed=2)}
    plain = build(text.format("y = MatMul(r, v)"), **weights)
    turned = build(text.format("t = Transpose<perm = [1, 0]>(r) y = Gemm<transA = 1>(t, v)"), **weights)
    samples = samples_of(plain, labels=True)
    samples = from_arrays(
        {"x": np.concatenate([f["x"] for f in samples])}, samples.specs, labels=np.arange(6) % 2
    )
    expected = score(plain, "fisher", samples, threads=1)
    np.testing.assert_allclose(
        score(turned, "fisher", samples, threads=1)["a[1]"], expected["a[1]"], rtol=1e-4
    )


def test_without_labels_fisher_is_the_distance_of_the_outputs() -> None:
    """Two linear outputs: their distance when channel i goes, relative to their energy, is known exactly.

    With signs of their own 4,000 copies of one sample leave 3 % of chance.
    """
    u, v = normal(4, 3, seed=1), normal(3, 2, seed=2)
    model = build("g (float[N, 4] x) => (float[N, 2] y) { a = MatMul(x, u) y = MatMul(a, v) }", u=u, v=v)
    x = normal(1, 4, seed=3)
    samples = from_arrays({"x": np.repeat(x, 4000, 0)}, input_specs(model))
    share = np.square((x @ u).T * v).sum(1) / np.square(x @ u @ v).sum()
    np.testing.assert_allclose(score(model, "fisher", samples, threads=1)["a[1]"], share / 2, rtol=0.1)


def test_behind_a_softmax_fisher_is_the_divergence() -> None:
    """To second order that is half the sum of dp^2 / p, at a temperature of four."""
    u, v = normal(4, 3, seed=1), normal(3, 4, seed=2)
    text = "g (float[N, 4] x) => (float[N, 4] y) { a = MatMul(x, u) z = MatMul(a, v) y = Softmax(z) }"
    x = normal(1, 4, seed=3)
    a = (x @ u)[0].astype(np.float64)
    p = np.exp(a @ v / 4) / np.exp(a @ v / 4).sum()
    change = a[:, None] * v / 4  # of the softened scores, by channel
    fisher = (p * change**2).sum(1) - (p * change).sum(1) ** 2
    model = build(text, u=u, v=v)
    samples = from_arrays({"x": np.repeat(x, 4000, 0)}, input_specs(model))
    np.testing.assert_allclose(score(model, "fisher", samples, threads=1)["a[1]"], fisher / 2, rtol=0.1)


@pytest.mark.parametrize(
    "labels", [np.zeros((6, 2), np.int64), np.arange(6.0), np.arange(6), np.arange(6) - 1], ids=repr
)
def test_labels_that_are_no_classes_are_left_alone(labels: Array) -> None:
    """Masks, measures, a class too many and one below zero."""
    model = residual()
    plain = samples_of(model)
    (spec,) = plain.specs
    masks = from_arrays({spec.name: np.concatenate([f[spec.name] for f in plain])}, [spec], labels=labels)
    for name, expected in score(model, "taylor", plain, threads=1).items():
        np.testing.assert_array_equal(score(model, "taylor", masks, threads=1)[name], expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_scores(method: str) -> None:
    model = residual()
    samples = samples_of(model)
    first, second = (score(model, method, samples, seed=3, threads=1) for _ in range(2))
    branches = [BRANCH] if method in BY_GRADIENTS else []
    assert list(first) == list(second) == ["x[1]", TRUNK, INNER, "z[1]", *branches]
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("method", ["random", "taylor"])
def test_another_seed_gives_other_scores(method: str) -> None:
    model = residual()
    samples = samples_of(model)
    first, second = (score(model, method, samples, seed=seed, threads=1)[TRUNK] for seed in (0, 1))
    assert (first != second).any()


@pytest.mark.parametrize("method", METHODS)
def test_what_has_to_stay_scores_infinity(method: str) -> None:
    scores = score(residual(), method, samples_of(residual()), threads=1)
    assert np.isinf(scores["x[1]"]).all()
    assert np.isfinite(scores[INNER]).all()
    assert all((array >= 0).all() for array in scores.values())


@pytest.mark.parametrize("method", [*BY_GRADIENTS, "activation-mean"])
def test_progress_counts_samples(method: str) -> None:
    heard: list[int] = []
    score(residual(), method, samples_of(residual()), threads=1, progress=heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == 6


@pytest.mark.parametrize("method", FROM_SAMPLES)
def test_samples_are_asked_for(method: str) -> None:
    with pytest.raises(InputError, match="there are none: pass --data"):
        score(residual(), method)


def test_an_unknown_score_is_told_the_known_ones() -> None:
    with pytest.raises(InputError, match="'magnitude': choose one of random, magnitude-l1, "):
        score(residual(), "magnitude")


def test_a_model_without_channels_says_why() -> None:
    model = build("g (float[N, 3, 4, 4] x) => (float[N, 8, 4, 4] y) { y = Conv(x, w) }", w=normal(8, 3, 1, 1))
    with pytest.raises(
        EdgewiseError, match=r"can be removed \(channels held by graph output: 8, graph input: 3\)"
    ):
        score(model, "random")


def test_a_model_without_layers_says_so() -> None:
    with pytest.raises(EdgewiseError, match="no layer has channels"):
        score(build("g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }"), "random")


def test_gradients_that_overflow_are_an_error() -> None:
    model = residual(w0=normal(8, 3, 3, 3) * np.float32(1e30), w1=normal(6, 8, 3, 3) * np.float32(1e30))
    with pytest.raises(EdgewiseError, match="not finite"):
        score(model, "taylor", samples_of(model), threads=1)


def test_weights_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(EdgewiseError, match="magnitude-l2 gives NaN"):
        score(residual(w2=np.full((8, 6, 1, 1), np.nan, np.float32)), "magnitude-l2")


def test_the_table_needs_no_torch() -> None:
    """Whoever prunes by magnitude needs none."""
    script = "import sys, edgewise.training.importance; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("method", BY_GRADIENTS)
def test_an_output_of_one_number_a_row_has_gradients(method: str) -> None:
    text = """g (float[N, 4] x) => (float[N] y) {
        h = Gemm<transB = 1>(x, w0)
        r = Relu(h)
        s = Gemm<transB = 1>(r, w1)
        y = Squeeze(s, axes)
    }"""
    model = build(text, 17, w0=normal(6, 4), w1=normal(1, 6, seed=1), axes=np.array([1]))
    scores = score(model, method, from_arrays({"x": normal(8, 4)}, input_specs(model)))
    assert np.isfinite(np.concatenate(list(scores.values()))).any()
