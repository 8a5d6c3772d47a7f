"""Grids of images: which outputs are images, what the files show, and what is said of them."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from answers import bare
from PIL import Image

from edgewise.calibration.data import from_arrays
from edgewise.optimizer.frechet import Frechet
from edgewise.optimizer.pictures import COLUMNS, Pictures, can_draw, grid, pictures
from edgewise.optimizer.report import write_report
from edgewise.runtime.evaluate import input_specs


def scaled(factor: float, shape: str = "N,1,8,8") -> ir.Model:
    """Draws its input, darker by a factor."""
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    draw (float[{shape}] x) => (float[{shape}] y)
    {{ k = Constant <value_float = {factor}> () y = Mul (x, k) }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


def drawn(images: np.ndarray, factor: float = 0.9, frechet: Frechet | None = None) -> Pictures | None:
    shape = ",".join(("N", *map(str, images.shape[1:])))
    model = scaled(1.0, shape)
    samples = from_arrays({"x": images.astype(np.float32)}, input_specs(model))
    return pictures(model, scaled(factor, shape), samples, frechet=frechet, floor=0.1)


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, np.float32)


def test_images_before_and_after() -> None:
    found = drawn(images(50, 1, 8, 8))
    assert found is not None
    assert (found.shown, found.samples) == (40, 50)
    # An error of a tenth of numbers uniform in [0, 1]: their mean square is a third.
    assert found.psnr == pytest.approx(-10 * np.log10(0.01 / 3), abs=0.2)
    assert 0.9 < found.ssim < 1
    assert found.before != found.after
    assert "hard to see" not in found.findings[0]
    assert "24." in found.findings[0]


@pytest.mark.parametrize(
    ("factor", "words"), [(1.0, "but for rounding"), (0.97, "hard to see"), (0.99, "nobody")]
)
def test_what_people_see(factor: float, words: str) -> None:
    found = drawn(images(4, 1, 8, 8), factor)
    assert found is not None
    assert words in found.findings[0]


@pytest.mark.parametrize(
    "other",
    [images(4, 10), images(4, 7, 8, 8), images(4, 1, 4, 4), 40 * images(4, 1, 8, 8) - 20, images(4, 8, 8)],
)
def test_what_is_no_image_has_no_pictures(other: np.ndarray) -> None:
    assert drawn(other) is None


def test_the_grid_shows_each_image_in_its_place() -> None:
    shades = np.linspace(-1, 1, COLUMNS + 1, dtype=np.float32)[:, None, None, None] * np.ones((1, 1, 8, 8))
    sheet = np.asarray(Image.open(io.BytesIO(grid(shades, (-1.0, 1.0)))))
    assert sheet.shape == (18, COLUMNS * 10 - 2, 2)
    for i, shade in enumerate(shades):
        tile = sheet[i // COLUMNS * 10 :, i % COLUMNS * 10 :][:8, :8]
        assert (tile[..., 0] == round(127.5 * (1 + float(shade[0, 0, 0])))).all()
        assert (tile[..., 1] == 255).all()
    assert not sheet[8:10, :, 1].any()
    assert not sheet[10:, 8:, 1].any()


@pytest.mark.parametrize(
    ("shape", "mode"), [((3, 3, 8, 9), "RGBA"), ((3, 8, 9, 3), "RGBA"), ((3, 4, 8, 9), "RGBA")]
)
def test_colours_in_either_layout(shape: tuple[int, ...], mode: str) -> None:
    sheet = Image.open(io.BytesIO(grid(images(*shape), (0.0, 1.0))))
    assert sheet.mode == mode
    assert sheet.size == (3 * 11 - 2, 8)


def test_distances_from_real_images(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    mean (float[N,1,8,8] image) => (float[N,1,1,1] y) { y = GlobalAveragePool (image) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "f.onnx")
    np.savez(tmp_path / "real.npz", image=images(50, 1, 8, 8))
    frechet = Frechet(str(tmp_path / "f.onnx"), str(tmp_path / "real.npz"))
    found = drawn(images(50, 1, 8, 8), 0.5, frechet)
    assert found is not None
    assert found.frechet is not None
    before, after, floor = found.frechet
    assert before == pytest.approx(0, abs=1e-9)
    assert after == pytest.approx(0.0625, rel=0.05)
    assert floor == 0.1
    assert found.findings[1].endswith("0.00 before, 0.07 after (other real images: 0.10)")


def test_a_report_names_the_files_beside_it(tmp_path: Path) -> None:
    found = drawn(images(4, 1, 8, 8))
    write_report(dataclasses.replace(bare(), images=found), tmp_path)
    told = json.loads((tmp_path / "report.json").read_text())["images"]
    assert found is not None
    assert told["files"] == ["images-before.png", "images-after.png"]
    assert told["psnr"] == pytest.approx(found.psnr)
    assert told["frechet"] is None
    for name, content in zip(told["files"], (found.before, found.after), strict=True):
        assert (tmp_path / name).read_bytes() == content


def test_a_report_without_images_has_no_such_files(tmp_path: Path) -> None:
    write_report(bare(), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "report.md"}


@pytest.mark.parametrize("shape", ["N,1,8,8", "N,3,H,W", "N,16,16,4"])
def test_shapes_that_are_drawn(shape: str) -> None:
    assert can_draw(scaled(1.0, shape))


@pytest.mark.parametrize("shape", ["N,10", "N,16,8,8", "N,C,8,8", "N,3,8,8,8"])
def test_shapes_that_are_not(shape: str) -> None:
    assert not can_draw(scaled(1.0, shape))


def test_without_a_shape_or_floats_nothing_is_drawn() -> None:
    unknown = scaled(1.0)
    unknown.graph.outputs[0].shape = None
    whole = scaled(1.0)
    whole.graph.outputs[0].dtype = ir.DataType.INT64
    assert not can_draw(unknown)
    assert not can_draw(whole)
