"""How channels couple in products of two activations, of which attention is made."""

from __future__ import annotations

from edgewise.passes.base import Refused
from edgewise.passes.channel_links import Coupling, NodeView


def product(view: NodeView) -> Coupling:
    """MatMul without a constant matrix: samples, heads, rows of the one and columns of the other.

    Along what is summed over nothing leaves. A head leaves both operands and the product at once.
    """
    ranks = len(view.dims(0)), len(view.dims(1))
    if min(ranks) < 2:
        raise Refused("MatMul of a vector")
    if view.data(0) is view.data(1):
        raise Refused("MatMul of a value and itself")  # whose rows are summed over as well
    last = len(view.out_dims()) - 1
    rows, columns = view.same([(ranks[0] - 2, last - 1)], 0), view.same([(ranks[1] - 1, last)], 1)
    return Coupling((*rows, *columns, *view.broadcast(range(last - 1))))
