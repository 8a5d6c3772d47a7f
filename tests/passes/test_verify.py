"""verify: every way to break a graph is found and named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build

from edgewise.passes.base import PassError
from edgewise.passes.verify import Signature, check

W = np.float32([1, 2])


def model() -> ir.Model:
    text = """g (bool c, float[2] x) => (float[2] y) {
        o = Mul(x, w)
        i = If(c) <then_branch = t () => (float[2] a) { k = Neg(o) a = Exp(k) },
                   else_branch = e () => (float[2] b) { k = Abs(o) b = Neg(k) }>
        y = Add(i, o)
    }"""
    return build(text, w=W)


def body(of: ir.Model) -> ir.Graph:
    return of.graph.node(1).attributes["then_branch"].as_graph()


def test_a_sound_model() -> None:
    """Bodies side by side may use the same names."""
    check(model(), Signature.of(model()))


def swap(m: ir.Model) -> None:
    node = m.graph.node(0)
    m.graph.remove(node)
    m.graph.append(node)


def dangle(m: ir.Model) -> None:
    m.graph.node(2).replace_input_with(0, ir.Value(name="nowhere"))


def unregister(m: ir.Model) -> None:
    m.graph.initializers.pop("w")


def repeat(m: ir.Model) -> None:
    m.graph.node(1).outputs[0].name = "o"


def forget(m: ir.Model) -> None:
    m.graph.inputs[1].name = None


def hide(m: ir.Model) -> None:
    body(m).node(0).outputs[0].name = "o"


def leave_inside(m: ir.Model) -> None:
    m.graph.node(2).replace_input_with(0, body(m).node(0).outputs[0])


def dangle_inside(m: ir.Model) -> None:
    body(m).node(1).replace_input_with(0, ir.Value(name="nowhere"))


def remove_the_end(m: ir.Model) -> None:
    m.graph.remove(m.graph.node(2))


@pytest.mark.parametrize(
    ("breakage", "complaint"),
    [
        (swap, "reads 'o' before it is produced"),
        (dangle, "reads 'nowhere' before it is produced"),
        (unregister, "reads 'w' before it is produced"),
        (repeat, "two values are named 'o'"),
        (hide, "hides it"),
        (leave_inside, "reads 'k' before it is produced"),
        (dangle_inside, "reads 'nowhere' before it is produced"),
        (remove_the_end, "output 'y' of 'g' has no producer"),
    ],
)
def test_breakages(breakage: Callable[[ir.Model], None], complaint: str) -> None:
    broken = model()
    breakage(broken)
    with pytest.raises(PassError, match=complaint):
        check(broken, Signature.of(model()))


def test_a_value_without_a_name() -> None:
    broken = model()
    forget(broken)
    with pytest.raises(PassError, match="has no name"):
        check(broken, Signature.of(broken))


def drop_output(m: ir.Model) -> None:
    m.graph.outputs.clear()


def rename_input(m: ir.Model) -> None:
    m.graph.inputs[1].name = "z"


def resize_output(m: ir.Model) -> None:
    m.graph.outputs[0].shape = ir.Shape(["N"])


def retype_input(m: ir.Model) -> None:
    m.graph.inputs[1].type = ir.TensorType(ir.DataType.DOUBLE)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (drop_output, "2 inputs and 1 outputs became 2 inputs and 0 outputs"),
        (rename_input, r"\('x', .*\) became \('z', .*\)"),
        (resize_output, r"'\[2\]'\) became .*'\[N\]'"),
        (retype_input, "FLOAT.* became .*DOUBLE"),
    ],
)
def test_changes_of_the_interface(change: Callable[[ir.Model], None], complaint: str) -> None:
    changed = model()
    change(changed)
    with pytest.raises(PassError, match=complaint):
        check(changed, Signature.of(model()))


def test_an_input_with_a_value_is_no_part_of_the_interface() -> None:
    """A caller need not name it, so it may stop being an input."""
    overridable = build("g (float[2] x, float[2] w) => (float[2] y) { y = Mul(x, w) }", w=W)
    frozen = build("g (float[2] x) => (float[2] y) { y = Mul(x, w) }", w=W)
    check(frozen, Signature.of(overridable))


def test_optional_outputs_need_no_name() -> None:
    pool = build("g (float[1, 1, 3] x) => (float[1, 1, 3] y) { y, i = MaxPool<kernel_shape = [1]>(x) }")
    pool.graph.node(0).outputs[1].name = ""
    check(pool, Signature.of(pool))


def test_functions_are_checked() -> None:
    broken = model()
    inner = build("f (float[2] x) => (float[2] y) { a = Neg(x) y = Exp(a) }")
    inner.graph.node(1).replace_input_with(0, ir.Value(name="nowhere"))
    function = ir.Function("mine", "f", graph=inner.graph, attributes=())
    broken.functions[function.identifier()] = function
    with pytest.raises(PassError, match="nowhere"):
        check(broken, Signature.of(model()))
