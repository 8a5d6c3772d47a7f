"""Students of a teacher, and models that learn labels: on digits, as files that are read and written."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch", reason="teaching needs torch")

from rewrites import build, normal
from small_nets import classifier, constants, images

from edgewise.calibration.plan import QuantOptions
from edgewise.models.digits import load_digits, load_digits_net
from edgewise.optimizer import distill, files, finetune, quantize, teaching
from edgewise.optimizer.recipe import Prune, Quantize, Recipe
from edgewise.optimizer.report import Report
from edgewise.optimizer.torch_export import export
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Evaluator
from edgewise.training.options import Penalty, TrainOptions

DIGITS = load_digits()
FLOAT = Recipe(quantize=None, benchmark=None, threads=1)
AS_TRAINED = FLOAT.model_copy(update={"passes": ()})
QUICK = TrainOptions(epochs=8, batch=32, learning_rate=1e-2)


def small_net(width: int = 16, **options: Any) -> ir.Model:
    """A classifier of digits that has learned nothing, with the digits network's names."""
    net = classifier(width, classes=10, **options)
    net.graph.inputs[0].name, net.graph.outputs[0].name = "image", "output"
    return net


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits network, a small one that has learned nothing, and samples with labels and without."""
    folder = tmp_path_factory.mktemp("teaching")
    export(load_digits_net(), ["image=1x1x8x8"], folder / "digits.onnx")
    files.save(small_net(), folder / "small.onnx")
    few, more = DIGITS.train_images[:240], DIGITS.train_images[:600]
    np.savez(folder / "few.npz", image=few)
    np.savez(folder / "few_labels.npz", image=few, labels=DIGITS.train_labels[:240])
    np.savez(folder / "labels.npz", image=more, labels=DIGITS.train_labels[:600])
    return folder


def top1(path: Path, labels: np.ndarray = DIGITS.test_labels, only: int | None = None) -> float:
    """Of digits that nothing was learned from: all, or only the first so many."""
    scores = Evaluator(files.load(path), threads=1).run({"image": DIGITS.test_images[:only]})["output"]
    return float(np.mean(scores.argmax(1) == labels[:only]))


def taught(folder: Path, out: Path, data: str = "few.npz", **options: Any) -> Report:
    chosen = {"recipe": FLOAT, "options": QUICK, **options}
    return distill(folder / "digits.onnx", folder / "small.onnx", out, data=str(folder / data), **chosen)


def tuned(folder: Path, out: Path, data: str = "labels.npz", **options: Any) -> Report:
    chosen = {"recipe": FLOAT, "options": QUICK, **options}
    return finetune(folder / "small.onnx", out, data=str(folder / data), **chosen)


# Distillation


def test_a_student_of_another_shape_learns_digits_without_labels(folder: Path, tmp_path: Path) -> None:
    options = TrainOptions(epochs=20, batch=16, learning_rate=1e-2)
    report = taught(folder, tmp_path / "out.onnx", options=options)
    assert report.score is not None
    assert (report.score.metric, report.score.samples) == ("agreement", 40)
    assert report.score.after > report.score.before + 0.25
    assert top1(tmp_path / "out.onnx") > top1(folder / "small.onnx") + 0.15
    assert report.history is not None
    assert report.history.best.held_back < report.history.start.held_back
    assert report.chosen == "trained"
    assert Path(report.input.path).name == "small.onnx"
    assert "edgewise.recipe" in files.load(tmp_path / "out.onnx").metadata_props


def test_the_exact_passes_run_behind(folder: Path, tmp_path: Path) -> None:
    report = taught(folder, tmp_path / "out.onnx", options=TrainOptions(epochs=1))
    assert {"fuse-batch-norm"} <= {s.step for s in report.steps if s.status == "applied"}
    assert report.output.nodes < report.input.nodes


def test_the_same_seed_teaches_the_same(folder: Path, tmp_path: Path) -> None:
    options = TrainOptions(epochs=1)
    for name in ("a.onnx", "b.onnx"):
        taught(folder, tmp_path / name, options=options)
    other = FLOAT.model_copy(update={"seed": 1})
    taught(folder, tmp_path / "c.onnx", options=TrainOptions(epochs=1, seed=1), recipe=other)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    one, another = (constants(files.load(tmp_path / name)) for name in ("a.onnx", "c.onnx"))
    assert any(not np.array_equal(one[name], another[name]) for name in one)


def test_frozen_weights_of_a_student_stay(folder: Path, tmp_path: Path) -> None:
    options = TrainOptions(epochs=1, freeze=("w[12]",))
    taught(folder, tmp_path / "out.onnx", options=options, recipe=AS_TRAINED)
    before, after = (constants(files.load(p)) for p in (folder / "small.onnx", tmp_path / "out.onnx"))
    assert {n for n in ("w1", "w2", "w3") if np.array_equal(before[n], after[n])} == {"w1", "w2"}


def test_labels_count_where_there_are_some(folder: Path, tmp_path: Path) -> None:
    report = taught(folder, tmp_path / "out.onnx", "few_labels.npz", options=TrainOptions(epochs=2))
    assert report.score is not None
    assert report.score.metric == "top1"


@pytest.mark.parametrize("job", [taught, tuned])
def test_those_for_validation_judge_what_was_trained(job: Any, folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "judges.npz", image=DIGITS.test_images[:90], labels=DIGITS.test_labels[:90])
    judges = {"data": "labels.npz", "validation": str(tmp_path / "judges.npz")}
    report = job(folder, tmp_path / "out.onnx", options=TrainOptions(epochs=1), **judges)
    assert report.score is not None
    assert (report.score.metric, report.score.samples) == ("top1", 90)
    assert report.score.after == pytest.approx(
        top1(tmp_path / "out.onnx", only=90), abs=1e-9
    )  # rounding moves no answer


# Fine-tuning


def test_labels_teach_digits_that_were_not_seen(folder: Path, tmp_path: Path) -> None:
    report = tuned(folder, tmp_path / "out.onnx")
    assert top1(tmp_path / "out.onnx") > max(top1(folder / "small.onnx") + 0.3, 0.6)
    assert report.history is not None
    assert report.history.best.score > report.history.start.score + 0.3
    assert report.score is not None
    assert report.score.metric == "top1"
    assert Path(report.input.path).name == "small.onnx"


def test_a_new_head_for_other_classes_learns_them(folder: Path, tmp_path: Path) -> None:
    """Of a net that knew digits: which of three groups one belongs to."""
    groups = np.array([0, 1, 2, 2, 1, 2, 0, 1, 0, 2])
    images, labels = DIGITS.train_images[:400], groups[DIGITS.train_labels[:400]]
    np.savez(tmp_path / "groups.npz", image=images, labels=labels)
    tuned(folder, tmp_path / "ten.onnx")
    finetune(
        tmp_path / "ten.onnx",
        tmp_path / "three.onnx",
        data=str(tmp_path / "groups.npz"),
        replace_head=3,
        recipe=FLOAT,
        options=QUICK,
    )
    output = files.load(tmp_path / "three.onnx").graph.outputs[0]
    assert output.shape is not None
    assert output.shape[1] == 3
    usual = np.bincount(groups[DIGITS.test_labels]).max() / len(DIGITS.test_labels)
    assert top1(tmp_path / "three.onnx", labels=groups[DIGITS.test_labels]) > usual + 0.2


def test_frozen_weights_stay_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    options = TrainOptions(epochs=1, freeze=("w1", "g*", "b[12]"))
    tuned(folder, tmp_path / "out.onnx", options=options, recipe=AS_TRAINED)
    before, after = (constants(files.load(p)) for p in (folder / "small.onnx", tmp_path / "out.onnx"))
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert {"w1", "g1", "g2", "b1", "b2"} <= same
    assert not same & {"w2", "w3", "b3"}


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A net of 32 channels that knows digits, its batch norms still there."""
    files.save(small_net(32), folder / "wide.onnx")
    path, data = folder / "trained.onnx", str(folder / "labels.npz")
    finetune(folder / "wide.onnx", path, data=data, recipe=AS_TRAINED, options=QUICK)
    return path


@pytest.mark.parametrize(("kind", "strength"), [("group-lasso", 0.16), ("bn-scale", 1.0)])
def test_a_penalty_empties_channels_and_they_leave(
    kind: str, strength: float, trained: Path, tmp_path: Path
) -> None:
    """So few steps want a penalty so strong that answers suffer; here it is the channels that count."""
    report = finetune(
        trained,
        tmp_path / "out.onnx",
        data=str(trained.with_name("labels.npz")),
        recipe=FLOAT,
        options=TrainOptions(epochs=12, batch=16, learning_rate=1e-2),
        penalty=Penalty(kind, strength),
    )
    assert report.output.parameters < 0.5 * report.input.parameters
    assert "prune-channels" in {s.step.partition("{")[0] for s in report.steps if s.status == "applied"}


def test_what_learned_is_pruned_where_the_recipe_says_so(folder: Path, tmp_path: Path) -> None:
    recipe = FLOAT.model_copy(update={"prune": Prune(max_macs=0.5, recover="closed-form")})
    report = tuned(folder, tmp_path / "out.onnx", recipe=recipe)
    (amount,) = report.amounts
    assert amount.macs <= 0.5
    assert report.chosen == "pruned"


def test_the_same_seed_learns_the_same(folder: Path, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        tuned(folder, tmp_path / name, "few_labels.npz", options=TrainOptions(epochs=2), replace_head=10)
    models = [files.load(tmp_path / name) for name in ("a.onnx", "b.onnx")]
    one, other = map(constants, models)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


# Int8 without labels

UNEVEN = """g (float[N, 1, 8, 8] x) => (float[N, 4] y) {
    c1 = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
    r1 = Relu(c1)
    c2 = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(r1, w2, b2)
    r2 = Relu(c2)
    p = GlobalAveragePool(r2)
    f = Flatten(p)
    y = Gemm<transB = 1>(f, w3, b3)
}"""


def uneven() -> ir.Model:
    """A net that one grid for all channels hurts: each is a multiple, up to 30-fold, of what would do.

    What reads a channel takes the multiple back, so that the small channels matter as much as the large.
    """
    times = np.geomspace(1, 30, 8).astype(np.float32)
    weights = {
        "w1": normal(8, 1, 3, 3, seed=1) * times[:, None, None, None] / 2,
        "b1": normal(8, seed=2) * times / 9,
    }
    weights |= {"w2": normal(8, 8, 3, 3, seed=3) / times[:, None, None] / 6, "b2": normal(8, seed=4) / 9}
    return build(UNEVEN, 17, **weights, w3=normal(4, 8, seed=5), b3=normal(4, seed=6) / 9)


def test_int8_is_healed_without_labels(tmp_path: Path) -> None:
    """Held against int8 by the same rules that learned nothing, on images that neither has seen."""
    net = uneven()
    files.save(net, tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", x=np.concatenate([f["x"] for f in images(net, 200)]))
    unseen = np.concatenate([f["x"] for f in images(net, 200, seed=9)])
    options = QuantOptions(per_channel=False)
    rules = Quantize(options=options, methods=("minmax",), ladder=(), search=False, samples=100)
    recipe = Recipe(quantize=rules, benchmark=None, threads=1, metric="fidelity", max_drop=0.9)
    data = str(tmp_path / "data.npz")
    plain = quantize(tmp_path / "net.onnx", tmp_path / "plain.onnx", data=data, recipe=recipe)
    healed = finetune(tmp_path / "net.onnx", tmp_path / "healed.onnx", data=data, int8=True, recipe=recipe)
    assert (plain.chosen, healed.chosen) == ("int8", "int8")
    assert {s.step: s.status for s in healed.steps}["quantization-aware training"] == "applied"
    assert healed.recipe["quantize"]["samples"] == 150, "more than calibrate, and the rest judges"
    assert healed.score is not None
    assert healed.score.samples == 50
    expected = Evaluator(net).run({"x": unseen})["y"]
    before, after = (
        np.square(Evaluator(files.load(tmp_path / name)).run({"x": unseen})["y"] - expected).sum()
        / np.square(expected).sum()
        for name in ("plain.onnx", "healed.onnx")
    )
    assert before > 1e-3  # or there would be nothing to heal
    assert after < 0.7 * before


# Failures


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("job", [taught, tuned])
def test_what_fails_behind_the_training_writes_nothing(
    job: Any, folder: Path, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise EdgewiseError("the disk is full")

    (tmp_path / "out.onnx").write_bytes(b"old")
    monkeypatch.setattr(teaching, "run_job", fails)
    monkeypatch.setattr(teaching, "save_stamped", fails)
    with pytest.raises(EdgewiseError, match="disk is full"):
        job(folder, tmp_path / "out.onnx", "few_labels.npz", options=TrainOptions(epochs=1), force=True)
    assert (tmp_path / "out.onnx").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir() if path.name != "out.onnx"] == ["scratch"]
    assert not list(scratch.glob("edgewise*"))


def test_an_interrupted_training_writes_nothing(folder: Path, tmp_path: Path, scratch: Path) -> None:
    def interrupts(stage: str, done: int, total: int) -> None:
        if stage == "train":
            raise KeyboardInterrupt

    for job in (taught, tuned):
        with pytest.raises(KeyboardInterrupt):
            job(folder, tmp_path / "out.onnx", "few_labels.npz", progress=interrupts)
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    assert not list(scratch.glob("edgewise*"))


def test_progress_knows_how_many_epochs_there_are(folder: Path, tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []

    def hear(stage: str, done: int, total: int) -> None:
        if stage == "train":
            heard.append((done, total))

    tuned(folder, tmp_path / "out.onnx", "few_labels.npz", options=TrainOptions(epochs=3), progress=hear)
    assert heard == [(1, 3), (2, 3), (3, 3)]


def test_labels_are_needed_unless_int8_is_all_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    for options in ({}, {"replace_head": 3, "int8": True}, {"penalty": Penalty("l1", 0.1), "int8": True}):
        with pytest.raises(InputError, match="no labels to learn from"):
            tuned(folder, tmp_path / "out.onnx", "few.npz", **options)
    with pytest.raises(InputError, match="of its own"):
        tuned(folder, tmp_path / "out.onnx", "few.npz", int8=True)


@pytest.mark.slow  # a real net of forty million multiply-accumulates
def test_what_was_learned_on_photographs_helps_with_digits(corpus: Path, tmp_path: Path) -> None:
    """From ten kinds of things on CIFAR-10 to ten digits, of 320 examples; then half of it leaves."""

    def shown(images: np.ndarray) -> np.ndarray:
        """[n, 1, 8, 8] as photographs of 32 x 32 with numbers about zero."""
        large = np.kron(images / DIGITS.train_images.max(), np.ones((1, 1, 4, 4)))
        return np.repeat(4 * large - 2, 3, axis=1).astype(np.float32)

    train, test = shown(DIGITS.train_images[:320]), shown(DIGITS.test_images)
    np.savez(tmp_path / "train.npz", input=train, labels=DIGITS.train_labels[:320])
    np.savez(tmp_path / "test.npz", input=test, labels=DIGITS.test_labels)
    report = finetune(
        corpus / "models" / "cifar_resnet20.onnx",
        tmp_path / "out.onnx",
        data=str(tmp_path / "train.npz"),
        validation=str(tmp_path / "test.npz"),
        replace_head=10,
        recipe=FLOAT.model_copy(update={"prune": Prune(max_macs=0.5, recover="closed-form")}),
        options=TrainOptions(epochs=10, batch=32),
    )
    assert report.score is not None
    assert (report.score.metric, report.score.samples) == ("top1", len(test))
    assert report.score.before > 0.9
    assert report.score.after > 0.8
    assert report.amounts[0].macs <= 0.5
