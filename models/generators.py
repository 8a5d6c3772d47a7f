"""Image generators trained on the digits: what they take, what they give, and how to load them.

The digits have 8x8 pixels; a generator that doubles its maps three times needs more, so they are learned
enlarged. Only `load_generator` needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgewise.models.digits import CLASSES, FOLDER, load_digits_net, read_state

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class GeneratorFacts:
    """A generator's ends: latent numbers, height and width of the image, its darkest value; white is 1."""

    network: str
    latent: int
    side: int
    low: float
    takes_label: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """Inputs as `export` wants them."""
        label = ("label=1:int64",) if self.takes_label else ()
        return (f"latent=1x{self.latent}", *label)

    def feed(self, count: int, seed: int) -> dict[str, npt.NDArray[Any]]:
        """Inputs of `count` images: float32 latents from a standard normal, int64 labels in turn."""
        latent = np.random.default_rng(seed).standard_normal((count, self.latent), dtype=np.float32)
        return {"latent": latent} | ({"label": np.arange(count) % CLASSES} if self.takes_label else {})

    def real(self, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Digits, float32 (samples, 1, 8, 8) in [0, 1], in the size and range that the generator draws."""
        return enlarged(images, self.side) * np.float32(1 - self.low) + np.float32(self.low)


GENERATORS: Mapping[str, GeneratorFacts] = MappingProxyType(
    {
        "dcgan": GeneratorFacts("Dcgan", 32, 32, -1.0),
        "mlp_gan": GeneratorFacts("MlpGan", 32, 16, -1.0),
        "vae_decoder": GeneratorFacts("VaeDecoder", 16, 32, 0.0),
        "conditional_vae": GeneratorFacts("ConditionalVae", 16, 16, 0.0, takes_label=True),
    }
)


def load_generator(name: str) -> nn.Module:
    """One of `GENERATORS`, trained, in eval mode.

    Raises `InputError` where torch is not installed, `KeyError` where there is none of that name.
    """
    facts = GENERATORS[name]
    state = read_state(FOLDER / f"{name}.npz", "the generators need")
    from edgewise.models import generator_nets

    net: nn.Module = getattr(generator_nets, facts.network)()
    net.load_state_dict(state)
    return net.eval()


def load_features(name: str) -> nn.Module:
    """What the trained digits network sees in the images of a generator: (batch, 96); in eval mode."""
    facts, digits_net = GENERATORS[name], load_digits_net()
    from edgewise.models.generator_nets import ImageFeatures

    return ImageFeatures(digits_net, facts.side, facts.low).eval()


def enlarged(images: npt.NDArray[np.float32], side: int) -> npt.NDArray[np.float32]:
    """Grey images (samples, 1, height, width) in [0, 1] at `side` x `side` pixels, bicubic."""
    rows = [
        np.asarray(Image.fromarray(image[0]).resize((side, side), Image.Resampling.BICUBIC))
        for image in images
    ]
    return np.stack(rows)[:, None].clip(0, 1)
