"""A student learns from its teacher, or from labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build, normal
from small_nets import classifier, constants, disturbed, images

from edgewise.calibration.data import from_arrays
from edgewise.passes.channels import ChannelGraph
from edgewise.passes.graph import opset
from edgewise.passes.remove_channels import PrunePlan, RemoveChannels, survivors
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Evaluator, input_specs
from edgewise.training.cut_points import cut_points
from edgewise.training.distillation import distill, finetune
from edgewise.training.options import TrainOptions

OPTIONS = TrainOptions(epochs=15, batch=16, learning_rate=1e-2)

UPSCALER = """g (float[N, 2, 6, 6] x) => (float[N, 1, 12, 12] y, float[N, 4] z) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w0, b0)
    r = Relu(a)
    y = ConvTranspose<strides = [2, 2]>(r, w1)
    p = GlobalAveragePool(r)
    f = Flatten(p)
    z = Gemm(f, w2)
}"""


def _upscaler() -> ir.Model:
    weights = {"w0": normal(8, 2, 3, 3, seed=1), "b0": normal(8, seed=2)}
    return build(UPSCALER, 17, **weights, w1=normal(8, 1, 2, 2, seed=3), w2=normal(8, 4, seed=4))


def _noise(model: ir.Model, student: ir.Model, feed: dict[str, np.ndarray]) -> float:
    expected, found = Evaluator(model).run(feed), Evaluator(student).run(feed)
    return max(
        float(np.square(expected[n] - found[n]).mean() / np.square(expected[n]).mean()) for n in expected
    )


@pytest.mark.parametrize(("softmax", "augment"), [(False, "auto"), (True, "none")])
def test_a_disturbed_classifier_comes_back_without_labels(softmax: bool, augment: str) -> None:
    teacher = classifier(softmax=softmax)
    student = disturbed(teacher, 0.5)
    options = replace(OPTIONS, augment=augment)  # type: ignore[arg-type]
    trained = distill(teacher, student, images(teacher, 128), images(teacher, 64, seed=2), options, threads=1)
    history = trained.history
    assert history.best.held_back < 0.4 * history.start.held_back
    unseen = {"x": np.concatenate([feed["x"] for feed in images(teacher, 64, seed=3)])}
    assert _noise(teacher, trained.model, unseen) < 0.5 * _noise(teacher, student, unseen)


def test_block_by_block_first_then_end_to_end() -> None:
    teacher = classifier()
    student = disturbed(teacher, 0.5)
    options = replace(OPTIONS, blockwise=0.5)
    history = distill(
        teacher, student, images(teacher, 128), images(teacher, 64, seed=2), options, threads=1
    ).history
    assert [e.phase for e in history.epochs if e.number == 0] == ["block by block", "end to end"]
    assert history.best.phase == "end to end"
    # What the blocks learned by themselves helps the whole: it starts lower than the disturbed student did.
    alone = distill(
        teacher,
        student,
        images(teacher, 128),
        images(teacher, 64, seed=2),
        replace(OPTIONS, epochs=1),
        threads=1,
    ).history
    assert history.start.held_back < alone.start.held_back


def test_a_narrower_student_is_held_against_the_channels_it_kept() -> None:
    teacher = classifier()
    graph = ChannelGraph.of(teacher.graph, opset(teacher))
    cuts = {g: np.arange(g.size) % 2 == 0 for g in graph.groups}
    plan = PrunePlan.of(graph.settle(cuts))
    student, staying = RemoveChannels(plan).on(teacher), survivors(teacher, plan)
    kept = staying["r1", 1]
    trained = distill(
        teacher, student, images(teacher, 128), images(teacher, 64, seed=2), OPTIONS,
        pairs={"r1": "r1"}, staying=staying, threads=1,
    )  # fmt: skip
    assert constants(trained.model)["w1"].shape[0] == len(kept) < 8
    assert trained.history.best.held_back < 0.6 * trained.history.start.held_back
    with pytest.raises(InputError, match="different shapes"):
        distill(teacher, student, images(teacher, 8), images(teacher, 8), OPTIONS, pairs={"r1": "r1"})


def test_a_student_of_another_shape_needs_the_same_ends_only() -> None:
    teacher, student = classifier(8), classifier(5, seed=9)
    options = replace(OPTIONS, epochs=20)
    trained = distill(teacher, student, images(teacher, 128), images(teacher, 64, seed=2), options, threads=1)
    assert trained.history.best.held_back < 0.6 * trained.history.start.held_back
    assert constants(trained.model)["w1"].shape == (5, 1, 3, 3)
    with pytest.raises(InputError, match="outputs"):
        distill(_upscaler(), student, images(teacher, 8), images(teacher, 8), OPTIONS)


def test_outputs_that_are_no_scores_come_back() -> None:
    teacher = _upscaler()
    student = disturbed(teacher, 0.3)
    specs = input_specs(teacher)
    rng = np.random.default_rng(0)
    samples, held_back = (
        from_arrays({"x": rng.standard_normal((n, 2, 6, 6)).astype(np.float32)}, specs) for n in (96, 32)
    )
    trained = distill(teacher, student, samples, held_back, OPTIONS, threads=1)
    assert trained.history.best.score > 0.95 > trained.history.start.score
    feed = {"x": rng.standard_normal((16, 2, 6, 6)).astype(np.float32)}
    assert _noise(teacher, trained.model, feed) < 0.3 * _noise(teacher, student, feed)


def test_a_model_of_a_fixed_batch_of_one_is_trained_in_batches() -> None:
    teacher = classifier(batch="1")
    student = disturbed(teacher, 0.5)
    trained = distill(teacher, student, images(teacher, 128), images(teacher, 64, seed=2), OPTIONS, threads=1)
    assert trained.history.best.held_back < 0.4 * trained.history.start.held_back


def test_never_worse_than_before() -> None:
    teacher = classifier()
    trained = distill(teacher, teacher, images(teacher, 32), images(teacher, 32, seed=2), OPTIONS, threads=1)
    assert trained.history.best.number == 0
    ours, theirs = constants(trained.model), constants(teacher)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_labels_teach_classes() -> None:
    model = classifier()
    samples, held_back = images(model, 128, classes=4), images(model, 64, seed=2, classes=4)
    trained = finetune(model, samples, held_back, replace(OPTIONS, epochs=20), threads=1)
    assert trained.history.start.score < 0.4
    assert trained.history.best.score > 0.65  # a mean over pixels tells little of where a bar is
    with pytest.raises(InputError, match="no labels"):
        finetune(model, images(model, 8), held_back, OPTIONS)
    with pytest.raises(InputError, match="4 classes"):
        finetune(model, images(model, 8, classes=4).take([0, 1]), from_arrays(
            {"x": np.zeros((2, 1, 8, 8), np.float32)}, input_specs(model), np.array([1, 7])
        ), OPTIONS)  # fmt: skip


def test_labels_help_a_teacher_that_knows_little() -> None:
    teacher = classifier()
    samples, held_back = images(teacher, 128, classes=4), images(teacher, 64, seed=2, classes=4)
    options = replace(OPTIONS, epochs=10, labels=0.9, inner=0.0)
    history = distill(teacher, disturbed(teacher, 0.3), samples, held_back, options, threads=1).history
    assert history.best.score > history.start.score + 0.2


def test_labels_that_are_numbers_are_what_an_output_should_be() -> None:
    teacher = _upscaler()
    specs = input_specs(teacher)
    x = np.random.default_rng(0).standard_normal((96, 2, 6, 6)).astype(np.float32)
    truth = Evaluator(teacher).run({"x": x})["y"]
    samples, held_back = (
        from_arrays({"x": x[:64]}, specs, truth[:64]),
        from_arrays({"x": x[64:]}, specs, truth[64:]),
    )
    trained = finetune(disturbed(teacher, 0.3), samples, held_back, OPTIONS, threads=1)
    assert trained.history.best.score > 0.95 > trained.history.start.score


def test_cut_points_are_the_ends_of_blocks() -> None:
    assert cut_points(classifier()) == ("r1", "r2", "p", "f")
    residual = build(
        """g (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {
            a = Conv(x, w) b = Relu(a) c = Conv(b, w) d = Relu(c) e = Conv(d, w) f = Add(e, b) h = Relu(f)
            y = Conv(h, w)
        }""",
        17,
        w=normal(4, 4, 1, 1),
    )
    assert cut_points(residual) == ("b", "h")


@pytest.mark.parametrize("last", ["Tanh", "Sigmoid"])
def test_a_picture_in_a_row_is_no_row_of_scores(last: str) -> None:
    text = f"""g (float[N, 5] x) => (float[N, 64] y) {{
        h = Gemm(x, w0)
        r = Relu(h)
        z = Gemm(r, w1)
        y = {last}(z)
    }}"""
    teacher = build(text, 17, w0=normal(5, 16), w1=normal(16, 64, seed=1))
    samples = from_arrays({"x": normal(64, 5, seed=3)}, input_specs(teacher))
    trained = distill(teacher, disturbed(teacher, 0.5), samples, samples, OPTIONS, threads=1)
    best, start = trained.history.best, trained.history.start
    # The score is one less the noise, not how often the brightest pixel is the same.
    pixels = np.concatenate([feed["x"] for feed in samples])
    assert best.score == pytest.approx(1 - _noise(teacher, trained.model, {"x": pixels}), abs=1e-3)
    assert best.score > start.score


def test_labels_that_do_not_fit_are_named_or_left_out() -> None:
    teacher = classifier()
    samples = images(teacher, 32)
    labels = np.full(32, 1000)
    labelled = from_arrays({"x": np.concatenate([f["x"] for f in samples])}, input_specs(teacher), labels)
    with pytest.raises(InputError, match="classes"):
        distill(teacher, teacher, labelled, labelled, replace(OPTIONS, epochs=1), threads=1)
    without = replace(OPTIONS, epochs=1, labels=0.0)
    assert distill(teacher, teacher, labelled, labelled, without, threads=1).history.best.score == 1.0
