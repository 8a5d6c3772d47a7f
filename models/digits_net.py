"""A convolutional network for 8x8 grey images, made of what today's networks are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

TRUNK = 64
WIDE = 96
BLOCKS = 3
CLASSES = 10


class ConvNorm(nn.Module):
    """Convolution and batch normalization, padded to keep height and width."""

    def __init__(self, channels: int, filters: int, size: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, filters, size, padding=size // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(filters)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.conv(x))
        return normed


class Residual(nn.Module):
    """Two convolutions, added to what went in (He et al. 2015, arXiv 1512.03385)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = ConvNorm(channels, width, 3)
        self.second = ConvNorm(width, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Separable(nn.Module):
    """A convolution a channel, then one across channels (Howard et al. 2017, arXiv 1704.04861)."""

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.depthwise = ConvNorm(channels, channels, 3, groups=channels)
        self.pointwise = ConvNorm(channels, filters, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.pointwise(torch.relu(self.depthwise(x))))


class DigitsNet(nn.Module):
    """Stem, residual blocks, a separable block beside them, both concatenated, mixed, pooled and classified.

    float32 (batch, 1, 8, 8) in [0, 1] -> logits (batch, 10). About 22 million multiply-adds an image.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, TRUNK, 3)
        self.blocks = nn.ModuleList(Residual(TRUNK, WIDE) for _ in range(BLOCKS))
        self.separable = Separable(TRUNK, WIDE)
        self.mix = ConvNorm(TRUNK + WIDE, WIDE, 1)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(WIDE, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.features(image)))
        return logits

    def features(self, image: Tensor) -> Tensor:
        """What the head decides by: float32 (batch, 96)."""
        x = torch.relu(self.stem(image))
        for block in self.blocks:
            x = block(x)
        x = torch.cat([x, self.separable(x)], dim=1)
        return torch.relu(self.mix(x)).mean(dim=(2, 3))

    def coupled_norms(self) -> Sequence[Sequence[nn.BatchNorm2d]]:
        """Batch norms whose channels leave together or not at all: those added or convolved one to one.

        Every batch norm is in exactly one group; all of a group have equally many channels.
        """
        ends = [block.second.norm for block in self._residuals()]
        inner = [(block.first.norm,) for block in self._residuals()]
        trunk = (self.stem.norm, *ends, self.separable.depthwise.norm)
        return (trunk, *inner, (self.separable.pointwise.norm,), (self.mix.norm,))

    def _residuals(self) -> list[Residual]:
        return [block for block in self.blocks if isinstance(block, Residual)]
