"""The ResNets of CIFAR-10 (He et al., 2016, section 4.2) as torch modules, rebuilt from their .onnx files.

    resnet = load(Path("cifar_resnet20.onnx"))

Shortcuts into wider stages hold every second pixel and zeros for the new channels: nothing is learned
there. Where they slice and pad, Torch-Pruning keeps all of the padding. As a convolution with the rows of
an identity, which gives the same numbers, they are layers like others.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

_WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two 3x3 layers beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else _identity(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def _identity(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    """Input i becomes output i, moved to the middle by the zeros on either side."""
    conv, before = nn.Conv2d(inputs, outputs, 1, stride, bias=False), (outputs - inputs) // 2
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[before : before + inputs, :, 0, 0] = torch.eye(inputs)
    return conv


class Resnet(nn.Module):
    """`blocks` in each of three stages, the mean over all pixels and a dense layer."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, _WIDTHS[0], 3, 1, 1, bias=False), nn.BatchNorm2d(_WIDTHS[0])
        stages, x = [], _WIDTHS[0]
        for width in _WIDTHS:
            stride = 1 if width == _WIDTHS[0] else 2
            stages.append(
                nn.Sequential(*(Block(width if i else x, width, 1 if i else stride) for i in range(blocks)))
            )
            x = width
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(x, 10)

    def forward(self, input: Tensor) -> Tensor:  # as the file calls it
        y = functional.relu(self.bn1(self.conv1(input)))
        y = self.layer3(self.layer2(self.layer1(y)))
        return self.linear(y.mean((2, 3)))  # type: ignore[no-any-return]


def load(path: Path) -> Resnet:
    """The module with the weights of the file, in eval mode. Raises where there are others than it takes."""
    held = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in onnx.load(path).graph.initializer}
    resnet = Resnet(sum(name.startswith("layer1.") and name.endswith("conv1.weight") for name in held))
    missing, unknown = resnet.load_state_dict(
        {name: t for name, t in held.items() if t.is_floating_point()}, strict=False
    )
    if left := [n for n in missing if "shortcut" not in n and "num_batches" not in n] + unknown:
        raise ValueError(f"{path} is no ResNet of CIFAR-10 as it is known here: {', '.join(left)}")
    return resnet.eval()
