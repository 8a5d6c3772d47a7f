"""shorten-names: every value and node gets the shortest name that is free, and nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build, rewritten

from edgewise.passes.shorten_names import ShortenNames
from edgewise.runtime.session import serialize

CHAIN = """g (float[2] image) => (float[2] scores) {
    hidden = Mul (image, scale_of_the_layer)
    passed = Relu (hidden)
    scores = Add (passed, scale_of_the_layer)
}"""
CHOICE = """g (float[2] x, bool c) => (float[2] y) {
    before = Mul (x, w)
    y = If(c) <then_branch = t () => (float[2] same) { inner = Mul (before, w) same = Neg (inner) },
               else_branch = e () => (float[2] same) { same = Neg (before) }>
}"""
W = np.float32([1, 2])


def names(model: ir.Model) -> set[str]:
    nodes = list(model.graph.all_nodes())
    values = {v.name for node in nodes for v in (*node.inputs, *node.outputs) if v is not None}
    return {*(name or "" for name in values), *(node.name or "" for node in nodes)}


def test_values_are_named_in_the_order_of_nodes_and_nodes_by_their_results() -> None:
    after, outcome = rewritten(build(CHAIN, scale_of_the_layer=W), ShortenNames())
    assert outcome.edits == 3 + 3
    first, second, third = after.graph
    assert [v.name for v in first.inputs] == ["image", "a"]
    assert [node.outputs[0].name for node in (first, second, third)] == ["b", "c", "scores"]
    assert [node.name for node in (first, second, third)] == ["b", "c", "scores"]
    assert list(after.graph.initializers) == ["a"]


def test_graphs_within_are_named_too() -> None:
    """Sharing what they read from outside, and no name between each other."""
    after, _ = rewritten(build(CHOICE, w=W), ShortenNames(), {"x": W, "c": np.array(True)})
    assert names(after) == {"x", "c", "y", "a", "b", "d", "e", "f"}


def test_inputs_and_outputs_keep_names_that_others_could_have_had() -> None:
    model = build("g (float[2] b) => (float[2] a) { long = Neg (b) a = Mul (long, weight) }", weight=W)
    after, _ = rewritten(model, ShortenNames())
    assert names(after) == {"a", "b", "c", "d"}


@pytest.mark.parametrize(
    "swapped", ["b = Neg (x) a = Mul (b, w) y = Add (a, b)", "z = Neg (x) y = Add (z, z)"]
)
def test_names_may_change_places(swapped: str) -> None:
    model = build(f"g (float[2] x) => (float[2] y) {{ {swapped} }}", **({"w": W} if "w" in swapped else {}))
    after, _ = rewritten(model, ShortenNames())
    assert after.graph.node(0).outputs[0].name == "a"


def test_more_than_26_have_two_letters() -> None:
    text = "".join(f"v{i} = Neg ({'x' if not i else f'v{i - 1}'}) " for i in range(60))
    after, _ = rewritten(build(f"g (float[2] x) => (float[2] y) {{ {text} y = Neg (v59) }}"), ShortenNames())
    found = [node.outputs[0].name for node in after.graph]
    assert found[:2] == ["a", "b"]
    assert found[23:26] == ["z", "aa", "ab"]  # x and y are taken
    assert len(set(found)) == 61


def test_the_file_is_smaller() -> None:
    model = build(CHAIN, scale_of_the_layer=W)
    before = len(serialize(model))
    after, _ = rewritten(model, ShortenNames())
    assert len(serialize(after)) < before - 3 * len("hidden")
    assert b"hidden" not in serialize(after)


def test_short_names_stay() -> None:
    once, _ = rewritten(build(CHOICE, w=W), ShortenNames(), {"x": W, "c": np.array(True)})
    assert ShortenNames().apply(once).edits == 0
