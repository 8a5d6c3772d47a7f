"""merge-branches: kernels that lie on each other's taps become one, and the input itself is a kernel too."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import build, constants, operators, refusal, rewritten

from edgewise.passes.fuse_batch_norm import FuseBatchNorm
from edgewise.passes.graph import attribute
from edgewise.passes.merge_branches import MergeBranches
from edgewise.runtime.evaluate import Array

RULE = MergeBranches()
RNG = np.random.default_rng(0)
NORM = "BatchNormalization"
WIDE = "Conv<pads = [1, 1, 1, 1]>(x, w)"
POINT = "Conv(x, v)"


def normal(*shape: int, dtype: type = np.float32) -> Array:
    return RNG.standard_normal(shape).astype(dtype)


def norm(channels: int, mark: str = "") -> dict[str, Array]:
    """Parameters as training leaves them: variances of the order of one."""
    variance = RNG.uniform(0.5, 2.0, channels).astype(np.float32)
    return {**{k + mark: normal(channels) for k in "gsm"}, "n" + mark: variance}


def pair(first: str, second: str, declared: str = "float[N, 4, 6, 6] x", **weights: Array) -> ir.Model:
    """y = first + second."""
    kind = declared.partition("[")[0]
    text = f"g ({declared}) => ({kind}[] y) {{ p = {first} q = {second} y = Add(p, q) }}"
    return build(text, **weights)


def kernels() -> dict[str, Array]:
    return {"w": normal(4, 4, 3, 3), "v": normal(4, 4, 1, 1)}


@dataclass(frozen=True)
class Nested:
    """Two convolutions of x, the second on some of the taps of the first."""

    outer: str
    inner: str
    declared: str
    weights: dict[str, Array]


@st.composite
def nested(draw: st.DrawFn) -> Nested:
    """Along each axis the smaller kernel begins at any tap of the larger; the rest of the padding is free."""
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    wide, deep = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    strides, dilations, axes = [], [], []
    for _ in range(dims):
        kernel, spacing = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        size = draw(st.integers(1, kernel))
        first = draw(st.integers(0, kernel - size))
        begin, end = draw(st.integers(0, 1)), draw(st.integers(0, 1))
        behind = kernel - size - first
        axes.append((kernel, size, first * spacing + begin, behind * spacing + end, begin, end))
        strides.append(draw(st.integers(1, 2)))
        dilations.append(spacing)
    kernel, size, *pads = (list(column) for column in zip(*axes, strict=True))
    common = f"group = {groups}, strides = {strides}, dilations = {dilations}"
    weights = {
        "w": normal(groups * deep, wide, *kernel),
        "v": normal(groups * deep, wide, *size),
        **{name: normal(groups * deep) for name in "bc" if draw(st.booleans())},
    }
    return Nested(
        f"Conv<{common}, pads = {pads[0] + pads[1]}>(x, w{', b' * ('b' in weights)})",
        f"Conv<{common}, pads = {pads[2] + pads[3]}>(x, v{', c' * ('c' in weights)})",
        f"float[2, {groups * wide}{', 7' * dims}] x",
        weights,
    )


@given(nested(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_the_smaller_kernel_goes_into_the_larger(case: Nested, swapped: bool) -> None:
    first, second = (case.inner, case.outer) if swapped else (case.outer, case.inner)
    after, outcome = rewritten(pair(first, second, case.declared, **case.weights), RULE)
    assert operators(after) == ["Conv"]
    assert outcome.edits == 1
    assert len(constants(after)) == 1 + any(name in case.weights for name in "bc")


def test_a_block_of_repvgg() -> None:
    """Three branches, each with its normalization, in a chain of two Add."""
    text = (
        f"g (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {{ c1 = {WIDE} a1 = {NORM}(c1, g1, s1, m1, n1)"
        f"c2 = {POINT} a2 = {NORM}(c2, g2, s2, m2, n2) a3 = {NORM}<epsilon = 0.01>(x, g3, s3, m3, n3)"
        "t = Add(a1, a2) u = Add(t, a3) y = Relu(u) }"
    )
    model = build(text, **kernels(), **norm(4, "1"), **norm(4, "2"), **norm(4, "3"))
    FuseBatchNorm().apply(model)
    assert operators(model) == ["Conv", "Conv", NORM, "Add", "Add", "Relu"]
    after, outcome = rewritten(model, RULE)
    assert operators(after) == ["Conv", "Relu"]
    assert outcome.edits == 2
    assert {a.shape for a in constants(after).values()} == {(4, 4, 3, 3), (4,)}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("order", ["Add(c, {})", "Add({}, c)"])
@pytest.mark.parametrize("branch", ["x", f"{NORM}(x, g, s, m, n)"])
def test_the_input_itself(branch: str, order: str, groups: int) -> None:
    """The unit matrix of each group, in the middle of the kernel."""
    conv = f"Conv<group = {groups}, pads = [1, 1, 1, 1]>(x, w)"
    parts = ("", "x") if branch == "x" else (f"i = {branch}", "i")
    text = f"g (float[N, 4, 6, 6] x) => (float[] y) {{ c = {conv} {parts[0]} y = {order.format(parts[1])} }}"
    weight = normal(4, 4 // groups, 3, 3)
    model = build(text, w=weight, **({} if branch == "x" else norm(4)))
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Conv"]
    if branch == "x":
        added = constants(after)["w"] - weight
        np.testing.assert_allclose(added[:, :, 1, 1], np.tile(np.eye(4 // groups), (groups, 1)), atol=1e-6)
        assert np.count_nonzero(added) == 4


def test_the_input_may_be_a_convolution_too() -> None:
    """c + Conv(c): c is a branch of itself, whatever else made it."""
    text = (
        "g (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) { c = Conv(x, v)"
        " d = Conv<pads = [1, 1, 1, 1]>(c, w)"
        "y = Add(c, d) }"
    )
    assert operators(rewritten(build(text, **kernels()), RULE)[0]) == ["Conv", "Conv"]


def test_sum_of_many() -> None:
    text = (
        f"g (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {{ a = {POINT} b = {WIDE} y = Sum(x, a, b, x) }}"
    )
    after, outcome = rewritten(build(text, **kernels()), RULE)
    assert operators(after) == ["Conv"]
    assert outcome.edits == 1


def test_a_dilated_kernel_on_every_second_tap() -> None:
    dense = "Conv<pads = [2, 2, 2, 2]>(x, w)"
    dilated = "Conv<pads = [2, 2, 2, 2], dilations = [2, 2]>(x, v)"
    model = pair(dense, dilated, w=np.zeros((4, 4, 5, 5), np.float32), v=normal(4, 4, 3, 3))
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Conv"]
    np.testing.assert_array_equal(constants(after)["w"][:, :, ::2, ::2], constants(model)["v"])


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("size", [2, 3])
def test_automatic_padding_at_stride_one(auto_pad: str, size: int) -> None:
    conv = f'Conv<auto_pad = "{auto_pad}">(x, w)'
    text = f"g (float[N, 4, 6, 6] x) => (float[] y) {{ a = {conv} y = Add(a, x) }}"
    assert operators(rewritten(build(text, w=normal(4, 4, size, size)), RULE)[0]) == ["Conv"]


@pytest.mark.parametrize("kind", ["float16", "float"])
def test_keeps_the_type_of_the_weights(kind: str) -> None:
    dtype = np.dtype(np.float16 if kind == "float16" else np.float32)
    weights = {name: a.astype(dtype) for name, a in kernels().items()}
    after, _ = rewritten(pair(WIDE, POINT, f"{kind}[N, 4, 6, 6] x", **weights), RULE)
    assert operators(after) == ["Conv"]
    assert {a.dtype for a in constants(after).values()} == {dtype}


def test_a_shared_weight_stays_for_its_other_user() -> None:
    text = (
        f"g (float[N, 4, 6, 6] x) => (float[] y, float[] z) {{ a = {WIDE} b = {POINT} y = Add(a, b)"
        "r = Relu(x) z = Conv(r, w) }"
    )
    model = build(text, **kernels())
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Conv", "Relu", "Conv"]
    np.testing.assert_array_equal(constants(after)["w"], constants(model)["w"])


def test_inside_a_subgraph_with_weights_from_outside() -> None:
    branch = "{{ a{0} = Conv(x, v) b{0} = Conv<pads = [1, 1, 1, 1]>(x, w) o{0} = Add(a{0}, b{0}) }}"
    text = (
        "g (float[N, 4, 6, 6] x, bool f) => (float[N, 4, 6, 6] y) { y = If (f) <"
        f"then_branch = t () => (float[N, 4, 6, 6] o1) {branch.format(1)},"
        f"else_branch = e () => (float[N, 4, 6, 6] o2) {branch.format(2)}> }}"
    )
    after, outcome = rewritten(build(text, **kernels()), RULE)
    assert outcome.edits == 2
    assert [[n.op_type for n in g] for g in after.graph.subgraphs()] == [["Conv"], ["Conv"]]


@pytest.mark.parametrize("outputs", ["float[] y, float[] a", "float[] y, float[] r"])
def test_a_branch_has_another_user(outputs: str) -> None:
    text = f"g (float[N, 4, 6, 6] x) => ({outputs}) {{ a = {WIDE} b = {POINT} r = Relu(a) y = Add(a, b) }}"
    assert refusal(build(text, **kernels()), RULE) == "a branch has another user"


def test_a_branch_in_another_graph() -> None:
    text = (
        f"g (float[N, 4, 6, 6] x, bool f) => (float[N, 4, 6, 6] y) {{ a = {WIDE} y = If (f) <"
        "then_branch = t () => (float[N, 4, 6, 6] o1) { o1 = Add(a, x) },"
        "else_branch = e () => (float[N, 4, 6, 6] o2) { o2 = Relu(x) }> }"
    )
    assert refusal(build(text, w=kernels()["w"]), RULE) == "a branch is in another graph"


SMALL = "float[N, 4, 1, 1] x"  # one position, which any stride gives and any size broadcasts to
SIDE, UP = "Conv<pads = [0, 1, 0, 1]>(x, w)", "Conv<pads = [1, 0, 1, 0]>(x, v)"
DILATED = "Conv<pads = [2, 2, 2, 2], dilations = [2, 2]>(x, {})"
CONDITIONS = [
    ("Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, w)", POINT, (3, 3), (1, 1), "strides differ"),
    ("Conv<pads = [2, 2, 2, 2]>(x, w)", POINT, (3, 3), (1, 1), "the branches give different sizes"),
    (SIDE, UP, (1, 3), (3, 1), "no kernel covers the others"),
    (DILATED.format("w"), WIDE.replace("w", "v"), (3, 3), (3, 3), "no kernel covers the others"),
    (WIDE, DILATED.format("v"), (3, 3), (3, 3), "no kernel covers the others"),
    # taps at -3, -1 and 1, and one at 0
    (
        "Conv<pads = [3, 3, 1, 1], dilations = [2, 2]>(x, w)",
        POINT,
        (3, 3),
        (1, 1),
        "no kernel covers the others",
    ),
    (
        'Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>(x, w)',
        "Conv<strides = [2, 2]>(x, v)",
        (3, 3),
        (1, 1),
        "auto_pad depends on the size of the input",
    ),
]


@pytest.mark.parametrize(("first", "second", "w", "v", "reason"), CONDITIONS)
def test_windows_that_do_not_fit(
    first: str, second: str, w: tuple[int, int], v: tuple[int, int], reason: str
) -> None:
    assert refusal(pair(first, second, SMALL, w=normal(4, 4, *w), v=normal(4, 4, *v)), RULE) == reason


def test_groups_differ() -> None:
    depthwise = "Conv<pads = [1, 1, 1, 1], group = 4>(x, w)"
    model = pair(depthwise, POINT, w=normal(4, 1, 3, 3), v=normal(4, 4, 1, 1))
    assert refusal(model, RULE) == "groups differ"


MANY = [
    ("y = Add(a, x)", {}),
    (f"b = {NORM}(x, g, s, m, n) y = Add(a, b)", norm(4)),
    ("b = Conv(x, v) y = Add(a, b)", {"v": normal(4, 4, 1, 1)}),
]


@pytest.mark.parametrize(("rest", "weights"), MANY)
def test_one_channel_beside_many(rest: str, weights: dict[str, Array]) -> None:
    """Add would repeat the one for all of the others."""
    text = f"g (float[N, 4, 6, 6] x) => (float[] y) {{ a = {WIDE} {rest} }}"
    assert refusal(build(text, w=normal(1, 4, 3, 3), **weights), RULE) == "channel counts differ"


@pytest.mark.parametrize(("name", "reason"), [("v", "weight is not constant"), ("b", "bias is not constant")])
def test_computed_parameters(name: str, reason: str) -> None:
    weights = {**kernels(), "b": normal(4)}
    shape = ", ".join(map(str, weights.pop(name).shape))
    model = pair(WIDE, "Conv(x, v, b)", f"float[N, 4, 6, 6] x, float[{shape}] {name}", **weights)
    assert refusal(model, RULE) == reason


def test_normalization_in_training() -> None:
    text = (
        f"g (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {{ a = {WIDE}"
        f"b, rm, rv = {NORM}<training_mode = 1>(x, g, s, m, n) y = Add(a, b) }}"
    )
    model = build(text, w=kernels()["w"], **norm(4))
    assert refusal(model, RULE) == "BatchNormalization is in training mode"


def test_normalization_that_is_computed() -> None:
    parameters = {k: v for k, v in norm(4).items() if k != "g"}
    declared = "float[N, 4, 6, 6] x, float[4] g"
    model = pair(WIDE, f"{NORM}(x, g, s, m, n)", declared, w=kernels()["w"], **parameters)
    assert refusal(model, RULE) == "BatchNormalization parameters are not constant"


def test_overflow() -> None:
    huge = np.full((4, 4, 1, 1), 3e38, np.float32)
    model = pair("Conv(x, w)", "Conv(x, v)", w=huge, v=huge)
    assert refusal(model, RULE) == "folded weights would overflow"


BODIES = [
    "a = Conv(x, w) y = Add(a, z)",  # a residual of something else
    "a = Conv(x, w) b = Conv(z, w) y = Add(a, b)",
    "a = Conv(x, w) y = Add(a, w)",
    "a = Conv(x, w) b = Relu(a) y = Add(b, x)",
    "a = Conv(x, w) b = Relu(x) y = Add(a, b)",
    "a = Conv(x, w) y = Sub(a, x)",
    "a = Conv(x, w) y = Mul(a, x)",
    "a = Conv(x, w) b = BatchNormalization(z, k, k, k, k) y = Add(a, b)",
    "a = Conv(x, w) b = ConvTranspose(x, w) y = Add(a, b)",
    "y = Add(x, x)",
]


@pytest.mark.parametrize("body", BODIES)
def test_what_is_no_sum_of_branches(body: str) -> None:
    text = f"g (float[N, 4, 6, 6] x, float[N, 4, 6, 6] z) => (float[] y) {{ {body} }}"
    held = {"w": normal(4, 4, 1, 1), "k": np.ones(4, np.float32)}
    assert refusal(build(text, **{k: v for k, v in held.items() if f"{k})" in body}), RULE) == ""


def test_broadcasting_of_old_opsets() -> None:
    """Before opset 7 an attribute said along which axis the second operand runs."""
    model = pair(WIDE, POINT, **kernels())
    (add,) = [n for n in model.graph if n.op_type == "Add"]
    add.attributes["broadcast"] = ir.AttrInt64("broadcast", 1)
    assert RULE.apply(model).edits == 0


def test_attributes_of_the_larger_stay() -> None:
    after, _ = rewritten(pair(POINT, WIDE, **kernels()), RULE)
    assert list(attribute(after.graph.node(0), "pads")) == [1, 1, 1, 1]
