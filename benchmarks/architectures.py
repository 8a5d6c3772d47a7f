"""Well-known networks as torch modules with seeded weights, of their published sizes or smaller.

python benchmarks/architectures.py FOLDER [NAME ...] [--width 1.0] [--depth 1.0] [--zeroed none]

exports them into FOLDER, which keeps them for the next time, and prints what they are. They are written from
the papers named at each; nothing is trained. Other benchmarks ask `exported` for them.

With half of all filters zeroed (`--zeroed`), a filter is zero in weight and bias, and so are its scale and
shift in the batch norm behind it. Which half, is drawn at random:
- coupled: once for all layers whose outputs are added, gated or filtered channel by channel, as structured
  pruning does. Of a transformer half of the heads and half of the neurons go; its own width stays.
- coupled-width: and half of the width of the model, its layer norms included.
- independent: for every layer anew. Sums keep what any of their terms brings.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from edgewise.optimizer import files
from edgewise.optimizer.torch_export import to_model

Mask = npt.NDArray[np.bool_]
"""The channels of a value, by whether they are among those that go. Its length is their number."""

IMAGE: Mask = np.zeros(3, np.bool_)
SCHEMES = ("none", "coupled", "coupled-width", "independent")
_NARROWEST = 8  # channels


@dataclass(frozen=True, eq=False)
class Plan:
    """How much smaller than published a network is made, and which half of every set of channels goes."""

    width: float = 1.0
    depth: float = 1.0
    pixels: int = 1024
    seed: int = 0
    narrow_model: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rng", np.random.default_rng(self.seed))

    def size(self, published: int) -> int:
        """A number of channels."""
        if self.width == 1:
            return published
        return max(_NARROWEST, round(published * self.width / _NARROWEST) * _NARROWEST)

    def blocks(self, published: int) -> int:
        """A number of layers in a row."""
        return max(1, round(published * self.depth))

    def side(self, published: int) -> int:
        """The height and width of an image."""
        return min(published, self.pixels)

    def channels(self, published: int) -> Mask:
        """A new set of channels."""
        return self.half(self.size(published))

    def model(self, published: int) -> Mask:
        """The channels of a transformer's residual stream, which layer norms run over."""
        size = self.size(published)
        return self.half(size) if self.narrow_model else np.zeros(size, np.bool_)

    def half(self, size: int) -> Mask:
        """A random half of so many."""
        rng: np.random.Generator = self._rng  # type: ignore[attr-defined]
        return rng.permutation(size) < size // 2


@dataclass(frozen=True, eq=False)
class Filters:
    """The filters of a layer: modules whose parameters have an entry for each, and which of them go.

    Runs of `each` filters go or stay as one, such as the rows of an attention head.
    """

    modules: tuple[nn.Module, ...]
    dead: Mask
    each: int = 1

    def zero(self, dead: Mask) -> None:
        """Set all entries of the filters `dead` to zero."""
        for module in self.modules:
            for parameter in module.parameters(recurse=False):
                swapped = isinstance(module, nn.ConvTranspose2d) and parameter.ndim > 1
                along = parameter.transpose(0, 1) if swapped else parameter
                along[torch.from_numpy(dead)] = 0


class Layer(nn.Module):
    """Convolution, batch norm and activation."""

    def __init__(
        self,
        x: Mask,
        y: Mask,
        kernel: int = 1,
        stride: int = 1,
        *,
        groups: int = 1,
        act: Callable[[], nn.Module] = nn.ReLU,
        norm: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(len(x), len(y), kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(len(y)) if norm else nn.Identity()
        self.act = act()
        self.filters = (Filters((self.conv, self.norm), y),)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))  # type: ignore[no-any-return]


def depthwise(x: Mask, kernel: int, stride: int = 1, *, act: Callable[[], nn.Module] = nn.Identity) -> Layer:
    """A filter for every channel, which is that channel's own."""
    return Layer(x, x, kernel, stride, groups=len(x), act=act)


class Dense(nn.Module):
    """A fully connected layer and an activation; `dead` filters are none by default."""

    def __init__(self, x: Mask, y: Mask, act: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(len(x), len(y)), act()
        self.filters = (Filters((self.linear,), y),)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x))  # type: ignore[no-any-return]


class Sum(nn.Module):
    """What two branches give for one input, added."""

    def __init__(
        self, branch: nn.Module, shortcut: nn.Module, act: Callable[[], nn.Module] = nn.Identity
    ) -> None:
        super().__init__()
        self.branch, self.shortcut, self.act = branch, shortcut, act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.branch(x) + self.shortcut(x))  # type: ignore[no-any-return]


def classifier(parts: Sequence[nn.Module], x: Mask, classes: int = 1000) -> nn.Module:
    """The mean over all pixels, and a dense layer, all of whose rows stay."""
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(len(x), classes))


def resnet18(plan: Plan) -> nn.Module:
    """Deep Residual Learning for Image Recognition (He et al., 2016), two 3x3 layers a block."""
    return _resnet(plan, (2, 2, 2, 2), bottleneck=False)


def resnet50(plan: Plan) -> nn.Module:
    """The same with bottlenecks, the stride in their 3x3 layer."""
    return _resnet(plan, (3, 4, 6, 3), bottleneck=True)


def _resnet(plan: Plan, counts: Sequence[int], *, bottleneck: bool) -> nn.Module:
    trunk = plan.channels(64)
    parts: list[nn.Module] = [Layer(IMAGE, trunk, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for stage, count in enumerate(counts):
        for block in range(plan.blocks(count)):
            x, width, stride = trunk, 64 * 2**stage, 2 if stage and not block else 1
            if not block and (stage or bottleneck):
                trunk = plan.channels(width * (4 if bottleneck else 1))
            a, b = plan.channels(width), plan.channels(width)
            branch = (
                (Layer(x, a), Layer(a, b, 3, stride), Layer(b, trunk, act=nn.Identity))
                if bottleneck
                else (Layer(x, a, 3, stride), Layer(a, trunk, 3, act=nn.Identity))
            )
            shortcut = nn.Identity() if x is trunk else Layer(x, trunk, 1, stride, act=nn.Identity)
            parts.append(Sum(nn.Sequential(*branch), shortcut, nn.ReLU))
    return classifier(parts, trunk)


class Gate(nn.Module):
    """Squeeze-and-Excitation (Hu et al., 2018): every channel times a number that all channels choose."""

    def __init__(
        self, x: Mask, squeezed: Mask, act: Callable[[], nn.Module], gate: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.squeeze = Layer(x, squeezed, act=act, norm=False, bias=True)
        self.excite = Layer(squeezed, x, act=gate, norm=False, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)))


@dataclass(frozen=True)
class Inverted:
    """An inverted residual as the papers' tables list it; `squeezed` of 0 is without a gate."""

    hidden: int
    outputs: int
    kernel: int
    stride: int
    act: Callable[[], nn.Module]
    squeezed: int = 0

    def build(
        self, plan: Plan, x: Mask, gate: Callable[[], nn.Module], gate_act: Callable[[], nn.Module]
    ) -> tuple[nn.Module, Mask]:
        """The block and the channels it gives: those it reads, where they are added."""
        residual = self.stride == 1 and plan.size(self.outputs) == len(x)
        hidden = x if self.hidden == 0 else plan.channels(self.hidden)
        parts: list[nn.Module] = [] if hidden is x else [Layer(x, hidden, act=self.act)]
        parts.append(depthwise(hidden, self.kernel, self.stride, act=self.act))
        if self.squeezed:
            parts.append(Gate(hidden, plan.channels(self.squeezed), gate_act, gate))
        y = x if residual else plan.channels(self.outputs)
        parts.append(Layer(hidden, y, act=nn.Identity))
        branch = nn.Sequential(*parts)
        return (Sum(branch, nn.Identity()) if residual else branch), y


def mobilenet_v2(plan: Plan) -> nn.Module:
    """MobileNetV2: Inverted Residuals and Linear Bottlenecks (Sandler et al., 2018)."""
    rows = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2))
    blocks, inputs = [], 32
    for expand, outputs, count, stride in (*rows, (6, 320, 1, 1)):
        for block in range(plan.blocks(count)):
            hidden = expand * inputs if expand > 1 else 0
            blocks.append(Inverted(hidden, outputs, 3, 1 if block else stride, nn.ReLU6))
            inputs = outputs
    parts, x = _inverted(plan, 32, blocks, nn.ReLU6, nn.Identity, nn.Identity)
    last = plan.channels(1280)
    return classifier([*parts, Layer(x, last, act=nn.ReLU6)], last)


def efficientnet(plan: Plan) -> nn.Module:
    """EfficientNet-B0 (Tan and Le, 2019): SiLU, and gates that squeeze to a quarter of the block's input."""
    rows = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3))
    blocks, inputs = [], 32
    for expand, kernel, stride, outputs, count in (*rows, (6, 5, 2, 192, 4), (6, 3, 1, 320, 1)):
        for block in range(plan.blocks(count)):
            hidden = expand * inputs if expand > 1 else 0
            step = 1 if block else stride
            blocks.append(Inverted(hidden, outputs, kernel, step, nn.SiLU, inputs // 4))
            inputs = outputs
    parts, x = _inverted(plan, 32, blocks, nn.SiLU, nn.Sigmoid, nn.SiLU)
    last = plan.channels(1280)
    return classifier([*parts, Layer(x, last, act=nn.SiLU)], last)


def mobilenet_v3(plan: Plan) -> nn.Module:
    """MobileNetV3-Small (Howard et al., 2019)."""
    re, hs = nn.ReLU, nn.Hardswish
    rows = (
        (0, 16, 3, 2, re, 8), (72, 24, 3, 2, re), (88, 24, 3, 1, re), (96, 40, 5, 2, hs, 24),
        (240, 40, 5, 1, hs, 64), (240, 40, 5, 1, hs, 64), (120, 48, 5, 1, hs, 32), (144, 48, 5, 1, hs, 40),
        (288, 96, 5, 2, hs, 72), (576, 96, 5, 1, hs, 144), (576, 96, 5, 1, hs, 144),
    )  # fmt: skip
    chosen = rows[:: max(1, round(1 / plan.depth))]
    parts, x = _inverted(plan, 16, [Inverted(*row) for row in chosen], hs, nn.Hardsigmoid, nn.ReLU)
    last, neurons = plan.channels(576), plan.channels(1024)
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(1), Dense(last, neurons, hs))
    return nn.Sequential(*parts, Layer(x, last, act=hs), *pooled, nn.Linear(len(neurons), 1000))


def _inverted(
    plan: Plan,
    stem: int,
    blocks: Sequence[Inverted],
    act: Callable[[], nn.Module],
    gate: Callable[[], nn.Module],
    gate_act: Callable[[], nn.Module],
) -> tuple[list[nn.Module], Mask]:
    """A stem and inverted residuals, and the channels they give."""
    x = plan.channels(stem)
    parts: list[nn.Module] = [Layer(IMAGE, x, 3, 2, act=act)]
    for block in blocks:
        part, x = block.build(plan, x, gate, gate_act)
        parts.append(part)
    return parts, x


class Grown(nn.Module):
    """Its input, and behind it what a layer makes of it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layer(x)], 1)


def densenet121(plan: Plan) -> nn.Module:
    """Densely Connected Convolutional Networks (Huang et al., 2017): norms run before their layers."""
    x = plan.channels(64)
    parts: list[nn.Module] = [Layer(IMAGE, x, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for stage, count in enumerate((6, 12, 24, 16)):
        if stage:
            y = plan.half(len(x) // 2)
            layer = Layer(x, y, norm=False, act=nn.Identity)
            parts += [nn.BatchNorm2d(len(x)), nn.ReLU(), layer, nn.AvgPool2d(2)]
            x = y
        for _ in range(plan.blocks(count)):
            wide, more = plan.channels(128), plan.channels(32)
            layers = (Layer(x, wide), Layer(wide, more, 3, norm=False, act=nn.Identity))
            parts.append(Grown(nn.Sequential(nn.BatchNorm2d(len(x)), nn.ReLU(), *layers)))
            x = np.concatenate([x, more])
    return classifier([*parts, nn.BatchNorm2d(len(x)), nn.ReLU()], x)


class Chunked(nn.Module):
    """The C2f block of YOLOv8: halves, a chain of bottlenecks on the second, and all that comes of it."""

    def __init__(self, plan: Plan, x: Mask, y: Mask, count: int, *, residual: bool) -> None:
        super().__init__()
        left, right = plan.half(len(y) // 2), plan.half(len(y) // 2)
        self.enter = Layer(x, np.concatenate([left, right]), act=nn.SiLU)
        self.chain, parts = nn.ModuleList(), [left, right]
        for _ in range(count):
            inner = plan.half(len(right))
            after = right if residual else plan.half(len(right))
            layers = (Layer(right, inner, 3, act=nn.SiLU), Layer(inner, after, 3, act=nn.SiLU))
            branch = nn.Sequential(*layers)
            self.chain.append(Sum(branch, nn.Identity()) if residual else branch)
            right = after
            parts.append(right)
        self.leave = Layer(np.concatenate(parts), y, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for link in self.chain:
            parts.append(link(parts[-1]))
        return self.leave(torch.cat(parts, 1))  # type: ignore[no-any-return]


class Pyramid(nn.Module):
    """Pooling of spatial pyramids, one window after another (SPPF)."""

    def __init__(self, plan: Plan, x: Mask, y: Mask) -> None:
        super().__init__()
        inner = plan.half(len(x) // 2)
        self.enter, self.pool = Layer(x, inner, act=nn.SiLU), nn.MaxPool2d(5, 1, 2)
        self.leave = Layer(np.tile(inner, 4), y, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.enter(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.leave(torch.cat(parts, 1))  # type: ignore[no-any-return]


class Yolo(nn.Module):
    """The layout of YOLOv8-n: a backbone, a path up and one down, and two heads at each of three scales."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        a, b, c, d, e = (plan.channels(n) for n in (16, 32, 64, 128, 256))
        bb, cc, dd, ee = (plan.half(len(x)) for x in (b, c, d, e))
        blocks, silu = plan.blocks, nn.SiLU
        self.stem = nn.Sequential(Layer(IMAGE, a, 3, 2, act=silu), Layer(a, b, 3, 2, act=silu))
        self.stem.extend([Chunked(plan, b, bb, 1, residual=True), Layer(bb, c, 3, 2, act=silu)])
        self.fine = Chunked(plan, c, cc, blocks(2), residual=True)
        middle = Chunked(plan, d, dd, blocks(2), residual=True)
        self.middle = nn.Sequential(Layer(cc, d, 3, 2, act=silu), middle)
        coarse, out = Chunked(plan, e, ee, 1, residual=True), plan.half(len(e))
        self.coarse = nn.Sequential(Layer(dd, e, 3, 2, act=silu), coarse, Pyramid(plan, ee, out))
        both = np.concatenate
        up, top, down, last = (plan.half(len(x)) for x in (d, c, d, e))
        self.up_middle = Chunked(plan, both([out, dd]), up, 1, residual=False)
        self.up_fine = Chunked(plan, both([up, cc]), top, 1, residual=False)
        to_middle, to_coarse = plan.half(len(c)), plan.half(len(d))
        self.to_middle = Layer(top, to_middle, 3, 2, act=silu)
        self.down_middle = Chunked(plan, both([to_middle, up]), down, 1, residual=False)
        self.to_coarse = Layer(down, to_coarse, 3, 2, act=silu)
        self.down_coarse = Chunked(plan, both([to_coarse, out]), last, 1, residual=False)
        scales = (top, down, last)
        self.boxes = nn.ModuleList(_head(plan, x, 64, 64) for x in scales)
        self.classes = nn.ModuleList(_head(plan, x, 80, 80) for x in scales)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        fine = self.fine(self.stem(x))
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        up = self.up_middle(torch.cat([_twice(coarse), middle], 1))
        top = self.up_fine(torch.cat([_twice(up), fine], 1))
        down = self.down_middle(torch.cat([self.to_middle(top), up], 1))
        last = self.down_coarse(torch.cat([self.to_coarse(down), coarse], 1))
        scales = zip((top, down, last), self.boxes, self.classes, strict=True)
        return tuple(torch.cat([box(v), kind(v)], 1) for v, box, kind in scales)


def _twice(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")


def _head(plan: Plan, x: Mask, width: int, outputs: int) -> nn.Module:
    a, b = plan.channels(width), plan.channels(width)
    layers = (Layer(x, a, 3, act=nn.SiLU), Layer(a, b, 3, act=nn.SiLU))
    return nn.Sequential(*layers, nn.Conv2d(len(b), outputs, 1))


class Unet(nn.Module):
    """U-Net (Ronneberger et al., 2015) with padding and batch norms."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.down, self.up, self.merge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        x, skips = IMAGE, []
        for width in (64, 128, 256, 512, 1024):
            y = plan.channels(width)
            self.down.append(_twofold(plan, x, y))
            skips.append(x := y)
        for skip in reversed(skips[:-1]):
            up, y = plan.half(len(skip)), plan.half(len(skip))
            self.up.append(Upward(x, up))
            self.merge.append(_twofold(plan, np.concatenate([skip, up]), y))
            x = y
        self.last = nn.Conv2d(len(x), 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            x = down(x if not skips else functional.max_pool2d(x, 2))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips[:-1]), strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.last(x)  # type: ignore[no-any-return]


class Upward(nn.Module):
    """A transposed convolution that doubles height and width."""

    def __init__(self, x: Mask, y: Mask) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(len(x), len(y), 2, 2)
        self.filters = (Filters((self.conv,), y),)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


def _twofold(plan: Plan, x: Mask, y: Mask) -> nn.Module:
    inner = plan.half(len(y))
    return nn.Sequential(Layer(x, inner, 3), Layer(inner, y, 3))


class Shuffled(nn.Module):
    """A unit of ShuffleNetV2: one half changes (with a stride both do), then the halves are interleaved."""

    def __init__(self, plan: Plan, x: Mask, outputs: int, stride: int) -> None:
        super().__init__()
        half = len(x) // 2
        source = x if stride > 1 else x[half:]
        kept: Mask = plan.channels(outputs // 2) if stride > 1 else x[:half]
        inner, y = plan.channels(outputs // 2), plan.channels(outputs // 2)
        self.left = nn.Sequential(depthwise(x, 3, stride), Layer(x, kept)) if stride > 1 else None
        self.right = nn.Sequential(Layer(source, inner), depthwise(inner, 3, stride), Layer(inner, y))
        self.y: Mask = np.concatenate([kept, y]).reshape(2, -1).T.ravel()

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1) if self.left is None else (self.left(x), x)
        y = torch.cat([a, self.right(b)], 1)
        n, channels, height, width = y.shape
        return y.reshape(n, 2, channels // 2, height, width).transpose(1, 2).reshape(y.shape)


def shufflenet_v2(plan: Plan) -> nn.Module:
    """ShuffleNet V2 (Ma et al., 2018), 1.0x."""
    x = plan.channels(24)
    parts: list[nn.Module] = [Layer(IMAGE, x, 3, 2), nn.MaxPool2d(3, 2, 1)]
    for outputs, count in ((116, 4), (232, 8), (464, 4)):
        for block in range(1 + plan.blocks(count - 1)):
            unit = Shuffled(plan, x, outputs, 1 if block else 2)
            parts.append(unit)
            x = unit.y
    last = plan.channels(1024)
    return classifier([*parts, Layer(x, last)], last)


class Encoder(nn.Module):
    """torch's own TransformerEncoderLayer (Vaswani et al., 2017), with the filters named."""

    def __init__(self, plan: Plan, x: Mask, heads: int, neurons: int) -> None:
        super().__init__()
        hidden, each = plan.channels(neurons), len(x) // heads
        layer = nn.TransformerEncoderLayer(len(x), heads, len(hidden), batch_first=True)
        rows = np.tile(np.repeat(plan.half(heads), each), 3)
        ends = (layer.self_attn.out_proj, layer.linear2, layer.norm1, layer.norm2)
        self.layer = layer
        self.filters = (
            Filters((layer.self_attn,), rows, each),
            Filters((layer.linear1,), hidden),
            *(Filters((end,), x) for end in ends),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def encoder(plan: Plan) -> nn.Module:
    """Six layers of a transformer's encoder on frames of 80 features, as for speech."""
    x = plan.model(512)
    layers = (Encoder(plan, x, 8, 2048) for _ in range(plan.blocks(6)))
    return nn.Sequential(Dense(np.zeros(80, np.bool_), x), *layers, nn.Linear(len(x), 64))


class Attention(nn.Module):
    """Self-attention with queries, keys and values in one layer."""

    def __init__(self, plan: Plan, x: Mask, heads: int) -> None:
        super().__init__()
        self.heads, each = heads, len(x) // heads
        self.enter, self.leave = nn.Linear(len(x), 3 * len(x)), nn.Linear(len(x), len(x))
        rows = np.tile(np.repeat(plan.half(heads), each), 3)
        self.filters = (Filters((self.enter,), rows, each), Filters((self.leave,), x))

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        rows = self.enter(x).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = rows.permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.leave(y.transpose(1, 2).reshape(n, tokens, width))  # type: ignore[no-any-return]


class Normed(nn.Module):
    """A layer norm over the width of the model."""

    def __init__(self, x: Mask) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(len(x), eps=1e-6)
        self.filters = (Filters((self.norm,), x),)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)  # type: ignore[no-any-return]


class Vit(nn.Module):
    """ViT-S/16 (Dosovitskiy et al., 2021; Touvron et al., 2021): norms run before their layers."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        x, side, heads = plan.model(384), plan.side(224) // 16, 6 if plan.width == 1 else 4
        self.patches = nn.Conv2d(3, len(x), 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, len(x)))
        self.places = nn.Parameter(torch.zeros(1, side**2 + 1, len(x)))
        self.blocks = nn.Sequential()
        for _ in range(plan.blocks(12)):
            hidden = plan.channels(1536)
            mlp = nn.Sequential(Normed(x), Dense(x, hidden, nn.GELU), Dense(hidden, x))
            attention = nn.Sequential(Normed(x), Attention(plan, x, heads))
            self.blocks.extend([Sum(attention, nn.Identity()), Sum(mlp, nn.Identity())])
        self.norm, self.last = Normed(x), nn.Linear(len(x), 1000)
        self.filters = (Filters((self.patches,), x),)
        self.dead = x

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.places
        return self.last(self.norm(self.blocks(tokens)[:, 0]))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Architecture:
    """How a network is built, what goes in (one sample), and how many parameters it has as published."""

    build: Callable[[Plan], nn.Module]
    sample: tuple[int, ...]
    parameters: int

    def made(self, plan: Plan) -> tuple[nn.Module, tuple[str, ...]]:
        """The module with seeded weights, in eval mode, and its inputs as edgewise's exporter takes them."""
        module = self.build(plan).eval()
        randomize(module, plan.seed)
        sides = [plan.side(n) for n in self.sample] if len(self.sample) == 3 else self.sample
        return module, (f"x=1x{'x'.join(map(str, sides))}",)


_PHOTO = (3, 224, 224)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "resnet18": Architecture(resnet18, _PHOTO, 11_689_512),
        "resnet50": Architecture(resnet50, _PHOTO, 25_557_032),
        "mobilenet_v2": Architecture(mobilenet_v2, _PHOTO, 3_504_872),
        "mobilenet_v3": Architecture(mobilenet_v3, _PHOTO, 2_542_856),
        "efficientnet": Architecture(efficientnet, _PHOTO, 5_288_548),
        "densenet121": Architecture(densenet121, _PHOTO, 7_978_856),
        "shufflenet_v2": Architecture(shufflenet_v2, _PHOTO, 2_278_604),
        "yolo": Architecture(Yolo, (3, 320, 320), 3_157_184),
        "unet": Architecture(Unet, (3, 128, 128), 31_037_698),
        "encoder": Architecture(encoder, (128, 80), 18_988_608),
        "vit": Architecture(Vit, _PHOTO, 22_050_664),
    }
)

TRANSFORMERS = ("encoder", "vit")
"""Those with a width of their own, through all layers, which norms run over."""


def randomize(module: nn.Module, seed: int) -> None:
    """Weights after He et al. (2015), and norms with scales, shifts, means and variances as if trained."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                if parameter.ndim < 2:
                    low, high = (0.5, 1.0) if _is_scale(part, name) else (-0.2, 0.2)
                    parameter.uniform_(low, high, generator=rng)
                elif parameter.ndim == 3:  # tokens and places
                    parameter.normal_(0, 0.2, generator=rng)
                else:
                    nn.init.kaiming_normal_(parameter, generator=rng)
            if isinstance(part, nn.BatchNorm2d):
                assert part.running_mean is not None
                assert part.running_var is not None
                part.running_mean.uniform_(-0.2, 0.2, generator=rng)
                part.running_var.uniform_(0.5, 1.5, generator=rng)


def _is_scale(part: nn.Module, name: str) -> bool:
    return isinstance(part, nn.BatchNorm2d | nn.LayerNorm) and name == "weight"


def filters_of(module: nn.Module) -> Iterator[Filters]:
    """The filters of every layer."""
    for part in module.modules():
        yield from getattr(part, "filters", ())


def zero_half(module: nn.Module, *, independent: bool = False, seed: int = 0) -> None:
    """Zero the filters that go by the plan, or a half that is drawn for every layer by itself."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for filters in filters_of(module):
            dead = filters.dead
            if independent:
                runs = len(dead) // filters.each
                dead = np.repeat(rng.permutation(runs) < runs // 2, filters.each)
            filters.zero(dead)
        if isinstance(module, Vit):
            for parameter in (module.token, module.places):
                parameter[..., torch.from_numpy(module.dead)] = 0


def zeroed(name: str, scheme: str, plan: Plan) -> tuple[nn.Module, tuple[str, ...]]:
    """A network and its inputs, with half of its filters zeroed by one of `SCHEMES`."""
    if scheme not in SCHEMES:
        raise ValueError(f"no scheme {scheme!r}: choose from {', '.join(SCHEMES)}")
    values = {**plan.__dict__, "narrow_model": scheme == "coupled-width"}
    values.pop("_rng")
    module, inputs = ARCHITECTURES[name].made(Plan(**values))
    if scheme != "none":
        zero_half(module, independent=scheme == "independent", seed=plan.seed)
    return module, inputs


def exported(name: str, scheme: str, folder: Path, plan: Plan | None = None) -> Path:
    """The .onnx file of a network in `folder`, exported with a free batch size if it is not there yet."""
    plan = plan or Plan()
    sizes = f"{plan.width:g}-{plan.depth:g}-{plan.pixels}-{plan.seed}"
    path = folder / f"{name}-{scheme}-{sizes}.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        module, inputs = zeroed(name, scheme, plan)
        files.save(to_model(module, inputs), path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ARCHITECTURES))
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--depth", type=float, default=1.0)
    parser.add_argument("--zeroed", choices=SCHEMES, default="none")
    options = parser.parse_args()
    table = Table("network", "parameters", "inputs", "nodes", "file")
    for name in options.names or ARCHITECTURES:
        plan = Plan(options.width, options.depth)
        module, inputs = zeroed(name, options.zeroed, plan)
        path = exported(name, options.zeroed, options.folder, plan)
        count, nodes = sum(p.numel() for p in module.parameters()), len(files.load(path).graph)
        table.add_row(name, f"{count:,}", *inputs, f"{nodes:,}", str(path))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
