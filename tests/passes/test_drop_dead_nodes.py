"""drop-dead-nodes: what no output depends on goes; what a caller can see stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build, operators, refusal, rewritten

from edgewise.passes.drop_dead_nodes import DropDeadNodes

RULE = DropDeadNodes()


def test_a_dead_chain_and_its_weight() -> None:
    model = build(
        "g (float[2] x) => (float[2] y) { a = Mul(x, w) b = Neg(a) y = Neg(x) }", w=np.float32([1, 2])
    )
    after, outcome = rewritten(model, RULE)
    assert operators(after) == ["Neg"]
    assert not after.graph.initializers
    assert outcome.edits == 3


def test_what_is_used_stays() -> None:
    model = build("g (float[2] x, float u) => (float[2] y) { y = Mul(x, w) }", w=np.float32([1, 2]))
    assert refusal(model, RULE) == ""
    assert [v.name for v in model.graph.inputs] == ["x", "u"]


def test_a_weight_that_is_an_output_stays() -> None:
    model = build("g (float[2] x) => (float[2] y, float[2] w) { y = Neg(x) }", w=np.float32([1, 2]))
    assert refusal(model, RULE) == ""


def test_a_dead_branch_lets_go_of_what_it_reads() -> None:
    model = build(
        """g (bool c, float[2] x) => (float[2] y) {
            n = Mul(x, w)
            d = If(c) <then_branch = t () => (float[2] a) { a = Neg(n) },
                       else_branch = e () => (float[2] b) { b = Abs(n) }>
            y = Neg(x)
        }""",
        w=np.float32([1, 2]),
    )
    after, outcome = rewritten(model, RULE)
    assert operators(after) == ["Neg"]
    assert outcome.edits == 3
    assert not after.graph.initializers


def test_dead_nodes_of_a_branch() -> None:
    model = build(
        """g (bool c, float[2] x) => (float[2] y) {
            y = If(c) <then_branch = t () => (float[2] a) {
                           d = Constant<value_float = 1.0>() e = Neg(d) a = Neg(x)
                       },
                       else_branch = e () => (float[2] b) { b = Abs(x) }>
        }"""
    )
    after, outcome = rewritten(model, RULE)
    assert outcome.edits == 2
    assert [n.op_type for n in after.graph.node(0).attributes["then_branch"].as_graph()] == ["Neg"]


def test_optional_outputs() -> None:
    """The whole sequence and the cell are left out, one in the middle and one at the end."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((1, 8, 3)), "r": rng.standard_normal((1, 8, 2))}
    model = build(
        "g (float[4, 2, 3] x) => (float[] h) { s, h, c = LSTM<hidden_size = 2>(x, w, r) }",
        **{name: array.astype(np.float32) for name, array in weights.items()},
    )
    after, outcome = rewritten(model, RULE)
    assert [v.name for v in after.graph.node(0).outputs] == ["", "h"]
    assert outcome.edits == 2


@pytest.mark.parametrize(
    ("text", "opset"),
    [
        ("y, m = Dropout(x)", 17),
        ("v, i = TopK(x, k) y = Neg(v)", 17),
    ],
)
def test_outputs_that_stay(text: str, opset: int) -> None:
    weights = {"k": np.int64([1])} if "k" in text else {}
    assert refusal(build(f"g (float[3] x) => (float[] y) {{ {text} }}", opset, **weights), RULE) == ""


def test_a_batch_norm_in_training_keeps_its_outputs() -> None:
    """Without them it would be read as inference in the operator sets before 14."""
    body = "y, m, v = BatchNormalization<training_mode = 1>(x, s, s, s, s)"
    model = build(f"g (float[2, 3] x) => (float[2, 3] y) {{ {body} }}", 15, s=np.float32([1, 2, 3]))
    assert refusal(model, RULE) == ""
    assert len(model.graph.node(0).outputs) == 3


def test_functions_and_operator_sets() -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    model.opset_imports.update({"mine": 1, "com.microsoft": 1})
    inner = build("f (float[2] x) => (float[2] y) { d = Abs(x) y = Neg(x) }")
    function = ir.Function("mine", "f", graph=inner.graph, attributes=())
    model.functions[function.identifier()] = function
    outcome = RULE.apply(model)
    assert outcome.edits == 3  # the function, its domain, and a domain nobody ever used
    assert not model.functions
    assert model.opset_imports == {"": 17}


def test_a_function_that_is_called() -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    model.opset_imports["mine"] = 1
    inner = build("f (float[2] x) => (float[2] y) { d = Abs(x) y = Neg(x) }")
    function = ir.Function("mine", "f", graph=inner.graph, attributes=())
    model.functions[function.identifier()] = function
    model.graph.node(0).domain, model.graph.node(0).op_type = "mine", "f"
    assert RULE.apply(model).edits == 1
    assert [n.op_type for n in function] == ["Neg"]
    assert model.opset_imports == {"": 17, "mine": 1}


def test_the_other_name_of_the_standard_domain_stays() -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    model.opset_imports["ai.onnx"] = model.opset_imports.pop("")
    assert RULE.apply(model).edits == 0
    assert model.opset_imports == {"ai.onnx": 17}
