"""The difference of hand-made profiles: sums, pairs of nodes, and the words."""

from __future__ import annotations

import json

import pytest

from edgewise.runtime.costs import Kind
from edgewise.runtime.profile import NodeTime, Profile
from edgewise.runtime.profile_difference import NodeChange, ProfileDifference, difference
from edgewise.runtime.session import Grant


def node(name: str, op: str, kind: Kind, ms: float, *sources: str) -> NodeTime:
    return NodeTime(
        name=name,
        op_type=op,
        kind=kind,
        dtype="float32",
        provider="CPUExecutionProvider",
        calls=1,
        ms=ms,
        share=0.0,
        macs=0,
        bytes=0,
        sources=sources,
    )


def profile(*nodes: NodeTime) -> Profile:
    return Profile("m.onnx", "cpu", 1, 10, 1.0, nodes, Grant("cpu", {}, {}), ())


FLOAT = profile(
    node("c1", "Conv", "convolution", 4.0, "conv1", "bn1", "relu1"),
    node("c2", "Conv", "convolution", 3.0, "conv2"),
    node("s", "Transpose", "layout", 0.1, "shuffle"),
    node("r", "ReorderOutput", "layout", 0.2),
)
INT8 = profile(
    node("s", "Transpose", "layout", 4.1, "shuffle", "q2"),
    node("c1_token", "QLinearConv", "convolution", 2.0, "conv1", "relu1", "dq1", "q1"),
    node("c2_token", "QLinearConv", "convolution", 1.9, "conv2", "dq1", "dq2"),
    node("in", "QuantizeLinear", "quantize/dequantize", 0.7, "q0"),
    node("out", "DequantizeLinear", "quantize/dequantize", 0.5, "dq9"),
    node("t1", "Transpose", "layout", 0.1),
    node("t2", "Transpose", "layout", 0.1),
)


def by_sources(found: ProfileDifference) -> dict[tuple[str, ...], NodeChange]:
    return {change.sources: change for change in found.nodes}


class TestSums:
    def test_by_kind_the_largest_change_first(self) -> None:
        found = difference(FLOAT, INT8)
        assert [(c.name, c.before_nodes, c.after_nodes) for c in found.kinds] == [
            ("layout", 2, 3),
            ("convolution", 2, 2),
            ("quantize/dequantize", 0, 2),
        ]
        assert [c.ms for c in found.kinds] == pytest.approx([4.0, -3.1, 1.2])
        assert found.kinds[1].before_ops == ("Conv",)
        assert found.kinds[1].after_ops == ("QLinearConv",)
        assert (found.before_ms, found.after_ms) == pytest.approx((7.3, 9.4))
        assert found.ms == pytest.approx(2.1)

    def test_by_operator(self) -> None:
        changes = {c.name: (c.before_ms, c.after_ms) for c in difference(FLOAT, INT8).ops}
        assert changes["Conv"] == pytest.approx((7.0, 0.0))
        assert changes["Transpose"] == pytest.approx((0.1, 4.3))

    @pytest.mark.parametrize("pair", [(FLOAT, INT8), (INT8, FLOAT), (FLOAT, FLOAT), (profile(), INT8)])
    def test_add_up(self, pair: tuple[Profile, Profile]) -> None:
        found = difference(*pair)
        for changes in (found.kinds, found.ops, found.nodes):
            assert sum(c.ms for c in changes) == pytest.approx(found.ms)
            assert sum(c.before_ms for c in changes) == pytest.approx(pair[0].nodes_ms)


class TestNodes:
    def test_belong_together_by_the_nodes_of_the_file(self) -> None:
        found = by_sources(difference(FLOAT, INT8))
        assert found["conv1", "bn1", "relu1"].after == (INT8.nodes[1],)
        assert found["conv2",].after == (INT8.nodes[2],)
        assert found["shuffle",].ms == pytest.approx(4.0)
        assert found["q0",].before == ()
        assert found["q0",].after_ms == pytest.approx(0.7)

    def test_that_onnxruntime_inserted_belong_to_their_operator(self) -> None:
        inserted = [c for c in difference(FLOAT, INT8).nodes if not c.sources]
        assert [([n.name for n in c.before], [n.name for n in c.after]) for c in inserted] == [
            (["r"], []),
            ([], ["t1", "t2"]),
        ]

    def test_that_were_fused_differently(self) -> None:
        before = profile(
            node("a", "Conv", "convolution", 1.0, "conv"), node("b", "Relu", "elementwise", 0.5, "relu")
        )
        after = profile(node("ab", "FusedConv", "convolution", 1.1, "conv", "relu"))
        for pair in ((before, after), (after, before)):
            (change,) = difference(*pair).nodes
            assert change.sources == ("conv", "relu")
            assert (change.before, change.after) == (pair[0].nodes, pair[1].nodes)

    def test_of_other_files_stay_apart(self) -> None:
        other = profile(node("z", "Conv", "convolution", 1.0, "another"))
        found = by_sources(difference(FLOAT, other))
        assert found["another",].before == ()
        assert found["conv2",].after == ()


class TestSentences:
    def test_say_where_int8_lost(self) -> None:
        first, second = difference(FLOAT, INT8, names=("float", "int8")).sentences
        assert first == (
            "int8 takes 2.10 ms more than float (7.30 -> 9.40 ms): it wins 3.10 ms in convolution "
            "and loses 4.00 ms in layout and 1.20 ms in quantize/dequantize"
        )
        assert second == (
            "the largest loss, in layout, comes with Transpose: 0.10 -> 4.30 ms in 3 nodes instead of 1"
        )

    def test_say_where_it_won(self) -> None:
        (first,) = difference(INT8, FLOAT, names=("int8", "float")).sentences[:1]
        assert first.startswith(
            "float takes 2.10 ms less than int8 (9.40 -> 7.30 ms): it wins 4.00 ms in layout"
        )
        assert first.endswith("and loses 3.10 ms in convolution")

    def test_name_what_is_new(self) -> None:
        before = profile(node("c", "Conv", "convolution", 1.0, "c"))
        after = profile(*before.nodes, node("t", "Transpose", "layout", 2.0))
        sentences = difference(before, after, names=("a", "b")).sentences
        assert sentences[0].endswith("it loses 2.00 ms in layout")
        assert sentences[1].endswith("0.00 -> 2.00 ms in 1 node that a does not have")

    def test_leave_out_what_is_not_worth_a_word(self) -> None:
        slower = profile(
            node("c", "Conv", "convolution", 5.0, "c"), node("r", "Relu", "elementwise", 0.11, "r")
        )
        before = profile(
            node("c", "Conv", "convolution", 1.0, "c"), node("r", "Relu", "elementwise", 0.1, "r")
        )
        assert "elementwise" not in " ".join(difference(before, slower).sentences)

    @pytest.mark.parametrize("same", [FLOAT, profile()])
    def test_of_the_same_profile(self, same: Profile) -> None:
        assert difference(same, same).sentences == (
            "the first and the second take the same time in every kind of work",
        )


def test_as_json() -> None:
    data = json.loads(json.dumps(difference(FLOAT, INT8).to_dict(), allow_nan=False))
    assert data["kinds"][0]["name"] == "layout"
    assert {tuple(change["sources"]) for change in data["nodes"]} == set(by_sources(difference(FLOAT, INT8)))
    assert len(data["sentences"]) == 2
