"""fold-shapes: arithmetic on shapes becomes constants, whole or in part."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import build, constants, operators, refusal, rewritten

from edgewise.passes.fold_shapes import FoldShapes
from edgewise.runtime.evaluate import Array

RULE = FoldShapes()


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def counted(body: str, shape: str = "N, 3, 4", **weights: Array) -> ir.Model:
    """`s` is computed by `body` from x, and converted for the output."""
    return build(f"g (float[{shape}] x) => (float[] y) {{ {body} y = Cast<to = 1>(s) }}", **weights)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("s = Shape<start = 1>(x)", ints(3, 4)),
        ("s = Shape<start = -1>(x)", ints(4)),
        ("s = Shape<start = 1, end = -1>(x)", ints(3)),
        ("a = Shape(x) s = Gather(a, i)", np.int64(3)),
        ("a = Shape(x) s = Gather(a, j)", ints(4, 3)),
        ("a = Shape(x) s = Slice(a, b, e)", ints(3, 4)),
        ("a = Shape(x) c = Cast<to = 6>(a) d = Gather(c, j) s = Cast<to = 7>(d)", ints(4, 3)),
        (
            "a = Shape(x) d = Gather(a, i) u = Unsqueeze(d, z) f = Identity(u) s = Concat<axis = 0>(f, j)",
            ints(3, 2, 1),
        ),
        ("a = Shape(x) d = Slice(a, b, k) s = Squeeze(d)", np.int64(3)),
        ("a = Shape(x) d = Gather(a, i) s = Reshape(d, b)", ints(3)),
        ("a = Shape(x) r = Shape(a) s = Squeeze(r)", np.int64(3)),
        ("a = Shape(x) d = Mul(a, m) s = Gather(d, j)", ints(12, 6)),
        ("a = Shape(x) d = Add(a, m) s = Gather(d, i)", np.int64(5)),
        ("a = Shape(x) d = Sub(m, a) s = Gather(d, j)", ints(-1, -1)),
        ("a = Shape(x) d = Div(a, m) s = Gather(d, j)", ints(1, 1)),
        ("a = Shape(x) e_ = Equal(a, neg) s = Where(e_, a, m)", ints(1, 2, 3)),
    ],
)
def test_known_although_the_batch_is_not(body: str, expected: Array) -> None:
    weights = {"i": np.int64(1), "j": ints(2, 1), "b": ints(1), "e": ints(9), "z": ints(0), "k": ints(2)}
    weights |= {"m": ints(1, 2, 3), "neg": ints(-1)}
    used = {name: a for name, a in weights.items() if f", {name}" in body or f"({name}" in body}
    after, _ = rewritten(counted(body, **used), RULE)
    assert operators(after) == ["Cast"]
    folded = constants(after)["s"]
    np.testing.assert_array_equal(folded, expected, strict=True)


@pytest.mark.parametrize(("body", "expected"), [("s = Size(x)", 24), ("a = Shape(x) s = Size(a)", 3)])
def test_sizes(body: str, expected: int) -> None:
    after, _ = rewritten(counted(body, "2, 3, 4"), RULE)
    np.testing.assert_array_equal(constants(after)["s"], np.int64(expected), strict=True)


@pytest.mark.parametrize(
    "body",
    [
        "s = Shape(x)",
        "s = Size(x)",
        "a = Shape(x) s = Gather(a, i)",
        "a = Shape(x) s = Slice(a, i, e)",
    ],
)
def test_unknown_because_of_the_batch(body: str) -> None:
    weights = {name: a for name, a in {"i": ints(0), "e": ints(2)}.items() if f", {name}" in body}
    assert refusal(counted(body, **weights), RULE) == ""


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(-6, 6),
    st.integers(-(2**63), 2**63 - 1) | st.integers(-6, 6),
    st.sampled_from([-2, -1, 1, 2]),
)
@settings(deadline=None, max_examples=40)
def test_any_slice_of_a_shape(shape: list[int], start: int, end: int, step: int) -> None:
    body = "a = Shape(x) s = Slice(a, b, e, z, m)"
    weights = {"b": ints(start), "e": ints(end), "z": ints(0), "m": ints(step)}
    after, _ = rewritten(counted(body, ", ".join(map(str, shape)), **weights), RULE)
    assert operators(after) == (["Cast"] if step > 0 else ["Slice", "Cast"])


RESHAPES: Mapping[str, tuple[str, Array]] = {
    "one unknown": ("t = Concat<axis = 0>(n, twelve)", ints(-1, 12)),
    "copied and inferred": ("t = Concat<axis = 0>(n, rest)", ints(0, -1)),
    "through a cast": ("c = Cast<to = 6>(n) d = Cast<to = 7>(c) t = Concat<axis = 0>(d, rest)", ints(0, -1)),
    "unknown arithmetic": ("d = Mul(n, twelve) t = Concat<axis = 0>(d, one)", ints(-1, 1)),
}


@pytest.mark.parametrize("name", RESHAPES)
def test_the_target_of_a_reshape(name: str) -> None:
    body, expected = RESHAPES[name]
    weights = {"i": ints(0), "twelve": ints(12), "rest": ints(-1), "one": ints(1)}
    used = {n: a for n, a in weights.items() if n == "i" or n in body}
    text = f"g (float[N, 3, 4] x) => (float[] y) {{ s = Shape(x) n = Gather(s, i) {body} y = Reshape(x, t) }}"
    after, outcome = rewritten(build(text, **used), RULE)
    assert operators(after) == ["Reshape"]
    assert outcome.edits == 1
    np.testing.assert_array_equal(next(iter(constants(after).values())), expected)


@pytest.mark.parametrize(
    "body",
    [
        "t = Concat<axis = 0>(n, m, rest) y = Reshape(x, t)",  # the order of the axes changes
        "t = Concat<axis = 0>(n, zero, rest) y = Reshape(x, t)",  # a 0 copies the second axis
        "t = Concat<axis = 0>(n, rest) y = Reshape<allowzero = 1>(x, t)",
    ],
)
def test_a_target_that_stays(body: str) -> None:
    weights = {"i": ints(1), "j": ints(0), "rest": ints(-1), "zero": ints(0)}
    used = {n: a for n, a in weights.items() if n in ("i", "j") or n in body}
    head = "s = Shape(x) n = Gather(s, i) m = Gather(s, j) k = Add(m, n) z = Neg(k)"
    text = f"g (float[N, M, 4] x) => (float[] y, int64[] z) {{ {head} {body} }}"
    assert refusal(build(text, **used), RULE) == ""


def test_the_target_of_an_expand() -> None:
    body = "s = Shape(x) n = Gather(s, i) t = Concat<axis = 0>(n, k) y = Expand(x, t)"
    after, _ = rewritten(build(f"g (float[N, 1] x) => (float[] y) {{ {body} }}", i=ints(0), k=ints(5)), RULE)
    assert operators(after) == ["Expand"]
    np.testing.assert_array_equal(next(iter(constants(after).values())), ints(1, 5))


def test_an_expand_as_exporters_write_it() -> None:
    """-1 for what stays; a dimension is never -1."""
    body = "s = Shape(x) n = Gather(s, i) t = Concat<axis = 0>(n, k) e = Equal(t, o) w = Where(e, u, t)"
    weights = {"i": ints(0), "k": ints(5), "o": ints(-1, -1), "u": ints(1, 1)}
    model = build(f"g (float[N, 1] x) => (float[] y) {{ {body} y = Expand(x, w) }}", **weights)
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Expand"]
    np.testing.assert_array_equal(next(iter(constants(after).values())), ints(1, 5))


@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul", "Div"])
def test_arithmetic_that_changes_nothing_keeps_the_name_of_a_dimension(operator: str) -> None:
    neutral = ints(0) if operator in ("Add", "Sub") else ints(1)
    body = f"s = Shape(x) n = Gather(s, i) d = {operator}(n, e) t = Concat<axis = 0>(d, r) y = Reshape(x, t)"
    after, _ = rewritten(
        build(f"g (float[N, 3, 4] x) => (float[] y) {{ {body} }}", i=ints(0), e=neutral, r=ints(-1)), RULE
    )
    assert operators(after) == ["Reshape"]
    np.testing.assert_array_equal(next(iter(constants(after).values())), ints(0, -1))


@pytest.mark.parametrize(
    "body",
    [
        "n = Gather(s, i) s_ = Equal(n, m)",  # one dimension may be as large as another
        "n = Gather(s, i) s_ = Equal(n, two)",
        "n = Gather(s, i) d = Mul(n, two) s_ = Equal(d, n)",
        "n = Gather(s, i) d = Sub(two, n) s_ = Equal(d, two)",
    ],
)
def test_what_may_be_equal(body: str) -> None:
    weights = {"i": ints(0), "j": ints(1)} | ({"two": ints(2)} if "two" in body else {})
    body = f"s = Shape(x) m = Gather(s, j) z = Neg(m) {body} y = Cast<to = 1>(s_)"
    assert refusal(build(f"g (float[N, M] x) => (float[] y, int64[] z) {{ {body} }}", **weights), RULE) == ""


def test_numbers_that_would_overflow() -> None:
    """The kernel may wrap around; that is left to it."""
    body = "a = Shape(x) s = Add(a, e)"
    after, _ = rewritten(counted(body, "2, 3", e=ints(2**62)), RULE)
    assert operators(after) == ["Add", "Cast"]


def test_an_expand_to_another_dimension() -> None:
    body = "s = Shape(x) n = Gather(s, i) t = Concat<axis = 0>(n, k) y = Expand(z, t)"
    text = f"g (float[N, 1] x, float[M, 1] z) => (float[] y) {{ {body} }}"
    assert refusal(build(text, i=ints(0), k=ints(5)), RULE) == ""


def test_a_dimension_with_the_same_name_in_a_loop() -> None:
    """A name inside a body holds for one turn: there it equals nothing."""
    model = build(
        """g (int64 trips, bool go, float[N, 1] x) => (float[] y) {
            y = Loop(trips, go, x) <body = b (int64 i, bool c, float[N, 1] v) => (bool d, float[] w) {
                d = Identity(c)
                s = Shape(x)
                n = Gather(s, zero)
                t = Concat<axis = 0>(n, one)
                w = Expand(v, t)
            }>
        }""",
        zero=ints(0),
        one=ints(1),
        shapes=False,
    )
    before = [n.op_type for n in model.graph.all_nodes()]
    assert RULE.apply(model).edits == 0
    assert [n.op_type for n in model.graph.all_nodes()] == before


def test_a_graph_output_stays() -> None:
    reason = "the constant result is a graph output"
    assert refusal(build("g (float[2, 3] x) => (int64[2] y) { y = Shape(x) }"), RULE) == reason


def test_what_nobody_reads_is_not_folded() -> None:
    model = build("g (float[2, 3] x) => (float[2, 3] y) { s = Shape(x) y = Neg(x) }")
    assert refusal(model, RULE) == ""


def test_another_domain() -> None:
    model = build("g (float[2, 3] x) => (int64[2] y) { s = Shape(x) y = Neg(s) }")
    model.graph.node(0).domain = "custom"
    assert RULE.apply(model).edits == 0
