"""How channels couple in products of two activations, and in the operators that attention is made of."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Refused
from edgewise.passes.channel_links import Coupling, Indices, Keep, Link, NodeView, size_of
from edgewise.passes.graph import attribute

Q, K, V, MASK, PAST_KEY, PAST_VALUE = range(6)  # inputs of Attention


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


def attention(view: NodeView) -> Coupling:
    """Heads, which lie on an axis of their own or in runs on the last one; and the mask that each may have.

    A head of keys and values leaves with all heads of queries that it serves, the only one never.
    """
    view.expect_one_output("Attention gives more than its result")
    if view.input(PAST_KEY) is not None or view.input(PAST_VALUE) is not None:
        raise Refused("Attention with a cache")
    links = [link for index in (Q, K, V) for link in _by_head(view, index)]
    if view.input(MASK) is not None:
        links += _mask(view)
    if len(view.out_dims()) == 4 and view.data(V) not in (view.data(Q), view.data(K)):
        links += view.same([(3, 3)], V)  # numbers of the values, which are not summed over
    return Coupling(tuple(links), cut=partial(_cut_attention, view))


def _heads(view: NodeView, index: int) -> int:
    """How many heads an input of Attention has."""
    dims = view.dims(index)
    count = (
        dims[1] if len(dims) == 4 else attribute(view.node, "q_num_heads" if index == Q else "kv_num_heads")
    )
    if not isinstance(count, int):
        raise Refused("the number of heads is not known")
    return count


def head_axis(view: NodeView) -> int:
    """The axis of heads, in what Attention and RotaryEmbedding read and in what they give."""
    return 1 if len(view.out_dims()) == 4 else 2


def _runs(view: NodeView, index: int) -> tuple[int, int]:
    """How many indices in a row are one head in an input of Attention, and in what it gives."""
    axis, heads = head_axis(view), (_heads(view, index), _heads(view, Q))
    sizes = view.dims(index)[axis], view.out_dims()[axis]
    if not all(isinstance(size, int) and size % n == 0 for size, n in zip(sizes, heads, strict=True)):
        raise Refused("channel axis is dynamic")
    return size_of(view.slot(index, axis)) // heads[0], size_of(view.out(axis)) // heads[1]


def _by_head(view: NodeView, index: int) -> tuple[Link, ...]:
    """The link of an input with one head or more for each of its own; of a single one none."""
    heads, axis = _heads(view, index), head_axis(view)
    source, target = view.slot(index, axis), view.out(axis)
    each, _ = _runs(view, index)
    if heads == 1:
        return ()
    all_in, all_out = np.arange(size_of(source)), np.arange(size_of(target))
    served = len(all_out) // heads  # indices of the result
    return (
        Link(source, target, all_in, all_in // each * served),
        Link(source, target, all_out // served * each, all_out),
    )


def _mask(view: NodeView) -> tuple[Link, ...]:
    """The link of a mask with one for every head."""
    dims, heads, target = view.dims(MASK), _heads(view, Q), view.out(head_axis(view))
    if len(dims) < 3 or dims[-3] == 1:
        return ()
    view.expect(view.slot(MASK, len(dims) - 3), heads)
    every = np.arange(size_of(target))
    return (Link(view.slot(MASK, len(dims) - 3), target, every // (len(every) // heads), every),)


def _cut_attention(view: NodeView, keep: Keep) -> None:
    """Let the numbers of heads follow where the axes do not say them."""
    axis = head_axis(view)
    for name, index in (("q_num_heads", Q), ("kv_num_heads", K)):
        kept = keep(view.slot(index, axis))
        if kept is not None and name in view.node.attributes:
            view.node.attributes[name] = ir.AttrInt64(name, len(kept) // _runs(view, index)[0])


def attended(view: NodeView) -> Indices:
    """For every index of the axis of heads that Attention gives, the one of the values that it averages."""
    each, run = _runs(view, V)
    every = np.arange(size_of(view.out(head_axis(view))))
    served = _heads(view, Q) // _heads(view, V)
    return every // run // served * each + every % run


def rotary(view: NodeView) -> Coupling:
    """Heads on an axis of their own pass through; in runs on the last axis they stay."""
    return Coupling(view.same([(1, 1)]) if len(view.dims()) == 4 else ())
