"""Preprocessing of images: its text forms, its arithmetic and its order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgewise.calibration.images import Images, Preprocess, find_images
from edgewise.runtime.errors import InputError

TORCH = "resize=256,crop=224,scale=255,mean=0.485/0.456/0.406,std=0.229/0.224/0.225"

sizes = st.none() | st.integers(1, 999) | st.tuples(st.integers(1, 999), st.integers(1, 999))
numbers = st.floats(1e-3, 1e3)
preprocesses = st.builds(
    Preprocess,
    resize=sizes,
    crop=sizes,
    channels=st.sampled_from(["rgb", "bgr"]),
    scale=numbers,
    mean=st.tuples(numbers) | st.tuples(numbers, numbers, numbers),
    std=st.tuples(numbers) | st.tuples(numbers, numbers, numbers),
    layout=st.sampled_from(["nchw", "nhwc"]),
)


def picture(path: Path, height: int = 4, width: int = 6, mode: str = "RGB") -> np.ndarray:
    """Write a picture whose pixels all differ; returns them (H, W, C)."""
    pixels = (np.arange(height * width * 3) * 3 % 256).astype(np.uint8).reshape(height, width, 3)
    Image.fromarray(pixels).convert(mode).save(path)
    return pixels


def test_the_text_of_a_classifier() -> None:
    assert Preprocess.parse(f" {TORCH} ,channels=rgb, layout=nchw") == Preprocess(
        resize=256, crop=224, scale=255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    assert Preprocess.parse("resize=227x320").resize == (227, 320)
    assert Preprocess.parse("") == Preprocess()


@settings(deadline=None, max_examples=50)
@given(preprocesses)
def test_texts_and_dicts_read_back(preprocess: Preprocess) -> None:
    assert Preprocess.parse(str(preprocess)) == preprocess
    assert Preprocess.from_dict(preprocess.to_dict()) == preprocess


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size=3", "no option 'size', only resize, crop"),
        ("resize=big", "resize cannot be 'big'"),
        ("resize=1x2x3", "resize cannot be"),
        ("crop", "as name=value, at 'crop'"),
        ("crop=3,crop=4", "each option once"),
        ("crop=0", "above zero"),
        ("mean=1/2", "mean has 2 numbers for 3 channels"),
        ("channels=gray,std=1/2/3", "std has 3 numbers for 1 channels"),
        ("channels=rgba", "channels is one of rgb, bgr, gray"),
        ("layout=hwc", "layout is one of nchw, nhwc"),
        ("std=0", "above zero"),
        ("scale=0", "above zero"),
        ("mean=nan", "finite"),
    ],
)
def test_options_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Preprocess.parse(text)


def test_pixels_stay_as_they_are_by_default(tmp_path: Path) -> None:
    pixels = picture(tmp_path / "a.png")
    array = Preprocess().load(tmp_path / "a.png")
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, pixels.transpose(2, 0, 1))
    np.testing.assert_array_equal(Preprocess(layout="nhwc").load(tmp_path / "a.png"), pixels)


def test_arithmetic_follows_the_order_of_the_channels(tmp_path: Path) -> None:
    pixels = picture(tmp_path / "a.png").astype(np.float32)
    text = "channels=bgr,layout=nhwc,scale=2,mean=1/2/3,std=4/5/6"
    expected = (pixels[..., ::-1] / 2 - np.array([1, 2, 3])) / np.array([4, 5, 6])
    np.testing.assert_allclose(Preprocess.parse(text).load(tmp_path / "a.png"), expected, rtol=1e-6)


def test_the_same_image_as_raw_pixels(tmp_path: Path) -> None:
    preprocess = Preprocess(crop=2, channels="bgr", scale=255, mean=(0.5,), std=(0.25, 0.5, 1))
    raw = preprocess.pixels("nhwc")
    assert raw == Preprocess(crop=2, channels="bgr", layout="nhwc")
    path = tmp_path / "a.png"
    picture(path)
    normal = (raw.load(path) / 255 - 0.5) / np.array([0.25, 0.5, 1])
    np.testing.assert_allclose(preprocess.load(path).transpose(1, 2, 0), normal, rtol=1e-6, atol=1e-6)


def test_resizing_keeps_the_aspect_and_cropping_the_center(tmp_path: Path) -> None:
    pixels = picture(tmp_path / "a.png", 40, 61)
    assert Preprocess.parse("resize=20").load(tmp_path / "a.png").shape == (3, 20, 30)
    assert Preprocess.parse("resize=20x10").load(tmp_path / "a.png").shape == (3, 20, 10)
    cropped = Preprocess.parse("crop=10x21,layout=nhwc").load(tmp_path / "a.png")
    np.testing.assert_array_equal(cropped, pixels[15:25, 20:41])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "LA"])
def test_every_kind_of_picture_becomes_the_channels_asked_for(tmp_path: Path, mode: str) -> None:
    picture(tmp_path / "a.png", mode=mode)
    assert Preprocess().load(tmp_path / "a.png").shape == (3, 4, 6)
    gray = Preprocess.parse("channels=gray,layout=nhwc")
    assert gray.load(tmp_path / "a.png").shape == (4, 6, 1)


def test_pictures_that_cannot_be_used(tmp_path: Path) -> None:
    picture(tmp_path / "small.png")
    with pytest.raises(InputError, match=r"small\.png is 4x6, less than the crop"):
        Preprocess(crop=8).load(tmp_path / "small.png")
    (tmp_path / "text.jpg").write_text("no picture")
    picture(tmp_path / "whole.png", 100, 100)
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    for name in ("text.jpg", "cut.png", "missing.png"):
        with pytest.raises(InputError, match=f"{name} cannot be read as an image"):
            Preprocess().load(tmp_path / name)


def test_rows_of_images(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    pixels = [picture(path) for path in paths]
    rows = Images(paths, Preprocess(layout="nhwc"), np.dtype(np.uint8))
    assert (rows.shape, rows.dtype) == ((3, 4, 6, 3), np.uint8)
    np.testing.assert_array_equal(rows[1:3], np.stack(pixels[1:]))
    np.testing.assert_array_equal(rows[...], np.stack(pixels))
    picture(paths[1], 5, 5)
    with pytest.raises(InputError, match="different size"):
        rows[0:2]


def test_folders_of_images(tmp_path: Path) -> None:
    def names(found: tuple[list[Path], Any]) -> list[str]:
        return [p.name for p in found[0]]

    for name in ("b.PNG", "a.jpg", "notes.txt", ".hidden.png"):
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    assert names(find_images(tmp_path)) == ["a.jpg", "b.PNG"]
    assert find_images(tmp_path)[1] is None
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "c.png").touch()
    with pytest.raises(InputError, match="beside sub-folders"):
        find_images(tmp_path)
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "b.PNG").unlink()
    assert names(find_images(tmp_path)) == ["c.png"]
    assert find_images(tmp_path)[1] == [1]
