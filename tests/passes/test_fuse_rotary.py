"""fuse-rotary: the rotation of a position embedding becomes RotaryEmbedding where that does the same."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import build, constants, operators, refusal, rewritten

from edgewise.passes.fuse_rotary import FuseRotary
from edgewise.passes.graph import attribute
from edgewise.runtime.evaluate import Array

RULE = FuseRotary()
USED = "a value inside the pattern has another user"
SHARED = "cos and sin are not known to be given for each sample and once for all heads"
X = "float[1, 4, 5, 8] x"
SLICES = "a = Slice(x, zero, four, last) b = Slice(x, four, end, last)"
ROTATE = "n = Neg(b) h = Concat<axis = -1>(n, a) s = Mul(x, cos) t = Mul(h, sin) y = Add(s, t)"
PAIRS = """
    a = Slice(x, zero, end, last, two) b = Slice(x, one, end, last, two) n = Neg(b)
    nu = Unsqueeze(n, last) au = Unsqueeze(a, last) g = Concat<axis = -1>(nu, au) h = Reshape(g, all)
    s = Mul(x, cos) t = Mul(h, sin) y = Add(s, t)"""
NUMBERS = {
    "zero": np.array([0]),
    "one": np.array([1]),
    "two": np.array([2]),
    "four": np.array([4]),
    "end": np.array([2**63 - 1]),
    "last": np.array([-1]),
    "all": np.array([1, 4, 5, 8]),
    "heads": np.array([1]),
    "halves": np.array([4, 4]),
}


def angles(*shape: int, in_pairs: bool = False, seed: int = 0) -> Array:
    """Of every two elements that turn together the same."""
    half = np.random.default_rng(seed).standard_normal((*shape[:-1], shape[-1] // 2)).astype(np.float32)
    return half.repeat(2, -1) if in_pairs else np.concatenate([half, half], -1)


def net(
    body: str, declared: str = X, outputs: str = "float[] y", opset: int = 23, **weights: Array
) -> ir.Model:
    """A graph with those of the weights that it reads; cos and sin are constant unless they are computed."""
    words = set("".join(c if c.isalnum() else " " for c in body).split())
    free = {part.strip().split()[-1] for part in declared.split(";")}
    shape = (1, 1, 5, 8)
    held = {"cos": angles(*shape), "sin": angles(*shape, seed=1), **NUMBERS, **weights}
    made = {part.split("=")[0].strip().split()[-1] for part in body.split(" = ")}
    held = {name: a for name, a in held.items() if name in words - free - made}
    return build(f"g ({declared.replace(';', ',')}) => ({outputs}) {{ {body} }}", opset, **held)


FORMS = {
    "slices": f"{SLICES} {ROTATE}",
    "axis from the front": f"{SLICES} {ROTATE}".replace("last", "third").replace("-1", "3"),
    "a split": f"a, b = Split<axis = -1>(x, halves) {ROTATE}",
    "an even split": f"a, b = Split<axis = 3, num_outputs = 2>(x) {ROTATE}",
    "factors first": f"{SLICES} {ROTATE}".replace("(x, cos)", "(cos, x)").replace("(h, sin)", "(sin, h)"),
    "terms the other way round": f"{SLICES} {ROTATE}".replace("Add(s, t)", "Add(t, s)"),
}


@pytest.mark.parametrize("body", FORMS.values(), ids=FORMS.keys())
def test_halves(body: str) -> None:
    after, outcome = rewritten(net(body, third=np.array([3])), RULE)
    assert outcome.edits == 1
    assert operators(after) == ["RotaryEmbedding"]
    assert {a.shape for a in constants(after).values()} == {(1, 5, 4)}


def test_pairs() -> None:
    cos, sin = (angles(1, 1, 5, 8, in_pairs=True, seed=seed) for seed in (0, 1))
    after, _ = rewritten(net(PAIRS, cos=cos, sin=sin), RULE)
    assert operators(after) == ["RotaryEmbedding"]
    assert attribute(after.graph[0], "interleaved") == 1


@pytest.mark.parametrize("shape", [(5, 8), (1, 5, 8), (1, 1, 5, 8)])
def test_ranks_of_the_angles(shape: tuple[int, ...]) -> None:
    model = net(f"{SLICES} {ROTATE}", cos=angles(*shape), sin=angles(*shape, seed=1))
    assert operators(rewritten(model, RULE)[0]) == ["RotaryEmbedding"]


def test_angles_for_every_sample() -> None:
    shape = (3, 1, 5, 8)
    model = net(f"{SLICES} {ROTATE}", "float[3, 4, 5, 8] x", cos=angles(*shape), sin=angles(*shape, seed=1))
    assert operators(rewritten(model, RULE)[0]) == ["RotaryEmbedding"]


COMPUTED = """
    f = Mul(pos, freq) ff = Concat<axis = -1>(f, f) fc = Cos(ff) fs = Sin(ff) c = Mul(fc, k) d = Mul(k, fs)
    cos = Unsqueeze(c, heads) sin = Unsqueeze(d, heads)"""


def test_computed_angles() -> None:
    """As transformers are written: frequencies joined with themselves, then cos and sin, scaled."""
    freq = np.random.default_rng(0).random((1, 1, 4), np.float32)
    model = net(
        f"{COMPUTED} {SLICES} {ROTATE}",
        "float[N, 4, L, 8] x; float[N, L, 1] pos",
        freq=freq,
        k=np.float32(0.9),
    )
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Mul", "Cos", "Mul", "Sin", "Mul", "RotaryEmbedding"]


def test_rows_of_a_table() -> None:
    lookup = "c = Gather(tc, ids) d = Gather(ts, ids) cos = Unsqueeze(c, heads) sin = Unsqueeze(d, heads)"
    model = net(
        f"{lookup} {SLICES} {ROTATE}",
        "float[N, 4, L, 8] x; int64[N, L] ids",
        tc=angles(16, 8),
        ts=angles(16, 8, seed=1),
    )
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Gather", "Gather", "RotaryEmbedding"]
    assert {a.shape for a in constants(after).values()} == {(16, 4)}


def test_two_with_the_same_angles() -> None:
    again = re.sub(r"\b([abnhstyx])\b", r"\g<1>2", f"{SLICES} {ROTATE}")
    model = net(f"{SLICES} {ROTATE} {again}", f"{X}; float[1, 2, 5, 8] x2", "float[] y, float[] y2")
    after, outcome = rewritten(model, RULE)
    assert outcome.edits == 2
    assert operators(after) == ["RotaryEmbedding", "RotaryEmbedding"]


def test_half_precision() -> None:
    cos, sin = (angles(1, 1, 5, 8, seed=seed).astype(np.float16) for seed in (0, 1))
    model = net(f"{SLICES} {ROTATE}", "float16[1, 4, 5, 8] x", "float16[] y", cos=cos, sin=sin)
    assert operators(rewritten(model, RULE)[0]) == ["RotaryEmbedding"]


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.booleans())
@settings(deadline=None, max_examples=25)
def test_any_sizes(batch: int, heads: int, length: int, half: int, in_pairs: bool) -> None:
    shape = (batch, 1, length, 2 * half)
    weights = {
        "cos": angles(*shape, in_pairs=in_pairs),
        "sin": angles(*shape, in_pairs=in_pairs, seed=1),
        "four": np.array([half]),
        "all": np.array([batch, heads, length, 2 * half]),
    }
    body = PAIRS if in_pairs else f"{SLICES} {ROTATE}"
    after, _ = rewritten(net(body, f"float[{batch}, {heads}, {length}, {2 * half}] x", **weights), RULE)
    assert operators(after) == ["RotaryEmbedding"]


def test_different_angles() -> None:
    model = net(f"{SLICES} {ROTATE}", sin=angles(1, 1, 5, 8, in_pairs=True))
    assert refusal(model, RULE) == "elements that turn together have different angles"


def test_pairs_of_different_angles() -> None:
    assert refusal(net(PAIRS), RULE) == "elements that turn together have different angles"


GIVEN = "cos = Unsqueeze(c, heads) sin = Unsqueeze(c, heads)"
UNKNOWN = "elements that turn together are not known to have one angle"
REFUSALS = [
    (f"{SLICES} {ROTATE} z = Relu(h)", X, USED),
    (f"{SLICES} {ROTATE} z = Relu(s)", X, USED),
    (
        f"{SLICES} {ROTATE}",
        f"{X}; float[1, 1, 5, 8] cos",
        "the axis of the heads is not added to cos and sin at last",
    ),
    (f"{GIVEN} {SLICES} {ROTATE}", f"{X}; float[1, 5, 8] c", UNKNOWN),
    (
        f"ff = Concat<axis = -1>(f, e) c = Cos(ff) {GIVEN} {SLICES} {ROTATE}",
        f"{X}; float[1, 5, 4] e; float[1, 5, 4] f",
        UNKNOWN,
    ),
    (f"{SLICES} {ROTATE}", "float[2, 4, 5, 8] x", SHARED),
    (f"{SLICES} {ROTATE}", "float[N, 4, 5, 8] x", SHARED),
    (f"{SLICES} {ROTATE}", f"{X}; float[1, 4, 5, 8] cos; float[1, 4, 5, 8] sin", SHARED),
    (f"{SLICES} {ROTATE}", f"{X}; float[1, 1, 1, 8] cos", SHARED),
]


@pytest.mark.parametrize(("body", "declared", "reason"), REFUSALS)
def test_conditions(body: str, declared: str, reason: str) -> None:
    outputs = "float[] y, float[] z" if "z =" in body else "float[] y"
    assert refusal(net(body, declared, outputs), RULE) == reason


def test_a_type_without_a_kernel() -> None:
    cos, sin = (angles(1, 1, 5, 8, seed=seed).astype(np.float64) for seed in (0, 1))
    model = net(f"{SLICES} {ROTATE}", "double[1, 4, 5, 8] x", "double[] y", cos=cos, sin=sin)
    assert refusal(model, RULE) == "runtimes have no rotary embedding of this type"


BODIES = [
    f"{SLICES} n = Neg(a) h = Concat<axis = -1>(n, b) s = Mul(x, cos) t = Mul(h, sin) y = Add(s, t)",
    f"{SLICES} n = Neg(a) h = Concat<axis = -1>(b, n) s = Mul(x, cos) t = Mul(h, sin) y = Add(s, t)",
    f"a = Slice(x, zero, three, last) b = Slice(x, three, end, last) {ROTATE}",
    f"w = Relu(x) {SLICES} {ROTATE}".replace("Mul(x", "Mul(w"),
    f"{SLICES} {ROTATE}".replace("Add", "Sub"),
    f"{SLICES} h = Concat<axis = -1>(b, a) s = Mul(x, cos) t = Mul(h, sin) y = Add(s, t)",
    PAIRS.replace("Concat<axis = -1>", "Concat<axis = -2>"),
    f"a = Slice(x, zero, two, heads) b = Slice(x, two, end, heads) {ROTATE}".replace("axis = -1", "axis = 1"),
]


@pytest.mark.parametrize("body", BODIES)
def test_what_is_no_rotation(body: str) -> None:
    assert refusal(net(body, three=np.array([3])), RULE) == ""


def test_operator_sets_without_it() -> None:
    assert refusal(net(f"{SLICES} {ROTATE}", opset=22), RULE) == ""
