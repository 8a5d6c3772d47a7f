"""Conv and ConvTranspose over one to three spatial axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor
from torch.nn import functional as nn

from edgewise.training.operators.call import Call, Operator
from edgewise.training.operators.windows import Sizes, of_rank, padded, windows_of

_CONV: Mapping[int, Callable[..., Tensor]] = MappingProxyType({1: nn.conv1d, 2: nn.conv2d, 3: nn.conv3d})
_TRANSPOSED: Mapping[int, Callable[..., Tensor]] = MappingProxyType(
    {1: nn.conv_transpose1d, 2: nn.conv_transpose2d, 3: nn.conv_transpose3d}
)


def conv(call: Call) -> Tensor:
    x, weight, bias = call.input(0), call.input(1), call.optional(2)
    return convolved(call, x, weight, bias)


def convolved(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A Conv with the attributes of `call`, whatever its inputs are."""
    w = windows_of(call, tuple(weight.shape[2:]), x.shape[2:])
    padding = w.begins
    if not w.symmetric:
        x, padding = padded(x, w.begins, w.ends), (0,) * len(w.begins)
    function = of_rank(_CONV, call)
    return function(x, weight, bias, w.strides, padding, w.dilations, call.attr("group", 1))


def conv_transpose(call: Call) -> Tensor:
    """Y of size stride * (n - 1) + output_padding + span - padding an axis, `output_shape` sets the last."""
    x, weight, bias = call.input(0), call.input(1), call.optional(2)
    function, rank = of_rank(_TRANSPOSED, call), x.dim() - 2
    more: Sizes = call.attr("output_padding") or (0,) * rank
    w = windows_of(call, tuple(weight.shape[2:]), x.shape[2:])
    full = [
        s * (n - 1) + m + span for n, s, m, span in zip(x.shape[2:], w.strides, more, w.spans, strict=True)
    ]
    begins, ends = _transposed_padding(
        call, full, [n * s for n, s in zip(x.shape[2:], w.strides, strict=True)]
    )
    group = call.attr("group", 1)
    if begins == ends and min(begins) >= 0:
        return function(x, weight, bias, w.strides, begins, more, group, w.dilations)
    y = function(x, weight, None, w.strides, (0,) * rank, more, group, w.dilations)
    y = padded(y, [-b for b in begins], [-e for e in ends])
    return y if bias is None else y + bias.reshape(-1, *(1,) * rank)


def _transposed_padding(call: Call, full: list[int], same: list[int]) -> tuple[Sizes, Sizes]:
    """The rows to leave out at both ends of a `full` result; below zero, rows of zeros to add."""
    automatic, wanted = call.attr("auto_pad", "NOTSET"), call.attr("output_shape")
    if wanted is None and automatic in ("SAME_UPPER", "SAME_LOWER"):
        wanted = same
    if wanted is None:
        pads: Sizes = (automatic == "NOTSET" and call.attr("pads")) or (0,) * (2 * len(full))
        return pads[: len(full)], pads[len(full) :]
    totals = [rows - target for rows, target in zip(full, wanted[-len(full) :], strict=True)]
    less, more = tuple(max(t, 0) // 2 for t in totals), tuple(t - max(t, 0) // 2 for t in totals)
    return (less, more) if automatic == "SAME_UPPER" or min(totals) < 0 else (more, less)


OPERATORS: Mapping[str, Operator] = MappingProxyType({"Conv": conv, "ConvTranspose": conv_transpose})
