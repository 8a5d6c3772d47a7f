"""Handwritten digits and a network trained on them: real images and a real accuracy, in the package itself.

The images are the test set of the UCI "Optical Recognition of Handwritten Digits" data set (E. Alpaydin
and C. Kaynak, 1998, CC BY 4.0) as scikit-learn distributes it. `manifest.json` says where every file
comes from. Reading the images needs numpy alone; building the network needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgewise.runtime.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from edgewise.models.digits_net import DigitsNet

FOLDER = Path(__file__).resolve().parent
IMAGES = FOLDER / "digits.npz"
CHECKPOINT = FOLDER / "digits_net.npz"
MANIFEST = FOLDER / "manifest.json"

CLASSES = 10
_BRIGHTEST = 16  # a pixel counts the dark points of a 4x4 block


@dataclass(frozen=True)
class Digits:
    """Images: float32 in [0, 1], shape (samples, 1, 8, 8). Labels: int64 in 0..9, shape (samples,)."""

    train_images: npt.NDArray[np.float32]
    train_labels: npt.NDArray[np.int64]
    test_images: npt.NDArray[np.float32]
    test_labels: npt.NDArray[np.int64]


def load_digits() -> Digits:
    """The 1,297 images to train, calibrate and choose with, and the 500 to judge with; a fixed split."""
    with np.load(IMAGES, allow_pickle=False) as file:
        arrays = {name: _ready(name, file[name]) for name in file.files}
    return Digits(**arrays)


def _ready(name: str, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Stored are bytes: images of shape (samples, 8, 8) counting 0..16, labels of shape (samples,)."""
    if name.endswith("labels"):
        return stored.astype(np.int64)
    return stored[:, None].astype(np.float32) / _BRIGHTEST


def load_digits_net() -> DigitsNet:
    """The trained network, in eval mode: float32 (batch, 1, 8, 8) -> logits (batch, 10).

    Raises `InputError` where torch is not installed.
    """
    state = read_state(CHECKPOINT, "the digits network needs")
    from edgewise.models.digits_net import DigitsNet

    net = DigitsNet()
    net.load_state_dict(state)
    return net.eval()


def read_state(path: Path, who: str) -> dict[str, Tensor]:
    """The state dict in a checkpoint. `InputError` where torch is not installed says `who` needs it."""
    try:
        import torch
    except ImportError:
        raise InputError(f"{who} torch: pip install 'edgewise[torch]'") from None
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(_widened(file[name])) for name in file.files}


def _widened(stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return stored.astype(np.float32) if stored.dtype == np.float16 else stored
