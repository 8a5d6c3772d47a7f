"""Small copies of well-known networks, with half of all filters zeroed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir
from channel_nets import Net, Value
from rewrites import build

from edgewise.runtime.evaluate import Array

PIXELS = 32


@dataclass
class Zeroed(Net):
    """A net whose layers lose half of their filters: the first ones, or any half.

    With `norms` the layers keep their filters, and the batch norms behind them have scale and shift zero.
    """

    first: bool = True
    norms: bool = False

    def half(self, size: int) -> Array:
        return np.arange(size // 2) if self.first else self.rng.permutation(size)[: size // 2]

    def layer(
        self, v: Value, outputs: int, kernel: int = 3, *, stride: int = 1, groups: int = 1, act: str = "Relu"
    ) -> Value:
        """Conv, batch norm if there are any, and an activation; `act` of "" is none."""
        inner = v.channels // groups
        weight = self.rng.standard_normal((outputs, inner, kernel, kernel)) / np.sqrt(inner * kernel**2)
        bias, dead = self.rng.standard_normal(outputs), self.half(outputs)
        if not self.norms:
            weight[dead], bias[dead] = 0, 0
        names = ", ".join(self.constant(a.astype(np.float32)) for a in (weight, bias))
        attributes = f"group = {groups}, strides = [{stride}, {stride}], pads = {[kernel // 2] * 4}"
        y = self.node(f"Conv<{attributes}>({v.name}, {names})", outputs, v.size // stride)
        return self.act(self.norm(y, dead) if self.norms else y, act)

    def norm(self, v: Value, dead: Array) -> Value:
        scale, shift, mean, variance = self.rng.uniform(0.5, 1.5, (4, v.channels)).astype(np.float32)
        scale[dead], shift[dead] = 0, 0
        names = ", ".join(self.constant(a) for a in (scale, shift, mean, variance))
        return self.node(f"BatchNormalization({v.name}, {names})", v.channels, v.size)

    def act(self, v: Value, act: str) -> Value:
        if act != "SiLU":
            return self.node(f"{act}({v.name})", v.channels, v.size) if act else v
        return self.op("Mul", v, self.node(f"Sigmoid({v.name})", v.channels, v.size))

    def op(self, operator: str, *values: Value) -> Value:
        """An elementwise operator."""
        return self.node(
            f"{operator}({', '.join(v.name for v in values)})", values[0].channels, values[0].size
        )

    def concat(self, *values: Value) -> Value:
        names = ", ".join(v.name for v in values)
        return self.node(f"Concat<axis = 1>({names})", sum(v.channels for v in values), values[0].size)

    def classified(self, v: Value) -> ir.Model:
        """Global pooling and a dense layer, which keeps its rows."""
        pooled = self.node(f"GlobalAveragePool({v.name})", v.channels, 1)
        flat = self.node(f"Flatten({pooled.name})", v.channels, 1)
        weight, bias = self.rng.standard_normal((10, v.channels)), self.rng.standard_normal(10)
        names = ", ".join(self.constant(a.astype(np.float32)) for a in (weight, bias))
        return self.finished(f"y = Gemm<transB = 1>({flat.name}, {names})")

    def mapped(self, v: Value) -> ir.Model:
        """A class for every pixel, all of which are kept."""
        weight = self.constant(self.rng.standard_normal((3, v.channels, 1, 1)).astype(np.float32))
        return self.finished(f"y = Conv({v.name}, {weight})")

    def finished(self, last: str) -> ir.Model:
        body = "\n".join([*self.lines, last])
        return build(
            f"net (float[N, 3, {PIXELS}, {PIXELS}] x) => (float[] y) {{ {body} }}", 17, **self.weights
        )


def _resnet(net: Zeroed, x: Value) -> ir.Model:
    """Four stages of two basic blocks (He et al., 2016)."""
    v = net.layer(x, 8, 7, stride=2)
    for stage in range(4):
        for block in range(2):
            width, stride = 8 * 2**stage, 2 if stage and not block else 1
            inner = net.layer(net.layer(v, width, stride=stride), width, act="")
            skip = v if block or not stage else net.layer(v, width, 1, stride=stride, act="")
            v = net.act(net.op("Add", inner, skip), "Relu")
    return net.classified(v)


def _mobilenet(net: Zeroed, x: Value) -> ir.Model:
    """Inverted residuals with linear bottlenecks (Sandler et al., 2018)."""
    v = net.layer(x, 8, stride=2, act="Clip")
    for width, count, stride in ((8, 1, 1), (12, 2, 2), (16, 3, 2), (24, 3, 1), (40, 3, 2)):
        for block in range(count):
            wide = net.layer(v, 6 * v.channels, 1, act="HardSwish")
            deep = net.layer(
                wide, wide.channels, groups=wide.channels, stride=stride if not block else 1, act="HardSwish"
            )
            narrow = net.layer(deep, width, 1, act="")
            v = net.op("Add", v, narrow) if block else narrow
    return net.classified(net.layer(v, 160, 1, act="HardSwish"))


def _c2f(net: Zeroed, x: Value) -> ir.Model:
    """Chunked bottlenecks whose parts are all concatenated, as in YOLOv8."""
    v = net.layer(x, 8, stride=2, act="SiLU")
    for width in (16, 32):
        v = net.layer(net.layer(v, width, stride=2, act="SiLU"), width, 1, act="SiLU")
        left, right = f"l{len(net.lines)}", f"r{len(net.lines)}"
        net.lines.append(f"{left}, {right} = Split<axis = 1>({v.name})")
        parts = [Value(name, width // 2, v.size) for name in (left, right)]
        for _ in range(2):
            inner = net.layer(net.layer(parts[-1], width // 2, act="SiLU"), width // 2, act="SiLU")
            parts.append(net.op("Add", parts[-1], inner))
        v = net.layer(net.concat(*parts), width, 1, act="SiLU")
    return net.mapped(v)


def _squeeze(net: Zeroed, x: Value) -> ir.Model:
    """Inverted residuals with squeeze-and-excitation gates, as in EfficientNet."""
    v = net.layer(x, 12, stride=2, act="SiLU")
    for block in range(4):
        wide = net.layer(v, 48, 1, act="SiLU")
        deep = net.layer(wide, 48, groups=48, act="SiLU")
        pooled = net.node(f"GlobalAveragePool({deep.name})", 48, 1)
        gate = net.layer(net.layer(pooled, 8, 1, act="SiLU"), 48, 1, act="Sigmoid")
        narrow = net.layer(net.op("Mul", deep, gate), 12, 1, act="")
        v = net.op("Add", v, narrow) if block else narrow
    return net.classified(net.layer(v, 96, 1, act="SiLU"))


def _unet(net: Zeroed, x: Value) -> ir.Model:
    """Down, up by transposed convolutions, and skips that are concatenated (Ronneberger et al., 2015)."""
    skips = []
    v = x
    for width in (8, 16, 32):
        v = net.layer(net.layer(v, width), width)
        skips.append(v)
        v = net.node(f"MaxPool<kernel_shape = [2, 2], strides = [2, 2]>({v.name})", width, v.size // 2)
    for skip in reversed(skips):
        weight = net.rng.standard_normal((v.channels, skip.channels, 2, 2))
        weight[:, net.half(skip.channels)] = 0
        name = net.constant(weight.astype(np.float32))
        up = net.node(f"ConvTranspose<strides = [2, 2]>({v.name}, {name})", skip.channels, 2 * v.size)
        v = net.layer(net.concat(up, skip), skip.channels)
    return net.mapped(v)


def _densenet(net: Zeroed, x: Value) -> ir.Model:
    """Every layer reads what all before it made (Huang et al., 2017)."""
    v = net.layer(x, 16)
    for _ in range(6):
        v = net.concat(v, net.layer(net.layer(v, 32, 1), 8))
    return net.classified(net.layer(v, 32, 1))


BUILDERS: Mapping[str, Callable[[Zeroed, Value], ir.Model]] = MappingProxyType(
    {
        "resnet": _resnet,
        "mobilenet": _mobilenet,
        "c2f": _c2f,
        "squeeze": _squeeze,
        "unet": _unet,
        "densenet": _densenet,
    }
)


def zeroed(name: str, *, first: bool, norms: bool) -> ir.Model:
    """One of `BUILDERS`, with weights drawn by a fixed seed."""
    net = Zeroed(np.random.default_rng(0), first=first, norms=norms)
    return BUILDERS[name](net, Value("x", 3, PIXELS))
