"""Random nets of convolutions whose channels are partly zero, constant or unread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from hypothesis import strategies as st
from rewrites import build

from edgewise.runtime.evaluate import Array

SIZE = 6  # pixels along each of two axes, at first


@dataclass(frozen=True)
class Value:
    """A value of shape [N, channels, size, size]."""

    name: str
    channels: int
    size: int


@dataclass
class Net:
    """A graph in the making: lines of onnx's text form, and weights."""

    rng: np.random.Generator
    lines: list[str] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)

    def node(self, expression: str, channels: int, size: int) -> Value:
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        return Value(name, channels, size)

    def constant(self, array: Array) -> str:
        name = f"c{len(self.weights)}"
        self.weights[name] = array
        return name

    def some(self, size: int) -> Array:
        """A mask that takes out about half, or nothing."""
        return self.rng.random(size) < self.rng.choice([0.0, 0.5, 0.7])

    def matrix(self, *shape: int, output_axis: int = 0, input_axis: int = 1) -> Array:
        """A weight with outputs that do nothing and inputs that nothing is done with."""
        weight = (self.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        np.moveaxis(weight, output_axis, 0)[self.some(shape[output_axis])] = 0
        if shape[input_axis] > 1 and self.rng.random() < 0.3:
            np.moveaxis(weight, input_axis, 0)[self.some(shape[input_axis])] = 0
        return weight

    def vector(self, size: int) -> Array:
        """Numbers per channel, many of them zero."""
        vector = self.rng.standard_normal(size).astype(np.float32)
        vector[self.some(size)] = 0
        return vector

    def model(self, last: str) -> ir.Model:
        body = "\n".join([*self.lines, last])
        return build(f"net (float[N, 3, {SIZE}, {SIZE}] x) => (float[] y) {{ {body} }}", 18, **self.weights)


def conv(net: Net, v: Value, pick: Callable[[int], int]) -> Value:
    """Any kernel, padding and number of groups."""
    groups = (1, v.channels, 2 if v.channels % 2 == 0 else 1)[pick(3)]
    kernel, pad = ((1, 0), (3, 1), (3, 0))[pick(3 if v.size > 2 else 2)]
    outputs = (v.channels, 2 * v.channels, 4)[pick(3)] if groups <= 2 else v.channels * (1 + pick(2))
    weight = net.constant(net.matrix(outputs, v.channels // groups, kernel, kernel))
    bias = f", {net.constant(net.vector(outputs))}" if pick(2) else ""
    attributes = f"group = {groups}, pads = [{pad}, {pad}, {pad}, {pad}]"
    return net.node(f"Conv<{attributes}>({v.name}, {weight}{bias})", outputs, v.size - kernel + 1 + 2 * pad)


def conv_transpose(net: Net, v: Value, pick: Callable[[int], int]) -> Value:
    weight = net.constant(net.matrix(v.channels, 4, 1, 1, output_axis=1, input_axis=0))
    return net.node(f"ConvTranspose({v.name}, {weight}, {net.constant(net.vector(4))})", 4, v.size)


def norm(net: Net, v: Value, pick: Callable[[int], int]) -> Value:
    scale, shift = net.vector(v.channels), net.vector(v.channels)
    names = [net.constant(a) for a in (scale, shift, net.vector(v.channels), np.exp(net.vector(v.channels)))]
    if pick(4) == 0 and v.size > 1:
        return net.node(f"InstanceNormalization({v.name}, {names[0]}, {names[1]})", v.channels, v.size)
    return net.node(f"BatchNormalization({v.name}, {', '.join(names)})", v.channels, v.size)


def activation(net: Net, v: Value, pick: Callable[[int], int]) -> Value:
    kinds = ["Relu", "Sigmoid", "LeakyRelu<alpha = 0.2>", "HardSwish", "Tanh", "Elu", "Softplus", "Identity"]
    kinds += ["Dropout", "Abs", "Cast<to = 1>", "Neg", "HardSigmoid", "Erf", "Selu", "Celu<alpha = 0.7>"]
    return net.node(f"{kinds[pick(len(kinds))]}({v.name})", v.channels, v.size)


def pool(net: Net, v: Value, pick: Callable[[int], int]) -> Value:
    window = "kernel_shape = [3, 3], pads = [1, 1, 1, 1]"
    kinds = ["MaxPool", "AveragePool", "AveragePool"]
    chosen = pick(3)
    counted = f", count_include_pad = {chosen - 1}" if chosen else ""
    return net.node(f"{kinds[chosen]}<{window}{counted}>({v.name})", v.channels, v.size)


def gate(net: Net, v: Value, pick: Callable[[int], int]) -> Value:
    """Squeeze and excitation."""
    squeezed = net.node(f"GlobalAveragePool({v.name})", v.channels, 1)
    hidden = net.node(f"Conv({squeezed.name}, {net.constant(net.matrix(3, v.channels, 1, 1))})", 3, 1)
    active = net.node(f"Relu({hidden.name})", 3, 1)
    weight, bias = net.matrix(v.channels, 3, 1, 1), net.vector(v.channels)
    back = net.node(f"Conv({active.name}, {net.constant(weight)}, {net.constant(bias)})", v.channels, 1)
    gated = net.node(f"Sigmoid({back.name})", v.channels, 1)
    return net.node(f"Mul({v.name}, {gated.name})", v.channels, v.size)


def scaled(net: Net, v: Value, pick: Callable[[int], int]) -> Value:
    operator = ("Mul", "Add", "Max", "Min", "Sub", "PRelu")[pick(6)]
    factor = net.constant(net.vector(v.channels).reshape(1, -1, 1, 1))
    return net.node(f"{operator}({v.name}, {factor})", v.channels, v.size)


def split(net: Net, v: Value, pick: Callable[[int], int]) -> Value:
    """A part of the channels is worked on, and goes back in another order."""
    if v.channels < 2:
        return v
    first = 1 + pick(v.channels - 1)
    sizes = net.constant(np.array([first, v.channels - first]))
    a, b = f"a{len(net.lines)}", f"b{len(net.lines)}"
    net.lines.append(f"{a}, {b} = Split<axis = 1>({v.name}, {sizes})")
    changed = activation(net, Value(a, first, v.size), pick)
    return net.node(f"Concat<axis = 1>({b}, {changed.name})", v.channels, v.size)


def window(net: Net, v: Value, pick: Callable[[int], int]) -> Value:
    start = pick(v.channels)
    stop = start + 1 + pick(v.channels - start)
    ends = [net.constant(np.array([i])) for i in (start, stop, 1)]
    return net.node(f"Slice({v.name}, {', '.join(ends)})", stop - start, v.size)


def shuffle(net: Net, v: Value, pick: Callable[[int], int]) -> Value:
    """The channel shuffle of two groups, or a selection that turns the order around."""
    if v.channels % 2 or pick(2):
        order = net.constant(np.arange(v.channels)[::-1].copy())
        return net.node(f"Gather<axis = 1>({v.name}, {order})", v.channels, v.size)
    apart = net.constant(np.array([0, 2, v.channels // 2, v.size, v.size]))
    together = net.constant(np.array([0, v.channels, v.size, v.size]))
    split_up = net.node(f"Reshape({v.name}, {apart})", v.channels, v.size)
    turned = net.node(f"Transpose<perm = [0, 2, 1, 3, 4]>({split_up.name})", v.channels, v.size)
    return net.node(f"Reshape({turned.name}, {together})", v.channels, v.size)


def channels_last(net: Net, v: Value, pick: Callable[[int], int]) -> Value:
    """A dense layer on the channels of every pixel."""
    last = net.node(f"Transpose<perm = [0, 2, 3, 1]>({v.name})", v.channels, v.size)
    dense = net.node(
        f"MatMul({last.name}, {net.constant(net.matrix(v.channels, 4, output_axis=1, input_axis=0))})", 4, 0
    )
    return net.node(f"Transpose<perm = [0, 3, 1, 2]>({dense.name})", 4, v.size)


def padded(net: Net, v: Value, pick: Callable[[int], int]) -> Value:
    """Around the pixels, or around the channels too."""
    more = pick(2)
    widths = net.constant(np.array([0, more, 1, 0, 0, 2 * more, 0, 1]))
    return net.node(f"Pad({v.name}, {widths})", v.channels + 3 * more, v.size + 1)


def residual(net: Net, v: Value, pick: Callable[[int], int]) -> Value:
    inner = activation(net, conv_of_same_shape(net, v), pick)
    return net.node(f"Add({v.name}, {inner.name})", v.channels, v.size)


def conv_of_same_shape(net: Net, v: Value) -> Value:
    weight = net.constant(net.matrix(v.channels, v.channels, 3, 3))
    bias = net.constant(net.vector(v.channels))
    return net.node(f"Conv<pads = [1, 1, 1, 1]>({v.name}, {weight}, {bias})", v.channels, v.size)


def joined(net: Net, v: Value, pick: Callable[[int], int]) -> Value:
    other = conv_of_same_shape(net, v)
    return net.node(f"Concat<axis = 1>({v.name}, {other.name})", 2 * v.channels, v.size)


def saturated(net: Net, v: Value, pick: Callable[[int], int]) -> Value:
    """Filters of one sign, between functions whose ranges are known: many give one number for every input."""
    kinds = ["Relu", "Sigmoid", "HardSigmoid", "Softplus", "HardSwish", "Mish", "Erf", "Tanh", "Abs"]
    active = net.node(f"{kinds[pick(len(kinds))]}({v.name})", v.channels, v.size)
    weight, bias, sign = net.matrix(4, v.channels, 3, 3), 4 * net.vector(4), -1 if pick(3) else 1
    one_sided = net.some(4)
    weight[one_sided], bias[one_sided] = (sign * np.abs(a[one_sided]) for a in (weight, bias))
    names = f"{net.constant(weight)}, {net.constant(bias)}"
    y = net.node(f"Conv<pads = [1, 1, 1, 1]>({active.name}, {names})", 4, v.size)
    low, high = net.constant(np.array(-0.5, np.float32)), net.constant(np.array(1, np.float32))
    ends = ("Relu({})", "HardSigmoid({})", "HardSwish({})", f"Clip({{}}, {low}, {high})")
    return net.node(ends[pick(4)].format(y.name), 4, v.size)


def normed(net: Net, v: Value, pick: Callable[[int], int]) -> Value:
    """A norm over the channels of every pixel, as ConvNeXt has it."""
    last = net.node(f"Transpose<perm = [0, 2, 3, 1]>({v.name})", v.channels, v.size)
    scale, shift = net.constant(net.vector(v.channels)), net.constant(net.vector(v.channels))
    norm = net.node(f"LayerNormalization<epsilon = 0.5>({last.name}, {scale}, {shift})", v.channels, v.size)
    return net.node(f"Transpose<perm = [0, 3, 1, 2]>({norm.name})", v.channels, v.size)


def attention(net: Net, v: Value, pick: Callable[[int], int]) -> Value:
    """Two heads, of which each averages the pixels of its channels."""
    if v.channels % 2:
        return v
    apart = net.constant(np.array([0, 2, v.channels // 2, v.size**2]))
    together = net.constant(np.array([0, v.channels, v.size, v.size]))
    q, k, values = (
        net.node(f"Reshape({conv_of_same_shape(net, v).name}, {apart})", v.channels, v.size) for _ in range(3)
    )
    turned = net.node(f"Transpose<perm = [0, 1, 3, 2]>({k.name})", v.channels, v.size)
    scores = net.node(f"MatMul({turned.name}, {q.name})", v.channels, v.size)
    weights = net.node(f"Softmax<axis = 2>({scores.name})", v.channels, v.size)
    mean = net.node(f"MatMul({values.name}, {weights.name})", v.channels, v.size)
    return net.node(f"Reshape({mean.name}, {together})", v.channels, v.size)


LAYERS = (
    conv, conv, conv, norm, activation, activation, pool, gate, scaled, split, window, shuffle, residual,
    joined, padded, conv_transpose, channels_last, saturated, saturated, normed, attention,
)  # fmt: skip


@st.composite
def nets(draw: st.DrawFn) -> ir.Model:
    """A chain of layers, some with branches of their own, then a classifier or a map of classes.

    The last bias is far from zero: outputs that cancel have rounding errors as large as themselves.
    """

    def pick(size: int) -> int:
        return draw(st.integers(0, size - 1))

    net = Net(np.random.default_rng(draw(st.integers(0, 2**16))))
    v = conv(net, Value("x", 3, SIZE), pick)
    for layer in draw(st.lists(st.sampled_from(LAYERS), min_size=2, max_size=8)):
        if v.channels <= 16:
            v = layer(net, v, pick)
    if pick(3) == 0:
        weight, bias = net.constant(net.matrix(5, v.channels, 1, 1)), net.constant(3 + net.vector(5))
        return net.model(f"y = Conv({v.name}, {weight}, {bias})")
    flat = net.node(f"Flatten({v.name})", 0, 0)
    weight = net.constant(net.matrix(5, v.channels * v.size**2))
    return net.model(f"y = Gemm<transB = 1>({flat.name}, {weight}, {net.constant(3 + net.vector(5))})")
