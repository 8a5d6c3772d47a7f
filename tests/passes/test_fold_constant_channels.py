"""fold-constant-channels: what is constant as a whole becomes its numbers, where that is no larger."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from channel_nets import nets
from hypothesis import given, settings
from rewrites import build, constants, operators, refusal, rewritten

from edgewise.passes.fold_constant_channels import FoldConstantChannels
from edgewise.runtime.evaluate import Array

RULE = FoldConstantChannels()
RNG = np.random.default_rng(0)


def floats(*shape: int) -> Array:
    return RNG.uniform(0.2, 1.0, shape).astype(np.float32)


def zeros(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


def net(
    body: str, declared: str = "float[N, 3, 4, 4] x", outputs: str = "float[] y", **weights: Array
) -> ir.Model:
    """A graph with those weights that it reads: d is dead, whatever goes in."""
    held = {
        "w": floats(8, 3, 3, 3),
        "d": zeros(8, 3, 3, 3),
        "b": floats(8),
        "v": floats(4, 8, 1, 1),
        **weights,
    }
    read = {name: array for name, array in held.items() if re.search(rf"\b{name}\b", body)}
    return build(f"g ({declared}) => ({outputs}) {{ {body} }}", 20, **read)


def test_a_dead_branch_of_a_sum() -> None:
    after, outcome = rewritten(net("a = Conv(x, w) c = Conv(x, d) r = Relu(c) y = Add(a, r)"), RULE)
    assert outcome.edits == 1
    assert operators(after) == ["Conv", "Add"]
    assert [a.tolist() for a in constants(after).values() if not a.ndim] == [0.0]


GATE = (
    "a = Conv(x, w) p = GlobalAveragePool(a) f = Conv(p, wf) e = Conv(f, we, be) s = Sigmoid(e) y = Mul(a, s)"
)


@pytest.mark.parametrize("bias", [floats(8), np.full(8, 0.5, np.float32)], ids=["numbers", "number"])
def test_a_gate_that_is_stuck(bias: Array) -> None:
    after, outcome = rewritten(net(GATE, wf=floats(2, 8, 1, 1), we=zeros(8, 2, 1, 1), be=bias), RULE)
    assert outcome.edits == 1
    assert operators(after) == ["Conv", "Mul"]
    (gate,) = [a for name, a in constants(after).items() if name != "w"]
    assert gate.shape == (() if np.unique(bias).size == 1 else (8, 1, 1))
    np.testing.assert_allclose(gate.ravel(), 1 / (1 + np.exp(-bias[: gate.size])), rtol=1e-6)


def test_a_gate_that_is_stuck_by_its_range() -> None:
    """Softplus is positive and the weights are negative, so HardSigmoid always gives zero."""
    body = "a = Conv(x, w) p = Softplus(a) f = Conv(p, wf, bf) h = HardSigmoid(f) g = Sub(a, h) y = Relu(g)"
    after, _ = rewritten(net(body, wf=-floats(8, 8, 1, 1), bf=np.full(8, -3, np.float32)), RULE)
    assert operators(after) == ["Conv", "Sub", "Relu"]


def test_over_features() -> None:
    """Channels on the last axis."""
    body = "m = MatMul(x, w) n = MatMul(x, z) a = Add(n, b) g = Gelu(a) y = Mul(m, g)"
    model = net(body, "float[N, T, 3] x", w=floats(3, 8), z=zeros(3, 8), b=floats(8))
    after, _ = rewritten(model, RULE)
    assert operators(after) == ["MatMul", "Mul"]
    assert sorted(a.shape for a in constants(after).values()) == [(3, 8), (8,)]


def test_an_output_that_is_constant() -> None:
    """Of known shape: it is written out, and named as before."""
    after, outcome = rewritten(net("c = Conv(x, d, b) y = Relu(c)", "float[2, 3, 4, 4] x"), RULE)
    assert outcome.edits == 1
    assert operators(after) == ["Expand"]
    assert after.graph.outputs[0].name == "y"


def test_what_channels_cannot_leave_through() -> None:
    """Softmax mixes them; it is a constant itself, which folding finds."""
    after, _ = rewritten(net("c = Conv(x, d, b) y = Softmax<axis = 1>(c)", "float[2, 3, 4, 4] x"), RULE)
    assert operators(after) == ["Expand", "Softmax"]


def test_inside_a_branch() -> None:
    body = (
        "y = If(k) <then_branch = t () => (float[2, 8, 2, 2] o1) "
        "{ a = Conv(x, w) c = Conv(x, d, b) o1 = Add(a, c) },"
        "else_branch = e () => (float[2, 8, 2, 2] o2) { o2 = Conv(x, w) }>"
    )
    after, outcome = rewritten(net(body, "bool k, float[2, 3, 4, 4] x"), RULE)
    assert outcome.edits == 1
    branch = after.graph.node(0).attributes["then_branch"].as_graph()
    assert [node.op_type for node in branch] == ["Conv", "Add"]


def test_what_a_branch_reads() -> None:
    body = (
        "c = Conv(x, d, b) y = If(k) <then_branch = t () => (float[2, 8, 2, 2] o1) { o1 = Neg(c) },"
        "else_branch = e () => (float[2, 8, 2, 2] o2) { o2 = Conv(x, w) }>"
    )
    after, outcome = rewritten(net(body, "bool k, float[2, 3, 4, 4] x"), RULE)
    assert outcome.edits == 1
    assert operators(after) == ["Expand", "If"]


@pytest.mark.parametrize(("declared", "dtype"), [("float16", np.float16), ("double", np.float64)])
def test_other_precisions(declared: str, dtype: type) -> None:
    arrays = {"w": floats(3, 8).astype(dtype), "d": zeros(3, 8).astype(dtype), "b": floats(8).astype(dtype)}
    body = "a = MatMul(x, w) m = MatMul(x, d) c = Add(m, b) s = Sigmoid(c) y = Mul(a, s)"
    after, _ = rewritten(net(body, f"{declared}[N, 3] x", f"{declared}[] y", **arrays), RULE)
    assert operators(after) == ["MatMul", "Mul"]
    assert {a.dtype for a in constants(after).values()} == {np.dtype(dtype)}


def test_refused_where_the_shape_is_dynamic() -> None:
    assert refusal(net("y = Conv(x, d, b)"), RULE) == "a constant value has a dynamic shape"


def test_refused_where_the_numbers_are_larger() -> None:
    """600 numbers that come from a table that somebody else reads as well."""
    weights = {"w": floats(4, 600), "t": zeros(4, 600), "k": floats(600)}
    body = "a = MatMul(x, w) m = MatMul(x, t) c = Add(m, k) y = Mul(a, c) l = Log(k) o = Neg(t)"
    model = net(body, "float[N, 4] x", "float[] y, float[] l, float[] o", **weights)
    assert refusal(model, RULE) == "the constant is larger than what it replaces"
    after, outcome = rewritten(model, FoldConstantChannels(max_growth=2400))
    assert outcome.edits == 1
    assert operators(after) == ["MatMul", "Mul", "Log", "Neg"]


SILENT = {
    "channels that leave one by one": "c = Conv(x, d, b) r = Relu(c) y = Conv<pads = [1, 1, 1, 1]>(r, v)",
    "a channel that lives": "a = Conv(x, w) c = Conv(x, h) r = Relu(c) y = Add(a, r)",
    "the constant gives the result its shape": (
        "p = GlobalAveragePool(x) a = Conv(p, wq) c = Conv(x, d, b) m = Mul(a, c) y = Conv(m, v)"
    ),
    "numbers are told apart": (
        "a = Conv(x, w) c = Conv(x, d, b) q = Greater(a, c) s = Where(q, a, a) y = Conv(s, v)"
    ),
}


@pytest.mark.parametrize("name", SILENT)
def test_left_alone(name: str) -> None:
    half = zeros(8, 3, 3, 3)
    half[0] = 1
    assert refusal(net(SILENT[name], h=half, wq=floats(8, 3, 1, 1)), RULE) == ""


@given(nets())
@settings(max_examples=60)
def test_random_nets(model: ir.Model) -> None:
    rewritten(model, RULE)
