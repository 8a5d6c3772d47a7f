"""convert-ends: the Casts at the ends go, and what is read as float32 stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from rewrites import build, operators, settled

from edgewise.passes.base import Outcome
from edgewise.passes.convert_ends import ConvertEnds
from edgewise.runtime.evaluate import Evaluator


def converted(text: str) -> tuple[ir.Model, Outcome]:
    return settled(build(text), ConvertEnds())


def test_both_ends() -> None:
    text = "g (float[4] x) => (float[4] y) { a = Cast<to = 10>(x) b = Relu(a) y = Cast<to = 1>(b) }"
    after, outcome = converted(text)
    assert outcome == Outcome(2, {})
    assert operators(after) == ["Relu"]
    x = np.array([-1, 0, 1, 2], np.float16)
    (y,) = Evaluator(after).run({"x": x}).values()
    assert y.dtype == np.float16
    assert y.tolist() == [0, 0, 1, 2]
    assert [v.name for v in after.graph.outputs] == ["y"]


def test_an_end_that_is_read_as_float32() -> None:
    text = """g (float[4] x) => (float[4] y, float[4] z)
        { a = Cast<to = 10>(x) b = Relu(a) y = Cast<to = 1>(b) c = Tanh(x) z = Add(y, c) }"""
    _, outcome = converted(text)
    assert outcome == Outcome(0, {"input is read as float32 too": 1, "output is read as float32 too": 1})


def test_an_input_that_is_an_output() -> None:
    _, outcome = converted("g (float[4] x) => (float16[4] y) { y = Cast<to = 10>(x) }")
    assert outcome == Outcome(0, {"input is an output in 16 bits": 1})


def test_a_model_in_float32() -> None:
    assert converted("g (float[4] x) => (float[4] y) { y = Relu(x) }")[1] == Outcome()
