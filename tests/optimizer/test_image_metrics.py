"""PSNR and SSIM on known images, in every layout and range, and how a wrong use is refused."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.optimizer.image_metrics import CAP_DB, dynamic_range, image_range, planes, psnr, ssim
from edgewise.optimizer.metrics import METRICS, metric_named
from edgewise.runtime.errors import EdgewiseError, InputError

RNG = np.random.default_rng(0)
IMAGES = RNG.random((6, 3, 16, 20), np.float32)
IMAGES.flat[:2] = 0, 1


def score(metric: str, images: np.ndarray, original: np.ndarray) -> float:
    return metric_named(metric).score({"y": images}, {"y": original}, None)


def test_they_have_names() -> None:
    assert METRICS["psnr"] is psnr
    assert METRICS["ssim"] is ssim


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-1, 1), (0, 255), (-3, 17)])
def test_psnr_of_a_known_error(low: float, high: float) -> None:
    """An error of a tenth of the range everywhere is 20 dB, whatever the range."""
    images = low + (high - low) * IMAGES
    assert score("psnr", images + 0.1 * (high - low), images) == pytest.approx(20, abs=1e-3)


def test_psnr_is_the_mean_over_images() -> None:
    off = IMAGES.copy()
    off[0] += 0.1
    assert score("psnr", off, IMAGES) == pytest.approx((20 + 5 * CAP_DB) / 6, abs=1e-3)


def test_psnr_of_equals_is_finite_and_rounding_costs_nothing() -> None:
    assert score("psnr", IMAGES, IMAGES) == CAP_DB
    assert score("psnr", IMAGES + np.float32(1e-6), IMAGES) == CAP_DB
    assert score("psnr", np.zeros_like(IMAGES), np.zeros_like(IMAGES)) == CAP_DB


def test_psnr_takes_what_is_no_image() -> None:
    assert score("psnr", IMAGES[:, :, 0, 0] + 0.1, IMAGES[:, :, 0, 0]) < 30


def test_ssim_of_equals_is_one_and_of_the_negative_below_zero() -> None:
    assert score("ssim", IMAGES, IMAGES) == pytest.approx(1)
    assert score("ssim", 1 - IMAGES, IMAGES) < 0


def direct_ssim(x: np.ndarray, y: np.ndarray, peak: float) -> float:
    """The paper's formula, window by window."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    found = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = (v[i : i + 11, j : j + 11].astype(float) for v in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            both = (window * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
            top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
            found.append(top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(found))


def test_ssim_is_that_of_the_paper() -> None:
    noisy = IMAGES[:1, :1] + 0.2 * RNG.standard_normal((1, 1, 16, 20)).astype(np.float32)
    expected = direct_ssim(IMAGES[0, 0], noisy[0, 0], 1.0)
    assert 0.2 < expected < 0.99
    assert score("ssim", noisy, IMAGES[:1, :1]) == pytest.approx(expected, abs=1e-6)


def test_ssim_is_the_same_in_every_layout_and_range() -> None:
    noisy = IMAGES + 0.1 * RNG.standard_normal(IMAGES.shape).astype(np.float32)
    expected = score("ssim", noisy, IMAGES)
    last = [np.moveaxis(images, 1, -1) for images in (noisy, IMAGES)]
    assert score("ssim", *last) == pytest.approx(expected, abs=1e-6)
    assert score("ssim", 255 * noisy, 255 * IMAGES) == pytest.approx(expected, abs=1e-5)
    grey = np.mean([score("ssim", noisy[:, i], IMAGES[:, i]) for i in range(3)])
    assert grey == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("side", [1, 2, 8])
def test_ssim_of_small_images(side: int) -> None:
    small = RNG.random((4, 1, side, side), np.float32)
    assert score("ssim", small, small) == pytest.approx(1)
    assert score("ssim", small[::-1].copy(), small) < 1


def test_blurring_costs_structure_before_brightness_does() -> None:
    """What the metric is for: of two changes of equal energy the one that blurs is the worse."""
    blurred = (IMAGES + np.roll(IMAGES, 1, -1)) / 2
    step = np.sqrt(np.mean((blurred - IMAGES) ** 2))
    assert score("ssim", blurred, IMAGES) < score("ssim", IMAGES + step, IMAGES)


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (0.02, 0.97, (0, 1)),
        (-0.05, 1.06, (0, 1)),
        (-0.9, 0.8, (-1, 1)),
        (-1.1, 1.1, (-1, 1)),
        (3, 250, (0, 255)),
        (-2.1, 2.6, None),
        (0, 20, None),
        (-60, 70, None),
    ],
)
def test_the_range_is_read_off_the_values(low: float, high: float, found: tuple[int, int] | None) -> None:
    images = low + (high - low) * IMAGES
    assert image_range(images) == found
    assert dynamic_range(images) == pytest.approx(high - low if found is None else found[1] - found[0])


def test_an_image_of_one_colour_has_a_range() -> None:
    assert dynamic_range(np.zeros((1, 1, 8, 8))) == 1


@pytest.mark.parametrize("shape", [(2, 7, 8, 8), (2, 10), (2, 1, 8, 8, 8)])
def test_ssim_refuses_what_is_no_image(shape: tuple[int, ...]) -> None:
    images = np.zeros(shape, np.float32)
    with pytest.raises(InputError, match="holds no images"):
        planes(images)
    with pytest.raises(InputError, match="holds no images"):
        score("ssim", images, images)


def test_what_is_not_finite_is_named() -> None:
    broken = IMAGES.copy()
    broken[0, 0, 0, 0] = np.nan
    with pytest.raises(EdgewiseError, match="NaN or infinity where the original"):
        score("psnr", broken, IMAGES)
    with pytest.raises(InputError, match="of the original"):
        score("psnr", IMAGES, broken)
    with pytest.raises(InputError, match="floats"):
        score("psnr", np.zeros((2, 3), np.int64), np.zeros((2, 3), np.int64))
