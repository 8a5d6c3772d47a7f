"""The generators that ship: what they take and give, that they draw digits, and how they are trained."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from edgewise.models.digits import FOLDER, MANIFEST, Digits, load_digits, load_digits_net
from edgewise.models.generators import GENERATORS, enlarged, load_features, load_generator
from edgewise.optimizer.frechet import Moments, frechet_distance

torch = pytest.importorskip("torch", reason="the generators need torch")

from edgewise.models import train_generators  # noqa: E402 - needs torch
from edgewise.models.critics import Critic, Encoder, hinge  # noqa: E402

COUNT = 500


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


@pytest.fixture(scope="module", params=GENERATORS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def drawn(name: str) -> np.ndarray:
    feed = GENERATORS[name].feed(COUNT, seed=1)
    with torch.no_grad():
        images: np.ndarray = load_generator(name)(*map(torch.from_numpy, feed.values())).numpy()
    return images


def seen(name: str, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        features: np.ndarray = load_features(name)(torch.from_numpy(images)).numpy().astype(float)
    return features


def classes(features: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = load_digits_net().head(torch.from_numpy(features).float()).argmax(1).numpy()
    return found


def test_images_have_the_shape_and_range_that_are_said(name: str) -> None:
    facts = GENERATORS[name]
    assert not load_generator(name).training
    images = drawn(name)
    assert images.shape == (COUNT, 1, facts.side, facts.side)
    assert images.dtype == np.float32
    assert facts.low <= images.min() < facts.low + 0.1
    assert 0.8 < images.max() <= 1


def test_what_they_draw_is_nearer_to_digits_than_what_is_no_digit(name: str, digits: Digits) -> None:
    """Frechet distance from the test images: of generated ones, of digits upside down, of noise."""
    facts = GENERATORS[name]
    test = Moments.of(seen(name, facts.real(digits.test_images)))
    real = facts.real(digits.train_images[:COUNT])
    noise = np.random.default_rng(0).uniform(facts.low, 1, real.shape).astype(np.float32)

    def distance(images: np.ndarray) -> float:
        return frechet_distance(Moments.of(seen(name, images)), test)

    generated = distance(drawn(name))
    assert generated < distance(np.ascontiguousarray(real[:, :, ::-1]))
    assert 4 * generated < distance(noise)


@pytest.mark.parametrize("name", [n for n, facts in GENERATORS.items() if not facts.takes_label])
def test_every_class_is_drawn(name: str) -> None:
    counts = np.bincount(classes(seen(name, drawn(name))), minlength=10)
    assert counts.min() >= 0.01 * COUNT
    assert counts.max() <= 0.4 * COUNT


def test_the_conditional_one_draws_what_it_is_told_in_many_ways() -> None:
    """Images of one class differ among themselves as much as real ones do, but for what blurs."""
    facts, digits = GENERATORS["conditional_vae"], load_digits()
    labels, images = facts.feed(COUNT, seed=1)["label"], drawn("conditional_vae")
    real = facts.real(digits.test_images)
    right = classes(seen("conditional_vae", images)) == labels
    for digit in range(10):
        assert right[labels == digit].mean() > 0.8
        spread = images[labels == digit].std(axis=0).mean()
        among_real = real[digits.test_labels == digit].std(axis=0).mean()
        assert 0.6 * among_real < spread < 1.2 * among_real


def test_manifest_knows_them(name: str) -> None:
    manifest: dict[str, Any] = json.loads(MANIFEST.read_text(encoding="utf-8"))
    assert manifest[f"{name}.npz"] == train_generators.describe(name, load_generator(name))
    assert (FOLDER / f"{name}.npz").stat().st_size < 1e6


def test_real_images_keep_what_they_show(digits: Digits) -> None:
    """Enlarged and put together again, the digits network names as many right as before."""
    features = seen("dcgan", GENERATORS["dcgan"].real(digits.test_images))
    assert np.mean(classes(features) == digits.test_labels) > 0.99


def test_enlarged_images_stay_in_range(digits: Digits) -> None:
    large = enlarged(digits.test_images[:20], 32)
    assert large.shape == (20, 1, 32, 32)
    assert large.dtype == np.float32
    assert large.min() >= 0
    assert large.max() <= 1


def test_inputs_are_seeded() -> None:
    facts = GENERATORS["conditional_vae"]
    first, again, other = facts.feed(12, 3), facts.feed(12, 3), facts.feed(12, 4)
    np.testing.assert_array_equal(first["latent"], again["latent"])
    assert (first["latent"] != other["latent"]).all()
    assert first["label"].tolist() == [*range(10), 0, 1]


def test_a_critic_is_smooth() -> None:
    torch.manual_seed(0)
    critic = Critic(16).eval()
    assert critic(torch.rand(4, 1, 16, 16)).shape == (4,)
    heads = [m.weight for m in critic.modules() if isinstance(m, torch.nn.Linear)]
    assert [torch.linalg.matrix_norm(w, 2).item() for w in heads] == pytest.approx([1.0], abs=1e-3)


def test_hinge_asks_for_a_margin() -> None:
    score = torch.tensor([2.0, 0.0, -2.0])
    assert hinge(score, 1).item() == pytest.approx((0 + 1 + 3) / 3)
    assert hinge(score, -1).item() == pytest.approx((3 + 1 + 0) / 3)


def test_an_encoder_gives_a_distribution_of_latents() -> None:
    mean, log_variance = Encoder(32)(torch.rand(3, 1, 32, 32))
    assert mean.shape == log_variance.shape == (3, GENERATORS["vae_decoder"].latent)


def test_latents_of_an_image_depend_on_its_label() -> None:
    torch.manual_seed(0)
    encoder, images = Encoder(16, takes_label=True).eval(), torch.rand(3, 1, 16, 16)
    zeros, ones = (encoder(images, torch.full((3,), label))[0] for label in (0, 1))
    assert zeros.shape == (3, GENERATORS["conditional_vae"].latent)
    assert not torch.isclose(zeros, ones).any()


def test_training_is_seeded_and_ends_in_batch_norm_of_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_generators, "NORM_BATCHES", 3)
    nets = []
    for _ in range(2):
        torch.manual_seed(5)
        nets.append(train_generators.train(name, steps=2))
    states = [net.state_dict() for net in nets]
    assert not nets[0].training
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key])
        if key.endswith("num_batches_tracked"):
            assert value == 3


def test_need_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None  # importing it now fails
from edgewise.models.generators import GENERATORS, load_generator
from edgewise.runtime.errors import InputError
try:
    load_generator("dcgan")
except InputError as error:
    assert "pip install 'edgewise[torch]'" in str(error)
else:
    raise SystemExit("the network was built without torch")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
