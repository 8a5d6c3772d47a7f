"""fuse-norms: normalizations written out become operators, with their parameters, where they are such."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import build, constants, operators, refusal, rewritten

from edgewise.passes.fuse_norms import FuseNorms
from edgewise.passes.graph import attribute
from edgewise.runtime.evaluate import Array

RULE = FuseNorms()
EVERYTHING = FuseNorms(always=True)
RNG = np.random.default_rng(0)
DTYPES = {"float": np.float32, "float16": np.float16, "double": np.float64}
NUMBERS = {"two": 2.0, "one": 1.0, "half": 0.5, "less": -0.5, "eps": 1e-3, "size": 8.0, "part": 0.125}
GAMMA = np.linspace(0.5, 2.0, 8)
BETA = np.linspace(-1.0, 1.0, 8)


def net(
    body: str, version: int = 23, kind: str = "float", x: str = "N, 3, 8", out: str = "{}[] y", **held: Any
) -> ir.Model:
    """A graph of x with the weights that it reads by name: numbers, g and b of its type, and axes."""
    words = set(re.findall(r"\w+", body))
    floats = {**NUMBERS, "g": GAMMA, "b": BETA, **held}
    arrays: dict[str, Array] = {
        name: a if isinstance(a, np.ndarray) and a.dtype == np.int64 else np.asarray(a, DTYPES[kind])
        for name, a in {**floats, "last": np.array([-1])}.items()
        if name in words
    }
    return build(f"g ({kind}[{x}] x) => ({out.format(kind)}) {{ {body} }}", version, **arrays)


def the_node(model: ir.Model) -> ir.Node:
    (node,) = model.graph
    return node


def centered(tail: str, axes: str = "last", square: str = "q = Mul(d, d)") -> str:
    """The deviation d of x from its mean, the variance v, w = v + eps, and what follows."""
    return (
        f"m = ReduceMean(x, {axes}) d = Sub(x, m) {square} v = ReduceMean(q, {axes}) w = Add(v, eps) {tail}"
    )


ROOTS = [
    "s = Sqrt(w) n = Div(d, s)",
    "s = Sqrt(w) r = Reciprocal(s) n = Mul(r, d)",
    "s = Sqrt(w) r = Div(one, s) n = Mul(d, r)",
    "r = Pow(w, less) n = Mul(d, r)",
    "s = Pow(w, half) n = Div(d, s)",
]
TAILS = ["h = Mul(n, g) y = Add(h, b)", "h = Mul(g, n) y = Add(b, h)", "y = Mul(n, g)", "y = Add(n, b)"]
SCALED = [
    "s = Sqrt(w) r = Reciprocal(s) k = Mul(r, g) h = Mul(d, k) y = Add(h, b)",
    "s = Sqrt(w) k = Mul(d, g) h = Div(k, s) y = Add(h, b)",
    "s = Sqrt(w) r = Reciprocal(s) k = Mul(g, d) h = Mul(k, r) y = Add(h, b)",
    "s = Sqrt(w) r = Reciprocal(s) k = Mul(r, g) o = Mul(x, k) p = Mul(m, k) z = Sub(b, p) y = Add(o, z)",
]


@pytest.mark.parametrize("kind", ["float", "float16"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("root", ROOTS)
def test_layer_normalization(root: str, tail: str, kind: str) -> None:
    after, outcome = rewritten(net(centered(f"{root} {tail}"), kind=kind), RULE)
    assert operators(after) == ["LayerNormalization"]
    assert outcome.edits == 1
    node = the_node(after)
    assert attribute(node, "axis", -1) == -1
    assert attribute(node, "epsilon", 1e-5) == pytest.approx(float(DTYPES[kind](1e-3)))
    assert attribute(node, "stash_type", 1) == 1


@pytest.mark.parametrize("tail", SCALED)
def test_scale_in_between(tail: str) -> None:
    after, _ = rewritten(net(centered(tail)), RULE)
    assert operators(after) == ["LayerNormalization"]
    assert sorted(constants(after)) == ["b", "g"]


@pytest.mark.parametrize(
    "square", ["q = Pow(d, two)", "e = Sub(x, m) q = Pow(e, two)", "e = Sub(x, m) q = Mul(e, e)"]
)
def test_squares_and_a_difference_computed_twice(square: str) -> None:
    after, _ = rewritten(net(centered(f"{ROOTS[0]} {TAILS[0]}", square=square)), RULE)
    assert operators(after) == ["LayerNormalization"]


def test_without_epsilon() -> None:
    body = centered("s = Sqrt(v) n = Div(d, s) h = Mul(n, g) y = Add(h, b)").replace("w = Add(v, eps)", "")
    after, _ = rewritten(net(body), RULE)
    assert operators(after) == ["LayerNormalization"]
    assert attribute(the_node(after), "epsilon") == 0.0


def test_axes_as_an_attribute() -> None:
    body = (
        "m = ReduceMean<axes = [2]>(x) d = Sub(x, m) q = Mul(d, d) v = ReduceMean<axes = [-1]>(q)"
        f" w = Add(v, eps) {ROOTS[0]} {TAILS[0]}"
    )
    after, _ = rewritten(net(body, 17), RULE)
    assert operators(after) == ["LayerNormalization"]


def test_several_axes() -> None:
    parameters = {"g": RNG.standard_normal((3, 8)), "b": RNG.standard_normal((3, 8))}
    body = centered(f"{ROOTS[0]} {TAILS[0]}", "two_axes")
    after, _ = rewritten(net(body, two_axes=np.array([-1, 1]), **parameters), RULE)
    assert operators(after) == ["LayerNormalization"]
    assert attribute(the_node(after), "axis") == -2


@pytest.mark.parametrize("shape", [(), (1,), (8,), (1, 8), (1, 1, 8)])
def test_parameters_that_stretch(shape: tuple[int, ...]) -> None:
    b = RNG.standard_normal(shape)
    after, _ = rewritten(net(centered(f"{ROOTS[0]} {TAILS[0]}"), b=b), RULE)
    assert operators(after) == ["LayerNormalization"]
    assert {a.shape for a in constants(after).values()} == {(8,)}


@pytest.mark.parametrize("shape", [(3, 1), (3, 8), (2, 1, 8), (1, 1, 1, 8)])
def test_parameters_that_do_not_fit_stay_behind(shape: tuple[int, ...]) -> None:
    g = RNG.standard_normal(shape)
    after, _ = rewritten(net(centered(f"{ROOTS[0]} {TAILS[2]}"), x="2, 3, 8", g=g), RULE)
    assert operators(after) == ["LayerNormalization", "Mul"]


def test_without_parameters() -> None:
    after, _ = rewritten(net(centered("s = Sqrt(w) y = Div(d, s)")), RULE)
    assert operators(after) == ["LayerNormalization"]
    ones, zeros = sorted(constants(after).values(), key=lambda a: -a.sum())
    assert (ones == 1).all()
    assert (zeros == 0).all()


def test_parameters_that_are_computed() -> None:
    body = "h = Exp(g) " + centered(f"{ROOTS[0]} k = Mul(n, h) y = Add(k, b)")
    after, _ = rewritten(net(body), RULE)
    assert operators(after) == ["Exp", "LayerNormalization"]


def means(tail: str, mean: str = "q = Mul(x, x) v = ReduceMean(q, last)") -> str:
    return f"{mean} w = Add(v, eps) {tail}"


MEANS = [
    "q = Mul(x, x) v = ReduceMean(q, last)",
    "q = Pow(x, two) t = ReduceSum(q, last) v = Div(t, size)",
    "q = Pow(x, two) t = ReduceSum(q, last) v = Mul(part, t)",
    "t = ReduceSumSquare(x, last) v = Div(t, size)",
]


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("root", ROOTS)
def test_rms_normalization(root: str, mean: str) -> None:
    after, _ = rewritten(
        net(means(f"{root.replace('d', 'x').replace('Axx', 'Add')} y = Mul(g, n)", mean)), RULE
    )
    assert operators(after) == ["RMSNormalization"]
    assert list(constants(after)) == ["g"]


def test_rms_normalization_has_no_shift() -> None:
    after, _ = rewritten(net(means("s = Sqrt(w) n = Div(x, s) h = Mul(n, g) y = Add(h, b)")), RULE)
    assert operators(after) == ["RMSNormalization", "Add"]
    after, _ = rewritten(net(means("s = Sqrt(w) r = Reciprocal(s) k = Mul(r, g) y = Mul(x, k)")), RULE)
    assert operators(after) == ["RMSNormalization"]


IMAGE = {"x": "N, 8, 5, 4", "space": np.array([2, 3])}


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1, 1)])
@pytest.mark.parametrize("root", ROOTS)
def test_instance_normalization(root: str, shape: tuple[int, ...]) -> None:
    held = {"g": GAMMA.reshape(shape), "b": BETA.reshape(shape), **IMAGE}
    after, _ = rewritten(net(centered(f"{root} {TAILS[0]}", "space"), **held), RULE)
    assert operators(after) == ["InstanceNormalization"]
    assert {a.shape for a in constants(after).values()} == {(8,)}


def test_instance_normalization_of_images_of_any_size_and_old_operator_sets() -> None:
    body = (
        "m = ReduceMean<axes = [2, 3]>(x) d = Sub(x, m) q = Mul(d, d) v = ReduceMean<axes = [2, 3]>(q)"
        " w = Add(v, eps) s = Sqrt(w) y = Div(d, s)"
    )
    after, _ = rewritten(net(body, 13, x="N, 8, H, W"), RULE)
    assert operators(after) == ["InstanceNormalization"]


def test_spatial_axes_with_parameters_of_a_layer_norm() -> None:
    held = {"g": RNG.standard_normal((5, 4)), "b": RNG.standard_normal((5, 4)), **IMAGE}
    after, _ = rewritten(net(centered(f"{ROOTS[0]} {TAILS[0]}", "space"), **held), RULE)
    assert operators(after) == ["LayerNormalization"]


def grouped(tail: str, back: str = "s = Shape(x) n = Reshape(i, s)") -> str:
    return f"r = Reshape(x, split) i = InstanceNormalization<epsilon = 0.001>(r, ones, zeros) {back} {tail}"


GROUPS = {
    "split": np.array([0, 4, -1]),
    "ones": np.ones(4),
    "zeros": np.zeros(4),
    "g": GAMMA.reshape(8, 1, 1),
    "b": BETA.reshape(8, 1, 1),
}
BACKS = [
    ("s = Shape(x) n = Reshape(i, s)", "N, 8, H, W"),
    ("n = Reshape(i, s)", "N, 8, 5, 4"),
    ("n = Reshape(i, s)", "2, 8, 5, 4"),
]


@pytest.mark.parametrize("first", [0, -1])
@pytest.mark.parametrize(("back", "x"), BACKS)
def test_group_normalization(back: str, x: str, first: int) -> None:
    held = {**GROUPS, "s": np.array([first, 8, 5, 4])} if "Shape(x)" not in back else GROUPS
    after, _ = rewritten(net(grouped(TAILS[0], back), x=x, **held), EVERYTHING)
    assert operators(after) == ["GroupNormalization"]
    node = the_node(after)
    assert attribute(node, "num_groups") == 4
    assert attribute(node, "epsilon") == pytest.approx(1e-3)
    assert {a.shape for a in constants(after).values()} == {(8,)}


def test_group_normalization_without_parameters() -> None:
    after, _ = rewritten(net(grouped("y = Neg(n)"), x="N, 8, H, W", **GROUPS), EVERYTHING)
    assert operators(after) == ["GroupNormalization", "Neg"]


def test_group_normalization_is_slow() -> None:
    reason = "GroupNormalization is slower in onnxruntime than what it is written as"
    assert refusal(net(grouped(TAILS[0]), x="N, 8, H, W", **GROUPS), RULE) == reason


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(ROOTS),
    st.sampled_from(TAILS),
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.data(),
)
def test_over_any_last_axes(root: str, tail: str, dims: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(dims)))
    axes = data.draw(
        st.permutations([a - data.draw(st.sampled_from([0, len(dims)])) for a in range(len(dims))])
    )
    axes = [a for a in axes if a % len(dims) >= len(dims) - count]
    rng = np.random.default_rng(sum(dims))
    held = {name: rng.standard_normal(dims[-count:]) for name in "gb"}
    body = centered(f"{root} {tail}", "axes")
    after, _ = rewritten(net(body, x=", ".join(map(str, dims)), axes=np.array(axes), **held), RULE)
    (operator,) = operators(after)
    assert operator in ("LayerNormalization", "InstanceNormalization")


LAYER = centered(f"{ROOTS[0]} {TAILS[0]}")
ATTRIBUTES = LAYER.replace("(x, last)", "<axes = [-1]>(x)").replace("(q, last)", "<axes = [-1]>(q)")
RMS = means("s = Sqrt(w) n = Div(x, s) y = Mul(n, g)")
RMS_OF_SUM = means("s = Sqrt(w) n = Div(x, s) y = Mul(n, g)", MEANS[1])
AXES = "the axes are not those of an operator, or of unknown size"
REDUCTIONS = "the reductions are not over the same constant axes"
COUNT = "a sum is not divided by its known count"
CONDITIONS = [
    (ATTRIBUTES, 16, "N, 3, 8", "the model's operator set has no LayerNormalization"),
    (RMS, 22, "N, 3, 8", "the model's operator set has no RMSNormalization"),
    (LAYER, 23, "N, 3, M", AXES),
    (LAYER.replace("last", "middle"), 23, "N, 8, 8", AXES),
    (LAYER.replace("(q, last)", "(q, middle)"), 23, "N, 3, 8", REDUCTIONS),
    (LAYER.replace("ReduceMean(q, last)", "ReduceMean<keepdims = 0>(q, first)"), 23, "1, 8", REDUCTIONS),
    (RMS_OF_SUM, 23, "N, 3, M", COUNT),
]


@pytest.mark.parametrize(("body", "version", "x", "reason"), CONDITIONS)
def test_conditions(body: str, version: int, x: str, reason: str) -> None:
    held = {"middle": np.array([1]), "first": np.array([0])}
    assert refusal(net(body, version, x=x, **held), RULE) == reason


def test_data_of_unknown_rank() -> None:
    model = net(LAYER)
    model.graph.inputs[0].shape = None
    assert RULE.apply(model).refused == {"the rank of the data is not known": 1}


def test_a_wrong_count() -> None:
    assert refusal(net(RMS_OF_SUM, size=7.0), RULE) == COUNT


def test_double_precision_stays() -> None:
    assert refusal(net(LAYER, kind="double"), RULE) == "double precision"


@pytest.mark.parametrize("shared", ["m", "d", "v"])
def test_a_value_inside_that_others_read(shared: str) -> None:
    model = net(f"{LAYER} z = Neg({shared})", out="{0}[] y, {0}[] z")
    reasons = RULE.apply(model.clone()).refused
    assert next(iter(reasons)) == "a value inside the pattern has another user"


def test_a_number_that_adds_axes() -> None:
    reason = "a number of the pattern may change the rank of its data"
    assert refusal(net(LAYER, eps=np.full((1, 1, 1, 1), 1e-3)), RULE) == reason


CASTS = [
    ("float16[N, 3, 8] c", "x = Cast<to = 1>(c) " + LAYER, "float[] y"),
    ("float[N, 3, 8] x", LAYER.replace("y =", "o =") + " y = Cast<to = 10>(o)", "float16[] y"),
    ("float[N, 3, 8] x, float16[8] c", "g = Cast<to = 1>(c) " + LAYER, "float[] y"),
]


@pytest.mark.parametrize(("declared", "body", "out"), CASTS)
def test_mixed_precision_stays(declared: str, body: str, out: str) -> None:
    held = {"eps": np.float32(1e-3), "b": BETA.astype(np.float32), "last": np.array([-1])}
    if "g = Cast" not in body:
        held["g"] = GAMMA.astype(np.float32)
    arrays = {name: np.asarray(a) for name, a in held.items()}
    model = build(f"g ({declared}) => ({out}) {{ {body} }}", 18, **arrays)
    assert refusal(model, RULE) == "mixed precision"


def test_group_normalization_needs_scales_of_channels() -> None:
    model = net(grouped(TAILS[0]), 20, x="N, 8, H, W", **GROUPS)
    assert refusal(model, RULE) == "the model's operator set has no GroupNormalization"


RESHAPES = [
    (
        "s = Shape(x) n = Reshape(i, s)",
        "N, 8, H, W",
        [1, 4, -1],
    ),  # the batch may become part of the last axis
    ("n = Reshape(i, s)", "2, 8, 5, 4", [0, 4, -1]),  # back to another shape
]


@pytest.mark.parametrize(("back", "x", "split"), RESHAPES)
def test_reshapes_that_do_more(back: str, x: str, split: list[int]) -> None:
    held = {**GROUPS, "split": np.array(split), "s": np.array([2, 8, 4, 5])}
    if "Shape(x)" in back:
        held.pop("s")
    reason = "the Reshapes are not known to split the channels and to join them again"
    assert refusal(net(grouped("y = Neg(n)", back), x=x, **held), RULE) == reason


def test_groups_of_unknown_channels() -> None:
    model = net(grouped("y = Neg(n)"), x="N, C, H, W", **GROUPS)
    assert refusal(model, RULE) == "the number of channels is not known"


def test_channels_do_not_fall_into_groups() -> None:
    """Six channels of two positions are four groups of three numbers, but not of channels."""
    model = net(grouped("y = Neg(n)"), x="N, 6, 2", **GROUPS)
    assert refusal(model, RULE) == "the channels do not fall into equal groups"


NOTHING = [
    "m = ReduceMean(x, last) y = Sub(x, m)",
    centered("s = Sqrt(w) y = Div(s, d)"),
    centered("s = Sqrt(w) y = Mul(d, s)"),
    centered("s = Sqrt(w) y = Div(d, s)", square="q = Mul(x, d)"),
    "q = Mul(x, x) v = ReduceSum(q, last) w = Add(v, eps) s = Sqrt(w) y = Div(x, s)",
    "q = Pow(x, half) v = ReduceMean(q, last) w = Add(v, eps) s = Sqrt(w) y = Div(x, s)",
]


@pytest.mark.parametrize("body", NOTHING)
def test_what_is_no_norm(body: str) -> None:
    assert refusal(net(body), RULE) == ""


def test_an_instance_norm_with_a_scale_of_its_own_is_no_group_norm() -> None:
    model = net(grouped("y = Neg(n)"), x="N, 8, H, W", **{**GROUPS, "ones": np.full(4, 2.0)})
    assert refusal(model, RULE) == ""


def test_inside_a_body() -> None:
    inner = LAYER.replace("y =", "o =")
    body = (
        f"y = If (f) <then_branch = t () => (float[N, 3, 8] o) {{ {inner} }},"
        "else_branch = e () => (float[N, 3, 8] u) { u = Neg(x) }>"
    )
    arrays = {name: np.asarray(a, np.float32) for name, a in {"eps": 1e-3, "g": GAMMA, "b": BETA}.items()}
    model = build(
        f"g (float[N, 3, 8] x, bool f) => (float[] y) {{ {body} }}", 18, last=np.array([-1]), **arrays
    )
    after, _ = rewritten(model, RULE)
    assert [node.op_type for node in after.graph.all_nodes()] == ["If", "LayerNormalization", "Neg"]
