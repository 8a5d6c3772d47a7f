"""freeze-inputs: weights of IR 3 files stop being inputs; defaults of newer files only when asked."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from rewrites import assert_equal, build

from edgewise.passes.freeze_inputs import FreezeInputs, raise_ir_version
from edgewise.passes.verify import Signature, check
from edgewise.runtime.evaluate import Evaluator

X = {"x": np.array([1.0, -2.0], np.float32)}


def overridable(ir_version: int) -> ir.Model:
    """y = x * w, the weight being an input as well."""
    model = build("g (float[2] x, float[2] w) => (float[2] y) { y = Mul(x, w) }", 8, w=np.float32([3, 4]))
    model.ir_version = ir_version
    return model


def test_weights_of_an_old_file() -> None:
    model = overridable(3)
    after = model.clone()
    assert FreezeInputs().apply(after).edits == 2  # the input and the version
    check(after, Signature.of(model))
    assert [v.name for v in after.graph.inputs] == ["x"]
    assert list(after.graph.initializers) == ["w"]
    assert after.ir_version == 4
    assert_equal(Evaluator(model).run(X), Evaluator(after).run(X))
    assert FreezeInputs().apply(after).edits == 0


def test_defaults_of_a_newer_file_stay() -> None:
    model = overridable(8)
    outcome = FreezeInputs().apply(model)
    assert outcome.edits == 0
    assert outcome.refused == {"an input has a default value that a caller may override": 1}
    assert len(model.graph.inputs) == 2


def test_defaults_of_a_newer_file_when_asked() -> None:
    model = overridable(8)
    assert FreezeInputs(always=True).apply(model).edits == 1
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert model.ir_version == 8
    assert not FreezeInputs(always=True).apply(model).edits


def test_an_old_file_without_weights_gets_a_version_that_allows_them() -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Neg(x) }", 8)
    model.ir_version = 3
    assert FreezeInputs().apply(model).edits == 1
    assert model.ir_version == 4


def test_nothing_to_do() -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Mul(x, w) }", w=np.float32([3, 4]))
    outcome = FreezeInputs().apply(model)
    assert (outcome.edits, dict(outcome.refused)) == (0, {})


def test_a_version_is_never_lowered() -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    assert not raise_ir_version(model, 4)
    assert model.ir_version == 8
