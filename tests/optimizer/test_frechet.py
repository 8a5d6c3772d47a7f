"""The Frechet distance: known values, few samples, and the metric that a user names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from edgewise.optimizer.frechet import Frechet, Moments, frechet_distance
from edgewise.optimizer.metrics import metric_named
from edgewise.runtime.errors import EdgewiseError, InputError

# Four corners of an image as one map of features, which counts by its mean: the brightness.
FEATURES = """
<ir_version: 8, opset_import: ["" : 17]>
corners (float[N,1,8,8] image) => (float[N,1,2,2] features)
{ features = AveragePool <kernel_shape = [4, 4], strides = [4, 4]> (image) }
"""


@pytest.fixture
def metric(tmp_path: Path) -> str:
    """A metric that knows 200 real images."""
    onnx.save(onnx.parser.parse_model(FEATURES), tmp_path / "corners.onnx")
    np.savez(tmp_path / "real.npz", image=images(200, seed=1))
    return f"frechet:{tmp_path / 'corners.onnx'},{tmp_path / 'real.npz'}"


def images(count: int, seed: int, brighter: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 1, 8, 8)).astype(np.float32) + np.float32(brighter)


def gaussian(count: int, size: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return shift + scale * np.random.default_rng(seed).standard_normal((count, size))


def test_of_known_gaussians() -> None:
    """Spheres of deviation 1 and 3, 2 apart in each of 4 dimensions: 4 * 2^2 + 4 * (3 - 1)^2."""
    first, second = Moments(np.zeros(4), np.eye(4)), Moments(np.full(4, 2.0), 9 * np.eye(4))
    assert frechet_distance(first, second) == pytest.approx(32)
    assert frechet_distance(second, first) == pytest.approx(32)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-12)


def test_of_covariances_that_do_not_commute() -> None:
    """Against the square root by the eigenvalues of the product, which is not symmetric."""
    a, b = (np.cov(gaussian(50, 5, seed), rowvar=False) for seed in (1, 2))
    b = b @ b
    root = np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    expected = np.trace(a) + np.trace(b) - 2 * root
    found = frechet_distance(Moments(np.zeros(5), a), Moments(np.zeros(5), b))
    assert found == pytest.approx(expected)


def test_of_singular_covariances() -> None:
    line = np.outer([1.0, 1, 0], [1.0, 1, 0])
    assert frechet_distance(Moments(np.zeros(3), line), Moments(np.zeros(3), line)) == pytest.approx(
        0, abs=1e-9
    )


def test_many_samples_are_hardly_shrunk_and_few_are_never_singular() -> None:
    scales = np.array([1.0, 2, 3, 4])
    many = Moments.of(gaussian(20_000, 4, 0) * scales)
    np.testing.assert_allclose(np.diag(many.covariance), scales**2, rtol=0.03)
    few = Moments.of(gaussian(5, 40, 0))
    assert np.linalg.eigvalsh(few.covariance).min() > 0
    assert np.trace(few.covariance) == pytest.approx(
        np.trace(np.cov(gaussian(5, 40, 0), rowvar=False, bias=True))
    )


def test_shrinking_brings_few_samples_nearer_to_the_truth() -> None:
    """Two sets of 40 from one distribution of 30 features: their distance is what noise alone makes."""
    a, b = gaussian(40, 30, 1), gaussian(40, 30, 2)
    plain = frechet_distance(*(Moments(x.mean(0), np.cov(x, rowvar=False, bias=True)) for x in (a, b)))
    assert frechet_distance(Moments.of(a), Moments.of(b)) < 0.5 * plain


def test_features_that_are_all_the_same() -> None:
    still = Moments.of(np.ones((6, 3)))
    assert frechet_distance(still, still) == 0


def test_one_sample_has_no_spread() -> None:
    with pytest.raises(InputError, match="two samples"):
        Moments.of(np.ones((1, 3)))


def test_the_metric_is_minus_the_distance(metric: str) -> None:
    found = metric_named(metric)
    assert found.name == "frechet"
    like, real = {"y": images(200, seed=2)}, {"y": images(200, seed=1)}
    assert found.score(real, real, None) == pytest.approx(0, abs=1e-9)
    near = found.score(like, real, None)
    assert -0.01 < near < 0
    far = found.score({"y": images(200, seed=2, brighter=0.5)}, real, None)
    assert far == pytest.approx(-(0.5**2), rel=0.1)


def test_two_dots_in_a_name_are_a_path(tmp_path: Path) -> None:
    assert Frechet.named("frechet:C:/f.onnx,D:/r.npz") == Frechet("C:/f.onnx", "D:/r.npz")


@pytest.mark.parametrize(
    "name", ["frechet", "frechet:", "frechet:f.onnx", "frechet:,real.npz", "frechet:f.onnx,"]
)
def test_a_name_that_says_too_little(name: str) -> None:
    with pytest.raises(InputError, match=r"frechet:FEATURES.onnx,REAL"):
        metric_named(name)


def test_files_that_are_not_there(tmp_path: Path, metric: str) -> None:
    outputs = {"y": images(8, 0)}
    with pytest.raises(InputError, match="no such file"):
        metric_named(f"frechet:{tmp_path / 'no.onnx'},real.npz").score(outputs, outputs, None)
    missing = metric.replace("real.npz", "none.npz")
    with pytest.raises(InputError, match=r"none.npz"):
        metric_named(missing).score(outputs, outputs, None)


@pytest.mark.parametrize("wrong", [np.zeros((4, 64), np.float32), np.zeros((4, 1, 8, 8))])
def test_images_that_do_not_fit_the_features(metric: str, wrong: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"takes float32 of 4 axes"):
        metric_named(metric).score({"y": wrong}, {"y": wrong}, None)


def test_broken_images_are_a_failure_of_the_model_not_of_the_input(metric: str) -> None:
    broken = images(4, 0)
    broken[0] = np.nan
    with pytest.raises(EdgewiseError, match="NaN") as caught:
        metric_named(metric).score({"y": broken}, {"y": broken}, None)
    assert not isinstance(caught.value, InputError)


def test_images_of_another_size_are_refused_in_one_line(metric: str) -> None:
    larger = {"y": np.zeros((4, 1, 16, 16), np.float32)}
    with pytest.raises(InputError):
        metric_named(metric).score(larger, larger, None)
