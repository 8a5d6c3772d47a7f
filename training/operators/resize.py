"""Resize and its older form Upsample, and sampling on a grid.

Resizing is separable: along each axis an output is a weighted sum of a few inputs, its taps. Where the
taps lie and what they weigh is worked out once an axis in float64; the sum itself is gathers and
products, so it has a gradient, takes any number of axes, and is the same for every mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from edgewise.training.operators.call import Call, Operator
from edgewise.training.operators.tensors import beside, unsupported

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Axis:
    """One axis to resize: its sizes, the scale that places are computed with, and the region of interest."""

    size: int
    resized: int
    scale: float
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class _Taps:
    """`places` and `weights` [taps, outputs]; `outside` marks outputs that lie beyond the input."""

    places: npt.NDArray[np.int64]
    weights: _Floats
    outside: npt.NDArray[np.bool_]


_ROUNDINGS: Mapping[str, Callable[[_Floats], _Floats]] = MappingProxyType(
    {
        "round_prefer_floor": lambda x: np.ceil(x - 0.5),
        "round_prefer_ceil": lambda x: np.floor(x + 0.5),
        "floor": np.floor,
        "ceil": np.ceil,
    }
)
_PLACES: Mapping[str, Callable[[_Floats, _Axis], _Floats]] = MappingProxyType(
    {
        "half_pixel": lambda x, a: (x + 0.5) / a.scale - 0.5,
        "half_pixel_symmetric": lambda x, a: _symmetric(x, a),
        "pytorch_half_pixel": lambda x, a: (x + 0.5) / a.scale - 0.5 if a.resized > 1 else x * 0 - 0.5,
        "tf_half_pixel_for_nn": lambda x, a: (x + 0.5) / a.scale,
        "asymmetric": lambda x, a: x / a.scale,
        "align_corners": lambda x, a: x * ((a.size - 1) / max(1, a.resized - 1)),
        "tf_crop_and_resize": lambda x, a: _cropped(x, a),
    }
)


def _symmetric(x: _Floats, axis: _Axis) -> _Floats:
    """Half pixels around the middle of the input, where the rounded size does not fit the scale."""
    adjustment = axis.resized / (axis.scale * axis.size)
    return (x + 0.5) / axis.scale + axis.size / 2 * (1 - adjustment) - 0.5


def _cropped(x: _Floats, axis: _Axis) -> _Floats:
    if axis.resized == 1:
        return x * 0 + 0.5 * (axis.start + axis.end) * (axis.size - 1)
    step = (axis.end - axis.start) * (axis.size - 1) / (axis.resized - 1)
    return x * step + axis.start * (axis.size - 1)


def _linear(distance: _Floats) -> _Floats:
    weights: _Floats = np.clip(1 - np.abs(distance), 0, 1)
    return weights


def _cubic(a: float) -> Callable[[_Floats], _Floats]:
    """The kernel of cubic convolution (Keys 1981) with slope `a` at its first zero."""

    def kernel(distance: _Floats) -> _Floats:
        d = np.abs(distance)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = np.where(d < 2, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a, 0.0)
        return np.where(d <= 1, near, far)

    return kernel


def resize(call: Call) -> Tensor:
    data = call.input(0)
    axes = tuple(a % data.dim() for a in call.attr("axes") or range(data.dim()))
    result = data
    for at, axis in zip(axes, _axes(call, axes), strict=True):
        result = _resized(call, result, at, axis)
    return result


def _axes(call: Call, axes: tuple[int, ...]) -> list[_Axis]:
    """What becomes of each axis: from scales or from sizes, whichever the node has."""
    sizes = [call.input(0).shape[a] for a in axes]
    scales = _numbers(call, "scales", 1 if call.opset < 11 else 2)
    roi = _numbers(call, "roi", 1) if call.opset > 10 else ()
    starts, ends = (roi[: len(axes)], roi[len(axes) :]) if roi else ([0.0] * len(axes), [1.0] * len(axes))
    if scales:
        cropped = call.attr("coordinate_transformation_mode") == "tf_crop_and_resize"
        spans = [e - s if cropped else 1.0 for s, e in zip(starts, ends, strict=True)]
        resized = [math.floor(n * span * scale) for n, span, scale in zip(sizes, spans, scales, strict=True)]
    else:
        resized = list(call.ints("sizes", 3) or ())
        scales = [r / n for r, n in zip(resized, sizes, strict=True)]
        resized, scales = _keeping_aspect(call, sizes, resized, scales)
    return [_Axis(*given) for given in zip(sizes, resized, scales, starts, ends, strict=True)]


def _numbers(call: Call, name: str, index: int) -> list[float]:
    value = call.optional(index)
    return list(call.attr(name, ())) if value is None else [float(v) for v in value.tolist()]


def _keeping_aspect(
    call: Call, sizes: list[int], resized: list[int], scales: list[float]
) -> tuple[list[int], list[float]]:
    policy = call.attr("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return resized, scales
    scale = min(scales) if policy == "not_larger" else max(scales)
    return [math.floor(scale * n + 0.5) for n in sizes], [scale] * len(sizes)


def _resized(call: Call, data: Tensor, at: int, axis: _Axis) -> Tensor:
    default = "half_pixel" if call.opset > 10 else "asymmetric"
    mode = call.attr("coordinate_transformation_mode", default)
    if axis.size == axis.resized and axis.scale == 1 and mode != "tf_crop_and_resize":
        return data
    where = _PLACES[mode](np.arange(axis.resized, dtype=np.float64), axis)
    taps = _taps(call, axis, where)
    outside = taps.outside & (mode == "tf_crop_and_resize")
    return _weighted(data, at, taps, outside, call.attr("extrapolation_value", 0.0))


def _taps(call: Call, axis: _Axis, where: _Floats) -> _Taps:
    outside = (where < 0) | (where > axis.size - 1)
    mode = call.attr("mode", "nearest")
    if mode == "nearest":
        default = "round_prefer_floor" if call.opset > 10 else "floor"
        picked = _ROUNDINGS[call.attr("nearest_mode", default)](where)
        places = picked.clip(0, axis.size - 1).astype(np.int64)[None]
        return _Taps(places, np.ones(places.shape), outside)
    shrink = min(1.0, axis.scale) if call.attr("antialias", 0) else 1.0
    kernel, reach = (_cubic(call.attr("cubic_coeff_a", -0.75)), 2) if mode == "cubic" else (_linear, 1)
    if mode not in ("linear", "cubic", "bilinear"):
        raise unsupported(call, f"mode {mode}")
    start = math.floor(-reach / shrink) + 1
    offsets = np.arange(start, 2 - start)[:, None]
    places = np.floor(where)[None] + offsets
    weights = kernel((places - where) * shrink)
    if call.attr("exclude_outside", 0):
        weights = np.where((places < 0) | (places >= axis.size), 0.0, weights)
    weights = weights / weights.sum(0)
    return _Taps(places.clip(0, axis.size - 1).astype(np.int64), weights, outside)


def _weighted(data: Tensor, at: int, taps: _Taps, outside: npt.NDArray[np.bool_], fill: float) -> Tensor:
    """Apply the taps along axis `at` and put `fill` where the output lies outside."""
    column = (-1,) + (1,) * (data.dim() - at - 1)
    places, weights = beside(data, torch.from_numpy(taps.places), torch.from_numpy(taps.weights))
    if len(places) == 1:
        total = data.index_select(at, places[0])
    else:
        work = data if data.is_floating_point() else data.float()
        terms = (
            work.index_select(at, p) * w.to(work.dtype).reshape(column)
            for p, w in zip(places, weights, strict=True)
        )
        total = sum(terms, start=torch.zeros((), dtype=work.dtype, device=work.device)).to(data.dtype)
    if not outside.any():
        return total
    (mask,) = beside(data, torch.from_numpy(outside))
    return total.masked_fill(mask.reshape(column), fill)


def grid_sample(call: Call) -> Tensor:
    modes = {"linear": "bilinear", "cubic": "bicubic"}
    mode = call.attr("mode", "linear")
    mode = modes.get(mode, mode)
    data, (grid,) = call.input(0), beside(call.input(0), call.input(1))
    if mode == "bicubic" and data.dim() != 4:
        raise unsupported(call, f"mode cubic on {data.dim()} axes")
    align = bool(call.attr("align_corners", 0))
    return functional.grid_sample(data, grid, mode, call.attr("padding_mode", "zeros"), align)


def affine_grid(call: Call) -> Tensor:
    size = list(call.ints("size", 1) or ())
    return functional.affine_grid(call.input(0), size, align_corners=bool(call.attr("align_corners", 0)))


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {"AffineGrid": affine_grid, "GridSample": grid_sample, "Resize": resize, "Upsample": resize}
)
