"""The demo of a generator: its files, its bound, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgewise.optimizer.metrics import metric_named
from edgewise.optimizer.recipe import Recipe

pytest.importorskip("torch", reason="the demo exports a torch module")

from edgewise.optimizer.demo import demo


@pytest.mark.slow  # trains and measures
def test_a_generator_is_optimized_by_the_quality_of_its_images(tmp_path: Path) -> None:
    """Without measuring the smallest wins, which is int8, as long as the bound is kept."""
    recipe = Recipe(metric="psnr", max_drop=70.0, benchmark=None, objective="size").fast()
    result = demo(tmp_path, generator=True, recipe=recipe)
    assert result.accuracy is None
    assert result.report.chosen == "int8"
    assert result.report.output.bytes < 0.5 * result.report.input.bytes
    seen = result.report.images
    assert seen is not None
    assert 30 <= seen.psnr < 60
    assert 0.9 < seen.ssim < 1
    assert seen.frechet is not None
    before, after, floor = seen.frechet
    assert floor is not None
    assert floor < before
    assert abs(after - before) < 0.2 * before
    assert [f.split()[0] for f in result.findings] == ["500", "Frechet"]
    _check_files(tmp_path, json.loads(json.dumps(result.to_dict())))
    _check_metric(tmp_path, before)


def _check_files(folder: Path, data: dict[str, object]) -> None:
    names = {"dcgan.onnx", "latents.npz", "dcgan.optimized.onnx", "features.onnx", "real.npz", "report"}
    assert {p.name for p in folder.iterdir()} == names
    pages = {"report.json", "report.md", "report.html", "images-before.png", "images-after.png"}
    assert {p.name for p in (folder / "report").iterdir()} == pages
    assert 'src="data:image/png' in (folder / "report" / "report.html").read_text()
    assert data["output"] == str(folder / "dcgan.optimized.onnx")


def _check_metric(folder: Path, before: float) -> None:
    """The files that lie there are what the metric of that name wants."""
    metric = metric_named(f"frechet:{folder / 'features.onnx'},{folder / 'real.npz'}")
    with np.load(folder / "real.npz") as file:
        real = {"y": file["image"]}
    assert metric.score(real, real, None) == pytest.approx(0, abs=1e-6)
    dark = {"y": np.full_like(real["y"], -1)}
    assert metric.score(dark, real, None) < -before
