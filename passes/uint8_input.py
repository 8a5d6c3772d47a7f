"""An image input takes the bytes of its pixels; their normalization moves into the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Outcome, Pass, PassError, Refused
from edgewise.passes.freeze_inputs import FIRST_IR_WITH_DEFAULTS, FreezeInputs
from edgewise.passes.graph import (
    Array,
    attribute,
    constant_of,
    graph_of,
    new_initializer,
    new_node,
    only_user,
    opset,
)
from edgewise.passes.linear import FLOATS, Channels, fold_into_consumer

_LAYOUTS = ("nchw", "nhwc")
_TO_NCHW, _TO_NHWC = (0, 3, 1, 2), (0, 2, 3, 1)
_FEW = 4  # channels of an image: gray, with alpha, RGB, RGB with alpha
_FIRST_BROADCASTING, _FIRST_PAD_OF_BYTES = 7, 11
_EXACT = 1e-5  # how far, in pixel values, a byte written as mean and scale may be off: rounding of float32


@dataclass(frozen=True)
class Uint8Input(Pass):
    """Let an image input take raw pixels, uint8, and normalize them in the first convolution.

    Given:   n = (x / scale - mean) / std, made of the pixels x by the caller, and y = Conv(n, W, b)
    Result:  V = W / (scale * std) and c = scale * mean, per channel, in one of these forms
             y = Conv(Cast(x), V, b - sum(V * c))           where the Conv pads nothing, or c is zero
             y = Conv(Cast(Pad(x, c)), V, b - sum(V * c))   where c is one byte, the same in all channels:
                                                            a border of zeros in n is one of c in x
             y = Conv(Cast(x) - c, V, b)                    where padding would meet another c
             y = Op((Cast(x) - c) * (1 / (scale * std)))    where no layer alone reads the image

    `layout` is that of the pixels, nchw or nhwc; without it the pass does nothing. With nhwc a Transpose
    follows the Cast, in place of the model's own if it begins with one. `mean` and `std` are one number
    or one a channel, 0.485/0.456/0.406, and are applied after the division by `scale`. `input` names the
    image, by default the only float input of rank 4. Raises `PassError` where there is none or the axis
    of its channels is not clear; so does a second run, which finds bytes.
    """

    name = "uint8-input"
    keeps_signature: ClassVar[bool] = False  # another type, and maybe another order of axes
    layout: str = ""
    scale: float = 1.0
    mean: str | int | float = 0.0
    std: str | int | float = 1.0
    input: str = ""

    def apply(self, model: ir.Model) -> Outcome:
        if not self.layout:
            return Outcome()
        if opset(model) < _FIRST_BROADCASTING:
            raise PassError(f"operator sets before {_FIRST_BROADCASTING} do not broadcast: upgrade the model")
        image = self.image_of(model)
        center, factor = self._center_and_factor(image)
        edits = 1
        if model.ir_version < FIRST_IR_WITH_DEFAULTS:
            edits += FreezeInputs().apply(model).edits
        sub, mul = _normalize(image, self.layout, center, factor)
        attempts: Sequence[Callable[[], bool]] = (
            lambda: mul is not None and _fold(mul, factor, np.zeros(1)),
            lambda: sub is not None and _pad_with_center(image, self.layout, sub, center, opset(model)),
            lambda: sub is not None and _fold(sub, np.ones(1), -center),
        )
        refused = Counter[str]()
        try:
            for attempt in attempts:
                edits += attempt()
        except Refused as refusal:
            refused[str(refusal)] += 1
        return Outcome(edits, MappingProxyType(dict(refused)))

    def image_of(self, model: ir.Model) -> ir.Value:
        """The input of `model`, as it is before this pass, that is to take pixels."""
        inputs = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
        named = [v for v in inputs if v.name == self.input]
        if self.input and not named:
            raise PassError(f"there is no input {self.input!r}, only {_names(inputs)}")
        images = [v for v in named or inputs if _is_float_image(v)]
        if self.input and not images:
            raise PassError(
                f"input {self.input!r} is no float image of rank 4 but {named[0].type} {named[0].shape}"
            )
        if len(images) != 1:
            found = _names(images) or "none"
            raise PassError(f"one float input of rank 4 is wanted, there are {found}: choose with input")
        if not images[0].uses():
            raise PassError(f"nothing reads input {_names(images)}")
        return images[0]

    def float_pixels(self, model: ir.Model, pixels: Array) -> Array:
        """What `model`, as it is before this pass, takes for `pixels` that lie in `layout`."""
        image = self.image_of(model)
        center, factor = self._center_and_factor(image)
        nchw = pixels.transpose(_TO_NCHW) if self.layout == "nhwc" else pixels
        normal: Array = (nchw.astype(np.float64) - center.reshape(-1, 1, 1)) * factor.reshape(-1, 1, 1)
        own = normal if _entry(image) is image else normal.transpose(_TO_NHWC)
        return own.astype(_dtype(image))

    def _center_and_factor(self, image: ir.Value) -> tuple[Array, Array]:
        """c and f, float64 [C] or [1], so that (x / scale - mean) / std = (x - c) * f."""
        if self.layout not in _LAYOUTS:
            raise PassError(f"layout is nchw or nhwc, not {self.layout!r}")
        channels = _channels(image)
        mean, std = _numbers("mean", self.mean, channels), _numbers("std", self.std, channels)
        if not (np.isfinite(mean).all() and np.isfinite([self.scale, *std]).all()):
            raise PassError("mean, std and scale are finite numbers")
        if not (self.scale > 0 and (std > 0).all()):
            raise PassError("scale and std are above zero")
        return mean * self.scale, 1 / (self.scale * std)


def _names(values: Sequence[ir.Value]) -> str:
    return ", ".join(v.name or "" for v in values)


def _numbers(option: str, given: str | float, channels: int | None) -> Array:
    """One number, or one a channel."""
    try:
        numbers = np.array([float(part) for part in str(given).split("/")])
    except ValueError:
        raise PassError(
            f"{option} is one number, or one a channel as in 0.485/0.456/0.406, not {given!r}"
        ) from None
    if channels is not None and len(numbers) not in (1, channels):
        raise PassError(f"{option} has {len(numbers)} numbers for {channels} channels")
    return numbers


def _is_float_image(value: ir.Value) -> bool:
    dtypes = [ir.DataType.from_numpy(np.dtype(kind)) for kind in FLOATS]
    plain = isinstance(value.type, ir.TensorType) and value.type.dtype in dtypes
    return plain and value.shape is not None and value.shape.rank() == 4


def _dtype(value: ir.Value) -> np.dtype[Any]:
    assert value.dtype is not None  # `_is_float_image` has seen to it
    return value.dtype.numpy()


def _entry(image: ir.Value) -> ir.Value:
    """The value [N, C, H, W] of the image: itself, or what the model's own Transpose makes of it."""
    reader = only_user(image)
    if reader is not None and reader.graph is image.graph and _makes_nchw(reader):
        entry = reader.outputs[0]
    elif _is_nchw(image):
        entry = image
    else:
        raise PassError(f"it is not clear which axis of input {image.name!r} holds the channels")
    if entry.is_graph_output():
        raise PassError(f"input {image.name!r} is an output as well")
    return entry


def _makes_nchw(node: ir.Node) -> bool:
    perm = attribute(node, "perm", ()) if node.op_type == "Transpose" and node.domain == "" else ()
    return tuple(perm) == _TO_NCHW


def _is_nchw(image: ir.Value) -> bool:
    """Whether convolutions alone read the image, or the second of its axes alone is as short as channels."""
    if all(u.node.op_type == "Conv" and u.node.domain == "" and u.idx == 0 for u in image.uses()):
        return True
    second, last = (_size(image, axis) for axis in (1, 3))
    return second is not None and second <= _FEW and (last is None or last > _FEW)


def _size(value: ir.Value, axis: int) -> int | None:
    dim = None if value.shape is None else value.shape[axis]
    return dim if isinstance(dim, int) and dim >= 0 else None


def _channels(image: ir.Value) -> int | None:
    """The number of channels, as declared or as the convolution has it; None where neither says."""
    entry = _entry(image)
    declared = _size(image, 1 if entry is image else 3)
    conv = only_user(entry)
    if declared is not None or conv is None or conv.op_type != "Conv" or conv.domain != "":
        return declared
    weight = constant_of(conv.inputs[1])
    return None if weight is None else weight.shape[1] * int(attribute(conv, "group", 1))


def _normalize(
    image: ir.Value, layout: str, center: Array, factor: Array
) -> tuple[ir.Node | None, ir.Node | None]:
    """Let `image` take bytes and its readers the normalized pixels; the Sub and the Mul that do it."""
    assert isinstance(image.graph, ir.Graph)
    first, entry = next(iter(image.graph)), _entry(image)
    uses, own = entry.uses(), entry.producer()
    pixels = _cast(first, image, layout, transposed=own is not None)
    centered = _arithmetic(first, "Sub", pixels, center, neutral=0)
    normal = _arithmetic(first, "Mul", centered, factor, neutral=1)
    for node, index in uses:
        node.replace_input_with(index, normal)
    if own is not None:
        image.graph.remove(own, safe=True)
    sub = None if centered is pixels else centered.producer()
    return sub, None if normal is centered else normal.producer()


def _cast(first: ir.Node, image: ir.Value, layout: str, *, transposed: bool) -> ir.Value:
    """The pixels as floats [N, C, H, W]; `transposed` says that the model takes [N, H, W, C] as it is."""
    assert image.shape is not None
    nchw = _permuted(image.shape, _TO_NCHW) if transposed else image.shape
    kind, image.type = image.type, ir.TensorType(ir.DataType.UINT8)
    assert kind is not None
    image.shape = nchw.copy() if layout == "nchw" else _permuted(nchw, _TO_NHWC)
    cast = new_node(first, "Cast", [image], {"to": int(kind.dtype)}, hint=f"{image.name}.float")
    cast.type, cast.shape = kind, image.shape.copy()
    if layout == "nchw":
        return cast
    pixels = new_node(first, "Transpose", [cast], {"perm": _TO_NCHW}, hint=f"{image.name}.nchw")
    pixels.shape = nchw.copy()
    return pixels


def _permuted(shape: ir.Shape, order: tuple[int, ...]) -> ir.Shape:
    return ir.Shape([shape[axis] for axis in order])


def _arithmetic(first: ir.Node, op_type: str, data: ir.Value, numbers: Array, *, neutral: int) -> ir.Value:
    """`data` minus or times one number a channel; `data` itself where that changes nothing."""
    if (numbers == neutral).all():
        return data
    same = (numbers == numbers[0]).all()
    array = numbers[:1].reshape(()) if same else numbers.reshape(-1, 1, 1)
    constant = new_initializer(graph_of(first), f"{data.name}.{op_type}.constant", array.astype(_dtype(data)))
    result = new_node(first, op_type, [data, constant], hint=f"{data.name}.{op_type}")
    result.shape = None if data.shape is None else data.shape.copy()
    return result


def _fold(node: ir.Node, scale: Array, shift: Array) -> bool:
    """Fold `node`, which gives scale * data + shift, into the layer that alone reads its result."""

    def vectors(channels: Channels) -> tuple[Array, Array]:
        if channels.axis != 1:
            raise Refused("the layer's channels are not those of the image")
        return np.broadcast_to(scale, (channels.size,)), np.broadcast_to(shift, (channels.size,))

    data = node.inputs[0]
    if data is None or not fold_into_consumer(node, data, vectors):
        raise Refused("no layer alone reads the image")
    return True


def _pad_with_center(image: ir.Value, layout: str, sub: ir.Node, center: Array, version: int) -> bool:
    """Pad the bytes with what becomes zero, in place of the Conv behind `sub`; whether it padded."""
    conv, cast = only_user(sub.outputs[0]), only_user(image)
    if conv is None or conv.op_type != "Conv" or conv.domain != "" or cast is None:
        return False
    pads = attribute(conv, "pads", ())
    if not any(pads):
        return False
    byte = round(center[0])
    if not np.allclose(center, byte, rtol=0, atol=_EXACT) or not 0 <= byte <= 255:
        raise Refused("padding would meet the mean, which is not one byte in all channels")
    if version < _FIRST_PAD_OF_BYTES:
        raise Refused(f"Pad takes no bytes before operator set {_FIRST_PAD_OF_BYTES}")
    begin, end = ((0, *p) if layout == "nchw" else (*p, 0) for p in (pads[:2], pads[2:]))
    amounts = new_initializer(graph_of(cast), f"{image.name}.pads", np.array([0, *begin, 0, *end], np.int64))
    value = new_initializer(graph_of(cast), f"{image.name}.border", np.array(byte, np.uint8))
    padded = new_node(cast, "Pad", [image, amounts, value], hint=f"{image.name}.padded")
    cast.replace_input_with(0, padded)
    conv.attributes.pop("pads")
    node: ir.Node | None = cast
    while node is not None and node is not conv:  # what lies between has grown
        node.outputs[0].shape = None
        node = only_user(node.outputs[0])
    return True
