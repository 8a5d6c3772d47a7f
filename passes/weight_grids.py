"""Weights as integers with scales: one scale a channel, or one a block along the products' axis."""

from __future__ import annotations

import numpy as np

from edgewise.passes.graph import Array

_SMALLEST_SCALE = 2.0**-100  # stays normal when it is multiplied by another
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a block's range: fewer outliers, finer steps


def symmetric(array: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Integers of -127..127 and their scales (float32), one scale for all that lies along `axes`.

    array = integers * scale, to half a step. The scale keeps `axes` with length 1, for broadcasting.
    """
    scale = _usable(np.abs(array).max(axis=axes, keepdims=True) / 127)
    return np.rint(array / scale).clip(-127, 127).astype(np.int8), scale


def around_128(array: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """`symmetric` as uint8 with zero point 128."""
    integers, scale = symmetric(array, axes)
    return (integers.astype(np.int16) + 128).astype(np.uint8), scale


def in_blocks(matrix: Array, block: int, bits: int) -> tuple[Array, Array, Array]:
    """A matrix (k, n) as unsigned integers of `bits` bits in blocks along k.

    Gives integers (n, blocks, block), scales (n, blocks) in float32 and zero points (n, blocks). k is
    filled up with zeros, which every block holds exactly. Of a few ranges, each block gets the one with
    the least squared error.
    """
    k, n = matrix.shape
    padded = np.zeros((n, -(-k // block) * block), np.float32)
    padded[:, :k] = matrix.T
    blocks = padded.reshape(n, -1, block)
    best = _rounded(blocks, bits, _SHRINKS[0])
    for shrink in _SHRINKS[1:]:
        other = _rounded(blocks, bits, shrink)
        better = _error(blocks, other) < _error(blocks, best)
        best = tuple(np.where(better, new, old) for new, old in zip(other, best, strict=True))
    integers, scale, zero_point = best
    return integers, scale[..., 0], zero_point[..., 0]


def packed(integers: Array) -> Array:
    """Integers of 4 bits, two in a byte along the last axis, the first one low."""
    if integers.shape[-1] % 2:
        integers = np.concatenate([integers, np.zeros((*integers.shape[:-1], 1), np.uint8)], axis=-1)
    return np.asarray(integers[..., ::2] | (integers[..., 1::2] << 4))


_Rounded = tuple[Array, ...]


def _rounded(blocks: Array, bits: int, shrink: float) -> _Rounded:
    """Integers, scale and zero point for the range of every block, cut down to a share of it."""
    top = 2**bits - 1
    low = np.minimum(blocks.min(-1, keepdims=True), 0) * shrink
    high = np.maximum(blocks.max(-1, keepdims=True), 0) * shrink
    scale = _usable((high - low) / top)
    zero_point = np.rint(-low / scale).clip(0, top)
    integers = (np.rint(blocks / scale) + zero_point).clip(0, top)
    return integers.astype(np.uint8), scale, zero_point.astype(np.uint8)


def _error(blocks: Array, rounded: _Rounded) -> Array:
    integers, scale, zero_point = rounded
    steps = integers.astype(np.float32) - zero_point
    return np.asarray(np.square(blocks - steps * scale).sum(-1, keepdims=True))


def _usable(scale: Array) -> Array:
    """Scales as float32; what is always zero gets scale 1."""
    return np.where(scale > _SMALLEST_SCALE, scale, 1).astype(np.float32)
