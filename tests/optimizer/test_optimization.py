"""The main job, end to end, on a small classifier."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import zoo
from answers import measured
from threadpoolctl import threadpool_info

from edgewise.optimizer import files, optimization
from edgewise.optimizer.optimization import optimize
from edgewise.optimizer.recipe import Benchmark, Format, Recipe
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import Evaluator
from edgewise.runtime.latency import LatencyReport
from edgewise.runtime.session import ProviderError

QUICK = Recipe(benchmark=None, threads=1)


@pytest.fixture
def data(tmp_path: Path, images: np.ndarray) -> str:
    path = tmp_path / "samples.npz"
    np.savez(path, image=images)
    return str(path)


def test_exact_only_without_data(model_path: Path, tmp_path: Path, images: np.ndarray) -> None:
    report = optimize(model_path, tmp_path / "out.onnx", recipe=QUICK)
    assert report.chosen == "exact"
    assert "--data" in report.notes[0]
    assert report.output.nodes < report.input.nodes
    assert report.output.parameters < report.input.parameters  # the zeroed channels of the norm
    assert report.score is None
    before = Evaluator(model_path).run({"image": images})["scores"]
    after = Evaluator(tmp_path / "out.onnx").run({"image": images})["scores"]
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())  # rounding alone


def test_int8_with_data(model_path: Path, tmp_path: Path, data: str) -> None:
    report = optimize(model_path, tmp_path / "out.onnx", data=data, recipe=QUICK, report=tmp_path / "report")
    assert report.chosen == "int8"
    assert report.score is not None
    assert report.score.after >= report.score.before - report.score.allowed
    ops = [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node]
    assert "QuantizeLinear" in ops
    written = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(report.to_dict()))
    assert "insert-qdq" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")


def test_what_has_no_int8_kernel_is_written_in_what_has_one(tmp_path: Path) -> None:
    """A ConvTranspose would stay in float; in the exact model, where the shuffle costs time, it stays."""
    text = """<ir_version: 8, opset_import: ["" : 17]> grow (float[N,4,5,5] z) => (float[N,3,10,10] image) {
        c = ConvTranspose <strides = [2, 2], pads = [1, 1, 1, 1]> (z, w) image = Tanh(c) }"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 3, 4, 4)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, tmp_path / "grow.onnx")
    np.savez(tmp_path / "z.npz", z=rng.standard_normal((64, 4, 5, 5)).astype(np.float32))
    data, options = str(tmp_path / "z.npz"), QUICK.with_options(max_drop=0.5)
    report = optimize(tmp_path / "grow.onnx", tmp_path / "out.onnx", data=data, recipe=options)
    assert report.chosen == "int8"
    assert "split-conv-transpose{channels_last: true}" in {s.step for s in report.steps if s.edits}
    ops = {node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node}
    assert "Conv" in ops
    assert "ConvTranspose" not in ops
    exact = optimize(tmp_path / "grow.onnx", tmp_path / "exact.onnx", recipe=QUICK)
    assert "ConvTranspose" in {node.op_type for node in onnx.load(tmp_path / "exact.onnx").graph.node}
    assert not any("split-conv" in step.step for step in exact.steps)


def test_report_shows_what_a_model_draws(tmp_path: Path, model_path: Path, data: str) -> None:
    """A model of images gets its grids; of a classifier nobody tries to draw any."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
        draw (float[N,3,8,8] z) => (float[N,3,8,8] image) { t = Identity (z) image = Tanh (t) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "draw.onnx")
    np.savez(tmp_path / "z.npz", z=2 * np.random.default_rng(0).standard_normal((20, 3, 8, 8), np.float32))
    recipe = QUICK.model_copy(update={"quantize": None})
    options = {"recipe": recipe, "report": tmp_path / "report"}
    drawn = optimize(tmp_path / "draw.onnx", tmp_path / "drawn.onnx", data=str(tmp_path / "z.npz"), **options)
    assert drawn.images is not None
    assert drawn.images.samples == 20
    assert (tmp_path / "report" / "images-after.png").read_bytes() == drawn.images.after
    assert 'id="images"' in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert optimize(model_path, tmp_path / "out.onnx", data=data, **options).images is None


def test_output_says_how_it_was_made(model_path: Path, tmp_path: Path, data: str) -> None:
    report = optimize(model_path, tmp_path / "out.onnx", data=data, recipe=QUICK)
    metadata = files.load(tmp_path / "out.onnx").metadata_props
    assert metadata["edgewise.input.sha256"] == files.sha256(model_path) == report.input.sha256
    assert metadata["edgewise.table"] == report.table
    assert Recipe.model_validate_json(metadata["edgewise.recipe"]) == QUICK


def blas_threads() -> list[int]:
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


@pytest.mark.parametrize("threads", [1, None])
def test_numpy_takes_as_many_threads_as_it_may(
    threads: int | None, model_path: Path, tmp_path: Path, data: str
) -> None:
    """And all of those that it had before where nobody says."""
    seen: list[int] = []
    before = blas_threads()
    recipe = Recipe(benchmark=None, threads=threads)

    def listen(*_: object) -> None:
        seen.extend(blas_threads())

    optimize(model_path, tmp_path / "out.onnx", data=data, recipe=recipe, progress=listen)
    assert set(seen) == ({threads} if threads else set(before))
    assert blas_threads() == before


def test_measured_result_is_not_slower(model_path: Path, tmp_path: Path, data: str) -> None:
    quick = Benchmark(precision=0.5, max_seconds=3)
    report = optimize(model_path, tmp_path / "out.onnx", data=data, recipe=Recipe(benchmark=quick, threads=1))
    assert report.latency is not None
    verdicts = {ratio.name: ratio.verdict for ratio in report.latency.ratios}
    assert verdicts.get(report.chosen) != "slower"


@pytest.mark.parametrize("format_", ["auto", "qoperator"])
def test_short_names(format_: Format, model_path: Path, tmp_path: Path, data: str) -> None:
    """Given at the very end: the report tells the noise of layers under the names that people know."""
    recipe, files_, layers = QUICK.with_options(quantize={"format": format_}), {}, {}
    for name, short in (("long", False), ("short", True)):
        files_[name] = tmp_path / f"{name}.onnx"
        asked = recipe.model_copy(update={"short_names": short})
        report = optimize(model_path, files_[name], data=data, recipe=asked, report=tmp_path / name)
        assert report.chosen == "int8"
        layers[name] = [layer.value for layer in report.layers]
        assert (
            any(step.step == "shorten-names" and step.status == "applied" for step in report.steps) == short
        )
    assert layers["short"] == layers["long"]
    assert len(layers["long"]) > 1
    long, short_ = (onnx.load(path).graph for path in files_.values())
    assert [node.op_type for node in short_.node] == [node.op_type for node in long.node]
    assert max(len(node.name) for node in short_.node if node.name != "scores") <= 2
    assert files_["short"].stat().st_size < files_["long"].stat().st_size


def test_bound_rolls_int8_back(model_path: Path, tmp_path: Path, data: str) -> None:
    recipe = QUICK.with_options(metric="fidelity", max_drop=0.0)
    report = optimize(model_path, tmp_path / "out.onnx", data=data, recipe=recipe)
    assert report.chosen == "exact"
    attempts = [step for step in report.steps if step.step.startswith("insert-qdq")]
    assert attempts  # each with fewer nodes in int8
    assert all(step.status == "rolled back" and "fidelity fell" in step.reason for step in attempts)


def test_input_file_is_never_touched(model_path: Path, tmp_path: Path) -> None:
    before = model_path.read_bytes()
    with pytest.raises(InputError):
        optimize(model_path, model_path, recipe=QUICK, force=True)
    optimize(model_path, tmp_path / "out.onnx", recipe=QUICK)
    assert model_path.read_bytes() == before


def test_missing_provider_is_an_error(model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="pip install"):
        optimize(model_path, tmp_path / "out.onnx", recipe=Recipe(target="tensorrt"))
    assert not (tmp_path / "out.onnx").exists()


def test_random_data_is_said_to_be_random(model_path: Path, tmp_path: Path) -> None:
    report = optimize(model_path, tmp_path / "out.onnx", data="random:40", recipe=QUICK)
    assert any("random" in note for note in report.notes)


def test_a_pass_that_makes_the_model_slower_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock by which a model without its Identity takes twice as long."""

    def clock(paths: Mapping[str, Path], *_: object) -> LatencyReport:
        kept = {
            name: any(node.op_type == "Identity" for node in onnx.load(path).graph.node)
            for name, path in paths.items()
            if name != "input"
        }
        return measured({name: (1.0, 0.98, 1.02) if kept[name] else (0.5, 0.48, 0.52) for name in kept})

    monkeypatch.setattr(optimization, "measure_files", clock)
    source = tmp_path / "in.onnx"
    files.save(zoo.build("conv_chain"), source)
    report = optimize(source, tmp_path / "out.onnx")
    (taken_back,) = [step for step in report.steps if step.status == "rolled back"]
    assert taken_back.step == "drop-identity"
    assert "slower" in taken_back.reason
    assert "drop-identity" not in report.recipe["passes"]
    assert report.chosen == "exact"
    assert [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node].count("Identity") == 1
    assert "BatchNormalization" not in [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node]
