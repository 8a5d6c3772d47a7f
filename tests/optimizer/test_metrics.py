"""Scores: what they are on known outputs, which one is chosen, and how a wrong use is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from edgewise.calibration.data import from_arrays
from edgewise.optimizer.metrics import (
    Metric,
    agreement,
    default_metric,
    fidelity,
    metric_named,
    run_all,
    top1,
)
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import input_specs
from edgewise.runtime.foreign import import_callable

SCORES = {"y": np.array([[1, 2, 0], [5, 0, 0], [0, 0, 3], [1, 0, 0]], np.float32)}
SHIFTED = {"y": np.array([[1, 2, 0], [0, 5, 0], [0, 0, 3], [1, 0, 0]], np.float32)}


def test_top1() -> None:
    assert top1(SCORES, SCORES, np.array([1, 0, 2, 2])) == 0.75


def test_top1_with_ones_in_the_shape() -> None:
    """Convolutional heads give (samples, classes, 1, 1)."""
    assert top1({"y": SCORES["y"][:, :, None, None]}, {}, np.array([1, 0, 2, 2])) == 0.75


def test_top1_takes_labels_as_a_column() -> None:
    assert top1(SCORES, SCORES, np.array([[1], [0], [2], [2]])) == 0.75


@pytest.mark.parametrize("labels", [None, np.array([0, 1])])
def test_top1_needs_a_label_for_every_row(labels: np.ndarray | None) -> None:
    with pytest.raises(InputError, match="label"):
        top1(SCORES, SCORES, labels)


def test_agreement() -> None:
    assert agreement(SHIFTED, SCORES, None) == 0.75


def test_fidelity_is_the_worst_output() -> None:
    good, bad = np.full((4, 2), 10.0, np.float32), np.full((4, 2), 9.0, np.float32)
    original = {"a": good, "b": good, "n": np.arange(4)}
    assert fidelity({"a": good, "b": bad, "n": np.arange(4)}, original, None) == pytest.approx(0.99)
    assert fidelity(original, original, None) == 1.0


def test_fidelity_of_silence() -> None:
    zero, one = np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)
    assert fidelity({"y": zero}, {"y": zero}, None) == 1.0
    assert fidelity({"y": one}, {"y": zero}, None) == 0.0


@pytest.mark.parametrize(
    ("output", "labels", "name"),
    [
        (SCORES["y"], np.zeros(4, int), "top1"),
        (SCORES["y"], None, "agreement"),
        (SCORES["y"][:, :, None, None], np.zeros(4, int), "top1"),
        (np.zeros((4, 3, 8, 8), np.float32), None, "fidelity"),
        (np.zeros((4, 1), np.float32), np.zeros(4, int), "fidelity"),
        (np.zeros(4, np.float32), None, "fidelity"),
    ],
)
def test_default_metric(output: np.ndarray, labels: np.ndarray | None, name: str) -> None:
    assert default_metric({"y": output}, labels).name == name


def test_default_metric_of_integers_can_score() -> None:
    """A segmentation model may end in ArgMax: equal classes are what counts."""
    classes = {"y": np.array([[[1, 2], [3, 3]]])}
    metric = default_metric(classes, None)
    assert metric.score(classes, classes, None) == 1.0
    assert metric.score({"y": np.array([[[1, 2], [3, 0]]])}, classes, None) == pytest.approx(0.75)


def test_a_score_must_be_a_number() -> None:
    with pytest.raises(EdgewiseError, match="gave nan"):
        Metric("mine", lambda *_: float("nan")).score(SCORES, SCORES, None)


def test_a_metric_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metrics_a.py").write_text("def mean(outputs, labels):\n    return outputs['y'].mean()\n")
    monkeypatch.chdir(tmp_path)
    metric = metric_named("my_metrics_a:mean")
    assert metric.score(SCORES, SCORES, None) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("topp1", "none of top1"),
        ("nomodule_x:f", "nomodule_x"),
        ("math:nothing", "no function 'nothing'"),
        ("math:pi", "no function 'pi'"),
        (":f", "module:function"),
        ("math:", "module:function"),
    ],
)
def test_metrics_that_do_not_exist(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        metric_named(name)


def test_a_module_with_a_mistake_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metrics_b.py").write_text("def broken(:\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="my_metrics_b"):
        import_callable("my_metrics_b:broken", "")


def test_a_metric_that_raises_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metrics_c.py").write_text("def f(outputs, labels):\n    return outputs['other']\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EdgewiseError, match=r"my_metrics_c:f.*other"):
        metric_named("my_metrics_c:f").score(SCORES, SCORES, None)


def test_run_all_stacks(model: ir.Model, images: np.ndarray) -> None:
    samples = from_arrays({"image": images[:40]}, input_specs(model))
    outputs = run_all(model, samples)
    assert outputs["scores"].shape == (40, 5)


def test_run_all_of_a_fixed_batch_and_a_scalar_output() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[1,4] x) => (float y) { y = ReduceSum <keepdims = 0> (x) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    samples = from_arrays({"x": np.ones((5, 4), np.float32)}, input_specs(model))
    np.testing.assert_array_equal(run_all(model, samples)["y"], [4, 4, 4, 4, 4])


def test_run_all_refuses_sequences() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[N,4] x) => (seq(float[N,2]) y) { y = SplitToSequence <axis = 1> (x) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    samples = from_arrays({"x": np.ones((2, 4), np.float32)}, input_specs(model))
    with pytest.raises(InputError, match="sequences"):
        run_all(model, samples)
