"""In what blocks of channels kernels work: all widths up to a block's end take as long as that.

onnxruntime's convolutions compute 8 or 16 channels at once, as the processor's vectors are wide, in int8
others than in float. A layer's times at some widths do not tell; those at all widths of a stretch do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt

from edgewise.optimizer.layer_models import Grid
from edgewise.optimizer.width_table import Kind
from edgewise.training.costs import full_width

Alone = Callable[[Kind, Grid], tuple[float, ...]]
"""Milliseconds of a layer in a model of its own, at every point of a grid; nothing where it cannot be."""

_BLOCKS = (8, 16, 32)
_WIDE = 48  # enough to show blocks
_STRETCH, _STEP = 44, 4
_FEWEST = 8  # widths of a stretch
_CLEARLY = 0.5

Blocks = Mapping[tuple[str, bool], int]
"""By operator, and whether it writes the channels or only reads them."""


def kernel_blocks(kinds: Iterable[Kind], alone: Alone) -> Blocks:
    """The blocks of each operator.

    Seen on its narrowest layer that is wide enough, for there a block is most of the time. Operators without
    such a layer are left out.
    """
    shown: dict[str, Kind] = {}
    for kind in sorted(kinds, key=lambda kind: max(map(full_width, kind.variables), default=0)):
        wide = min(map(full_width, kind.variables), default=0) >= _WIDE
        if kind.computes and wide and sorted(kind.written) == [False, True]:
            shown.setdefault(kind.layer.node.op_type, kind)
    return {
        (op_type, written): _block(kind, axis, alone)
        for op_type, kind in shown.items()
        for axis, written in enumerate(kind.written)
    }


def _block(kind: Kind, axis: int, alone: Alone) -> int:
    """The block along one axis, 1 where none is to be seen."""
    full = [full_width(slot) for slot in kind.variables]
    each = full[axis] // kind.channels[axis]
    stretch = tuple(w for w in range(full[axis] - _STRETCH, full[axis] + 1, _STEP) if w % each == 0)
    if len(stretch) < _FEWEST:
        return 1
    grid = tuple(stretch if i == axis else (width,) for i, width in enumerate(full))
    ms = np.array(alone(kind, grid))
    if len(ms) < len(stretch):
        return 1
    off = {block: _off_a_line(-(-np.array(stretch) // block) * block, ms) for block in (1, *_BLOCKS)}
    best = min(_BLOCKS, key=lambda block: off[block])
    return best if off[best] < _CLEARLY * off[1] else 1


def _off_a_line(x: npt.NDArray[np.int64], y: npt.NDArray[np.float64]) -> float:
    """The sum of squares that is left of y by the straight line through it that leaves least."""
    terms = np.stack([x, np.ones(len(x))], 1)
    return float(np.square(terms @ np.linalg.lstsq(terms, y, rcond=None)[0] - y).sum())
