"""The dependency graph: index maps as the runtime has them, closed groups, removal that spares the rest."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from channel_nets import nets
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import assert_equal, build, constants

from edgewise.passes.base import PassError, Refused
from edgewise.passes.channel_constants import Constants
from edgewise.passes.channel_links import Link, NodeView
from edgewise.passes.channels import COUPLINGS, ChannelGraph, ChannelGroup, _components, find_groups
from edgewise.passes.graph import attribute
from edgewise.passes.verify import Signature, check
from edgewise.runtime.evaluate import Array, Evaluator, input_specs, seeded_feed
from edgewise.runtime.session import serialize

OPSET = 20


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def coupled(model: ir.Model, operator: str) -> tuple[Link, ...]:
    """The links of the one node of that type."""
    graph = ChannelGraph.of(model.graph, OPSET)
    (coupling,) = [c for node, c in graph.couplings.items() if node.op_type == operator]
    return coupling.links


MOVES = {
    "transpose": (4, "y = Transpose<perm = [0, 3, 1, 2]>(x)", {}),
    "reversed": (4, "y = Transpose(x)", {}),
    "flatten": (2, "y = Flatten<axis = 2>(x)", {}),
    "reshape": (3, "y = Reshape(x, s)", {"s": ints(2, 24, 5)}),
    "merged and split": (1, "y = Reshape(x, s)", {"s": ints(12, 2, 10)}),
    "split up": (4, "y = Reshape(x, s)", {"s": ints(2, 3, 2, 4, 5)}),
    "with ones": (3, "y = Reshape(x, s)", {"s": ints(1, 2, 6, 1, 20)}),
    "unsqueeze": (4, "y = Unsqueeze(x, s)", {"s": ints(1, 3)}),
    "concat": (4, "y = Concat<axis = 1>(z, x, z)", {"z": np.zeros((2, 3, 4, 5), np.float32)}),
    "split": (4, "y, z = Split<axis = 1>(x, s)", {"s": ints(4, 2)}),
    "window": (4, "y = Slice(x, s, e, a)", {"s": ints(-5, 1), "e": ints(2**40, 3), "a": ints(1, 3)}),
    "stride": (3, "y = Slice(x, s, e, a, t)", {"s": ints(5), "e": ints(-9), "a": ints(1), "t": ints(-2)}),
    "gather": (4, "y = Gather<axis = 1>(x, s)", {"s": ints(3, -1, 0, 3)}),
    "gather one": (3, "y = Gather<axis = 2>(x, s)", {"s": np.array(2)}),
    "gather a table": (3, "y = Gather<axis = 2>(x, s)", {"s": np.array([[0, 1], [3, 2]])}),
    "pad": (4, "y = Pad(x, s)", {"s": ints(0, 2, 0, 1, 0, 1, 0, 0)}),
    "pad of axes": (4, "y = Pad(x, s, , a)", {"s": ints(1, 0, 0, 2), "a": ints(-3, 2)}),
    "depth to space": (1, "y = DepthToSpace<blocksize = 2>(x)", {}),
    "columns first": (1, 'y = DepthToSpace<blocksize = 2, mode = "CRD">(x)', {}),
    "space to depth": (1, "y = SpaceToDepth<blocksize = 2>(x)", {}),
    "resize": (3, "y = Resize(x, , s)", {"s": np.array([1, 1, 2, 1], np.float32)}),
    "resize to sizes": (3, "y = Resize(x, , , s)", {"s": ints(2, 6, 9, 5)}),
    "mean": (3, "y = ReduceMean<keepdims = 0>(x, s)", {"s": ints(2)}),
    "nothing summed": (4, "y = ReduceSum<noop_with_empty_axes = 1>(x)", {}),
    "pool": (2, "y = MaxPool<kernel_shape = [2, 2]>(x)", {}),
}


@pytest.mark.parametrize("name", MOVES)
def test_index_maps(name: str) -> None:
    """Feed every index of an axis as its own number: where it comes out is what the link must say."""
    count, text, weights = MOVES[name]
    shape = (2, 8, 4, 5) if "depth to" in name or name == "columns first" else (2, 6, 4, 5)
    if name == "space to depth":
        shape = (2, 6, 4, 6)
    model = build(f"g (float{list(shape)} x) => (float[] y) {{ {text} }}", OPSET, **weights)
    node = model.graph.node(0)
    links = [link for link in coupled(model, node.op_type) if link.a.use is None and link.b.value.name == "y"]
    assert len(links) == count
    for link in links:
        axis, size = link.a.axis, shape[link.a.axis]
        labels = np.arange(1, size + 1, dtype=np.float32).reshape([-1 if i == axis else 1 for i in range(4)])
        y = Evaluator(model).run({"x": np.broadcast_to(labels, shape)})["y"]
        slices = np.moveaxis(y, link.b.axis, 0).reshape(y.shape[link.b.axis], -1)
        seen = {(int(v) - 1, k) for k, row in enumerate(slices) for v in row if v}
        source = np.arange(size) if link.source is None else link.source
        target = np.arange(size) if link.target is None else link.target
        assert seen == set(zip(source.tolist(), target.tolist(), strict=True))


def test_blocks_of_a_reshape_with_unknown_sizes() -> None:
    """From the right as far as numbers go, from the left as far as names agree."""
    text = "g (float[N, 6, H, 4, 5] x) => (float[] y) { y = Reshape(x, s) }"
    model = build(text, OPSET, s=ints(0, 0, -1, 20))
    model.graph.node(0).outputs[0].shape = ir.Shape(["N", 6, None, 20])
    assert [(link.a.axis, link.b.axis) for link in coupled(model, "Reshape")] == [(1, 1), (3, 3)]


def test_the_merged_axis_is_the_one_that_has_channels() -> None:
    """In pixels-first order the channels are the last of three merged axes."""
    text = "t = Transpose<perm = [0, 2, 3, 1]>(c) f = Reshape(t, s) y = MatMul(f, v)"
    model = build(
        f"g (float[N, 3, 4, 5] x) => (float[] y) {{ c = Conv(x, w) {text} }}",
        w=np.ones((2, 3, 1, 1), np.float32),
        s=ints(0, -1),
        v=np.ones((40, 7), np.float32),
    )
    group = group_of(model, "c")
    assert slices(group, 1)["v", 0] == list(range(1, 40, 2))


def heads(last: str, **weights: Array) -> ir.Model:
    """Twelve features that are four heads of three numbers each."""
    return build(
        f"g (float[N, 5, 6] x) => (float[] y) {{ m = MatMul(x, w) r = Reshape(m, s) {last} }}",
        OPSET,
        w=np.ones((6, 12), np.float32),
        s=ints(0, 5, 4, 3),
        **weights,
    )


def test_an_axis_that_is_split_up_goes_on_along_the_part_that_is_free() -> None:
    """Sums over the numbers of a head hold those fast, so channels are heads."""
    summed = heads(
        "h = ReduceSum<keepdims = 0>(r, a) y = MatMul(h, v)", a=ints(3), v=np.ones((4, 7), np.float32)
    )
    assert slices(group_of(summed, "h", 2), 1)["w", 1] == [3, 4, 5]
    other = heads(
        "h = ReduceSum<keepdims = 0>(r, a) y = MatMul(h, v)", a=ints(2), v=np.ones((3, 7), np.float32)
    )
    assert slices(group_of(other, "h", 2), 1)["w", 1] == [1, 4, 7, 10]


def test_where_both_parts_are_free_it_is_the_one_that_others_go_on_along() -> None:
    """Values may lose heads or numbers; they are multiplied with sums that are one number a head."""
    text = """h = ReduceSum<keepdims = 1>(r, a) m2 = MatMul(x, w2) r2 = Reshape(m2, s) p = Mul(r2, h)
        f = Reshape(p, t) y = MatMul(f, v)"""
    held = {"w2": np.ones((6, 12), np.float32), "v": np.ones((12, 2), np.float32)}
    model = heads(text, a=ints(3), t=ints(0, 5, 12), **held)
    assert slices(group_of(model, "f", 2), 2)["w2", 1] == [6, 7, 8]


def test_any_number_of_heads_will_do() -> None:
    """A multiple is kept to where layers have weights: twelve features less three heads are three."""
    model = heads(
        "h = ReduceSum<keepdims = 1>(r, a) p = Mul(r, h) f = Reshape(p, t) y = MatMul(f, v)",
        a=ints(3),
        t=ints(0, 5, 12),
        v=np.ones((12, 2), np.float32),
    )
    graph = ChannelGraph.of(model.graph, OPSET)
    (free,) = [group for group in graph.groups if not group.blocks]
    settled = graph.settle(
        {group: group is free and np.array([1, 1, 1, 0], bool) for group in graph.groups}, 3
    )
    assert settled[free].sum() == 3


def group_of(model: ir.Model, name: str, axis: int = 1) -> ChannelGroup:
    """The group of a value."""
    (found,) = [
        g for g in find_groups(model) if any((s.value.name, s.axis) == (name, axis) for s in g.members)
    ]
    return found


def group_in(graph: ChannelGraph, name: str) -> ChannelGroup:
    """The group of axis 1 of a value."""
    return next(group for slot, group in graph.home.items() if (slot.value.name, slot.axis) == (name, 1))


def slices(group: ChannelGroup, channel: int) -> dict[tuple[str | None, int], list[int]]:
    """What leaves with a channel, by name and axis."""
    return {(value.name, axis): indices.tolist() for value, axis, indices in group.slices(channel)}


def branches() -> ir.Model:
    """A residual sum, a concat with a branch of its own, a depthwise layer and a dense one over pixels."""
    ones = lambda *shape: np.ones(shape, np.float32)  # noqa: E731
    return build(
        """g (float[N, 3, 4, 4] x) => (float[] y) {
            a = Conv<pads = [1, 1, 1, 1]>(x, wa, ba)
            b = Conv<pads = [1, 1, 1, 1]>(a, wb)
            s = Add(a, b)
            c = Conv(x, wc)
            j = Concat<axis = 1>(c, s)
            d = Conv<group = 6>(j, wd)
            f = Flatten(d)
            y = Gemm(f, wf)
        }""",
        wa=ones(4, 3, 3, 3),
        ba=ones(4),
        wb=ones(4, 4, 3, 3),
        wc=ones(2, 3, 1, 1),
        wd=ones(6, 1, 3, 3),
        wf=ones(24, 5),
    )


def test_a_channel_leaves_with_all_its_slices() -> None:
    group = group_of(branches(), "s")
    (channel,) = {int(labels[1]) for slot, labels in group.members.items() if slot.value.name == "s"}
    assert slices(group, channel) == {
        ("wa", 0): [1],
        ("ba", 0): [1],
        ("a", 1): [1],
        ("wb", 0): [1],
        ("wb", 1): [1],
        ("b", 1): [1],
        ("s", 1): [1],
        ("j", 1): [3],
        ("wd", 0): [3],
        ("d", 1): [3],
        ("f", 1): [12, 13, 14, 15],
        ("wf", 0): [12, 13, 14, 15],
    }


def test_groups_of_a_net() -> None:
    """The network's inputs and outputs are groups as well, but blocked."""
    found = {frozenset(s.value.name for s in g.members): g for g in find_groups(branches())}
    reasons = {group.size: {b.reason for b in group.blocks} for group in found.values()}
    assert reasons == {3: {"graph input"}, 6: set(), 5: {"graph output"}}
    assert all(group.blocked.all() == bool(group.blocks) for group in found.values())


def cut_in(group: ChannelGroup, name: str, *indices: int) -> Array:
    """The channels at these indices of axis 1 of a value."""
    (labels,) = [labels for s, labels in group.members.items() if (s.value.name, s.axis) == (name, 1)]
    cut = np.zeros(group.size, np.bool_)
    cut[labels[list(indices)]] = True
    return cut


def test_what_has_to_stay_is_taken_back() -> None:
    graph = ChannelGraph.of(branches().graph, OPSET)
    everything = {group: np.ones(group.size, np.bool_) for group in graph.groups}
    settled = graph.settle(everything)
    assert [int(cut.sum()) for group, cut in settled.items() if group.blocks] == [0, 0]
    (free,) = [group for group in graph.groups if not group.blocks]
    assert (settled[free] == cut_in(free, "j", 1, 3, 4, 5)).all(), "one of each branch stays, the first"
    assert int(graph.settle(everything, multiple=2)[free].sum()) == 2


def test_what_is_worth_most_is_taken_back() -> None:
    graph = ChannelGraph.of(branches().graph, OPSET)
    everything = {group: np.ones(group.size, np.bool_) for group in graph.groups}
    (free,) = [group for group in graph.groups if not group.blocks]
    worth = {group: np.zeros(group.size) for group in graph.groups}
    worth[free][cut_in(free, "j", 1, 5)] = 1.0
    settled = graph.settle(everything, worth=worth)
    assert (settled[free] == cut_in(free, "j", 0, 2, 3, 4)).all(), "one of each branch stays, the dearest"


def test_removal_is_all_or_nothing() -> None:
    model = branches()
    before = serialize(model)
    graph = ChannelGraph.of(model.graph, OPSET)
    with pytest.raises(PassError, match="cannot leave"):
        graph.remove({group: np.ones(group.size, np.bool_) for group in graph.groups})
    assert serialize(model) == before


def test_groups_of_a_convolution_stay_equal() -> None:
    """Two groups of three: what leaves unevenly is taken back from the front."""
    model = build(
        "g (float[N, 2, 4, 4] x) => (float[] y) "
        "{ a = Conv(x, w1) b = Conv<group = 2>(a, w2) y = Conv(b, w3) }",
        w1=np.ones((6, 2, 1, 1), np.float32),
        w2=np.ones((4, 3, 1, 1), np.float32),
        w3=np.ones((2, 4, 1, 1), np.float32),
    )
    graph = ChannelGraph.of(model.graph, OPSET)
    group = {v: group_in(graph, v) for v in "ab"}
    none = {g: np.zeros(g.size, np.bool_) for g in graph.groups}
    uneven = none | {group["a"]: cut_in(group["a"], "a", 0, 2, 4)}
    assert (graph.settle(uneven)[group["a"]] == cut_in(group["a"], "a", 2, 4)).all()
    worth = {g: np.zeros(g.size) for g in graph.groups} | {group["a"]: np.arange(6.0)}
    assert (graph.settle(uneven, worth=worth)[group["a"]] == cut_in(group["a"], "a", 0, 4)).all()
    whole = none | {
        group["a"]: cut_in(group["a"], "a", 0, 1, 2, 4),
        group["b"]: cut_in(group["b"], "b", 0, 1),
    }
    assert (graph.settle(whole)[group["a"]] == whole[group["a"]]).all()
    graph.remove(graph.settle(whole))
    grouped = model.graph.node(1)
    assert (attribute(grouped, "group"), grouped.inputs[1].shape) == (1, (2, 2, 1, 1))


@given(st.lists(st.booleans(), min_size=12, max_size=12), st.integers(1, 4))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_two_quotas_on_one_value(wanted: list[bool], multiple: int) -> None:
    """Halves of six in front, thirds of four behind: to settle one may unsettle the other."""
    model = build(
        "g (float[N, 3, 4, 4] x) => (float[] y) "
        "{ i = Conv(x, w0) a = Conv<group = 2>(i, w1) b = Conv<group = 3>(a, w2) y = Conv(b, w3) }",
        w0=np.ones((4, 3, 1, 1), np.float32),
        w1=np.ones((12, 2, 1, 1), np.float32),
        w2=np.ones((6, 4, 1, 1), np.float32),
        w3=np.ones((2, 6, 1, 1), np.float32),
    )
    graph = ChannelGraph.of(model.graph, OPSET)
    none = {g: np.zeros(g.size, np.bool_) for g in graph.groups}
    group = group_in(graph, "a")
    settled = graph.settle(none | {group: np.array(wanted)}, multiple)
    leaving = settled[group][group.members[next(s for s in group.members if s.value.name == "a")]]
    for groups in (2, 3):
        assert len(set(leaving.reshape(groups, -1).sum(1).tolist())) == 1
    assert (12 - leaving.sum()) % multiple == 0
    assert all((graph.settle(settled)[g] == cut).all() for g, cut in settled.items())


def without(graph: ChannelGraph, cuts: dict[ChannelGroup, Array]) -> None:
    """Zero in every layer the weights of the inputs that are to leave."""
    for layer in Constants.of(graph).layers:
        leaving = graph.leaving(layer.source, cuts).reshape(layer.weight.shape[0], 1, -1, 1)
        (value,) = [v for v in layer.node.inputs if v is not None and v is not layer.source.value][:1]
        kept = np.where(leaving, 0, layer.weight).astype(np.float32)
        operator, transposed = layer.node.op_type, attribute(layer.node, "transB", 0)
        if operator == "ConvTranspose":
            kept = kept.swapaxes(1, 2)
        elif operator == "MatMul" or (operator == "Gemm" and not transposed):
            kept = kept[0, :, :, 0].T
        assert value.const_value is not None
        value.const_value = ir.tensor(kept.reshape(value.const_value.shape.numpy()), name=value.name)


@given(nets(), st.integers(0, 2**16))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_any_settled_cut_is_as_good_as_not_reading_its_channels(model: ir.Model, seed: int) -> None:
    """Remove channels at random: what stays computes what it did, from the channels that stay."""
    rng = np.random.default_rng(seed)
    deaf, feed = model.clone(), seeded_feed(input_specs(model), size=2)
    graph, twin = (ChannelGraph.of(m.graph, OPSET) for m in (model, deaf))
    wanted = [rng.random(group.size) < 0.4 for group in graph.groups]
    without(twin, twin.settle(dict(zip(twin.groups, wanted, strict=True))))
    signature = Signature.of(model)
    graph.remove(graph.settle(dict(zip(graph.groups, wanted, strict=True))))
    check(model, signature)
    assert_equal(Evaluator(deaf).run(feed), Evaluator(model).run(feed))


def test_random_cuts_do_cut() -> None:
    """The property above would hold of a removal that removes nothing."""
    model = branches()
    graph = ChannelGraph.of(model.graph, OPSET)
    (free,) = [group for group in graph.groups if not group.blocks]
    cuts = {group: np.zeros(group.size, np.bool_) for group in graph.groups} | {free: cut_in(free, "j", 0, 2)}
    graph.remove(cuts)
    sizes = {name: array.shape for name, array in constants(model).items()}
    assert sizes["wa"] == (3, 3, 3, 3)
    assert sizes["wf"] == (16, 5)
    assert {v.name: v.shape[1] for n in model.graph for v in n.outputs if v.name in "jdf"} == {
        "j": 4,
        "d": 4,
        "f": 16,
    }


MALFORMED = [
    ("MatMul of a vector", "y = MatMul(x, w)", "float[4] x", {"w": np.ones((4, 2), np.float32)}),
    ("MatMul of a vector", "y = MatMul(w, x)", "float[4] x", {"w": np.ones((3, 2, 4), np.float32)}),
    ("MatMul of a value and itself", "y = MatMul(x, x)", "float[4, 4] x", {}),
    ("channel axis is dynamic", "y = Conv(x, w)", "float[N, C, 5] x", {"w": np.ones((2, 3, 1), np.float32)}),
    ("channel axis is dynamic", "y = DepthToSpace<blocksize = 2>(x)", "float[N, C, 2, 2] x", {}),
    ("channel axis is dynamic", "y = SpaceToDepth<blocksize = 2>(x)", "float[N, C, 2, 2] x", {}),
    ("Resize names too few axes", "y = Resize(x, , s)", "float[1, 2, 4] x", {"s": np.ones(2, np.float32)}),
    ("Slice lacks an input", "y = Slice(x)", "float[4] x", {}),
    ("Pad lacks an input", "y = Pad(x)", "float[4] x", {}),
    ("Gather lacks an input", "y = Gather(x)", "float[4] x", {}),
    (
        "parameter is not per channel",
        "y = InstanceNormalization(x, s, s)",
        "float[1, 4, 2] x",
        {"s": np.ones(2, np.float32)},
    ),
]


@pytest.mark.parametrize(("reason", "text", "given", "weights"), MALFORMED)
def test_rules_refuse(reason: str, text: str, given: str, weights: dict[str, Array]) -> None:
    model = build(f"g ({given}) => (float[] y) {{ {text} }}", OPSET, shapes=False, **weights)
    node = model.graph.node(0)
    rank = 1 if given.count(",") == 0 else given.count(",") + 1
    node.outputs[0].shape = ir.Shape([None] * rank)
    with pytest.raises(Refused, match=f"^{reason}$"):
        COUPLINGS[node.op_type](NodeView(node, OPSET))


@given(st.integers(1, 40), st.data())
@settings(deadline=None, derandomize=True, max_examples=60)
def test_components(size: int, data: st.DataObject) -> None:
    """Against merging one edge at a time."""
    ends = st.integers(0, size - 1)
    edges = data.draw(st.lists(st.tuples(ends, ends), max_size=60))
    naive = list(range(size))
    for a, b in edges:
        naive = [naive[a] if label == naive[b] else label for label in naive]
    heads, tails = (np.array([e[i] for e in edges], np.int64) for i in (0, 1))
    labels = _components(size, heads, tails)
    assert labels[0] == 0
    assert [labels.tolist().index(v) for v in labels] == [naive.index(v) for v in naive]
