"""The grids of weights: as fine as the kernels' integers allow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.calibration.kernels import Weights, is_depthwise, kernel_rows
from edgewise.passes.quant_plan import ValuePlan

Array = npt.NDArray[Any]

_LARGEST = 127
_LARGEST_BIAS = 2**30  # half of int32 for the bias, half for the products
_SMALLEST_SCALE = 2.0**-100  # stays normal when it is multiplied by another
_SMALLEST_UNIT = 2.0**-125  # of products, which a bias is stored in: a normal float32
_NO_GAP = 1e-3  # of the largest weight: less than half of the finest step that fits 8 bits
_ON_GRID = 1e-3  # of a step; a step itself is 1e5 times what float32 resolves
_ROUNDING = 1e-6  # of a quotient that may be whole


def weight_plan(
    node: ir.Node, weights: Weights, input_scale: float, per_channel: bool, saturates: bool
) -> ValuePlan:
    """Symmetric int8 for the weights of `node`: the largest magnitude of a channel becomes 127, or less.

    Where products are added in pairs in saturating 16 bits, 255 * |q0 + q1| has to stay below 2**15 for
    neighbours q0, q1 along k: |q0 + q1| <= 128, which the scale max |w0 + w1| / 127 grants (rounding
    moves a sum by 1 at most). A sum of opposite signs is never the largest. A channel's worst pair costs
    it less than a bit, and nothing where large weights are not side by side.

    A channel whose weights are multiples of a step already, because they were integers once, gets the
    finest fraction of the step that is large enough, if the step is: then nothing is rounded.
    """
    rows = kernel_rows(node, weights.array.astype(np.float64))
    magnitude = np.abs(rows).max(axis=1)
    in_pairs = saturates and not is_depthwise(node, weights.array)
    largest = np.maximum(magnitude, _largest_pair(rows)) if in_pairs else magnitude
    least = np.maximum(largest / _LARGEST, _bias_scales(weights, input_scale))
    least = np.maximum(least, _SMALLEST_UNIT / input_scale)
    name = weights.value.name or ""
    if not per_channel:
        return ValuePlan(name, "int8", (float32_scale(float(least.max())),), why="largest weight")
    steps = _steps(rows)
    kept = (steps >= least) & (steps > 0)
    fraction = np.floor(np.divide(steps, least, out=np.ones_like(steps), where=kept) + _ROUNDING)
    scale = tuple(float32_scale(float(s)) for s in np.where(kept, steps / fraction, least))
    widened = (largest > magnitude) & ~kept
    return ValuePlan(name, "int8", scale, axis=weights.axis, why=_why(kept, widened))


def _why(kept: Array, widened: Array) -> str:
    notes = (
        (kept, "of {} channels were on a grid already"),
        (widened, "of {} channels widened: pairs would saturate"),
    )
    found = [f"{int(which.sum())} {text.format(len(which))}" for which, text in notes if which.any()]
    return ", ".join(found) or "largest weight"


def float32_scale(scale: float) -> float:
    """`scale` as the runtime will see it; what is always zero gets scale 1."""
    return float(np.float32(scale)) if scale > _SMALLEST_SCALE else 1.0


def wider(a: ValuePlan, b: ValuePlan) -> ValuePlan:
    """One plan for a weight that two nodes read; one scale in all if they count channels differently."""
    if a.axis != b.axis:
        return replace(a, scale=(max(a.scale + b.scale),), axis=None, why="shared along two axes")
    return replace(a, scale=tuple(map(max, a.scale, b.scale)), why=a.why if a == b else "shared")


def _largest_pair(rows: Array) -> Array:
    """The largest |w0 + w1| of each row, over neighbours 0 and 1, 2 and 3, ..."""
    even = rows[:, : rows.shape[1] // 2 * 2].reshape(rows.shape[0], -1, 2)
    largest: Array = np.abs(even.sum(axis=2)).max(axis=1, initial=0.0)
    return largest


def _bias_scales(weights: Weights, input_scale: float) -> Array:
    """The least weight scale at which round(bias / (input scale * weight scale)) fits its integers."""
    if weights.bias is None:
        return np.zeros(weights.channels)
    bias = np.broadcast_to(weights.bias.astype(np.float64).reshape(-1), weights.channels)
    return np.abs(bias) / (input_scale * _LARGEST_BIAS)


def _steps(rows: Array) -> Array:
    """The number that all elements of a row are multiples of, up to rounding; 0 where there is none.

    It is looked for as the least gap between two elements, or an element and zero, and refined by least
    squares over the multiples found.
    """
    levels = np.sort(np.pad(rows, ((0, 0), (0, 1))), axis=1)
    gaps = np.diff(levels)
    clear = gaps > _NO_GAP * np.abs(rows).max(axis=1, keepdims=True)
    gap = np.min(gaps, axis=1, where=clear, initial=np.inf)
    multiples = np.rint(rows / gap[:, None])
    squares = (multiples**2).sum(axis=1)
    step: Array = (rows * multiples).sum(axis=1) / np.maximum(squares, 1)
    off = np.abs(rows - multiples * step[:, None]).max(axis=1)
    return np.where(off <= _ON_GRID * step, step, 0.0)
