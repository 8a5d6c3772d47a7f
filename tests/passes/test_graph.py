"""The moves that passes are made of: reading what is constant, rewiring without losing a name."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build, operators

from edgewise.passes import graph as moves
from edgewise.passes.base import Refused
from edgewise.passes.verify import Signature, check

W = np.float32([[1, 2], [3, 4]])


def values(model: ir.Model) -> dict[str, ir.Value]:
    """Every value of the main graph by name."""
    found = {*model.graph.inputs, *model.graph.initializers.values()}
    found.update(v for node in model.graph for v in node.outputs)
    return {v.name or "": v for v in found}


def chain(weights: bool = True) -> ir.Model:
    held = {"w": W} if weights else {}
    body = "a = Mul(x, w) b = Neg(a) y = Exp(b)" if weights else "a = Abs(x) b = Neg(a) y = Exp(b)"
    return build(f"g (float[2, 2] x) => (float[2, 2] y) {{ {body} }}", **held)


@pytest.mark.parametrize(("domain", "version"), [("", 17), ("ai.onnx", 17)])
def test_opset(domain: str, version: int) -> None:
    model = chain()
    model.opset_imports.clear()
    assert moves.opset(model) == 1
    model.opset_imports[domain] = version
    assert moves.opset(model) == version


def test_constant_of() -> None:
    text = """g (float[2, 2] x, float[2, 2] d) => (float[2, 2] y) {
        i = Constant<value_ints = [1, 2]>() t = Constant<value = float[2] {1, 2}>()
        f = Constant<value_float = 2.0>()
        s = Constant<value_string = "a">() a = Mul(x, w) y = Add(a, d)
    }"""
    found = values(build(text, w=W, d=W))
    np.testing.assert_array_equal(moves.constant_of(found["w"]), W, strict=True)
    np.testing.assert_array_equal(moves.constant_of(found["i"]), np.int64([1, 2]), strict=True)
    np.testing.assert_array_equal(moves.constant_of(found["t"]), np.float32([1, 2]), strict=True)
    np.testing.assert_array_equal(moves.constant_of(found["f"]), np.float32(2), strict=True)
    assert [moves.constant_of(found[name]) for name in ("x", "a", "d", "s")] == [None] * 4
    assert moves.constant_of(None) is None


def test_constants_cannot_be_written_to() -> None:
    """Their memory is that of all clones of the model."""
    constant = moves.constant_of(values(chain())["w"])
    assert constant is not None
    with pytest.raises(ValueError, match="read-only"):
        constant[0, 0] = 7


def test_attribute() -> None:
    node = build("g (float[2] x) => (float[2] y) { y = Elu<alpha = 0.5>(x) }").graph.node(0)
    assert moves.attribute(node, "alpha") == 0.5
    assert moves.attribute(node, "beta", 3) == 3
    assert moves.attribute(node, "beta") is None
    node.attributes.add(ir.RefAttr("alpha", "a", ir.AttributeType.FLOAT))
    with pytest.raises(Refused, match="parameter"):
        moves.attribute(node, "alpha")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((2, 3), (2, 3)), ((), ()), ((2, "N"), None), ((2, None), None), ((-1, 3), None), (None, None)],
)
def test_static_shape(shape: tuple[int | str | None, ...] | None, expected: tuple[int, ...] | None) -> None:
    value = ir.Value(name="v", shape=None if shape is None else ir.Shape(shape))
    assert moves.static_shape(value) == expected
    assert moves.static_shape(None) is None


def test_only_user() -> None:
    found = values(
        build("g (float[2] x) => (float[2] y, float[2] b) { a = Neg(x) b = Abs(a) y = Mul(x, x) }")
    )
    assert moves.only_user(found["a"]) is found["b"].producer()
    assert moves.only_user(found["b"]) is None  # a graph output has a user outside
    assert moves.only_user(found["x"]) is None
    assert moves.only_user(ir.Value(name="alone")) is None


def test_unique_name() -> None:
    model = build(
        """g (bool c, float[2] x) => (float[2] y) {
            y = If(c) <then_branch = t () => (float[2] a) { a_1 = Neg(x) a = Exp(a_1) },
                       else_branch = e () => (float[2] b) { b = Abs(x) }>
        }"""
    )
    assert [moves.unique_name(model.graph, hint) for hint in ("new", "x", "a", "y")] == [
        "new",
        "x_1",
        "a_2",
        "y_1",
    ]


@pytest.mark.parametrize(
    "array", [np.int64(3), W.T, np.zeros((0, 2), np.float16)], ids=["scalar", "turned", "empty"]
)
def test_new_initializer(array: np.ndarray) -> None:
    model = chain()
    value = moves.new_initializer(model.graph, "w", array)
    assert value.name == "w_1"
    assert value.shape == ir.Shape(array.shape)
    assert value.const_value is not None
    assert value.const_value.shape == ir.Shape(array.shape)
    assert value.const_value.tobytes() == np.asarray(array).tobytes()
    np.testing.assert_array_equal(moves.constant_of(value), array, strict=True)


def test_new_node() -> None:
    model = chain()
    found, signature = values(model), Signature.of(model)
    user = found["y"].producer()
    assert user is not None
    new = moves.new_node(user, "Elu", [found["b"]], {"alpha": 0.5}, hint="a")
    assert (new.name, new.dtype) == ("a_1", ir.DataType.FLOAT)
    assert moves.new_node(user, "Abs", [new]).name == "y.Abs"
    user.replace_input_with(0, new)
    assert operators(model) == ["Mul", "Neg", "Elu", "Abs", "Exp"]
    check(model, signature)


def test_outside_any_graph() -> None:
    with pytest.raises(Refused, match="function"):
        moves.graph_of(ir.node("Neg", [ir.Value(name="x")]))


def test_replace_removes_what_nobody_reads() -> None:
    model = chain()
    found, signature = values(model), Signature.of(model)
    moves.replace(found["b"], found["x"])
    assert operators(model) == ["Exp"]
    assert not model.graph.initializers
    check(model, signature)


def test_replace_an_output() -> None:
    model = chain(weights=False)
    found, signature = values(model), Signature.of(model)
    found["a"].shape = None
    moves.replace(found["y"], found["a"])
    assert operators(model) == ["Abs"]
    check(model, signature)
    assert model.graph.outputs[0] is found["a"]


@pytest.mark.parametrize("other", ["x", "w", "z"])
def test_replace_refuses_before_it_edits(other: str) -> None:
    text = "g (float[2, 2] x) => (float[2, 2] y, float[2, 2] z) { y = Mul(x, w) z = Neg(x) }"
    model = build(text, w=W)
    found = values(model)
    with pytest.raises(Refused, match="fixed name"):
        moves.replace(found["y"], found[other])
    assert [v.name for v in model.graph.outputs] == ["y", "z"]
    assert operators(model) == ["Mul", "Neg"]


def test_replace_refuses_across_graphs() -> None:
    model = build(
        """g (bool c, float[2] x) => (float[2] y) {
            o = Neg(x)
            i = If(c) <then_branch = t () => (float[2] a) { a = Abs(o) },
                       else_branch = e () => (float[2] b) { b = Exp(o) }>
            y = Exp(i)
        }"""
    )
    body = model.graph.node(1).attributes["then_branch"].as_graph()
    with pytest.raises(Refused, match="another graph"):
        moves.replace(body.outputs[0], model.graph.node(0).outputs[0])


def test_a_removed_body_lets_go() -> None:
    """What only the body of a removed node read has no user any more."""
    model = build(
        """g (bool c, float[2] x) => (float[2] y) {
            o = Neg(x)
            i = If(c) <then_branch = t () => (float[2] a) { a = Abs(o) },
                       else_branch = e () => (float[2] b) { b = Exp(o) }>
            y = Exp(i)
        }"""
    )
    moves.replace(model.graph.node(1).outputs[0], model.graph.inputs[1])
    assert operators(model) == ["Neg", "Exp"]
    assert not model.graph.node(0).outputs[0].uses()


def test_long_chains_are_removed_without_recursion() -> None:
    names = ["x", *(f"v{i}" for i in range(3000))]
    body = " ".join(f"{b} = Neg({a})" for a, b in itertools.pairwise(names))
    model = build(f"g (float[2] x) => (float[2] y) {{ {body} y = Exp({names[-1]}) }}", shapes=False)
    moves.replace(values(model)[names[-1]], model.graph.inputs[0])
    assert operators(model) == ["Exp"]


@pytest.mark.parametrize(
    "text",
    [
        "g (float[2, 2] x) => (float[2, 2] y) { y = Mul(x, w) }",
        "g (float[2, 2] x) => (float[2, 2] y, float[2, 2] w) { y = Neg(x) }",
        "g (float[2, 2] x, float[2, 2] w) => (float[2, 2] y) { y = Neg(x) }",
    ],
    ids=["used", "an output", "an input"],
)
def test_initializers_that_stay(text: str) -> None:
    model = build(text, w=W)
    moves.drop_unused_initializer(model.graph.initializers["w"])
    assert list(model.graph.initializers) == ["w"]


def test_an_initializer_that_goes() -> None:
    model = build("g (float[2, 2] x) => (float[2, 2] y) { y = Neg(x) }", w=W)
    moves.drop_unused_initializer(model.graph.initializers["w"])
    moves.drop_unused_initializer(model.graph.inputs[0])
    assert not model.graph.initializers
    assert len(model.graph.inputs) == 1
