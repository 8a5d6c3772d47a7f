"""The digits that ship, the network trained on them, and how its channels came to be zero."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from edgewise.models.digits import CHECKPOINT, CLASSES, IMAGES, MANIFEST, Digits, load_digits

torch = pytest.importorskip("torch", reason="the network needs torch")

from edgewise.models import train  # noqa: E402 - needs torch
from edgewise.models.digits import load_digits_net  # noqa: E402
from edgewise.models.digits_net import DigitsNet  # noqa: E402


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(MANIFEST.read_text(encoding="utf-8"))
    return data


def test_digits_are_images_and_labels(digits: Digits) -> None:
    assert digits.train_images.shape == (1297, 1, 8, 8)
    assert digits.test_images.shape == (500, 1, 8, 8)
    assert digits.train_labels.shape == (1297,)
    assert digits.test_labels.shape == (500,)
    assert digits.train_images.dtype == digits.test_images.dtype == np.float32
    assert digits.test_images.min() == 0
    assert digits.test_images.max() == 1
    assert set(digits.train_labels) == set(digits.test_labels) == set(range(CLASSES))


def test_digits_are_those_of_scikit_learn(digits: Digits) -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="the source of the digits")
    original = datasets.load_digits()
    pixels = np.concatenate([digits.train_images, digits.test_images]).reshape(-1, 64) * 16
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    ours = np.column_stack([pixels, labels])
    theirs = np.column_stack([original.data, original.target])
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])


def test_manifest_names_the_files(manifest: dict[str, Any]) -> None:
    shipped = sorted(IMAGES.parent.glob("*.npz"))
    assert set(manifest) == {path.name for path in shipped}
    for path in shipped:
        assert manifest[path.name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert path.stat().st_size < 1.5e6
    assert manifest[IMAGES.name]["license"] == "CC BY 4.0"


def test_network_is_as_good_as_the_manifest_says(digits: Digits, manifest: dict[str, Any]) -> None:
    net = load_digits_net()
    assert not net.training
    found = train.accuracy(net, digits)
    assert found >= 0.97
    # Rounding differs from machine to machine: one image on the edge may go either way.
    assert found == pytest.approx(manifest[CHECKPOINT.name]["test_accuracy"], abs=1.5 / 500)


def test_a_good_share_of_the_channels_is_zero(manifest: dict[str, Any]) -> None:
    net = load_digits_net()
    norms = [norm for group in net.coupled_norms() for norm in group]
    zero = sum(int(((n.weight == 0) & (n.bias == 0)).sum()) for n in norms)
    assert 0.3 <= zero / sum(n.num_features for n in norms) <= 0.6
    assert train.zeroed(net) == manifest[CHECKPOINT.name]["zeroed_channels"]


def test_coupled_channels_are_zero_together() -> None:
    net = load_digits_net()
    trunk = net.coupled_norms()[0]
    assert len(trunk) == 5
    dead = trunk[0].weight == 0
    assert 0 < int(dead.sum()) < len(dead)
    for norm in trunk:
        assert torch.equal(norm.weight == 0, dead)
        assert torch.equal(norm.bias == 0, dead)


def test_every_norm_is_in_one_group() -> None:
    net = DigitsNet()
    grouped = [id(norm) for group in net.coupled_norms() for norm in group]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(m) for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)}


def test_zero_channels_carry_nothing(digits: Digits) -> None:
    """Whatever the filters before a dead channel hold, the logits stay the same to the bit."""
    net, changed = load_digits_net(), load_digits_net()
    images = torch.from_numpy(digits.test_images[:20])
    with torch.no_grad():
        for module in changed.modules():
            if hasattr(module, "conv") and hasattr(module, "norm"):
                module.conv.weight[module.norm.weight == 0] = 7.0
        assert torch.equal(net(images), changed(images))


def test_penalty_of_norms_on_their_own_is_their_l1() -> None:
    norm = torch.nn.BatchNorm2d(3)
    norm.weight.data.copy_(torch.tensor([0.5, -2.0, 0.0]))
    value = train.penalty([(norm,)])
    value.backward()
    assert value.item() == pytest.approx(2.5)
    assert norm.weight.grad is not None
    assert norm.weight.grad.tolist() == [1.0, -1.0, 0.0]  # finite at zero


def test_penalty_of_coupled_norms_is_their_length() -> None:
    first, second = torch.nn.BatchNorm2d(1), torch.nn.BatchNorm2d(1)
    first.weight.data.fill_(3.0)
    second.weight.data.fill_(4.0)
    assert train.penalty([(first, second)]).item() == pytest.approx(2**0.5 * 5)
    assert train.strength((first, second)).item() == pytest.approx((25 / 2) ** 0.5)


def test_held_channels_stay_zero_in_training(digits: Digits) -> None:
    torch.manual_seed(0)
    net = DigitsNet()
    (stem, *_) = trunk = net.coupled_norms()[0]
    alive = torch.arange(stem.num_features) % 2 == 0
    few = Digits(digits.train_images[:64], digits.train_labels[:64], digits.test_images, digits.test_labels)
    train.run(net, few, 1, 0.01, lambda: torch.zeros(()), train.Channels(trunk, alive).hold)
    for norm in trunk:
        assert not norm.weight[~alive].any()
        assert not norm.bias[~alive].any()
        assert norm.weight[alive].all()


def test_checkpoint_reads_back(tmp_path: Any) -> None:
    net = load_digits_net()
    path = tmp_path / "net.npz"
    train.write_checkpoint(net, path)
    with np.load(path, allow_pickle=False) as ours, np.load(CHECKPOINT, allow_pickle=False) as shipped:
        assert set(ours.files) == set(shipped.files) == set(net.state_dict())
        assert all(np.array_equal(ours[name], shipped[name]) for name in ours.files)


def test_digits_need_no_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None  # importing it now fails
import edgewise.models
from edgewise.models.digits import load_digits, load_digits_net
from edgewise.runtime.errors import InputError
assert len(load_digits().test_labels) == 500
try:
    load_digits_net()
except InputError as error:
    assert "pip install 'edgewise[torch]'" in str(error)
else:
    raise SystemExit("the network was built without torch")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
