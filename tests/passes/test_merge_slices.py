"""merge-slices: one Slice in place of several that cut different axes."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import build, operators, refusal, rewritten

from edgewise.passes.graph import Array
from edgewise.passes.merge_slices import MergeSlices

SHAPE = "float[4, 6, 7]"


def ints(**bounds: Any) -> dict[str, Array]:
    return {name: np.array(numbers, np.int64) for name, numbers in bounds.items()}


def slices(first: str, second: str, outputs: str = "float[A, B, C] y", after: str = "") -> str:
    return f"agraph ({SHAPE} x) => ({outputs}) {{ m = Slice({first}) y = Slice({second}) {after} }}"


def test_two_axes_are_cut_at_once() -> None:
    weights = ints(s=[1], e=[5], a=[1], t=[0], f=[2**31 - 1], b=[-1], two=[2])
    model, outcome = rewritten(build(slices("x, s, e, a", "m, t, f, b, two"), **weights), MergeSlices())
    assert outcome.edits == 1
    assert operators(model) == ["Slice"]
    bounds = [None if v is None else v.const_value for v in model.graph[0].inputs[1:]]
    assert [b.numpy().tolist() for b in bounds if b is not None] == [[1, 0], [5, 2**31 - 1], [1, 2], [1, 2]]
    assert len(model.graph.initializers) == 4, "the old bounds are gone"


@st.composite
def cuts(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """One cut (start, end, axis, step) for each axis, in any order."""
    axes = draw(st.permutations([0, 1, 2]))
    found = []
    for axis in axes:
        step = draw(st.sampled_from([-2, -1, 1, 2]))
        start = draw(st.integers(-9, 9))
        end = draw(st.integers(-9, 9))
        found.append((start, end, draw(st.sampled_from([axis, axis - 3])), step))
    return found


@settings(deadline=None, max_examples=25)
@given(cuts(), st.integers(0, 2))
def test_any_bounds_mean_the_same_together(found: list[tuple[int, int, int, int]], split: int) -> None:
    first, second = (
        np.array(part, np.int64).reshape(-1, 4) for part in (found[: split + 1], found[split + 1 :])
    )
    names = ("s", "e", "a", "t")
    weights = {f"{n}{k}": part[:, i] for k, part in enumerate((first, second)) for i, n in enumerate(names)}
    text = slices("x, s0, e0, a0, t0", "m, s1, e1, a1, t1")
    model, outcome = rewritten(build(text, **weights), MergeSlices())
    assert outcome.edits == 1
    assert operators(model) == ["Slice"]


def test_a_chain_of_three_becomes_one() -> None:
    weights = ints(s=[1], e=[3], a=[0], b=[1], c=[2])
    body = "m = Slice(x, s, e, a) n = Slice(m, s, e, b) y = Slice(n, s, e, c)"
    text = f"agraph ({SHAPE} x) => (float[A, B, C] y) {{ {body} }}"
    model, outcome = rewritten(build(text, **weights), MergeSlices())
    assert outcome.edits == 2
    assert operators(model) == ["Slice"]


def test_bounds_of_different_integers_become_one_type() -> None:
    weights = {**ints(s=[1], e=[3], a=[0]), "t": np.array([1], np.int32), "f": np.array([2], np.int32)}
    weights["b"] = np.array([1], np.int32)
    _, outcome = rewritten(build(slices("x, s, e, a", "m, t, f, b"), **weights), MergeSlices())
    assert outcome.edits == 1


SAME = ints(s=[1], e=[3], a=[0], b=[1])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (slices("x, s, e, a", "m, s, e, a"), "both cut the same axis"),
        (slices("x, s, e", "m, s, e, a"), "both cut the same axis"),
        (
            slices("x, s, e, a", "m, s, e, b", "float[A, B, C] y, float[A, B, C] m"),
            "the first Slice has another user",
        ),
        (
            slices("x, s, k, a", "m, s, e, b").replace(" x)", " x, int64[1] k)"),
            "the bounds are not constant",
        ),
    ],
)
def test_refuses(text: str, reason: str) -> None:
    assert refusal(build(text, **SAME), MergeSlices()) == reason


def test_refuses_axes_from_the_end_of_an_unknown_rank() -> None:
    text = slices("r, s, e, a", "m, s, e, b").replace("m = ", "r = Exp(x) m = ")
    model = build(text, shapes=False, **ints(s=[1], e=[3], a=[-3], b=[1]))
    assert refusal(model, MergeSlices()) == "the rank of what is cut is not known"


def test_a_slice_alone_stays() -> None:
    text = f"agraph ({SHAPE} x) => (float[A, B, C] y) {{ r = Exp(x) y = Slice(r, s, e, a) }}"
    assert rewritten(build(text, **SAME), MergeSlices())[1].edits == 0
