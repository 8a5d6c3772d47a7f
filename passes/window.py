"""Where a convolution looks: what can be said of it without its weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import onnx_ir as ir

from edgewise.passes.base import Refused
from edgewise.passes.graph import attribute, constant_of


@dataclass(frozen=True)
class Window:
    """Which inputs a convolution sums, along each of its n spatial axes.

    Tap t of output o reads input o * stride + t * dilation - pad. `pads` are the n in front and the n
    behind. Where they depend on the size of the input, they are zero and `auto_pad` says how.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str = ""

    @classmethod
    def of(cls, conv: ir.Node) -> Window:
        """The window of a Conv; `Refused` where its weight is not constant."""
        weight = constant_of(conv.inputs[1])
        if weight is None:
            raise Refused("weight is not constant")
        kernel = weight.shape[2:]
        strides, dilations = (
            tuple(attribute(conv, name, ())) or (1,) * len(kernel) for name in ("strides", "dilations")
        )
        auto_pad = attribute(conv, "auto_pad", "NOTSET")
        if not auto_pad.startswith("SAME"):
            written = () if auto_pad == "VALID" else tuple(attribute(conv, "pads", ()))
            return cls(kernel, strides, dilations, written or (0,) * 2 * len(kernel))
        if any(n != 1 for n in strides + dilations):
            return cls(kernel, strides, dilations, (0,) * 2 * len(kernel), auto_pad)
        less, more = tuple((k - 1) // 2 for k in kernel), tuple(k // 2 for k in kernel)
        return cls(kernel, strides, dilations, less + more if auto_pad == "SAME_UPPER" else more + less)

    @classmethod
    def point(cls, axes: int) -> Window:
        """The window of a convolution that looks at the position it computes and nowhere else."""
        return cls((1,) * axes, (1,) * axes, (1,) * axes, (0,) * 2 * axes)

    @property
    def is_point(self) -> bool:
        """Whether the convolution mixes channels only; a single tap has no use for its dilation."""
        axes = len(self.kernel)
        return dataclasses.replace(self, dilations=(1,) * axes) == Window.point(axes)

    def surplus(self, axis: int) -> int:
        """The size of the output along an axis, at stride 1, less that of the input."""
        padding = self.pads[axis] + self.pads[axis + len(self.kernel)]
        return padding - self.dilations[axis] * (self.kernel[axis] - 1)
