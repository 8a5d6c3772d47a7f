"""The networks that train generators and are thrown away then: critics and the encoder of a VAE."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from edgewise.models.generator_nets import CLASSES, START, VaeDecoder


class Critic(nn.Module):
    """Says how real an image is; smooth by spectral norm (Miyato et al. 2018, arXiv 1802.05957).

    float32 image (batch, 1, side, side) -> score (batch,). With `classes` it judges the image as one of its
    label, by a projection (Miyato and Koyama 2018, arXiv 1802.05637).
    """

    def __init__(self, side: int, *, classes: int = 0, width: int = 32) -> None:
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
        self.labels = spectral_norm(nn.Embedding(classes, channels * START**2)) if classes else None

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        features = self.layers(image)
        score: Tensor = self.head(features).squeeze(1)
        if self.labels is None or label is None:
            return score
        fit: Tensor = (self.labels(label) * features).sum(dim=1)
        return score + fit


class Encoder(nn.Module):
    """The half of a VAE that is not deployed: float32 image (batch, 1, 32, 32) -> mean and log variance."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 32), (32, 64), (64, 96)):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(96 * START**2, 2 * VaeDecoder.LATENT)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.head(self.layers(image)).chunk(2, dim=1)
        return mean, log_variance


def critic_of(side: int, *, takes_label: bool) -> Critic:
    """A critic of the size that fits a generator."""
    return Critic(side, classes=CLASSES if takes_label else 0)


def hinge(score: Tensor, sign: int) -> Tensor:
    """What a critic loses that should score above 1 (`sign` 1) or below -1 (`sign` -1)."""
    return torch.relu(1 - sign * score).mean()
