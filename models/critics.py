"""The networks that train generators and are thrown away then: critics and encoders of VAEs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from edgewise.models.generator_nets import CLASSES, START, VAE_LATENT


class Critic(nn.Module):
    """Says how real an image is; smooth by spectral norm (Miyato et al. 2018, arXiv 1802.05957).

    float32 image (batch, 1, side, side) -> score (batch,).
    """

    def __init__(self, side: int, *, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        while side > START:
            filters = width if channels == 1 else 2 * channels
            conv = nn.Conv2d(channels, filters, 4, stride=2, padding=1)
            layers += [spectral_norm(conv), nn.LeakyReLU(0.2)]
            channels, side = filters, side // 2
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.head = spectral_norm(nn.Linear(channels * START**2, 1))

    def forward(self, image: Tensor) -> Tensor:
        score: Tensor = self.head(self.layers(image)).squeeze(1)
        return score


class Encoder(nn.Module):
    """The half of a VAE that is not deployed.

    float32 image (batch, 1, side, side) -> mean and log variance of its latents, (batch, 16) each. One that
    `takes_label` is told the class of the image too, so that its latents say what the class does not.
    """

    def __init__(self, side: int, *, takes_label: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        while side > START:
            filters = channels + 32 if channels > 1 else 32
            conv = nn.Conv2d(channels, filters, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(filters), nn.ReLU()]
            channels, side = filters, side // 2
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(channels * START**2 + takes_label * CLASSES, 2 * VAE_LATENT)

    def forward(self, image: Tensor, *label: Tensor) -> tuple[Tensor, Tensor]:
        told = [functional.one_hot(one, CLASSES).float() for one in label]
        mean, log_variance = self.head(torch.cat([self.layers(image), *told], dim=1)).chunk(2, dim=1)
        return mean, log_variance


def hinge(score: Tensor, sign: int) -> Tensor:
    """What a critic loses that should score above 1 (`sign` 1) or below -1 (`sign` -1)."""
    return torch.relu(1 - sign * score).mean()
