"""Image generators of the common kinds: convolutional, fully connected, decoders of VAEs, one conditional.

All are wider than their digits need, as such networks are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from edgewise.models.digits_net import DigitsNet

LATENT = 32
VAE_LATENT = 16
CLASSES = 10
LABEL_SIZE = 16
START = 4  # height and width of the first map


class Dcgan(nn.Module):
    """A stack of transposed convolutions with batch norm (Radford et al. 2015, arXiv 1511.06434).

    float32 latent (batch, 32) from a standard normal -> image (batch, 1, 32, 32) in [-1, 1].
    """

    def __init__(self, widths: Sequence[int] = (128, 64, 32)) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.ConvTranspose2d(LATENT, widths[0], START, bias=False)]
        for before, after in pairwise(widths):
            layers += [nn.BatchNorm2d(before), nn.ReLU(), doubling(before, after)]
        layers += [nn.BatchNorm2d(widths[-1]), nn.ReLU(), doubling(widths[-1], 1, bias=True), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, latent: Tensor) -> Tensor:
        image: Tensor = self.layers(latent[:, :, None, None])
        return image


def doubling(channels: int, filters: int, *, bias: bool = False) -> nn.ConvTranspose2d:
    """Twice the height and width, every pixel from as many taps: no checkerboard."""
    return nn.ConvTranspose2d(channels, filters, 4, stride=2, padding=1, bias=bias)


class MlpGan(nn.Module):
    """Fully connected layers with batch norm (Goodfellow et al. 2014, arXiv 1406.2661).

    float32 latent (batch, 32) from a standard normal -> image (batch, 1, 16, 16) in [-1, 1].
    """

    SIDE = 16

    def __init__(self, widths: Sequence[int] = (192, 384, 384)) -> None:
        super().__init__()
        sizes = (LATENT, *widths)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], self.SIDE**2), nn.Tanh())

    def forward(self, latent: Tensor) -> Tensor:
        image: Tensor = self.layers(latent).unflatten(1, (1, self.SIDE, self.SIDE))
        return image


class VaeDecoder(nn.Module):
    """The half of a variational autoencoder that is deployed (Kingma and Welling 2013, arXiv 1312.6114).

    float32 latent (batch, 16) from a standard normal -> image (batch, 1, 32, 32) in [0, 1].
    """

    def __init__(self, inputs: int = VAE_LATENT, widths: Sequence[int] = (96, 64, 48)) -> None:
        super().__init__()
        self.start = nn.Linear(inputs, widths[0] * START**2)
        layers: list[nn.Module] = [nn.ReLU()]
        for before, after in pairwise(widths):
            layers += [_grown(before, after), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, _grown(widths[-1], 1), nn.Sigmoid())

    def forward(self, latent: Tensor) -> Tensor:
        image: Tensor = self.layers(self.start(latent).unflatten(1, (-1, START, START)))
        return image


def _grown(channels: int, filters: int) -> nn.ConvTranspose2d:
    """Twice the height and width with a kernel of 3, as autoencoders mirror a Conv of stride 2."""
    return nn.ConvTranspose2d(channels, filters, 3, stride=2, padding=1, output_padding=1)


class ConditionalVae(nn.Module):
    """A shorter `VaeDecoder` that draws the class it is told (Sohn et al. 2015, "Learning structured output
    representation using deep conditional generative models").

    float32 latent (batch, 16) from a standard normal and int64 label (batch,) in 0..9
    -> image (batch, 1, 16, 16) in [0, 1].
    """

    def __init__(self, widths: Sequence[int] = (128, 64)) -> None:
        super().__init__()
        self.labels = nn.Embedding(CLASSES, LABEL_SIZE)
        self.decoder = VaeDecoder(VAE_LATENT + LABEL_SIZE, widths)

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:
        image: Tensor = self.decoder(torch.cat([latent, self.labels(label)], dim=1))
        return image


class ImageFeatures(nn.Module):
    """What the digits network sees in images of a generator: Frechet distances are of these features.

    float32 image (batch, 1, side, side) in [low, 1] -> (batch, 96). Pixels are put together to 8x8.
    """

    def __init__(self, digits_net: DigitsNet, side: int, low: float) -> None:
        super().__init__()
        self.digits_net, self.low = digits_net, low
        self.shrink = nn.AvgPool2d(side // 8)

    def forward(self, image: Tensor) -> Tensor:
        return self.digits_net.features((self.shrink(image) - self.low) / (1 - self.low))
