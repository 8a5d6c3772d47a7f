"""fuse-pad: a Pad goes into every kind of convolution and into poolings that pad alike, and else stays."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import ConvCase, build, convolutions, operators, refusal, rewritten

from edgewise.passes.fuse_pad import FusePad
from edgewise.passes.graph import attribute
from edgewise.runtime.evaluate import Array

RULE = FusePad()
RNG = np.random.default_rng(0)
W = RNG.standard_normal((2, 2, 3, 3)).astype(np.float32)
SPATIAL = np.array([0, 0, 1, 0, 0, 0, 2, 1])  # before and behind: batch, channels, height, width
CONV = "Conv(z, w)"
AVERAGE = "AveragePool<kernel_shape = [3, 3]{}>(z)"
MAXIMUM = "MaxPool<kernel_shape = [3, 3]{}>(z)"
LOWEST = np.array(-np.inf, np.float32)


def padded(user: str, pad: str = "Pad(x, p)", opset: int = 17, **constants: Array) -> ir.Model:
    """x of [2, 2, 6, 6] -> Pad -> `user`, with those of the constants that are read."""
    held = {"p": SPATIAL, "w": W, "v": LOWEST, **constants}
    text = f"g (float[2, 2, 6, 6] x) => (float[] y) {{ z = {pad} y = {user} }}"
    return build(text, opset, **{name: a for name, a in held.items() if re.search(rf"\b{name}\b", text[30:])})


@given(convolutions(transposed=False), st.data())
@settings(deadline=None, max_examples=30)
def test_into_a_convolution(case: ConvCase, data: st.DataObject) -> None:
    sizes = st.lists(st.integers(0, 2), min_size=2 * case.dims, max_size=2 * case.dims)
    amounts = np.array(data.draw(sizes)).reshape(2, -1)
    pads = np.pad(amounts, [(0, 0), (2, 0)]).ravel()
    text = (
        f"g ({case.declared(case.inputs)} x) => (float[] y) {{ z = Pad(x, p) y = {case.text.format('z')} }}"
    )
    model = build(text, p=pads, **case.weights)
    own = attribute(model.graph.node(1), "pads")
    after, outcome = rewritten(model, RULE)
    assert operators(after) == ["Conv"]
    assert outcome.edits == 1
    assert list(attribute(after.graph.node(0), "pads")) == list(own + amounts.ravel())


@pytest.mark.parametrize(
    ("opset", "pad"),
    [
        (2, "Pad<pads = [0, 0, 1, 0, 0, 0, 2, 1]>(x)"),
        (10, "Pad<pads = [0, 0, 1, 0, 0, 0, 2, 1], value = 0.0>(x)"),
        (11, "Pad(x, p)"),
        (13, "Pad(x, p, zero)"),
        (18, "Pad(x, q, , axes)"),
        (19, "Pad(x, q, zero, axes)"),
    ],
)
def test_every_way_to_write_it(opset: int, pad: str) -> None:
    given_axes = {"q": np.array([0, 1, 1, 2]), "axes": np.array([-1, 2])}
    model = padded(CONV, pad, opset, zero=np.zeros((), np.float32), **given_axes)
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Conv"]
    assert list(attribute(after.graph.node(0), "pads")) == [1, 0, 2, 1]


def test_auto_pad_valid_means_no_padding_of_its_own() -> None:
    after, _ = rewritten(padded('Conv<auto_pad = "VALID">(z, w)'), RULE)
    assert operators(after) == ["Conv"]
    assert "auto_pad" not in after.graph.node(0).attributes


@pytest.mark.parametrize("own", ["", ", pads = [1, 0, 0, 1], count_include_pad = 1"])
def test_into_an_average(own: str) -> None:
    """The zeros of the Pad count in the mean, so those of the pooling have to count as well."""
    after, _ = rewritten(padded(AVERAGE.format(own), p=np.array([0, 0, 1, 0, 0, 0, 1, 1])), RULE)
    assert operators(after) == ["AveragePool"]
    assert attribute(after.graph.node(0), "count_include_pad") == 1


def test_into_a_maximum() -> None:
    after, _ = rewritten(padded(MAXIMUM.format(", pads = [0, 1, 0, 0]"), "Pad(x, p, v)"), RULE)
    assert operators(after) == ["MaxPool"]


def test_every_user_takes_it() -> None:
    text = (
        "g (float[2, 2, 6, 6] x, bool k) => (float[2, 2, 4, 4] y, float[] u)"
        "{ z = Pad(x, p) r = Conv<strides = [2, 2]>(z, w) u = Relu(r) y = If (k) <"
        "then_branch = t () => (float[2, 2, 4, 4] o) { o = Conv<strides = [2, 2]>(z, w) },"
        "else_branch = e () => (float[2, 2, 4, 4] q)"
        "{ q = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(z) }> }"
    )
    model = build(text, p=np.array([0, 0, 1, 1, 0, 0, 1, 1]), w=W[..., :2, :2])
    x = RNG.standard_normal((2, 2, 6, 6)).astype(np.float32)
    rewritten(model, RULE, {"x": x, "k": np.array(False)})
    after, outcome = rewritten(model, RULE, {"x": x, "k": np.array(True)})
    assert "Pad" not in operators(after)
    assert outcome.edits == 1


OTHERS = {
    "another operator": ("r = Relu(z)", ", float[] r"),
    "the graph's output": ("", ", float[] z"),
    "as a weight": ("r = Conv(x, z)", ", float[] r"),
}


@pytest.mark.parametrize(("tail", "outputs"), OTHERS.values(), ids=OTHERS)
def test_other_users(tail: str, outputs: str) -> None:
    text = f"g (float[2, 2, 5, 5] x) => (float[] y{outputs}) {{ z = Pad(x, p) y = Conv(z, w) {tail} }}"
    pads = np.array([0, 0, 0, 0, 0, 0, 0, 0])
    assert refusal(build(text, p=pads, w=W), RULE) == "the padded value has another user"


ONE = np.ones((), np.float32)
WIDE = np.array([0, 0, 3, 0, 0, 0, 0, 0])
REFUSED = {
    "reflect": (
        CONV,
        'Pad<mode = "reflect">(x, p)',
        {},
        "Pad repeats its input instead of padding with a constant",
    ),
    "crop": (CONV, "Pad(x, p)", {"p": np.array([0, 0, -1, 0, 0, 0, 2, 0])}, "Pad crops"),
    "batch": (CONV, "Pad(x, p)", {"p": np.array([1] + [0] * 7)}, "Pad pads batch or channels"),
    "channels": (
        "AveragePool<kernel_shape = [3, 3]>(z)",
        "Pad(x, p)",
        {"p": np.array([0, 1] + [0] * 6)},
        "Pad pads batch or channels",
    ),
    "ones": (CONV, "Pad(x, p, one)", {"one": ONE}, "Pad pads with another value than Conv"),
    "zeros below a maximum": (
        MAXIMUM.format(""),
        "Pad(x, p)",
        {},
        "Pad pads with another value than MaxPool",
    ),
    "lowest in a mean": (
        AVERAGE.format(""),
        "Pad(x, p, v)",
        {},
        "Pad pads with another value than AveragePool",
    ),
    "same": (
        'Conv<auto_pad = "SAME_UPPER">(z, w)',
        "Pad(x, p)",
        {},
        "auto_pad depends on the size of the padded input",
    ),
    "ceil": (
        AVERAGE.format(", ceil_mode = 1"),
        "Pad(x, p)",
        {},
        "the last windows of ceil_mode depend on who pads",
    ),
    "dilated": (MAXIMUM.format(", dilations = [2, 2]"), "Pad(x, p, v)", {}, "dilated pooling"),
    "wide": (AVERAGE.format(""), "Pad(x, p)", {"p": WIDE}, "a pooling window would hold nothing but padding"),
    "own": (
        AVERAGE.format(", pads = [1, 0, 0, 0]"),
        "Pad(x, p)",
        {},
        "AveragePool leaves its own padding out of the mean",
    ),
}


@pytest.mark.parametrize(("user", "pad", "constants", "reason"), REFUSED.values(), ids=REFUSED)
def test_conditions(user: str, pad: str, constants: dict[str, Array], reason: str) -> None:
    assert refusal(padded(user, pad, **constants), RULE) == reason


def test_indices_of_a_maximum() -> None:
    text = (
        "g (float[2, 2, 6, 6] x) => (float[] y, int64[] i)"
        "{ z = Pad(x, p, v) y, i = MaxPool<kernel_shape = [3, 3]>(z) }"
    )
    assert refusal(build(text, p=SPATIAL, v=LOWEST), RULE) == "MaxPool gives indices into the padded input"


@pytest.mark.parametrize("name", ["p", "zero", "axes"])
def test_what_a_caller_may_override(name: str) -> None:
    shared = {"p": np.array([1, 1]), "zero": np.zeros((), np.float32), "axes": np.array([2])}
    model = padded(CONV, "Pad(x, p, zero, axes)", 18, **shared)
    model.graph.inputs.append(model.graph.initializers[name])
    assert refusal(model, RULE) == "amounts, axes or value of Pad are not constant"


def test_axes_of_an_unknown_rank() -> None:
    text = (
        "g (float[A, B] a, int64[R] r) => (float[N, 2, H, V] y)"
        "{ x = Reshape(a, r) z = Pad(x, q, , axes) y = Conv(z, w) }"
    )
    model = build(text, 18, shapes=False, q=np.array([1, 1]), axes=np.array([-1]), w=W)
    assert refusal(model, RULE) == "the rank of what is padded is not known"


@pytest.mark.parametrize("user", ["Relu(z)", "ConvTranspose(z, w)"])
def test_nothing_that_pads(user: str) -> None:
    assert refusal(padded(user), RULE) == ""
