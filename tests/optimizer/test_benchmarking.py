"""Latency under many conditions, with what models need to run, and held against an earlier result."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgewise.calibration.data import Samples, from_arrays
from edgewise.optimizer import benchmark, files, quantize
from edgewise.optimizer.benchmarking import Benchmark, grid_of, names_of, sweep
from edgewise.optimizer.inputs import feed_of
from edgewise.optimizer.recipe import Recipe
from edgewise.runtime.conditions import Conditions
from edgewise.runtime.errors import InputError
from edgewise.runtime.evaluate import input_specs
from edgewise.runtime.latency import LatencyReport, ModelLatency, Ratio
from edgewise.runtime.machine import describe
from edgewise.runtime.session import ProviderError

ONE = Conditions(threads=1)


@pytest.fixture
def samples(model: ir.Model, images: np.ndarray) -> Samples:
    return from_arrays({"image": images}, input_specs(model))


def run(models: list[Path], *grid: Conditions, **options: object) -> Benchmark:
    return sweep(models, grid or [ONE], max_seconds=0.1, **options)  # type: ignore[arg-type]


def report(ms: float, conditions: Conditions = ONE, name: str = "net", ratio: float = 1.0) -> LatencyReport:
    """One model of `ms` known to 1 %, and another that is `ratio` times as fast."""
    first = ModelLatency(name, "n.onnx", 1, median_ms=ms, low_ms=0.99 * ms, high_ms=1.01 * ms)
    verdict = "slower" if ratio < 0.99 else "no difference"
    ratios = (Ratio("other", name, ratio, 0.99 * ratio, 1.01 * ratio, verdict),)  # type: ignore[arg-type]
    return LatencyReport(describe(), conditions, "x", (first,), ratios, None, 3, 1.0, "precise")


class TestFeeds:
    def test_of_samples(self, model_path: Path, samples: Samples) -> None:
        conditions = Conditions(threads=1, batch=3)
        report = benchmark([model_path], conditions=conditions, data=samples, max_seconds=0.1)
        (net,) = report.models
        assert net.name == "net"
        assert "[3, 3, 8, 8]" in report.inputs
        assert net.per_second == pytest.approx(3 / net.median_ms * 1e3)

    def test_a_batch_larger_than_the_samples(self, model: ir.Model, images: np.ndarray) -> None:
        few = from_arrays({"image": images[:2]}, input_specs(model))
        feed = feed_of(model, few, 5, 0)
        np.testing.assert_array_equal(feed["image"], images[[0, 1, 0, 1, 0]])
        assert feed_of(model, None, 1, 0)["image"].shape == (1, 3, 8, 8)

    def test_a_batch_that_is_fixed(self, model: ir.Model, tmp_path: Path) -> None:
        model.graph.inputs[0].shape = ir.Shape((1, 3, 8, 8))
        path = files.save(model, tmp_path / "fixed.onnx")
        with pytest.raises(InputError, match="fixed in the model"):
            run([path], Conditions(batch=4))

    def test_seeded_ones_of_models_with_other_inputs(
        self, model: ir.Model, model_path: Path, tmp_path: Path
    ) -> None:
        model.graph.inputs[0].name = "picture"
        other = files.save(model, tmp_path / "other.onnx")
        (found,) = run([model_path, other]).reports
        assert [m.failed for m in found.models] == [None, None]
        assert "image" in found.inputs
        assert "picture" in found.inputs

    def test_samples_do_not_fit_a_model_with_other_inputs(
        self, model: ir.Model, model_path: Path, tmp_path: Path, samples: Samples
    ) -> None:
        model.graph.inputs[0].name = "picture"
        other = files.save(model, tmp_path / "other.onnx")
        result = run([model_path, other], data=samples)
        assert result.failures == (f"{other} failed on cpu, 1 thread: it takes picture and was given image",)


class TestSweep:
    def test_has_a_report_for_every_combination(self, model_path: Path) -> None:
        grid = grid_of(["cpu"], [1, 2], [1, 3], [1, 2], spinning=False)
        assert len(grid) == 8
        assert [(c.threads, c.batch, c.concurrency) for c in grid[:3]] == [(1, 1, 1), (1, 1, 2), (1, 3, 1)]
        stages = []
        few = [grid[1], grid[6]]
        result = run([model_path], *few, progress=lambda stage, done, total: stages.append(stage))
        assert [r.conditions.pinned() for r in result.reports] == [c.pinned() for c in few]
        assert result.failures == ()
        assert stages[0] == "benchmark 1/2: cpu, 1 thread, 2 runs at once"
        restored = [LatencyReport.from_dict(r) for r in json.loads(json.dumps(result.to_dict()))["reports"]]
        assert tuple(restored) == result.reports

    def test_a_file_that_is_broken_does_not_stop_the_others(self, model_path: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(model_path.read_bytes()[:200])
        result = run([broken, model_path])
        (line,) = result.failures
        assert line.startswith(f"{broken} failed on cpu, 1 thread: ")
        assert result.reports[0].models[1].median_ms > 0

    def test_a_file_that_is_not_there_is_refused(self, model_path: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no\.onnx: no such file"):
            run([model_path, tmp_path / "no.onnx"])

    def test_no_provider_is_taken_for_another(self, model_path: Path) -> None:
        with pytest.raises(ProviderError, match="unknown"):
            benchmark([model_path], conditions=Conditions("toaster"))
        with pytest.raises(ProviderError, match="toaster"):
            run([model_path], ONE, Conditions("toaster"))
        with pytest.raises(ProviderError):
            quantize(model_path, "out.onnx", data="random", recipe=Recipe(target="tensorrt"))


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/x.onnx", "b/y.onnx"], ["x", "y"]),
        (["a/x.onnx", "b/x.onnx"], ["a/x", "b/x"]),
        (["a/x.onnx", "a/x.onnx"], ["a/x #1", "a/x #2"]),
    ],
)
def test_models_get_names_of_their_own(paths: list[str], names: list[str]) -> None:
    assert list(names_of([Path(p) for p in paths])) == names


class TestBaseline:
    def test_is_read_back(self, tmp_path: Path) -> None:
        path = tmp_path / "old.json"
        benchmark = Benchmark((report(1.0),))
        path.write_text(json.dumps(benchmark.to_dict()).replace("NaN", "null"))
        (found,) = Benchmark.load(path).reports
        assert found.models[0].median_ms == 1.0

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"reports": 3}', '{"reports": [{"models": []}]}'])
    def test_that_is_none(self, text: str, tmp_path: Path) -> None:
        path = tmp_path / "old.json"
        path.write_text(text)
        with pytest.raises(InputError, match=r"old\.json is no result"):
            Benchmark.load(path)
        with pytest.raises(InputError, match="cannot be read"):
            Benchmark.load(tmp_path / "nowhere.json")

    def test_tells_what_got_slower(self) -> None:
        result = Benchmark((report(1.1),)).against(Benchmark((report(1.0),)))
        assert result.slower(0.05) == ("net is 10.0% slower than in the baseline (cpu, 1 thread)",)
        assert result.slower(0.15) == ()
        assert Benchmark((report(0.5),)).against(Benchmark((report(1.0),))).slower(0.0) == ()

    def test_of_the_same_conditions_is_found(self) -> None:
        two = Conditions(threads=2)
        earlier = Benchmark((report(1.0, two), report(9.0)))
        (held,) = (
            Benchmark((report(1.1, dataclasses.replace(two, cores=(0, 1))),)).against(earlier).comparisons
        )
        assert held.changes[0].slowdown == pytest.approx(0.1)
        assert held.doubts == ()

    @pytest.mark.parametrize("other", [report(1.0, Conditions(threads=3)), report(1.0, name="web")])
    def test_with_nothing_in_common_is_refused(self, other: LatencyReport) -> None:
        with pytest.raises(InputError, match="none of these models under these conditions"):
            Benchmark((report(1.0),)).against(Benchmark((other,)))

    def test_another_machine_raises_doubts(self) -> None:
        old = report(1.0)
        old = dataclasses.replace(old, machine=dataclasses.replace(old.machine, cpu="abacus"))
        (held,) = Benchmark((report(1.0),)).against(Benchmark((old,))).comparisons
        assert any("abacus" in doubt for doubt in held.doubts)

    def test_without_one_the_first_model_is_the_bound(self) -> None:
        assert Benchmark((report(1.0, ratio=0.8),)).slower(0.05) == (
            "other is 25.0% slower than net (cpu, 1 thread)",
        )
        assert Benchmark((report(1.0, ratio=0.97),)).slower(0.05) == ()
        assert Benchmark((report(1.0, ratio=1.0),)).slower(0.0) == ()
