"""inline-functions: bodies in place of calls."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from rewrites import operators, refusal, rewritten

from edgewise.passes.inline_functions import InlineFunctions

RULE = InlineFunctions()


def model(graph: str, *functions: str, opset: int = 17, domain: str = "local") -> ir.Model:
    header = f'<ir_version: 8, opset_import: ["" : 17, "{domain}" : 1]>'
    heads = [f'<domain: "{domain}", opset_import: ["" : {opset}, "{domain}" : 1]>' for _ in functions]
    bodies = "\n".join(f"{head} {body}" for head, body in zip(heads, functions, strict=True))
    proto = onnx.parser.parse_model(f"{header} g (float[N, 4] x) => (float[N, 4] y) {{ {graph} }}\n{bodies}")
    return ir.from_proto(proto)


TWICE = "twice (a) => (b) { b = Add(a, a) }"


def test_every_call() -> None:
    after, outcome = rewritten(model("h = local.twice(x) r = Relu(h) y = local.twice(r)", TWICE), RULE)
    assert operators(after) == ["Add", "Relu", "Add"]
    assert outcome.edits == 2
    assert not after.functions


def test_attributes_are_written_out() -> None:
    leaky = "leak <k> (a) => (b) { b = LeakyRelu<alpha: float = @k>(a) }"
    after, _ = rewritten(model("y = local.leak<k = 0.25>(x)", leaky), RULE)
    (node,) = after.graph
    assert node.attributes["alpha"].value == 0.25


def test_functions_of_functions() -> None:
    four_times = "four_times (a) => (b) { c = local.twice(a) b = local.twice(c) }"
    after, _ = rewritten(model("y = local.four_times(x)", four_times, TWICE), RULE)
    assert operators(after) == ["Add", "Add"]
    assert not after.functions


def test_calls_in_a_body_of_control_flow() -> None:
    text = """c = Constant<value = bool {1}>()
        y = If(c) <then_branch = t () => (float[N, 4] u) { u = local.twice(x) },
                   else_branch = e () => (float[N, 4] v) { v = Relu(x) }>"""
    after, outcome = rewritten(model(text, TWICE), RULE)
    assert outcome.edits == 1
    assert "twice" not in {node.op_type for node in after.graph.all_nodes()}


def test_another_version_of_the_operators() -> None:
    assert "another version" in refusal(model("y = local.twice(x)", TWICE, opset=15), RULE)


def test_what_the_runtime_may_have_itself() -> None:
    gelu = "FastGelu (a) => (b) { b = Relu(a) }"
    stays = model("y = com.microsoft.FastGelu(x)", gelu, domain="com.microsoft")
    assert "operator of the runtime" in refusal(stays, RULE)


def test_too_many_copies() -> None:
    calls = model("h = local.twice(x) y = local.twice(h)", TWICE)
    assert "too many" in refusal(calls, InlineFunctions(max_nodes=0))


@pytest.mark.parametrize("graph", ["y = Relu(x)", "y = local.unknown(x)"])
def test_nothing_to_inline(graph: str) -> None:
    without = model(graph)
    assert RULE.apply(without).edits == 0
