"""merge-reshapes: what is only reshaped on the way is reshaped once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from rewrites import build, constants, operators, refusal, rewritten

from edgewise.passes.merge_reshapes import MergeReshapes
from edgewise.runtime.evaluate import Array

RULE = MergeReshapes()
UNKNOWN = "the Reshape copies a dimension that is not known"


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("first", "shape", "target", "merged"),
    [
        ("Reshape(x, p)", "2, 3, 4", ints(4, 6), ints(4, 6)),
        ("Flatten(x)", "2, 3, 4", ints(3, -1), ints(3, -1)),
        ("Squeeze(x)", "2, 1, 4", ints(8), ints(8)),
        ("Unsqueeze(x, p)", "2, 3", ints(3, 2), ints(3, 2)),
        ("Flatten(x)", "2, 3, 4", ints(0, 3, 4), ints(2, 3, 4)),
        ("Flatten(x)", "2, 3, 4", ints(-1, 0), ints(-1, 12)),
        ("Flatten(x)", "N, 3, 4", ints(0, 3, 4), ints(-1, 3, 4)),
        ("Flatten(x)", "N, 3, 4", ints(-1, 3, 4), ints(-1, 3, 4)),
        ("Flatten(x)", "N, 3, 4", ints(0, -1, 4), ints(0, -1, 4)),
        ("Squeeze(x, p)", "N, 1, M", ints(0, 0), ints(0, -1)),
    ],
)
def test_a_reshape_of_the_reshaped(first: str, shape: str, target: Array, merged: Array) -> None:
    weights: dict[str, Array] = {"s": target}
    if "p" in first:
        weights["p"] = {"U": ints(0), "S": ints(1), "R": ints(6, 4)}[first[0]]
    model = build(f"g (float[{shape}] x) => (float[] y) {{ a = {first} y = Reshape(a, s) }}", **weights)
    after, outcome = rewritten(model, RULE)
    assert operators(after) == ["Reshape"]
    assert outcome.edits == 1
    (target,) = constants(after).values()
    np.testing.assert_array_equal(target, merged)


def test_the_first_stays_for_its_other_users() -> None:
    body = "a = Flatten(x) y = Reshape(a, s) z = Neg(a)"
    after, _ = rewritten(
        build(f"g (float[2, 3, 4] x) => (float[] y, float[] z) {{ {body} }}", s=ints(24)), RULE
    )
    assert operators(after) == ["Flatten", "Reshape", "Neg"]


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("a = Unsqueeze(x, k) b = Squeeze(a, k)", "2, 3"),
        ("a = Squeeze(x, k) b = Unsqueeze(a, k)", "2, 1, 3"),
        ("a = Unsqueeze(x, k) b = Squeeze(a, l)", "2, 3"),
    ],
)
def test_inverse_pairs(body: str, shape: str) -> None:
    weights = {"k": ints(1), "l": ints(1)} if "l)" in body else {"k": ints(1)}
    after, _ = rewritten(
        build(f"g (float[{shape}] x) => (float[] y) {{ {body} y = Neg(b) }}", **weights), RULE
    )
    assert operators(after) == ["Neg"]


def test_inverse_pairs_whose_axes_are_attributes() -> None:
    body = "a = Unsqueeze<axes = [0, 3]>(x) b = Squeeze<axes = [3, 0]>(a) y = Neg(b)"
    after, _ = rewritten(build(f"g (float[2, 3] x) => (float[] y) {{ {body} }}", 11), RULE)
    assert operators(after) == ["Neg"]


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("a = Neg(x) y = Reshape(a, s)", {"s": ints(6)}),
        ("k = Tile(x, r) t = Transpose(k) y = Reshape(t, s)", {"r": ints(2, 1), "s": ints(12)}),
        ("a = Unsqueeze(x, k) y = Squeeze(a, l)", {"k": ints(0), "l": ints(0, 1)}),
        ("a = Unsqueeze(x, k) y = Unsqueeze(a, k)", {"k": ints(0)}),
        ("a = Flatten(x) n = Shape(a) y = Reshape(a, n)", {}),
    ],
)
def test_no_pair(body: str, weights: Mapping[str, Array]) -> None:
    assert refusal(build(f"g (float[1, 6] x) => (float[] y) {{ {body} }}", **weights), RULE) == ""


@pytest.mark.parametrize("target", [ints(0, -1, 4), ints(0, 0)], ids=["one to infer already", "two"])
def test_copies_of_what_is_not_known(target: Array) -> None:
    shape = "1, N, 12" if target.size > 2 else "1, N, M"
    body = "a = Squeeze(x, k) y = Reshape(a, s)"
    model = build(f"g (float[{shape}] x) => (float[] y) {{ {body} }}", s=target, k=ints(0))
    assert refusal(model, RULE) == UNKNOWN


def test_a_zero_that_means_zero() -> None:
    body = "a = Flatten(x) y = Reshape<allowzero = 1>(a, s)"
    model = build(f"g (float[0, 3] x) => (float[] y) {{ {body} }}", s=ints(3, 0))
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Reshape"]
    np.testing.assert_array_equal(constants(after)["s"], ints(3, 0))


@pytest.mark.parametrize(
    ("shape", "order", "target", "merged"),
    [
        ("2, 3, 1, 1", [0, 2, 3, 1], ints(-1, 3), ints(-1, 3)),
        ("N, 1, 1, 3", [0, 3, 1, 2], ints(-1, 3), ints(-1, 3)),
        ("2, 1, 3, 4", [0, 2, 1, 3], ints(0, 0, 4), ints(2, 3, 4)),
        ("1, 3, 4", [1, 0, 2], ints(12), ints(12)),
    ],
)
def test_a_transpose_that_moves_nothing(shape: str, order: list[int], target: Array, merged: Array) -> None:
    """Axes of size one may be anywhere: what global pooling leaves is channels last as well."""
    text = f"g (float[{shape}] x) => (float[] y) {{ a = Transpose<perm = {order}>(x) y = Reshape(a, s) }}"
    after, _ = rewritten(build(text, s=target), RULE)
    assert operators(after) == ["Reshape"]
    (target,) = constants(after).values()
    np.testing.assert_array_equal(target, merged)


@pytest.mark.parametrize("shape", ["1, 3, 1, 2", "N, 3, M, 1"])
def test_a_transpose_that_moves_something(shape: str) -> None:
    text = (
        f"g (float[{shape}] x) => (float[] y) {{ a = Transpose<perm = [0, 2, 3, 1]>(x) y = Reshape(a, s) }}"
    )
    assert refusal(build(text, s=ints(-1)), RULE) == ""
