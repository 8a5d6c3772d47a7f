"""A branch is what a sum can do without; leaving, it takes along what nobody else needs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rewrites import build, normal, operators

from edgewise.passes.branches import branches_of
from edgewise.passes.infer_shapes import InferShapes
from edgewise.runtime.evaluate import Evaluator

WEIGHTS = {"w0": normal(4, 3, 3, 3), "w1": normal(6, 4, 3, 3), "w2": normal(4, 6, 1, 1), "b": normal(4, 1, 1)}


def net(text: str, result: str = "y", **weights: np.ndarray) -> ir.Model:
    head = f"net (float[N, 3, 6, 6] x) => (float[N, 4, 6, 6] {result}) "
    same = "<pads = [1, 1, 1, 1]>"
    model = build(head + "{" + text.replace("SAME", same) + "}", 17, **{**WEIGHTS, **weights})
    InferShapes().apply(model)
    return model


BLOCK = "a = Conv SAME (x, w0) c = Conv SAME (a, w1) e = Relu(c) f = Conv(e, w2) "


def names(model: ir.Model) -> list[str]:
    return [branch.name for branch in branches_of(model.graph)]


def test_a_residual_block_is_a_branch() -> None:
    (branch,) = branches_of(net(BLOCK + "h = Add(a, f) y = Relu(h)").graph)
    assert branch.name == "h"
    assert branch.stream.name == "a"
    assert sorted(n.outputs[0].name or "" for n in branch.nodes) == ["c", "e", "f", "h"]


@pytest.mark.parametrize("sum_", ["h = Add(a, f)", "h = Add(f, a)"])
def test_the_stream_goes_on_without_it(sum_: str) -> None:
    model = net(BLOCK + sum_ + " y = Relu(h)")
    feed = {"x": normal(2, 3, 6, 6)}
    (branch,) = branches_of(model.graph)
    branch.leave()
    assert operators(model) == ["Conv", "Identity", "Relu"]
    assert [v.name for n in model.graph for v in n.outputs] == ["a", "h", "y"]
    plain = net("a = Conv SAME (x, w0) y = Relu(a)")
    np.testing.assert_array_equal(Evaluator(model).run(feed)["y"], Evaluator(plain).run(feed)["y"])


def test_a_sum_that_is_the_output_keeps_its_name() -> None:
    model = net(BLOCK + "y = Add(a, f)")
    (branch,) = branches_of(model.graph)
    branch.leave()
    assert [v.name for v in model.graph.outputs] == ["y"]
    assert Evaluator(model).run({"x": normal(1, 3, 6, 6)})["y"].shape == (1, 4, 6, 6)


def test_of_two_branches_the_longer_one_is_it() -> None:
    """Where a block changes the width, its shortcut has a layer too."""
    model = net(
        "p = Relu(x) a = Conv SAME (p, w0) c = Conv SAME (p, w3) e = Relu(c) f = Conv(e, w2) y = Add(a, f)",
        w3=normal(6, 3, 3, 3),
    )
    (branch,) = branches_of(model.graph)
    assert branch.stream.name == "a"


def test_a_branch_in_a_branch() -> None:
    w4 = normal(4, 4, 3, 3)
    model = net(BLOCK + "h = Add(a, f) g = Conv SAME (h, w4) k = Add(h, g) y = Relu(k)", w4=w4)
    assert names(model) == ["h", "k"]
    block = "c = Conv SAME (a, w4) d = Conv SAME (c, w4) e = Add(c, d) f = Conv SAME (e, w4) "
    inner = net(f"a = Conv SAME (x, w0) {block} y = Add(a, f)", w4=w4)
    assert names(inner) == ["e", "y"]
    for branch in branches_of(inner.graph):  # the inner one first
        branch.leave()
    assert operators(inner) == ["Conv", "Identity"]


@pytest.mark.parametrize(
    "text",
    [
        "a = Conv SAME (x, w0) y = Add(a, b)",  # a bias
        "a = Conv SAME (x, w0) c = Relu(a) y = Add(a, c)",  # no layer
        "a = Conv SAME (x, w0) y = Add(a, a)",
        "a = Conv SAME (x, w0) p = GlobalAveragePool(a) q = Conv(p, w4) y = Add(a, q)",  # broadcast
        "a = Conv SAME (x, w0) c = Conv SAME (a, w4) y = Mul(a, c)",
        "a = Conv SAME (x, w0) c = Conv SAME (a, w4) h = Add(a, c) y = Mul(h, c)",  # read elsewhere
    ],
)
def test_what_is_no_branch(text: str) -> None:
    assert names(net(text, w4=normal(4, 4, 1, 1) if "GlobalAverage" in text else normal(4, 4, 3, 3))) == []


def test_what_the_caller_sees_stays() -> None:
    text = BLOCK + "h = Add(a, f) y = Relu(h)"
    model = net(text)
    model.graph.outputs.append(next(v for n in model.graph for v in n.outputs if v.name == "f"))
    assert names(model) == []
