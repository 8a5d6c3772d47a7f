"""Windows and whole planes reduced to one number: maximum, mean, norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as nn

from edgewise.training.operators.call import Call, Operator
from edgewise.training.operators.windows import Sizes, Windows, of_rank, padded, windows_of

_MAX: Mapping[int, Callable[..., Tensor]] = MappingProxyType(
    {1: torch.max_pool1d, 2: torch.max_pool2d, 3: torch.max_pool3d}
)
_MAX_WITH_INDICES: Mapping[int, Callable[..., tuple[Tensor, Tensor]]] = MappingProxyType(
    {
        1: nn.max_pool1d_with_indices,
        2: nn.max_pool2d_with_indices,
        3: nn.max_pool3d_with_indices,
    }
)
_MEAN: Mapping[int, Callable[..., Tensor]] = MappingProxyType(
    {1: nn.avg_pool1d, 2: nn.avg_pool2d, 3: nn.avg_pool3d}
)
_SUM: Mapping[int, Callable[..., Tensor]] = MappingProxyType({1: nn.conv1d, 2: nn.conv2d, 3: nn.conv3d})


def max_pool(call: Call) -> Tensor | tuple[Tensor | None, ...]:
    x, w = call.input(0), _windows(call)
    if not x.is_floating_point():
        return _max_pool_of_integers(call)
    none = (0,) * len(w.kernel)
    by_torch, by_hand = (w.begins, none) if _native(call, w) else (none, w.begins)
    if by_torch is none:
        x = padded(x, w.begins, _ends(call, w), -math.inf)
    if len(call.node.outputs) == 1:
        return of_rank(_MAX, call)(x, w.kernel, w.strides, by_torch, w.dilations)
    y, indices = of_rank(_MAX_WITH_INDICES, call)(x, w.kernel, w.strides, by_torch, w.dilations)
    return y, _flat_indices(call, indices, x.shape[2:], by_hand)


def _max_pool_of_integers(call: Call) -> Tensor | tuple[Tensor | None, ...]:
    """torch pools few integer types; in float64 all up to 53 bits are exact."""
    x = call.input(0)
    result = max_pool(Call(call.node, (x.double(),), call.opset, attributes=call.attributes))
    if isinstance(result, Tensor):
        return result.to(x.dtype)
    y, indices = result
    return None if y is None else y.to(x.dtype), indices


def _flat_indices(call: Call, indices: Tensor, inside: Sequence[int], begins: Sizes) -> Tensor:
    """Positions in the whole input from positions in a plane of size `inside`, which may be padded.

    With storage_order 1 the last two axes of a plane count in columns.
    """
    x, rest = call.input(0), indices
    coordinates = []
    for size in reversed(inside):
        coordinates.append(rest % size)
        rest = torch.div(rest, size, rounding_mode="floor")
    places = [c - b for c, b in zip(reversed(coordinates), begins, strict=True)]
    sizes = list(x.shape[2:])
    if call.attr("storage_order", 0) == 1:
        places, sizes = places[::-1], sizes[::-1]
    flat = torch.zeros_like(indices)
    for place, size in zip(places, sizes, strict=True):
        flat = flat * size + place
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device) * math.prod(sizes)
    return flat + planes.reshape(x.shape[0], x.shape[1], *(1,) * len(sizes))


def average_pool(call: Call) -> Tensor:
    x, w = call.input(0), _windows(call)
    counts_pads = bool(call.attr("count_include_pad", 0))
    if _native(call, w) and max(w.dilations) == 1:
        return of_rank(_MEAN, call)(x, w.kernel, w.strides, w.begins, False, counts_pads)
    ends = _ends(call, w)
    within = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    if counts_pads:  # rows that only rounding up adds count never
        within = padded(within, w.begins, w.ends, 1.0)
        within = padded(within, (0,) * len(ends), [e - p for e, p in zip(ends, w.ends, strict=True)])
    else:
        within = padded(within, w.begins, ends)
    return _window_sums(call, padded(x, w.begins, ends), w) / _window_sums(call, within, w)


def lp_pool(call: Call) -> Tensor:
    x, w = call.input(0), _windows(call)
    p: float = call.attr("p", 2)
    powers = padded(x.abs() ** p, w.begins, _ends(call, w))
    return _window_sums(call, powers, w) ** (1.0 / p)


def _window_sums(call: Call, x: Tensor, w: Windows) -> Tensor:
    """The sum of each window of an `x` that is padded already."""
    planes = x.reshape(-1, 1, *x.shape[2:])
    ones = torch.ones((1, 1, *w.kernel), dtype=x.dtype, device=x.device)
    sums = of_rank(_SUM, call)(planes, ones, None, w.strides, 0, w.dilations)
    return sums.reshape(x.shape[0], x.shape[1], *sums.shape[2:])


def max_unpool(call: Call) -> Tensor:
    """Values back at the places MaxPool took them from, zeros elsewhere."""
    x, indices = call.input(0), call.input(1)
    w, wanted = _windows(call), call.ints("", 2)
    sizes = zip(x.shape[2:], w.strides, w.spans, w.begins, w.ends, strict=True)
    inferred = (*x.shape[:2], *((n - 1) * s + span - b - e for n, s, span, b, e in sizes))
    flat = torch.zeros(math.prod(inferred), dtype=x.dtype, device=x.device)
    y = flat.scatter(0, indices.reshape(-1), x.reshape(-1)).reshape(inferred)
    if wanted is None:
        return y
    return padded(y, (0,) * len(wanted), [t - n for t, n in zip(wanted, inferred, strict=True)])


def global_average_pool(call: Call) -> Tensor:
    x = call.input(0)
    return x.mean(dim=tuple(range(2, x.dim())), keepdim=True)


def global_max_pool(call: Call) -> Tensor:
    x = call.input(0)
    return x.amax(dim=tuple(range(2, x.dim())), keepdim=True)


def global_lp_pool(call: Call) -> Tensor:
    x = call.input(0)
    p: float = call.attr("p", 2)
    return (x.abs() ** p).sum(dim=tuple(range(2, x.dim())), keepdim=True) ** (1.0 / p)


def _windows(call: Call) -> Windows:
    return windows_of(call, call.attr("kernel_shape"), call.input(0).shape[2:])


def _native(call: Call, w: Windows) -> bool:
    """Whether torch's pooling places the windows as ONNX does: it pads by half a kernel at most."""
    small = all(2 * pad <= kernel for pad, kernel in zip(w.begins, w.kernel, strict=True))
    return w.symmetric and small and not call.attr("ceil_mode", 0)


def _ends(call: Call, w: Windows) -> list[int]:
    """The rows to pad at the end: with ceil_mode as many as make the last window of every axis whole."""
    if not call.attr("ceil_mode", 0):
        return list(w.ends)
    found = []
    sizes = zip(call.input(0).shape[2:], w.strides, w.spans, w.begins, w.ends, strict=True)
    for size, stride, span, begin, end in sizes:
        steps = -(-(size + begin + end - span) // stride)
        if steps * stride >= size + begin:  # a window that starts in the padding at the end is none
            steps -= 1
        found.append(max(end, steps * stride + span - size - begin))
    return found


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "AveragePool": average_pool,
        "GlobalAveragePool": global_average_pool,
        "GlobalLpPool": global_lp_pool,
        "GlobalMaxPool": global_max_pool,
        "LpPool": lp_pool,
        "MaxPool": max_pool,
        "MaxUnpool": max_unpool,
    }
)
