"""merge-transposes: two orders of axes are one, or none."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import build, operators, refusal, rewritten

from edgewise.passes.graph import attribute
from edgewise.passes.merge_transposes import MergeTransposes

RULE = MergeTransposes()
ORDERS = st.sampled_from(list(itertools.permutations(range(3))))


def written(order: tuple[int, ...] | None) -> str:
    return "" if order is None else f"<perm = {list(order)}>"


@given(st.none() | ORDERS, st.none() | ORDERS)
@settings(deadline=None, max_examples=30)
def test_any_two_orders(first: tuple[int, ...] | None, second: tuple[int, ...] | None) -> None:
    text = f"a = Neg(x) b = Transpose{written(first)}(a) c = Transpose{written(second)}(b) y = Neg(c)"
    after, outcome = rewritten(build(f"g (float[2, 3, 4] x) => (float[] y) {{ {text} }}"), RULE)
    assert outcome.edits == 1
    reverse = (2, 1, 0)
    merged = tuple((first or reverse)[axis] for axis in second or reverse)
    if merged == (0, 1, 2):
        assert operators(after) == ["Neg", "Neg"]
    else:
        assert operators(after) == ["Neg", "Transpose", "Neg"]
        assert tuple(attribute(after.graph.node(1), "perm")) == merged


def test_a_chain_that_cancels() -> None:
    """Channels last and back, twice over, with a turn between."""
    body = """a = Transpose<perm = [0, 2, 3, 1]>(x) b = Transpose<perm = [0, 3, 1, 2]>(a)
              c = Transpose<perm = [0, 2, 3, 1]>(b) d = Transpose<perm = [0, 3, 1, 2]>(c) y = Neg(d)"""
    after, _ = rewritten(build(f"g (float[1, 2, 3, 4] x) => (float[] y) {{ {body} }}"), RULE)
    assert operators(after) == ["Neg"]


def test_a_first_one_with_another_user_stays_for_it() -> None:
    body = "a = Transpose<perm = [1, 0]>(x) b = Transpose<perm = [1, 0]>(a) y = Neg(b) z = Neg(a)"
    after, outcome = rewritten(build(f"g (float[2, 3] x) => (float[] y, float[] z) {{ {body} }}"), RULE)
    assert operators(after) == ["Transpose", "Neg", "Neg"]
    assert outcome.edits == 1


def test_nothing_is_gained_where_the_first_has_another_user() -> None:
    body = "a = Transpose<perm = [1, 2, 0]>(x) b = Transpose<perm = [1, 2, 0]>(a) y = Neg(b) z = Neg(a)"
    model = build(f"g (float[2, 3, 4] x) => (float[] y, float[] z) {{ {body} }}")
    assert refusal(model, RULE) == "the first Transpose has another user"


@pytest.mark.parametrize("body", ["y = Transpose(x)", "a = Neg(x) y = Transpose(a)"])
def test_one_alone(body: str) -> None:
    assert refusal(build(f"g (float[2, 3] x) => (float[] y) {{ {body} }}"), RULE) == ""


def test_between_an_input_and_an_output() -> None:
    model = build("g (float[2, 3] x) => (float[] y) { a = Transpose(x) y = Transpose(a) }")
    assert refusal(model, RULE) == "the result is a graph output and its source has a fixed name"
