"""Operators that rearrange: the numbers stay, their places change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from edgewise.training.operators.call import Call, Operator
from edgewise.training.operators.tensors import gathered, unsupported


def identity(call: Call) -> Tensor:
    return call.input(0)


def reshape(call: Call) -> Tensor:
    data, shape = call.input(0), call.ints("shape", 1) or ()
    if not call.attr("allowzero", 0):
        shape = tuple(data.shape[i] if d == 0 else d for i, d in enumerate(shape))
    return data.reshape(_with_more_rows(shape, data.numel()))


def _with_more_rows(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The shape for a batch of more rows than it was written for: exporters leave their own size in it."""
    written = math.prod(shape)
    has_more = len(shape) > 1 and min(shape) > 0 and size > written and size % written == 0
    return (size // written * shape[0], *shape[1:]) if has_more else shape


def transpose(call: Call) -> Tensor:
    data = call.input(0)
    return data.permute(call.attr("perm") or tuple(range(data.dim()))[::-1])


def flatten(call: Call) -> Tensor:
    data, axis = call.input(0), call.attr("axis", 1)
    axis = axis + data.dim() if axis < 0 else axis
    return data.reshape(math.prod(data.shape[:axis]), math.prod(data.shape[axis:]))


def squeeze(call: Call) -> Tensor:
    data, axes = call.input(0), call.ints("axes", 1)
    return data.squeeze() if axes is None else data.squeeze(axes)


def unsqueeze(call: Call) -> Tensor:
    data, axes = call.input(0), call.ints("axes", 1) or ()
    rank = data.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        data = data.unsqueeze(axis)
    return data


def expand(call: Call) -> Tensor:
    data, shape = call.input(0), call.ints("shape", 1) or ()
    rank = max(data.dim(), len(shape))
    sizes, shape = (1,) * (rank - data.dim()) + tuple(data.shape), (1,) * (rank - len(shape)) + shape
    return data.expand([n if wanted == 1 else wanted for n, wanted in zip(sizes, shape, strict=True)])


def tile(call: Call) -> Tensor:
    return call.input(0).repeat(call.ints("repeats", 1) or ())


def concat(call: Call) -> Tensor:
    return torch.cat(gathered([t for t in call.inputs if t is not None]), call.attr("axis"))


def split(call: Call) -> tuple[Tensor, ...]:
    data, axis = call.input(0), call.attr("axis", 0)
    sizes = call.ints("split", 1)
    if sizes is None:
        total, parts = data.shape[axis], call.attr("num_outputs", len(call.node.outputs))
        step = -(-total // parts)
        sizes = tuple(max(0, min(step, total - i * step)) for i in range(parts))
    return tuple(torch.split(data, list(sizes), axis))


def shape(call: Call) -> Tensor:
    dims = list(call.input(0).shape)
    return torch.tensor(dims[call.attr("start", 0) : call.attr("end")], dtype=torch.int64)


def size(call: Call) -> Tensor:
    return torch.tensor(call.input(0).numel(), dtype=torch.int64)


def depth_to_space(call: Call) -> Tensor:
    data, block = call.input(0), call.attr("blocksize")
    n, c, h, w = data.shape
    if call.attr("mode", "DCR") == "DCR":
        blocks = data.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        blocks = data.reshape(n, c // block**2, block, block, h, w).permute(0, 1, 4, 2, 5, 3)
    return blocks.reshape(n, c // block**2, h * block, w * block)


def space_to_depth(call: Call) -> Tensor:
    data, block = call.input(0), call.attr("blocksize")
    n, c, h, w = data.shape
    blocks = data.reshape(n, c, h // block, block, w // block, block)
    order = (0, 3, 5, 1, 2, 4) if call.attr("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    return blocks.permute(order).reshape(n, c * block**2, h // block, w // block)


def col2im(call: Call) -> Tensor:
    """Sum sliding blocks back into an image: torch's fold onto the padded image, then the crop."""
    image, block = call.ints("image_shape", 1) or (), call.ints("block_shape", 2) or ()
    if len(image) != 2:
        raise unsupported(call, f"an image of {len(image)} axes")
    pads = call.attr("pads", (0, 0, 0, 0))
    padded = (image[0] + pads[0] + pads[2], image[1] + pads[1] + pads[3])
    strides, dilations = call.attr("strides", (1, 1)), call.attr("dilations", (1, 1))
    folded = torch.nn.functional.fold(
        call.input(0), padded, (block[0], block[1]), dilation=dilations, stride=strides
    )
    return folded[:, :, pads[0] : pads[0] + image[0], pads[1] : pads[1] + image[1]]


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "Col2Im": col2im,
        "Concat": concat,
        "DepthToSpace": depth_to_space,
        "Expand": expand,
        "Flatten": flatten,
        "Identity": identity,
        "Reshape": reshape,
        "Shape": shape,
        "Size": size,
        "SpaceToDepth": space_to_depth,
        "Split": split,
        "Squeeze": squeeze,
        "Tile": tile,
        "Transpose": transpose,
        "Unsqueeze": unsqueeze,
    }
)
