"""Where the windows of a convolution or a pooling lie: strides, dilations and paddings of a node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from torch import Tensor
from torch.nn import functional as nn

from edgewise.runtime.errors import InputError
from edgewise.training.operators.call import Call, described

Sizes: TypeAlias = tuple[int, ...]
F = TypeVar("F")


@dataclass(frozen=True, slots=True)
class Windows:
    """One number a spatial axis each. `begins` and `ends` are the rows of padding before and after."""

    kernel: Sizes
    strides: Sizes
    dilations: Sizes
    begins: Sizes
    ends: Sizes

    @property
    def symmetric(self) -> bool:
        """Whether torch's own padding can stand for this one."""
        return self.begins == self.ends

    @property
    def spans(self) -> Sizes:
        """How many rows a window reaches over, its holes included."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilations, strict=True))


def windows_of(call: Call, kernel: Sizes, sizes: Sequence[int]) -> Windows:
    """The windows of `kernel` that a node's attributes lay over an input of spatial `sizes`."""
    rank = len(kernel)
    strides: Sizes = call.attr("strides") or (1,) * rank
    dilations: Sizes = call.attr("dilations") or (1,) * rank
    automatic = call.attr("auto_pad", "NOTSET")
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        begins, ends = _same(sizes, kernel, strides, dilations, upper=automatic == "SAME_UPPER")
    else:
        pads: Sizes = (automatic == "NOTSET" and call.attr("pads")) or (0,) * (2 * rank)
        begins, ends = pads[:rank], pads[rank:]
    return Windows(kernel, strides, dilations, begins, ends)


def _same(
    sizes: Sequence[int], kernel: Sizes, strides: Sizes, dilations: Sizes, *, upper: bool
) -> tuple[Sizes, Sizes]:
    """The padding that gives ceil(size / stride) windows; the odd row goes to the end if `upper`."""
    totals = tuple(
        max(0, (-(-size // s) - 1) * s + d * (k - 1) + 1 - size)
        for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)
    )
    less, more = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
    return (less, more) if upper else (more, less)


def of_rank(table: Mapping[int, F], call: Call) -> F:
    """The entry for as many spatial axes as a node's first input has. Raises `InputError` without one."""
    rank = call.input(0).dim() - 2
    if rank not in table:
        raise InputError(f"{described(call.node)} has {rank} spatial axes; 1 to 3 are supported")
    return table[rank]


def padded(x: Tensor, begins: Sequence[int], ends: Sequence[int], value: float = 0.0) -> Tensor:
    """`x` with rows of `value` around its last axes; a negative number takes rows away."""
    if not any(begins) and not any(ends):
        return x
    flat = [rows for pair in zip(reversed(begins), reversed(ends), strict=True) for rows in pair]
    return nn.pad(x, flat, value=value)
