"""How channels couple in operators that only move, copy, pad or drop elements: their index maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from edgewise.passes.base import Refused
from edgewise.passes.channel_links import Coupling, Dim, Indices, Keep, Link, NodeView, dims_of, is_wide
from edgewise.passes.graph import Array, attribute, constant_of, graph_of, new_initializer, new_node
from edgewise.passes.linear import release, set_constant

Block = tuple[range, range]


def _set_ints(view: NodeView, name: str, index: int, values: Sequence[int]) -> None:
    """Write an integer list back to where `NodeView.ints` read it."""
    if view.input(index) is None and name in view.node.attributes:
        view.node.attributes[name] = ir.AttrInt64s(name, list(values))
    else:
        given = constant_of(view.input(index))
        set_constant(view.node, index, np.array(values, np.int64 if given is None else given.dtype), name)


def _transpose(view: NodeView) -> Coupling:
    rank = len(view.dims())
    order = attribute(view.node, "perm", tuple(reversed(range(rank))))
    return Coupling(view.same((i, o) for o, i in enumerate(order)))


def _reshape(view: NodeView) -> Coupling:
    """Blocks of axes with equal products; the requested shape follows the channels that stay."""
    links, options = _block_links(view)
    entries = _entries(view)
    links = tuple(link for link in links if entries[link.b.axis] is not None)
    options = tuple(some for some in options if all(entries[k.b.axis] is not None for k in some))
    if None in entries and not links and not options:
        raise Refused("Reshape to a computed shape")
    return Coupling(links, options, cut=partial(_cut_shape, view))


def _expand(view: NodeView) -> Coupling:
    """Axes that are there before and keep their size."""
    entries, more = _entries(view), len(view.out_dims()) - len(view.dims())
    kept = ((i, i + more) for i in range(len(view.dims())) if entries[i + more] is not None)
    return Coupling(view.same(kept), cut=partial(_cut_shape, view))


def _entries(view: NodeView) -> list[int | None]:
    """The sizes that a Reshape or Expand is given for every axis of its output, None where not known."""
    length = view.dims(1)[0]
    if not isinstance(length, int):
        raise Refused(f"{view.node.op_type} to a computed shape")
    missing = len(view.out_dims()) - length
    return [1] * missing + [_entry(view.data(1), axis) for axis in range(length)]


def _cut_shape(view: NodeView, keep: Keep) -> None:
    """Put in the sizes that are left where they are given, or copied from an axis that shrinks."""
    changed: dict[int, int] = {}
    for axis, (entry, size) in enumerate(zip(_entries(view), view.out_dims(), strict=True)):
        kept = keep(view.out(axis))
        copied = entry == 0 and kept is None and keep(view.slot(0, axis)) is None
        left = size if kept is None else len(kept)
        if entry not in (None, -1, 1, left) and isinstance(left, int) and not copied:
            changed[axis - len(view.out_dims())] = left
    shape = view.data(1)
    given = constant_of(shape)
    if changed and given is not None:
        set_constant(view.node, 1, _with_entries(given, changed), "shape")
    elif changed:
        view.node.replace_input_with(1, _put_together(view, shape, changed))
        release(shape)


def _with_entries(given: Array, changed: Mapping[int, int]) -> Array:
    """A list of sizes of which some are others, counted from the end."""
    sizes = given.copy()
    sizes[list(changed)] = list(changed.values())
    return sizes


def _put_together(view: NodeView, shape: ir.Value, changed: Mapping[int, int]) -> ir.Value:
    """The same for a Concat of lists, of which those that change are constant."""
    concat, parts, end = shape.producer(), list[ir.Value | None](), 0
    assert concat is not None  # `_entry` has looked into it
    for part in reversed(concat.inputs):
        length = 0 if part is None else _size(dims_of(part)[0])
        own = {k + end: size for k, size in changed.items() if -length <= k + end < 0}
        array = constant_of(part)
        if array is not None and own:
            part = new_initializer(graph_of(view.node), f"{shape.name}.part", _with_entries(array, own))
        parts.insert(0, part)
        end += length
    fresh = new_node(view.node, "Concat", parts, {"axis": 0}, hint=f"{shape.name}.sizes")
    fresh.shape, fresh.type = shape.shape, shape.type
    return fresh


def _entry(shape: ir.Value, axis: int) -> int | None:
    """Entry `axis` of a shape that is put together at run time, None where it is not known."""
    array, producer = constant_of(shape), shape.producer()
    if array is not None:
        return int(array[axis])
    if producer is None or producer.op_type != "Concat":
        return None
    for part in producer.inputs:
        length = dims_of(part)[0] if part is not None else None
        if part is None or not isinstance(length, int):
            return None
        if axis < length:
            return None if constant_of(part) is None else _entry(part, axis)
        axis -= length
    return None


def _same_elements(view: NodeView) -> Coupling:
    """Flatten, Unsqueeze, and Squeeze of named axes: a Reshape whose shape needs no edit."""
    if view.node.op_type == "Squeeze" and view.ints("axes", 1) is None:
        raise Refused("Squeeze without axes")
    return Coupling(*_block_links(view))


def _block_links(view: NodeView) -> tuple[tuple[Link, ...], tuple[tuple[Link, ...], ...]]:
    """Links of axes that survive alone, and for each run that is merged or split up its rival links."""
    before, after = view.dims(), view.out_dims()
    links: list[Link] = []
    options: list[tuple[Link, ...]] = []
    for ins, outs in _blocks(before, after):
        wide_in = [i for i in ins if before[i] != 1]
        wide_out = [o for o in outs if after[o] != 1]
        if len(wide_in) == len(wide_out) == 1:
            links += view.same([(wide_in[0], wide_out[0])])
        elif len(wide_out) == 1:
            options.append(tuple(_merged(view, before, ins, i, wide_out[0]) for i in wide_in))
        elif len(wide_in) == 1:
            options.append(tuple(_split_up(view, after, outs, o, wide_in[0]) for o in reversed(wide_out)))
    return tuple(links), tuple(options)


def _merged(view: NodeView, before: Sequence[Dim], block: range, axis: int, out: int) -> Link:
    sizes = [_size(before[i]) for i in block]
    inner = math.prod(sizes[axis - block.start + 1 :])
    every = np.arange(math.prod(sizes))
    return Link(view.slot(0, axis), view.out(out), every // inner % _size(before[axis]), every)


def _split_up(view: NodeView, after: Sequence[Dim], block: range, axis: int, source: int) -> Link:
    sizes = [_size(after[o]) for o in block]
    inner = math.prod(sizes[axis - block.start + 1 :])
    every = np.arange(math.prod(sizes))
    return Link(view.slot(0, source), view.out(axis), every, every // inner % _size(after[axis]))


def _size(dim: Dim) -> int:
    assert isinstance(dim, int)  # blocks of several axes are static
    return dim


def _blocks(before: Sequence[Dim], after: Sequence[Dim]) -> Iterator[Block]:
    """Runs of axes, as short as can be, that hold the same elements in the same order.

    From the right as far as symbols agree or sizes are known and products meet, then from the left. Both
    are sound because the total is the same and the order is row-major.
    """
    i, j = len(before), len(after)
    while (found := _meeting(before[:i][::-1], after[:j][::-1])) is not None:
        yield range(i - found[0], i), range(j - found[1], j)
        i, j = i - found[0], j - found[1]
    k = m = 0
    while (found := _meeting(before[k:i], after[m:j])) is not None:
        yield range(k, k + found[0]), range(m, m + found[1])
        k, m = k + found[0], m + found[1]


def aligned_axes(before: Sequence[Dim], after: Sequence[Dim]) -> Iterator[Block]:
    """All runs of `_blocks`, and what lies between them: in all they hold the same elements."""
    found = sorted(_blocks(before, after), key=lambda block: block[0].start)
    yield from found
    i = j = 0
    for ins, outs in (*found, (range(len(before), 0), range(len(after), 0))):
        if i < ins.start or j < outs.start:
            yield range(i, ins.start), range(j, outs.start)
        i, j = ins.stop, outs.stop


def _meeting(left: Sequence[Dim], right: Sequence[Dim]) -> tuple[int, int] | None:
    """The least numbers of axes, from the first on, that hold as many elements; None where not known."""
    if not (left and right):
        return None
    a, b, i, j = left[0], right[0], 1, 1
    while isinstance(a, int) and isinstance(b, int) and a != b:
        if a < b:
            a, i = _times(a, left[i]) if i < len(left) else None, i + 1
        else:
            b, j = _times(b, right[j]) if j < len(right) else None, j + 1
    return None if a is None or a != b else (i, j)


def _times(product: int, dim: Dim) -> int | None:
    return product * dim if isinstance(dim, int) else None


def _concat(view: NodeView) -> Coupling:
    """Along its axis every input has a run of the output; other axes are shared by all."""
    after = view.out_dims()
    axis = int(attribute(view.node, "axis", 1)) % len(after)
    links: list[Link] = []
    for other in range(len(after)):
        if other != axis and all(view.dims(i)[other] == after[other] for i in range(len(view.node.inputs))):
            links += [link for i in range(len(view.node.inputs)) for link in view.same([(other, other)], i)]
    start = 0
    for index in range(len(view.node.inputs)):
        size = view.dims(index)[axis]
        if not isinstance(size, int):
            return Coupling(tuple(links))
        every = np.arange(size)
        links.append(Link(view.slot(index, axis), view.out(axis), every, every + start))
        start += size
    return Coupling(tuple(links))


def _split(view: NodeView) -> Coupling:
    """Along its axis every output has a run of the input."""
    rank = len(view.dims())
    axis = int(attribute(view.node, "axis", 0)) % rank
    sizes = [view.out_dims(k)[axis] for k in range(len(view.node.outputs))]
    links: list[Link] = []
    start = 0
    for k, size in enumerate(sizes):
        links += view.same(((i, i) for i in range(rank) if i != axis), output=k)
        if isinstance(size, int) and is_wide(view.dims()[axis]):
            every = np.arange(size)
            links.append(Link(view.slot(0, axis), view.out(axis, k), every + start, every))
            start += size
    if None in sizes or start != view.dims()[axis]:
        links = [link for link in links if link.b.axis != axis]
    return Coupling(tuple(links), cut=lambda keep: _cut_split(view, axis, keep))


def _cut_split(view: NodeView, axis: int, keep: Keep) -> None:
    if keep(view.slot(0, axis)) is None:
        return
    kept = [keep(view.out(axis, k)) for k in range(len(view.node.outputs))]
    sizes = [
        _size(dims_of(v)[axis]) if k is None else len(k) for v, k in zip(view.node.outputs, kept, strict=True)
    ]
    view.node.attributes.pop("num_outputs", None)
    if view.opset < 13:
        view.node.attributes["split"] = ir.AttrInt64s("split", sizes)
    else:
        set_constant(view.node, 1, np.array(sizes, np.int64), "split")


def _slice(view: NodeView) -> Coupling:
    """A window of step one on any axis; axes that are sliced otherwise stay as they are."""
    rank = len(view.dims())
    starts, ends = view.ints("starts", 1), view.ints("ends", 2)
    if starts is None or ends is None:
        raise Refused("Slice lacks an input")
    axes = tuple(a % rank for a in view.ints("axes", 3) or range(len(starts)))
    steps = (view.ints("steps", 4) if view.opset >= 10 else None) or (1,) * len(starts)
    links = list(view.same((i, i) for i in range(rank) if i not in axes))
    windows = {}
    for k, axis in enumerate(axes):
        size = view.dims()[axis]
        window = np.arange(size if isinstance(size, int) else 0)[starts[k] : ends[k]]
        if steps[k] == 1 and len(window):
            windows[axis] = window
            links.append(Link(view.slot(0, axis), view.out(axis), window, np.arange(len(window))))
    return Coupling(tuple(links), cut=lambda keep: _cut_slice(view, axes, windows, keep))


def _cut_slice(view: NodeView, axes: Sequence[int], windows: Mapping[int, Indices], keep: Keep) -> None:
    starts, ends = list(view.ints("starts", 1) or ()), list(view.ints("ends", 2) or ())
    before = (tuple(starts), tuple(ends))
    for k, axis in enumerate(axes):
        kept = keep(view.slot(0, axis)) if axis in windows else None
        if kept is not None:
            window = windows[axis]
            starts[k] = int(np.searchsorted(kept, window[0]))
            ends[k] = int(np.searchsorted(kept, window[-1], side="right"))
    if (tuple(starts), tuple(ends)) != before:
        _set_ints(view, "starts", 1, starts)
        _set_ints(view, "ends", 2, ends)


def _gather(view: NodeView) -> Coupling:
    """A selection with constant indices, and every axis that is not gathered along."""
    before, indices = view.dims(), view.dims(1)
    axis = int(attribute(view.node, "axis", 0)) % len(before)
    shift = len(indices) - 1
    links = view.same((i, i if i < axis else i + shift) for i in range(len(before)) if i != axis)
    chosen, size = constant_of(view.data(1)), before[axis]
    if chosen is None or len(indices) != 1 or not isinstance(size, int):
        return Coupling(links)
    source = chosen.astype(np.int64) % size
    link = Link(view.slot(0, axis), view.out(axis), source, np.arange(len(source)))
    return Coupling((*links, link), cut=lambda keep: _cut_gather(view, link, source, keep))


def _cut_gather(view: NodeView, link: Link, source: Indices, keep: Keep) -> None:
    kept_in, kept_out = keep(link.a), keep(link.b)
    if kept_in is None and kept_out is None:
        return
    wanted = source if kept_out is None else source[kept_out]
    moved = wanted if kept_in is None else np.searchsorted(kept_in, wanted)
    set_constant(view.node, 1, moved, "indices")


def _pad(view: NodeView) -> Coupling:
    """Axes without padding, and axes that a constant is put around."""
    before, after = view.dims(), view.out_dims()
    begins, ends = pad_widths(view)
    constant = attribute(view.node, "mode", "constant") == "constant"
    links = list(view.same((i, i) for i in range(len(before)) if begins[i] == ends[i] == 0))
    padded = [i for i in range(len(before)) if begins[i] or ends[i]]
    for i in padded:
        size = before[i]
        if constant and min(begins[i], ends[i]) >= 0 and isinstance(size, int) and is_wide(after[i]):
            every = np.arange(size)
            links.append(Link(view.slot(0, i), view.out(i), every, every + begins[i]))
    return Coupling(tuple(links), cut=lambda keep: _cut_pad(view, padded, keep))


def pad_widths(view: NodeView) -> tuple[list[int], list[int]]:
    """What a Pad adds before and after, axis by axis; the widths must be constant."""
    rank = len(view.dims())
    pads = view.ints("pads", 1)
    if pads is None:
        raise Refused("Pad lacks an input")
    axes = view.ints("axes", 3) or tuple(range(rank))
    begins, ends = [0] * rank, [0] * rank
    for k, axis in enumerate(axes):
        begins[axis], ends[axis] = pads[k], pads[k + len(axes)]
    return begins, ends


def _cut_pad(view: NodeView, padded: Sequence[int], keep: Keep) -> None:
    """What leaves among the padding makes the padding narrower."""
    begins, ends = pad_widths(view)
    sizes = {i: _size(view.dims()[i]) for i in padded if keep(view.out(i)) is not None}
    if not sizes:
        return
    for i, size in sizes.items():
        kept = keep(view.out(i))
        assert kept is not None
        inner = slice(begins[i], begins[i] + size)
        begins[i], ends[i] = int((kept < inner.start).sum()), int((kept >= inner.stop).sum())
    axes = [a % len(begins) for a in view.ints("axes", 3) or range(len(begins))]
    _set_ints(view, "pads", 1, [begins[a] for a in axes] + [ends[a] for a in axes])


def _resize(view: NodeView) -> Coupling:
    """Axes that keep their size, whatever becomes of the others."""
    if attribute(view.node, "coordinate_transformation_mode") == "tf_crop_and_resize":
        raise Refused("Resize with a region of interest")
    if attribute(view.node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Refused("Resize that keeps the aspect ratio")
    rank = len(view.dims())
    axes = [int(a) % rank for a in attribute(view.node, "axes", range(rank))]
    scales = _scales(view)
    wanted = _sizes(view) if scales is None else scales
    if len(wanted) != len(axes):
        raise Refused("Resize names too few axes")
    unscaled: Sequence[object] = view.dims() if scales is None else [1.0] * rank
    changed = {a for a, new in zip(axes, wanted, strict=True) if new != unscaled[a]}
    links = view.same((i, i) for i in range(rank) if i not in changed)
    return Coupling(links, cut=partial(_cut_sizes, view, axes) if scales is None else None)


def _scales(view: NodeView) -> Sequence[float] | None:
    """The factors that a Resize names, None where it names sizes."""
    index = 2 if view.node.op_type == "Resize" and view.opset >= 11 else 1
    value = view.input(index)
    if value is None:
        return attribute(view.node, "scales")  # type: ignore[no-any-return]
    scales = constant_of(value)
    if scales is None:
        raise Refused("Resize by a computed scale")
    return [float(s) for s in scales] if scales.size else None


def _sizes(view: NodeView) -> Sequence[float]:
    sizes = constant_of(view.input(3))
    if sizes is None:
        raise Refused("Resize to a computed size")
    return [int(s) for s in sizes]


def _cut_sizes(view: NodeView, axes: Sequence[int], keep: Keep) -> None:
    sizes = list(_sizes(view))
    for k, axis in enumerate(axes):
        kept = keep(view.out(axis))
        sizes[k] = sizes[k] if kept is None else len(kept)
    if sizes != _sizes(view):
        set_constant(view.node, 3, np.array(sizes, np.int64), "sizes")


def _depth_to_space(view: NodeView) -> Coupling:
    """Every output channel is made of blocksize^2 input channels."""
    area = int(attribute(view.node, "blocksize")) ** 2
    x, y = view.slot(0, 1), view.out(1)
    channels = view.out_dims()[1]
    if not isinstance(channels, int):
        raise Refused("channel axis is dynamic")
    view.expect(x, channels * area)
    every = np.arange(channels * area)
    depth_first = attribute(view.node, "mode", "DCR") == "DCR"
    return Coupling((Link(x, y, every, every % channels if depth_first else every // area),))


def _space_to_depth(view: NodeView) -> Coupling:
    """Every input channel becomes blocksize^2 output channels."""
    channels = view.dims()[1]
    if not isinstance(channels, int):
        raise Refused("channel axis is dynamic")
    every = np.arange(channels * int(attribute(view.node, "blocksize")) ** 2)
    view.expect(view.out(1), len(every))
    return Coupling((Link(view.slot(0, 1), view.out(1), every % channels, every),))


def _shape(view: NodeView) -> Coupling:
    """Axes whose size nobody picks from the result may change."""
    rank = len(view.dims())
    start, end = attribute(view.node, "start", 0), attribute(view.node, "end", rank)
    given = range(rank)[start:end]
    picked = _picked(view.node.outputs[0])
    read = given if picked is None else [given[i] for i in picked]
    return Coupling(free=tuple(view.slot(0, i) for i in range(rank) if i not in read))


def _picked(shape: ir.Value) -> list[int] | None:
    """The entries of a shape that its readers pick; None where one may read them all."""
    picked: list[int] = []
    if shape.is_graph_output():
        return None
    for node, index in shape.uses():
        chosen = constant_of(node.inputs[1]) if node.op_type == "Gather" and index == 0 else None
        if chosen is None:
            return None
        picked += [int(i) for i in chosen.ravel()]
    return picked


MOVES: Mapping[str, Callable[[NodeView], Coupling]] = MappingProxyType(
    {
        "Concat": _concat,
        "DepthToSpace": _depth_to_space,
        "Expand": _expand,
        "Flatten": _same_elements,
        "Gather": _gather,
        "Pad": _pad,
        "Reshape": _reshape,
        "Resize": _resize,
        "Shape": _shape,
        "Slice": _slice,
        "SpaceToDepth": _space_to_depth,
        "Split": _split,
        "Squeeze": _same_elements,
        "Transpose": _transpose,
        "Unsqueeze": _same_elements,
        "Upsample": _resize,
    }
)
"""Operators of the default domain, by type."""
