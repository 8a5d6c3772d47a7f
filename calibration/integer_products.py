"""What int8 kernels compute of a convolution or a matrix product, integer by integer, on any processor.

Without VNNI, x86 kernels multiply unsigned activations by signed weights, add the products of neighbours
(0 and 1, 2 and 3, ... in the order of `edgewise.calibration.kernels.kernel_rows`) in 16 bits, cut what does
not fit (vpmaddubsw), and go on in 32 bits. Convolutions with one filter a channel, unsigned weights and
signed activations take other kernels, which add in 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.lib.stride_tricks import sliding_window_view

from edgewise.passes.graph import Array, attribute

LIMITS = (-(2**15), 2**15 - 1)
"""What a pair of products is cut to."""

_EXACT = 512  # products of 8 bits whose sum float32 holds exactly
_HARMLESS = 256  # the sum of two activations that no weights of 8 bits make too large
_CHUNK = 1 << 22  # sums of pairs in memory at once


def patches(node: ir.Node, levels: Array, kernel: Sequence[int], zero_point: int) -> Array:
    """The integers that `node` multiplies by its weights, as (groups, positions, k).

    `levels` is the input of a Conv, Gemm or MatMul as stored, `kernel` the spatial shape of the weights of
    a Conv. Padding is zero, which is stored as `zero_point`.
    """
    if node.op_type != "Conv":
        matrix = levels.T if attribute(node, "transA", 0) else levels
        return matrix.reshape(1, -1, matrix.shape[-1])
    windows = _windows(node, levels, kernel, zero_point)
    rank, group = len(kernel), int(attribute(node, "group", 1))
    batch, channels = windows.shape[:2]
    split = windows.reshape(batch, group, channels // group, *windows.shape[2:])
    ordered = np.moveaxis(np.moveaxis(split, 2, -1), 1, 0)
    return ordered.reshape(group, batch * math.prod(windows.shape[2 : 2 + rank]), -1)


def arrange(node: ir.Node, sums: Array, shape: Sequence[int], kernel: Sequence[int]) -> Array:
    """(groups, positions, channels of a group) as the output of `node` for an input of that `shape`."""
    rows = np.moveaxis(sums, 0, 1).reshape(sums.shape[1], -1)
    if node.op_type == "Gemm":
        return rows
    if node.op_type == "MatMul":
        return rows.reshape(*shape[:-1], rows.shape[-1])
    spatial = [
        (size + sum(pads) - reach) // stride + 1
        for size, pads, reach, stride in zip(shape[2:], *geometry(node, shape[2:], kernel), strict=True)
    ]
    return np.moveaxis(rows.reshape(shape[0], *spatial, rows.shape[-1]), -1, 1)


def products(columns: Array, rows: Array) -> Array:
    """`columns` (positions, k) times `rows` (channels, k) as (positions, channels): floats, but exact."""
    if rows.shape[1] <= _EXACT:
        return columns.astype(np.float32) @ rows.T.astype(np.float32)
    total = np.zeros((len(columns), len(rows)))
    for start in range(0, rows.shape[1], _EXACT):
        block = slice(start, start + _EXACT)
        total += products(columns[:, block], rows[:, block])
    return total


def excess(columns: Array, rows: Array) -> Array:
    """What 16 bits cut from `products(columns, rows)`, as (positions, channels).

    Few pairs of activations are large enough for any weight, and few channels have a weight for them:
    only those are multiplied.
    """
    lost = np.zeros((len(columns), len(rows)), np.float32)
    levels, weights = neighbours(columns), neighbours(rows)
    near = np.flatnonzero(levels.max(axis=1, initial=0).sum(axis=0, dtype=int) > _HARMLESS)
    levels, weights = levels[:, :, near].astype(np.int32), weights[:, :, near].astype(np.int32)
    risky = leaves(*pair_bounds(weights, levels.min(axis=1), levels.max(axis=1))) if near.size else near
    chosen = np.flatnonzero(risky.any(axis=1)) if near.size else near
    if not chosen.size:
        return lost
    weights = weights[:, chosen]
    reach = np.abs(weights).max(axis=1) * risky.any(axis=0)
    places, which = np.nonzero(levels[0] * reach[0] + levels[1] * reach[1] > LIMITS[1])
    step = max(1, _CHUNK // len(chosen))
    for start in range(0, len(places), step):
        place, pair = places[start : start + step], which[start : start + step]
        (x, y), (v, w) = levels[:, place, pair, None], weights[:, :, pair].transpose(0, 2, 1)
        sums = x * v + y * w
        first = np.flatnonzero(np.diff(place, prepend=-1))
        lost[np.ix_(place[first], chosen)] += np.add.reduceat(sums - sums.clip(*LIMITS), first, axis=0)
    return lost


def pair_bounds(weights: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """The least and the largest sum of each pair of products, as (channels, pairs).

    `weights` are (2, channels, pairs), the activations, none negative, lie between `low` and `high`, both
    (2, pairs).
    """
    plus, minus = np.maximum(weights, 0), np.minimum(weights, 0)
    least, largest = plus * low[:, None] + minus * high[:, None], plus * high[:, None] + minus * low[:, None]
    return least[0] + least[1], largest[0] + largest[1]


def leaves(least: Array, largest: Array) -> Array:
    """Whether a sum between these bounds may leave 16 bits."""
    return (least < LIMITS[0]) | (largest > LIMITS[1])


def neighbours(rows: Array) -> Array:
    """(n, k) as (2, n, pairs): the first and the second of each pair; a zero behind the last of odd k."""
    even = np.pad(rows, ((0, 0), (0, 1))) if rows.shape[1] % 2 else rows
    return np.moveaxis(even.reshape(len(even), -1, 2), 2, 0)


def _windows(node: ir.Node, levels: Array, kernel: Sequence[int], zero_point: int) -> Array:
    """(batch, channels, positions..., kernel...), nothing copied but the padding."""
    rank = len(kernel)
    pads, reaches, strides = geometry(node, levels.shape[2:], kernel)
    padded = np.pad(levels, ((0, 0), (0, 0), *pads), constant_values=zero_point)
    windows = sliding_window_view(padded, reaches, axis=tuple(range(2, 2 + rank)))
    dilations = attribute(node, "dilations", [1] * rank)
    steps = (*(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilations))
    return windows[(slice(None), slice(None), *steps)]


def geometry(
    node: ir.Node, sizes: Sequence[int], kernel: Sequence[int]
) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Padding on both sides, extent of the dilated kernel, and stride, for each spatial axis."""
    rank = len(kernel)
    strides = list(attribute(node, "strides", [1] * rank))
    dilations = attribute(node, "dilations", [1] * rank)
    reaches = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    auto = attribute(node, "auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        missing = [
            max(0, (-(-size // s) - 1) * s + reach - size)
            for size, s, reach in zip(sizes, strides, reaches, strict=True)
        ]
        halves = [(m // 2, m - m // 2) for m in missing]
        return [h if auto == "SAME_UPPER" else h[::-1] for h in halves], reaches, strides
    flat = [0] * (2 * rank) if auto == "VALID" else list(attribute(node, "pads", [0] * (2 * rank)))
    return list(zip(flat[:rank], flat[rank:], strict=True)), reaches, strides
