"""Learned rounding: of the integers around each weight, those that disturb the layer's output least."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgewise.calibration.edits import Anchor, Edits, anchors, nearest
from edgewise.calibration.kernels import is_depthwise, kernel_rows
from edgewise.calibration.moments import LayerMoments, Moments
from edgewise.passes.fingerprint import fingerprint
from edgewise.passes.quant_plan import QuantPlan
from edgewise.runtime.errors import InputError

Array = npt.NDArray[Any]

_LARGEST = 127
_LARGEST_PAIR = 128  # 255 * 128 < 2**15
_DAMPING = 0.01  # of the mean variance, after the source
_COLUMNS = 64  # decided one by one; what earlier ones carry into them is one matrix product
_SWEEPS = 2


def round_weights(model: ir.Model, plan: QuantPlan, moments: Moments) -> Edits:
    """New weights for the layers of `plan`, multiples of its scales, and biases that go with them.

    The error of an output is (w - q) x for weights w, q and an input x. A layer with a bias of its own
    takes the mean of that error out of it, so that its variance (w - q) C (w - q)^T remains to be made
    small, C the covariance of x; for a layer without one it is the second moment. Weights are decided one
    after the other, each making up for the errors before it, which is Babai's nearest plane and the
    order of Frantar et al., "GPTQ", ICLR 2023; then single steps that help are taken. A channel that does
    not gain keeps its nearest integers. Raises `InputError` on moments of another model.
    """
    if moments.fingerprint != fingerprint(model):
        raise InputError("these moments are of another model: collect them again")
    edits: dict[str, Array] = {}
    for anchor in anchors(model, plan):
        seen = moments.layers.get(anchor.name)
        if seen is not None and anchor.own_weights:
            edits |= _round_layer(anchor, seen)
    return edits


def _round_layer(anchor: Anchor, seen: LayerMoments) -> dict[str, Array]:
    array = anchor.weights.array.astype(np.float64)
    plain = nearest(array, anchor.grid)
    rows, start = (_by_group(anchor, a) for a in (array, plain))
    scale = np.broadcast_to(np.array(anchor.grid.scale), anchor.weights.channels)
    scale = scale.reshape(anchor.groups, -1)
    in_pairs = anchor.saturates and not is_depthwise(anchor.node, array)
    chosen = np.empty_like(rows)
    for number, block in enumerate(seen.blocks):
        second = seen.covariance(number) if anchor.own_bias is not None else seen.second[number] / seen.count
        chosen[:, :, block] = round_rows(rows[:, :, block], start[:, :, block], scale, second, in_pairs)
    if (chosen == start).all():
        return {}
    shift = ((chosen - rows) @ seen.mean[:, :, None]).reshape(-1)
    weights = _from_groups(anchor, chosen).astype(np.float32)
    return {anchor.weights.value.name or "": weights, **anchor.corrected_bias(-shift)}


def _by_group(anchor: Anchor, array: Array) -> Array:
    """Weights as groups x channels x k, k in the order of the kernels."""
    rows = kernel_rows(anchor.node, array)
    return rows.reshape(anchor.groups, -1, rows.shape[1])


def _from_groups(anchor: Anchor, rows: Array) -> Array:
    """What `_by_group` was given."""
    shape = anchor.weights.array.shape
    flat = rows.reshape(-1, rows.shape[-1])
    if anchor.node.op_type == "Conv":
        return np.moveaxis(flat.reshape(shape[0], *shape[2:], shape[1]), -1, 1)
    return flat if anchor.weights.axis == 0 else flat.T


def round_rows(rows: Array, start: Array, scale: Array, second: Array, in_pairs: bool) -> Array:
    """Multiples of `scale` near `rows` with no more error under `second` than `start`, row by row.

    `rows` and `start` are groups x channels x k, `scale` is groups x channels, `second` is groups x k x k.
    `in_pairs` keeps neighbours along k from saturating, unless they did in `start`. A moment that is not
    finite, or not one of real vectors, changes nothing.
    """
    if not np.isfinite(second).all():
        return start
    damped = _damped(second)
    try:
        factor = _factor(damped)
    except np.linalg.LinAlgError:  # next to its mean, the input varies less than float32 resolves
        return start
    levels = rows / scale[:, :, None]
    chosen = _nearest_plane(levels, factor, in_pairs)
    for _ in range(_SWEEPS):
        _improve(chosen, levels, damped, in_pairs)
    better = quadratic(chosen - levels, second) < quadratic(start / scale[:, :, None] - levels, second)
    return np.where(better[:, :, None], chosen * scale[:, :, None], start)


def quadratic(errors: Array, second: Array) -> Array:
    """e H e^T for every row e; groups x channels."""
    energy: Array = np.einsum("grk,grk->gr", errors @ second, errors)
    return energy


def bounds(chosen: Array, column: int, in_pairs: bool) -> tuple[Array | int, Array | int]:
    """The least and the greatest integer that may stand in `column`, given its partner in the pair.

    Without VNNI, x86 kernels add the products of elements 0 and 1, 2 and 3, ... in saturating 16 bits:
    |q0 + q1| <= 128 is safe for any uint8 input.
    """
    partner = column ^ 1
    if not in_pairs or partner >= chosen.shape[2]:
        return -_LARGEST, _LARGEST
    other = chosen[:, :, partner]
    return np.maximum(-_LARGEST, -_LARGEST_PAIR - other), np.minimum(_LARGEST, _LARGEST_PAIR - other)


def _factor(second: Array) -> Array:
    """The upper triangular A with A A^T = `second`."""
    return np.ascontiguousarray(np.linalg.cholesky(second[:, ::-1, ::-1])[:, ::-1, ::-1])


def _nearest_plane(levels: Array, factor: Array, in_pairs: bool) -> Array:
    """Integers decided from the first element to the last.

    With H = A A^T, A = `factor`, the error e of a row costs |e A|^2, whose element j depends on e[0..j]
    alone: e[j] is chosen to make it small.
    """
    chosen, errors = np.zeros_like(levels), np.zeros_like(levels)
    for begin in range(0, levels.shape[2], _COLUMNS):
        end = min(begin + _COLUMNS, levels.shape[2])
        carried = errors[:, :, :begin] @ factor[:, :begin, begin:end]
        for j in range(begin, end):
            inside = errors[:, :, begin:j] @ factor[:, begin:j, j : j + 1]
            pull = (carried[:, :, j - begin] + inside[:, :, 0]) / factor[:, None, j, j]
            chosen[:, :, j] = np.rint(levels[:, :, j] - pull).clip(*bounds(chosen, j, in_pairs))
            errors[:, :, j] = chosen[:, :, j] - levels[:, :, j]
    return chosen


def _damped(second: Array) -> Array:
    """`second` with more on its diagonal: positive definite, and less of what few samples show by chance."""
    level = np.einsum("gkk->g", second) / second.shape[1]
    damping = np.where(level > 0, level * _DAMPING, 1.0)
    damped: Array = second + damping[:, None, None] * np.eye(second.shape[1])
    return damped


def _improve(chosen: Array, levels: Array, second: Array, in_pairs: bool) -> None:
    """One sweep of coordinate descent, in place: every element to its best integer, the others given."""
    errors = chosen - levels
    curvature = np.maximum(np.einsum("gkk->gk", second), np.finfo(np.float64).tiny)
    for begin in range(0, levels.shape[2], _COLUMNS):
        end = min(begin + _COLUMNS, levels.shape[2])
        slope = errors @ second[:, :, begin:end]
        for j in range(begin, end):
            best = np.rint(chosen[:, :, j] - slope[:, :, j - begin] / curvature[:, None, j])
            best = best.clip(*bounds(chosen, j, in_pairs))
            step = best - chosen[:, :, j]
            slope[:, :, j - begin :] += step[:, :, None] * second[:, j : j + 1, j:end]
            errors[:, :, j] += step
            chosen[:, :, j] = best
