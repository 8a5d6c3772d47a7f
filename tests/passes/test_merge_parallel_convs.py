"""merge-parallel-convs: filters are stacked where a Concat puts their results next to each other anyway."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import build, constants, operators, refusal, rewritten

from edgewise.passes.graph import attribute
from edgewise.passes.merge_parallel_convs import MergeParallelConvs
from edgewise.runtime.evaluate import Array

RULE = MergeParallelConvs()
RNG = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def net(body: str, outputs: str = "float[] y", inputs: str = "", **weights: Array) -> ir.Model:
    """A graph on x of [N, 2, 6, 6] with those of the weights w, v, u, b and c that it reads."""
    held = {
        "w": normal(3, 2, 3, 3),
        "v": normal(5, 2, 3, 3),
        "u": normal(1, 2, 3, 3),
        "b": normal(3),
        "c": normal(5),
        "low": np.array(-0.5, np.float32),
        "high": np.array(0.5, np.float32),
        **weights,
    }
    words = set("".join(c if c.isalnum() else " " for c in body).split())
    free = {word.split()[-1] for word in inputs.split(",") if word.strip()}
    text = f"g (float[N, 2, 6, 6] x{inputs}) => ({outputs}) {{ {body} }}"
    return build(text, **{name: a for name, a in held.items() if name in words - free})


PAIR = "p = Conv(x, w, b) q = Conv(x, v, c) "


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_any_number_of_any_window(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))
    counts = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    axis = st.lists(st.integers(1, 2), min_size=dims, max_size=dims)
    kernel, strides, dilations = data.draw(axis), data.draw(axis), data.draw(axis)
    pads = data.draw(st.lists(st.integers(0, 1), min_size=2 * dims, max_size=2 * dims))
    window = f"<strides = {strides}, dilations = {dilations}, pads = {pads}>"
    weights, lines = {}, []
    for i, count in enumerate(counts):
        weights[f"w{i}"] = normal(count, 2, *kernel)
        bias = data.draw(st.booleans())
        weights |= {f"b{i}": normal(count)} if bias else {}
        lines.append(f"c{i} = Conv{window}(x, w{i}{f', b{i}' * bias})")
    order = data.draw(st.permutations(range(len(counts))))
    lines.append(f"y = Concat<axis = 1>({', '.join(f'c{i}' for i in order)})")
    text = f"g (float[2, 2{', 6' * dims}] x) => (float[] y) {{ {' '.join(lines)} }}"
    after, outcome = rewritten(build(text, **weights), RULE)
    assert operators(after) == ["Conv"]
    assert outcome.edits == len(counts) - 1
    assert after.graph.outputs[0].name == "y"
    expected = np.concatenate([weights[f"w{i}"] for i in order])
    (stacked,) = [a for a in constants(after).values() if a.ndim > 1]
    np.testing.assert_array_equal(stacked, expected)


FUNCTIONS = [
    ["Relu({})"],
    ["Sigmoid({})"],
    ["HardSwish({})"],
    ["LeakyRelu<alpha = 0.2>({})"],
    ["Clip({}, low, high)"],
    ["Clip({},, high)"],
    ["Relu({})", "Tanh({})"],
]


@pytest.mark.parametrize("functions", FUNCTIONS)
def test_the_same_function_behind_each(functions: list[str]) -> None:
    lines, ends = [PAIR], []
    for end in "pq":
        for i, function in enumerate(functions):
            lines.append(f"{end}{i} = {function.format(end if i == 0 else f'{end}{i - 1}')}")
        ends.append(f"{end}{len(functions) - 1}")
    after, _ = rewritten(net(f"{' '.join(lines)} y = Concat<axis = 1>({', '.join(ends)})"), RULE)
    assert operators(after) == ["Conv", *(f.partition("(")[0].partition("<")[0] for f in functions)]


def test_what_is_noted_of_the_results() -> None:
    body = PAIR + "r = Relu(p) s = Relu(q) t = Concat<axis = 1>(r, s) y = Neg(t)"
    after, _ = rewritten(net(body), RULE)
    assert operators(after) == ["Conv", "Relu", "Neg"]
    assert [n.outputs[0].shape[1] for n in after.graph] == [8, 8, 8]


def test_bounds_of_the_same_value() -> None:
    """Two constants are as good as one."""
    body = PAIR + "r = Clip(p, low) s = Clip(q, high) y = Concat<axis = 1>(r, s)"
    after, _ = rewritten(net(body, high=np.array(-0.5, np.float32)), RULE)
    assert operators(after) == ["Conv", "Clip"]
    assert set(constants(after)) == {"w", "b", "low"}


@pytest.mark.parametrize("axis", [1, -3])
@pytest.mark.parametrize(("order", "left"), [("x, {}", 2), ("{}, x", 2), ("x, {}, x", 3)])
def test_the_rest_of_the_concat_stays(order: str, left: int, axis: int) -> None:
    convs = "p = Conv<pads = [1, 1, 1, 1]>(x, w) q = Conv<pads = [1, 1, 1, 1]>(x, v)"
    after, _ = rewritten(net(f"{convs} y = Concat<axis = {axis}>({order.format('p, q')})"), RULE)
    assert operators(after) == ["Conv", "Concat"]
    assert len(after.graph.node(1).inputs) == left


def test_two_runs_in_one_concat() -> None:
    """1x1 and 3x3 kernels side by side: each kind is stacked."""
    point = "p{0} = Conv(x, w{0}) "
    wide = "q{0} = Conv<pads = [1, 1, 1, 1]>(x, v{0}) "
    body = "".join(text.format(i) for text in (point, wide) for i in range(2))
    weights = {f"w{i}": normal(2, 2, 1, 1) for i in range(2)}
    weights |= {f"v{i}": normal(3, 2, 3, 3) for i in range(2)}
    after, outcome = rewritten(net(body + "y = Concat<axis = 1>(p0, p1, q0, q1)", **weights), RULE)
    assert operators(after) == ["Conv", "Conv", "Concat"]
    assert outcome.edits == 2
    assert sorted(a.shape[0] for a in constants(after).values()) == [4, 6]


def test_written_and_implied_attributes_are_the_same() -> None:
    written = "p = Conv<kernel_shape = [3, 3], strides = [1, 1], pads = [0, 0, 0, 0], group = 1>(x, w)"
    implied = 'q = Conv<auto_pad = "VALID", dilations = [1, 1]>(x, v)'
    after, _ = rewritten(net(f"{written} {implied} y = Concat<axis = 1>(p, q)"), RULE)
    assert operators(after) == ["Conv"]


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
def test_the_same_automatic_padding(auto_pad: str) -> None:
    conv = f'Conv<auto_pad = "{auto_pad}", strides = [2, 2]>'
    after, _ = rewritten(net(f"p = {conv}(x, w) q = {conv}(x, v) y = Concat<axis = 1>(p, q)"), RULE)
    assert operators(after) == ["Conv"]
    assert attribute(after.graph.node(0), "auto_pad") == auto_pad


def test_a_shared_weight_stays_for_its_other_user() -> None:
    body = PAIR + "t = Concat<axis = 1>(p, q) y = Relu(t) r = Relu(x) z = Conv(r, w, b)"
    model = net(body, "float[] y, float[] z")
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Conv", "Relu", "Relu", "Conv"]
    np.testing.assert_array_equal(constants(after)["w"], constants(model)["w"])


def test_inside_a_subgraph_with_weights_from_outside() -> None:
    branch = "{{ p{0} = Conv(x, w) q{0} = Conv(x, v) o{0} = Concat<axis = 1>(p{0}, q{0}) }}"
    body = (
        "y = If (f) <"
        f"then_branch = t () => (float[N, 8, 4, 4] o1) {branch.format(1)},"
        f"else_branch = e () => (float[N, 8, 4, 4] o2) {branch.format(2)}>"
    )
    after, outcome = rewritten(net(body, inputs=", bool f"), RULE)
    assert outcome.edits == 2
    assert [[n.op_type for n in g] for g in after.graph.subgraphs()] == [["Conv"], ["Conv"]]


NO_CONCAT = "no Concat of channels joins the branches"
APART = "the branches are not next to each other in one Concat"
DIFFERENT = "the activations differ"
USED = "a branch has another user"
JOIN = "y = Concat<axis = 1>(r, s)"

CONDITIONS = [
    ("p = Conv(x, w) q = Conv(x, w, b) y = Add(p, q)", NO_CONCAT),
    ("p = Conv(x, w) q = Conv(x, w, b) y = Concat<axis = 2>(p, q)", NO_CONCAT),
    (
        "p = Conv<pads = [1, 1, 1, 1]>(x, w) q = Conv<pads = [1, 1, 1, 1]>(x, v)"
        " y = Concat<axis = 1>(p, x, q)",
        APART,
    ),
    (PAIR + "r = Relu(p) s = Sigmoid(q) " + JOIN, DIFFERENT),
    (PAIR + "r = Relu(p) y = Concat<axis = 1>(r, q)", DIFFERENT),
    (PAIR + "r = Relu(q) y = Concat<axis = 1>(p, r)", DIFFERENT),
    (PAIR + "r = LeakyRelu<alpha = 0.1>(p) s = LeakyRelu<alpha = 0.2>(q) " + JOIN, DIFFERENT),
    (PAIR + "r = Clip(p, low) s = Clip(q, high) " + JOIN, DIFFERENT),
    (PAIR + "r = Clip(p, low) s = Clip(q,, high) " + JOIN, DIFFERENT),
    (PAIR + "r = Clip(p, low) s = Clip(q) " + JOIN, DIFFERENT),
    (PAIR + "y = Concat<axis = 1>(p, p, q, q)", USED),
    (
        "p = Conv<group = 2>(x, w) q = Conv<group = 2>(x, v) y = Concat<axis = 1>(p, q)",
        "grouped convolutions cannot be stacked",
    ),
]


@pytest.mark.parametrize(("body", "reason"), CONDITIONS)
def test_conditions(body: str, reason: str) -> None:
    grouped = {"w": normal(4, 1, 3, 3), "v": normal(2, 1, 3, 3)} if "group" in body else {}
    assert refusal(net(body, **grouped), RULE) == reason


@pytest.mark.parametrize("used", ["p", "q"])
@pytest.mark.parametrize("how", ["{}", "r"])
def test_another_user(used: str, how: str) -> None:
    body = PAIR + f"r = Neg({used}) y = Concat<axis = 1>(p, q)"
    outputs = f"float[] y, float[] {how.format(used)}"
    assert refusal(net(body if how == "r" else body.replace(f"r = Neg({used})", ""), outputs), RULE) == USED


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [("v", "5, 2, 3, 3", "weight is not constant"), ("c", "5", "bias is not constant")],
)
def test_computed_parameters(name: str, shape: str, reason: str) -> None:
    model = net(PAIR + "y = Concat<axis = 1>(p, q)", inputs=f", float[{shape}] {name}")
    assert refusal(model, RULE) == reason


def test_concat_in_another_graph() -> None:
    body = PAIR + (
        "y = If (f) <"
        "then_branch = t () => (float[N, 8, 4, 4] o1) { o1 = Concat<axis = 1>(p, q) },"
        "else_branch = e () => (float[N, 8, 4, 4] o2) { o2 = Conv(x, k) }>"
    )
    assert refusal(net(body, inputs=", bool f", k=normal(8, 2, 3, 3)), RULE) == NO_CONCAT


BODIES = [
    "y = Conv(x, w)",
    "p = Conv(x, w) y = Relu(p)",
    "p = Conv(x, w) r = Relu(x) q = Conv(r, v) y = Concat<axis = 1>(p, q)",  # of different inputs
    "p = Conv(x, w) q = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, v) y = Shape(p) z = Shape(q)",
    "p = Conv<pads = [1, 1, 1, 1]>(x, w) q = Conv<pads = [2, 2, 2, 2], dilations = [2, 2]>(x, v)"
    "y = Concat<axis = 1>(p, q)",
    "p = Conv(x, w) q = MaxPool<kernel_shape = [3, 3]>(x) y = Concat<axis = 1>(p, q)",
]


@pytest.mark.parametrize("body", BODIES)
def test_what_is_not_parallel(body: str) -> None:
    outputs = "int64[] y, int64[] z" if "Shape" in body else "float[] y"
    assert refusal(net(body, outputs), RULE) == ""
