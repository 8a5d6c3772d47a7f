"""drop-no-ops: a node goes where it changes nothing, whatever it is given, and stays otherwise."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import build, operators, refusal, rewritten

from edgewise.passes.drop_no_ops import DropNoOps
from edgewise.runtime.evaluate import Array

RULE = DropNoOps()
FIXED = "the result is a graph output and its source has a fixed name"
ENLARGE = "the neutral operand may enlarge the other one"


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def after_neg(node: str, shape: str = "2, 3", kind: str = "float") -> str:
    """a = -x, z = the node in question, y = z + z: nothing but `a` and `y` should be left."""
    return f"g ({kind}[{shape}] x) => ({kind}[] y) {{ a = Neg(x) z = {node} y = Add(z, z) }}"


GONE: Mapping[str, tuple[str, str, Mapping[str, Array]]] = {
    "dropout": ("Dropout(a)", "2, 3", {}),
    "dropout with a ratio": ("Dropout(a, r)", "2, 3", {"r": np.float32(0.9)}),
    "dropout told not to train": ("Dropout(a, r, t)", "2, 3", {"r": np.float32(0.9), "t": np.array(False)}),
    "cast": ("Cast<to = 1>(a)", "2, 3", {}),
    "cast like": ("CastLike(a, x)", "2, 3", {}),
    "transpose": ("Transpose<perm = [0, 1, 2]>(a)", "2, 3, 4", {}),
    "transpose of a vector": ("Transpose(a)", "3", {}),
    "reshape": ("Reshape(a, s)", "2, 3", {"s": ints(2, 3)}),
    "reshape that infers": ("Reshape(a, s)", "2, 3", {"s": ints(-1, 3)}),
    "reshape that copies": ("Reshape(a, s)", "N, 3", {"s": ints(0, 3)}),
    "reshape of a dynamic batch": ("Reshape(a, s)", "N, 3", {"s": ints(-1, 3)}),
    "reshape that copies and infers": ("Reshape(a, s)", "N, M, 3", {"s": ints(0, -1, 3)}),
    "expand": ("Expand(a, s)", "2, 3", {"s": ints(2, 3)}),
    "expand by ones": ("Expand(a, s)", "N, M", {"s": ints(1, 1)}),
    "expand to fewer axes": ("Expand(a, s)", "N, 3", {"s": ints(3)}),
    "tile": ("Tile(a, r)", "2, 3", {"r": ints(1, 1)}),
    "slice": ("Slice(a, b, e)", "2, 3", {"b": ints(0, 0), "e": ints(2, 9)}),
    "slice from far before": ("Slice(a, b, e, k)", "2, 3", {"b": ints(-9), "e": ints(3), "k": ints(-1)}),
    "slice of a dynamic axis": (
        "Slice(a, b, e, k)",
        "N, 3",
        {"b": ints(0), "e": ints(2**63 - 1), "k": ints(0)},
    ),
    "squeeze": ("Squeeze(a)", "2, 3", {}),
    "flatten": ("Flatten(a)", "N, M", {}),
    "pad": ("Pad(a, p)", "2, 3", {"p": ints(0, 0, 0, 0)}),
    "resize by scales": ('Resize<mode = "linear">(a, , s)', "1, 1, 3, 4", {"s": np.ones(4, np.float32)}),
    "resize to sizes": ("Resize(a, , , s)", "1, 1, 3, 4", {"s": ints(1, 1, 3, 4)}),
    "concat": ("Concat<axis = 0>(a)", "2, 3", {}),
    "split": ("Split(a)", "2, 3", {}),
    "sum": ("Sum(a)", "2, 3", {}),
    "max": ("Max(a)", "2, 3", {}),
    "min": ("Min(a)", "2, 3", {}),
    "mean": ("Mean(a)", "2, 3", {}),
    "add": ("Add(a, c)", "N, M", {"c": np.float32(0)}),
    "add to the right": ("Add(c, a)", "N, 3", {"c": np.zeros((1, 3), np.float32)}),
    "subtract": ("Sub(a, c)", "N, 3", {"c": np.zeros(1, np.float32)}),
    "multiply": ("Mul(c, a)", "2, 3", {"c": np.ones((2, 3), np.float32)}),
    "divide": ("Div(a, c)", "2, 3", {"c": np.float32(1)}),
}


@pytest.mark.parametrize("name", GONE)
def test_gone(name: str) -> None:
    node, shape, weights = GONE[name]
    model = build(after_neg(node, shape), **weights)
    after, outcome = rewritten(model, RULE)
    assert operators(after) == ["Neg", "Add"]
    assert outcome.edits == 1
    assert not after.graph.initializers


STAYS: Mapping[str, tuple[str, str, Mapping[str, Array]]] = {
    "cast to another type": ("CastLike(d, a)", "2, 3", {"d": np.float64([[1, 2, 3]])}),
    "transpose": ("Transpose<perm = [1, 0]>(a)", "3, 3", {}),
    "transpose of unknown order": ("Transpose(a)", "3, 3", {}),
    "reshape to another shape": ("Reshape(a, s)", "2, 3", {"s": ints(3, 2)}),
    "reshape to another rank": ("Reshape(a, s)", "2, 3", {"s": ints(6)}),
    "reshape of two dynamic axes": ("Reshape(a, s)", "N, M", {"s": ints(-1, 3)}),
    "reshape that does not copy": ("Reshape<allowzero = 1>(a, s)", "N, 3", {"s": ints(0, 3)}),
    "expand": ("Expand(a, s)", "2, 1", {"s": ints(2, 3)}),
    "expand of a dynamic axis": ("Expand(a, s)", "N, 3", {"s": ints(3, 3)}),
    "expand to more axes": ("Expand(a, s)", "2, 3", {"s": ints(1, 2, 3)}),
    "tile": ("Tile(a, r)", "2, 3", {"r": ints(1, 2)}),
    "slice": ("Slice(a, b, e)", "2, 3", {"b": ints(0, 1), "e": ints(2, 3)}),
    "slice backwards": (
        "Slice(a, b, e, k, s)",
        "2, 3",
        {"b": ints(9), "e": ints(-9), "k": ints(1), "s": ints(-1)},
    ),
    "slice of a dynamic axis": ("Slice(a, b, e, k)", "N, 3", {"b": ints(0), "e": ints(3), "k": ints(0)}),
    "squeeze": ("Squeeze(a)", "2, 1, 3", {}),
    "flatten": ("Flatten<axis = 0>(a)", "2, 3", {}),
    "pad": ("Pad(a, p)", "2, 3", {"p": ints(0, 0, 0, 1)}),
    "resize": ("Resize(a, , s)", "1, 1, 3, 4", {"s": np.float32([1, 1, 2, 2])}),
    "concat": ("Concat<axis = 0>(a, a)", "2, 3", {}),
    "sum": ("Sum(a, x)", "2, 3", {}),
    "subtract from zero": ("Sub(c, a)", "2, 3", {"c": np.float32(0)}),
    "one over": ("Div(c, a)", "2, 3", {"c": np.float32(1)}),
    "nearly one": ("Mul(a, c)", "2, 3", {"c": np.float32(1 + 1e-7)}),
    "not zero everywhere": ("Add(a, c)", "2, 3", {"c": np.float32([0, 0, 1])}),
}


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    node, shape, weights = STAYS[name]
    assert refusal(build(after_neg(node, shape), **weights), RULE) == ""


@pytest.mark.parametrize(
    ("shape", "constant"),
    [
        ("2, 3", np.zeros((4, 1, 1), np.float32)),
        ("2, 1", np.zeros(3, np.float32)),
        ("2, M", np.zeros(3, np.float32)),
    ],
    ids=["more axes", "a longer axis", "perhaps a longer axis"],
)
def test_a_neutral_operand_that_may_enlarge(shape: str, constant: Array) -> None:
    assert refusal(build(after_neg("Add(a, c)", shape), c=constant), RULE) == ENLARGE


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("r = Relu(x) y = Relu(r)", {}),
        ("c = Clip(x, low) y = Relu(c)", {"low": np.float32(0)}),
        ("c = Clip(x, low, high) y = Relu(c)", {"low": np.float32(0), "high": np.float32(6)}),
    ],
)
def test_relu_of_what_is_not_negative(text: str, weights: Mapping[str, Array]) -> None:
    model = build(f"g (float[2, 3] x) => (float[2, 3] y) {{ {text} }}", **weights)
    after, _ = rewritten(model, RULE)
    assert operators(after) == operators(model)[:1]


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("c = Clip(x) y = Relu(c)", {}),
        ("c = Clip(x, low) y = Relu(c)", {"low": np.float32(-1)}),
        # With crossed bounds everything is the upper one.
        ("c = Clip(x, low, high) y = Relu(c)", {"low": np.float32(1), "high": np.float32(-1)}),
        ("c = Clip(x, low, high) y = Relu(c)", {"low": np.float32(1)}),
        ("c = Neg(x) y = Relu(c)", {}),
    ],
)
def test_relu_of_what_may_be_negative(text: str, weights: Mapping[str, Array]) -> None:
    inputs = "float[2, 3] x, float high" if "high" in text and "high" not in weights else "float[2, 3] x"
    assert refusal(build(f"g ({inputs}) => (float[2, 3] y) {{ {text} }}", **weights), RULE) == ""


def test_a_dropout_that_may_train() -> None:
    text = "g (float[2] x, bool t) => (float[2] y) { a = Neg(x) d = Dropout(a, r, t) y = Neg(d) }"
    reason = "whether the Dropout is in training mode is not constant"
    assert refusal(build(text, r=np.float32(0.5)), RULE) == reason


def test_a_dropout_that_trains() -> None:
    text = "g (float[2] x) => (float[2] y) { a = Neg(x) d = Dropout(a, r, t) y = Neg(d) }"
    assert refusal(build(text, r=np.float32(0.5), t=np.array(True)), RULE) == ""


def test_a_mask_that_is_used() -> None:
    text = "g (float[2] x) => (float[2] y, bool[2] n) { a = Neg(x) d, m = Dropout(a) y = Neg(d) n = Not(m) }"
    assert refusal(build(text), RULE) == "the mask of the Dropout is used"
    text = "g (float[2] x) => (float[2] y, bool[2] m) { a = Neg(x) d, m = Dropout(a) y = Neg(d) }"
    assert refusal(build(text), RULE) == ""


def test_a_squeeze_of_dynamic_axes() -> None:
    text = "g (float[2, N, 3] x) => (float[A, B] y) { a = Neg(x) z = Squeeze(a) y = Neg(z) }"
    assert refusal(build(text), RULE) == ""


def test_a_resize_of_a_region() -> None:
    mode = 'coordinate_transformation_mode = "tf_crop_and_resize"'
    text = f"g (float[1, 1, 4, 4] x) => (float[] y) {{ a = Neg(x) z = Resize<{mode}>(a, r, s) y = Neg(z) }}"
    region = np.float32([0, 0, 0, 0, 1, 1, 0.5, 0.5])
    assert refusal(build(text, r=region, s=np.ones(4, np.float32)), RULE) == ""


def test_between_an_input_and_an_output() -> None:
    assert refusal(build("g (float[2] x) => (float[2] y) { y = Dropout(x) }"), RULE) == FIXED


def test_forms_of_old_operator_sets() -> None:
    """Where amounts are attributes, they are left to the upgrade."""
    body = "a = Pad<pads = [0, 0]>(x) b = Slice<starts = [0], ends = [9]>(a) y = Dropout<ratio = 0.3>(b)"
    after, _ = rewritten(build(f"g (float[2] x) => (float[2] y) {{ {body} }}", 9), RULE)
    assert operators(after) == ["Pad", "Slice"]


def test_a_domain_that_is_not_the_standard() -> None:
    model = build("g (float[2] x) => (float[2] y) { a = Neg(x) y = Relu(a) }")
    model.graph.node(1).domain = "custom"
    assert RULE.apply(model).edits == 0


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.lists(st.sampled_from([-4, -1, 0, 1, 3, 4, 2**31 - 1]), min_size=2, max_size=2),
    st.sampled_from([-1, 1]),
)
@settings(deadline=None, max_examples=40)
def test_any_slice(shape: list[int], bounds: list[int], step: int) -> None:
    """Whether it goes or stays, the numbers are the same; if it takes everything forwards, it goes."""
    names = {"b": ints(bounds[0]), "e": ints(bounds[1]), "k": ints(0), "s": ints(step)}
    model = build(after_neg("Slice(a, b, e, k, s)", ", ".join(map(str, shape))), **names)
    _, outcome = rewritten(model, RULE)
    whole = len(range(shape[0])[bounds[0] : bounds[1] : step]) == shape[0]
    assert outcome.edits == (whole and step == 1)
