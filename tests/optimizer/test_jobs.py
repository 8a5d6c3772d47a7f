"""The single jobs from Python: what they write, what they report, and when they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgewise.calibration.data import Samples, from_arrays
from edgewise.calibration.table import CalibrationTable
from edgewise.optimizer import calibrate, compare, files, prune, quantize
from edgewise.optimizer.recipe import Quantize, Recipe
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Evaluator, input_specs

QUICK = Recipe(benchmark=None, max_drop=1.0, quantize=Quantize(methods=("minmax",), samples=16), threads=1)


@pytest.fixture
def samples(model: ir.Model, images: np.ndarray) -> Samples:
    return from_arrays({"image": images}, input_specs(model), np.arange(len(images)) % 5)


def operators(path: Path) -> list[str]:
    return [node.op_type for node in files.load(path).graph]


def scores(path: Path, images: np.ndarray) -> np.ndarray:
    (values,) = Evaluator(str(path)).run({"image": images}).values()
    return np.asarray(values)


def test_prune_removes_what_is_zero_and_keeps_the_outputs(
    model_path: Path, tmp_path: Path, images: np.ndarray
) -> None:
    before = model_path.read_bytes()
    report = prune(model_path, tmp_path / "out.onnx")
    assert report.output.parameters == 12 * 3 * 9 + 12 + 5 * 12 + 5
    assert report.output.bytes == (tmp_path / "out.onnx").stat().st_size < report.input.bytes
    assert report.chosen == "pruned"
    assert report.latency is None
    assert all("without VNNI" in note for note in report.notes)
    # Sums in another order: a few units in the last place of float32.
    np.testing.assert_allclose(scores(tmp_path / "out.onnx", images), scores(model_path, images), atol=1e-5)
    assert model_path.read_bytes() == before


def test_prune_says_when_there_was_nothing_to_remove(model_path: Path, tmp_path: Path) -> None:
    first = prune(model_path, tmp_path / "a.onnx")
    again = prune(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert again.output.parameters == first.output.parameters
    assert any("none was removed" in note for note in again.notes)


def test_calibrate_writes_a_table_that_quantize_takes(
    model_path: Path, tmp_path: Path, samples: Samples
) -> None:
    report = calibrate(model_path, samples, tmp_path / "table.npz", recipe=QUICK)
    table = CalibrationTable.load(tmp_path / "table.npz")
    assert (report.samples, report.values) == (len(samples), len(table.sketches))
    assert report.digest == table.digest
    json.dumps(report.to_dict())
    made = quantize(model_path, tmp_path / "int8.onnx", table=tmp_path / "table.npz", recipe=QUICK)
    assert made.table == table.digest
    assert made.score is None
    assert any("--data" in note for note in made.notes)
    assert "QuantizeLinear" in operators(tmp_path / "int8.onnx")
    assert files.load(tmp_path / "int8.onnx").metadata_props["edgewise.table"] == table.digest


def test_quantize_is_judged_on_the_samples(model_path: Path, tmp_path: Path, samples: Samples) -> None:
    report = quantize(model_path, tmp_path / "int8.onnx", data=samples, recipe=QUICK)
    assert report.score is not None
    assert report.score.metric == "top1"
    assert report.score.samples == len(samples) - 16  # those that calibrate do not judge
    (difference,) = report.differences
    assert difference.snr_db > 20  # a tenth of the signal would be a broken scale
    assert report.chosen == "int8"
    assert "int8 by minmax ranges" in [step.step for step in report.steps]
    assert any("without VNNI" in note for note in report.notes)


def test_a_table_calibrates_and_all_samples_judge(model_path: Path, tmp_path: Path, samples: Samples) -> None:
    calibrate(model_path, samples, tmp_path / "table.npz", recipe=QUICK)
    report = quantize(
        model_path, tmp_path / "int8.onnx", data=samples, table=tmp_path / "table.npz", recipe=QUICK
    )
    assert report.score is not None
    assert report.score.samples == len(samples)


def test_the_recipe_decides_what_is_fused_before_int8(
    model_path: Path, tmp_path: Path, samples: Samples
) -> None:
    bare = QUICK.model_copy(update={"passes": ("freeze-inputs",)})
    quantize(model_path, tmp_path / "a.onnx", data=samples, recipe=bare)
    quantize(model_path, tmp_path / "b.onnx", data=samples, recipe=QUICK)
    assert "BatchNormalization" in operators(tmp_path / "a.onnx")
    assert "BatchNormalization" not in operators(tmp_path / "b.onnx")


def test_quantize_measures_against_the_input(model_path: Path, tmp_path: Path, samples: Samples) -> None:
    recipe = Recipe.model_validate(
        {**QUICK.fast().model_dump(), "benchmark": {"precision": 0.9, "max_seconds": 0.1}}
    )
    report = quantize(model_path, tmp_path / "int8.onnx", data=samples, recipe=recipe)
    assert report.latency is not None
    assert [m.name for m in report.latency.models] == ["input", "exact", "int8"]


def test_where_the_bound_cannot_be_kept_float_is_written_and_the_reason_told(
    model_path: Path, tmp_path: Path, samples: Samples
) -> None:
    options = Quantize(methods=("minmax", "mse"), samples=16)
    recipe = QUICK.model_copy(update={"quantize": options, "metric": "fidelity", "max_drop": 0.0})
    report = quantize(model_path, tmp_path / "int8.onnx", data=samples, recipe=recipe)
    assert report.chosen == "exact"
    assert any("no int8" in note and "fidelity fell" in note for note in report.notes)
    assert "QuantizeLinear" not in operators(tmp_path / "int8.onnx")


def test_random_samples_are_told(model_path: Path, tmp_path: Path) -> None:
    report = quantize(model_path, tmp_path / "int8.onnx", data="random", recipe=QUICK)
    assert any("random" in note for note in report.notes)
    table = calibrate(model_path, "random:4", tmp_path / "t.npz", recipe=QUICK)
    assert table.samples == 4
    assert any("random" in note for note in table.notes)
    assert any("random" in note for note in compare(model_path, model_path, data="random:4").notes)


def test_outputs_are_refused_before_the_work(
    model_path: Path, tmp_path: Path, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the job began")

    monkeypatch.setattr("edgewise.optimizer.jobs.run_passes", never)
    existing = tmp_path / "there"
    existing.touch()
    for job in (
        lambda: prune(model_path, existing),
        lambda: calibrate(model_path, samples, existing),
        lambda: quantize(model_path, existing, data=samples),
    ):
        with pytest.raises(InputError, match="exists"):
            job()
    with pytest.raises(InputError, match="never touched"):
        prune(model_path, model_path, force=True)


def test_compare_finds_what_is_there(model_path: Path, tmp_path: Path, samples: Samples) -> None:
    model = files.load(model_path)
    bias = model.graph.initializers["fc_b"]
    assert bias.const_value is not None
    moved = bias.const_value.numpy() + np.array([0, 0, 0, 0, 100], np.float32)
    bias.const_value = ir.tensor(moved, name="fc_b")
    other = files.save(model, tmp_path / "other.onnx")
    same = compare(model_path, model_path, data=samples)
    assert same.differences[0].relative == 0
    assert same.inputs == "64 samples of arrays"
    found = compare(model_path, other, data=samples)
    assert found.differences[0].absolute == pytest.approx(100, rel=1e-5)
    assert found.score is not None
    assert found.score.after == pytest.approx(np.mean(np.arange(64) % 5 == 4))
    assert compare(model_path, other, data=samples, metric="fidelity").score is not None
    seeded = compare(model_path, other)
    assert seeded.score is None
    assert seeded.differences[0].absolute == pytest.approx(100, rel=1e-5)
    json.dumps(seeded.to_dict(), allow_nan=False)
    json.dumps(found.to_dict(), allow_nan=False)


def test_compare_of_outputs_that_no_metric_scores(tmp_path: Path) -> None:
    """Sequences have no score, and still can be compared."""
    import onnx

    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[N,4] x) => (seq(float[N,2]) y) { y = SplitToSequence <axis = 1> (x) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "s.onnx")
    (found,) = compare(tmp_path / "s.onnx", tmp_path / "s.onnx").differences
    assert found.relative == 0
