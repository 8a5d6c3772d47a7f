"""unroll-loop: as many copies of the body as there are turns, and reasons to leave a Loop alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build, constants, operators, refusal, rewritten

from edgewise.passes.unroll_loop import UnrollLoop
from edgewise.runtime.evaluate import Array

RULE = UnrollLoop()
TRUE = np.array(True)
TYPES = "int64 i, bool c, float[2] v"


def loop(
    body: str,
    *,
    inputs: str = "n, t, x",
    outputs: str = "y",
    formal: str = TYPES,
    results: str = "bool d, float[2] w",
    head: str = "",
    rest: str = "",
    declared: str = "float[2] x",
    out: str = "float[2] y",
    turns: int = 3,
    **more: Array,
) -> ir.Model:
    """x of [2] through a Loop of `turns` turns."""
    text = (
        f"g ({declared}) => ({out}) {{ {head} {outputs} = Loop({inputs}) "
        f"<body = b ({formal}) => ({results}) {{ {body} }}> {rest} }}"
    )
    held: Mapping[str, Array] = {"n": np.array(turns, np.int64), "t": TRUE, **more}
    asked = {name.strip() for name in inputs.split(",")} | more.keys()
    return build(text, **{name: a for name, a in held.items() if name in asked})


def test_a_carried_value() -> None:
    after, outcome = rewritten(loop("d = Identity(c) w = Add(v, v)"), RULE)
    assert operators(after) == ["Add"] * 3
    assert outcome.edits == 1
    assert not constants(after)
    assert after.graph.outputs[0].name == "y"


def test_the_number_of_the_turn() -> None:
    after, _ = rewritten(loop("d = Identity(c) f = Cast<to = 1>(i) w = Add(v, f)"), RULE)
    assert operators(after) == ["Cast", "Add"] * 3
    assert sorted(int(a) for a in constants(after).values()) == [0, 1, 2]


def test_a_number_of_the_turn_that_is_a_vector() -> None:
    """Converters declare it so, and read it as where a Slice starts."""
    model = loop(
        "d = Identity(c) e = Add(i, one) f = Slice(k, i, e) w = Mul(v, f)",
        formal="int64[1] i, bool c, float[2] v",
        results="bool d, float[2] w",
        one=np.array([1], np.int64),
        k=np.float32([2, 3, 5]),
    )
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Add", "Slice", "Mul"] * 3


def test_the_condition_as_a_value() -> None:
    after, _ = rewritten(loop("d = Identity(c) f = Cast<to = 1>(c) w = Add(v, f)"), RULE)
    assert operators(after) == ["Cast", "Add"] * 3


@pytest.mark.parametrize("turns", [1, 3])
def test_a_value_of_every_turn(turns: int) -> None:
    model = loop(
        "d = Identity(c) w = Add(v, v) s = Neg(w)",
        outputs="y, z",
        results="bool d, float[2] w, float[2] s",
        out="float[2] y, float[K, 2] z",
        turns=turns,
    )
    after, _ = rewritten(model, RULE)
    rows = ["Unsqueeze"] * turns + ["Concat"] * (turns > 1)
    assert operators(after) == ["Add", "Neg"] * turns + rows


@pytest.mark.parametrize("first", ["", "t"])
@pytest.mark.parametrize(
    "again", ["d = Identity(c)", "d = Constant<value = bool {1}>()", "e = Identity(c) d = Identity(e)"]
)
def test_conditions_that_stay_true(first: str, again: str) -> None:
    model = loop(f"{again} w = Add(v, v)", inputs=f"n, {first}, x")
    assert operators(rewritten(model, RULE)[0]) == ["Add"] * 3


def test_what_is_read_from_outside() -> None:
    model = loop("d = Identity(c) a = Mul(v, k) w = Add(a, h)", head="h = Abs(x)", k=np.float32([2, 3]))
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Abs", *["Mul", "Add"] * 3]
    assert list(constants(after)) == ["k"]


def test_weights_of_the_body_are_written_once() -> None:
    model = loop("d = Identity(c) w = Mul(v, k)", k=np.float32([2, 3]))
    body = model.graph.node(0).attributes["body"].as_graph()
    body.register_initializer(model.graph.initializers.pop("k"))
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Mul"] * 3
    assert list(constants(after)) == ["k"]


def test_values_that_change_places() -> None:
    model = loop(
        "d = Identity(c) p = Identity(u) q = Add(v, u)",
        inputs="n, t, x, z",
        outputs="y, o",
        formal=f"{TYPES}, float[2] u",
        results="bool d, float[2] p, float[2] q",
        declared="float[2] x, float[2] z",
        out="float[2] y, float[2] o",
    )
    after, _ = rewritten(model, RULE)
    assert operators(after).count("Add") == 3


def swapping(turns: int) -> ir.Model:
    """Two values change places without a node; the body reads nothing else."""
    model = loop(
        "d = Identity(c) p = Identity(u) q = Identity(v)",
        inputs="n, t, x, z",
        outputs="y, o",
        formal=f"{TYPES}, float[2] u",
        results="bool d, float[2] p, float[2] q",
        declared="float[2] x, float[2] z",
        out="float[2] y, float[2] o",
        turns=turns,
    )
    body = model.graph.node(0).attributes["body"].as_graph()
    body.outputs[1], body.outputs[2] = body.inputs[3], body.inputs[2]
    for node in [n for n in body if n.outputs[0].name != "d"]:
        body.remove(node, safe=True)
    return model


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_inputs_that_become_outputs(turns: int) -> None:
    after = swapping(turns)
    assert RULE.apply(after).edits == 1
    assert operators(after) == ["Identity", "Identity"]
    given = [node.inputs[0].name for node in after.graph if node.inputs[0] is not None]
    assert given == (["x", "z"] if turns % 2 == 0 else ["z", "x"])


def test_no_turns() -> None:
    after, _ = rewritten(
        loop("d = Identity(c) w = Add(v, v)", turns=0, rest="z = Neg(y)", out="float[2] z"), RULE
    )
    assert operators(after) == ["Neg"]


def test_a_condition_that_is_false_at_first() -> None:
    model = loop("d = Identity(c) w = Add(v, v)", t=np.array(False), rest="z = Neg(y)", out="float[2] z")
    assert operators(rewritten(model, RULE)[0]) == ["Neg"]


def test_a_loop_in_a_loop() -> None:
    inner = (
        "w = Loop(m, c, v) <body = e (int64 j, bool p, float[2] q) => (bool r, float[2] s) "
        "{ r = Identity(p) k = Add(q, v) s = Mul(k, x) }>"
    )
    model = loop(f"d = Identity(c) {inner}", m=np.array(2, np.int64))
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Add", "Mul"] * 6


def test_a_branch_in_a_loop() -> None:
    """Its bodies read what the turn gave, and use the same names in every turn."""
    branch = (
        "a = Abs(v) w = If(f) <then_branch = s () => (float[2] o) { k = Add(a, v) o = Mul(k, x) },"
        "else_branch = r () => (float[2] q) { k = Sub(a, x) q = Neg(k) }>"
    )
    model = loop(f"d = Identity(c) {branch}", declared="float[2] x, bool f")
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Abs", "If"] * 3


def test_in_a_branch() -> None:
    text = """g (float[2] x, bool f) => (float[2] y) {
        y = If(f) <then_branch = s () => (float[2] o) {
            o = Loop(n, t, x) <body = b (int64 i, bool c, float[2] v) => (bool d, float[2] w)
                { d = Identity(c) w = Add(v, x) }>
        }, else_branch = r () => (float[2] q) { q = Neg(x) }>
    }"""
    after, _ = rewritten(build(text, n=np.array(2, np.int64), t=TRUE), RULE)
    assert [[n.op_type for n in g] for g in after.graph.subgraphs()] == [["Add", "Add"], ["Neg"]]


def test_names_that_are_taken() -> None:
    """The body's names may be used outside as well, by what it does not read."""
    model = loop("d = Identity(c) k = Add(v, v) w = Neg(k)", rest="m = Abs(y) z = Neg(m)", out="float[2] z")
    model.graph.node(1).outputs[0].name = "k"
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["Add", "Neg"] * 3 + ["Abs", "Neg"]


def test_shapes_that_grow() -> None:
    """A dimension has a name for one turn only."""
    model = loop(
        "d = Identity(c) w = Concat<axis = 0>(v, v)",
        formal="int64 i, bool c, float[K] v",
        results="bool d, float[L] w",
        out="float[M] y",
    )
    after, _ = rewritten(model, RULE)
    assert all(v.shape is None or v.shape.is_dynamic() for n in list(after.graph)[:-1] for v in n.outputs)


def test_up_to_the_limit() -> None:
    model = loop("d = Identity(c) w = Add(v, v)", turns=5)
    assert refusal(model, UnrollLoop(max_nodes=9)) == "the turns together have too many nodes"
    assert operators(rewritten(model, UnrollLoop(max_nodes=10))[0]) == ["Add"] * 5


def test_weights_in_nodes() -> None:
    numbers = ", ".join(["1"] * 200)
    model = loop(
        f"d = Identity(c) k = Constant<value = float[200] {{{numbers}}}>() "
        "m = ReduceSum(k, ax) w = Add(v, m)",
        ax=np.array([0], np.int64),
    )
    assert refusal(model, RULE) == "the turns together would take more room in the file"


@pytest.mark.parametrize(
    "model",
    [
        loop("l = ReduceMax<keepdims = 0>(v) d = Less(l, k) w = Add(v, v)", k=np.float32(9)),
        loop("d = Constant<value = bool {0}>() w = Add(v, v)"),
        loop("d = Identity(c) w = Add(v, v)", inputs="n, f, x", declared="float[2] x, bool f"),
    ],
    ids=["computed", "false", "from outside"],
)
def test_conditions_that_may_end_it(model: ir.Model) -> None:
    assert refusal(model, RULE) == "the condition may end the loop"


def test_nothing_to_stack() -> None:
    model = loop(
        "d = Identity(c) w = Add(v, v) s = Neg(w)",
        outputs="y, z",
        results="bool d, float[2] w, float[2] s",
        out="float[2] y, float[K, 2] z",
        turns=0,
    )
    assert refusal(model, RULE) == "a loop without turns gives something empty"


def test_a_body_that_hands_on_a_value_from_outside() -> None:
    branch = "w = If(f) <then_branch = s () => (float[2] o) { o = Neg(v) }, "
    branch += "else_branch = r () => (float[2] q) { q = Abs(v) }>"
    model = loop(f"d = Identity(c) a = Abs(v) {branch}", declared="float[2] x, bool f")
    body = model.graph.node(0).attributes["body"].as_graph()
    inner = body.node(2).attributes["then_branch"].as_graph()
    inner.outputs.clear()
    inner.outputs._graph = body  # as onnx-ir reads a file that does so
    inner.outputs.append(body.node(1).outputs[0])
    assert RULE.apply(model).refused == {"a body inside the loop hands on a value from outside": 1}


def test_a_number_of_turns_that_is_not_known() -> None:
    model = loop("d = Identity(c) w = Add(v, v)", inputs="m, t, x", declared="float[2] x, int64 m")
    before = operators(model)
    assert RULE.apply(model).edits == 0
    assert operators(model) == before


def test_old_operator_sets() -> None:
    model = build(
        "g (float[2] x) => (float[2] y) { y = Loop(n, t, x) <body = b (int64 i, bool c, float[2] v) => "
        "(bool d, float[2] w) { d = Identity(c) w = Add(v, v) }> }",
        12,
        n=np.array(3, np.int64),
        t=TRUE,
    )
    assert refusal(model, RULE) == "opset below 13: upgrade it first"
