"""keep-outputs: outputs not named go, with what only they needed; inputs go when asked."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from rewrites import assert_equal, build, constants, operators

from edgewise.passes import parse
from edgewise.passes.base import PassError
from edgewise.passes.keep_outputs import KeepOutputs
from edgewise.passes.verify import Signature, check
from edgewise.runtime.evaluate import Evaluator, input_specs, seeded_feed

TEXT = """g (float[n, 3] x, float[n, 3] u) => (float[n, 3] scores, float[n, 3] features, float[n, 3] mask) {
    h = Mul(x, w) scores = Neg(h) a = Add(h, u) features = Mul(a, v) mask = Abs(features)
}"""
WEIGHTS = {"w": np.float32([1, 2, 3]), "v": np.float32([4, 5, 6])}


def kept(model: ir.Model, step: KeepOutputs) -> ir.Model:
    """The model after the pass, checked to be sound, settled and to give the same in what is left."""
    before, after = Signature.of(model), model.clone()
    edits = step.apply(after).edits
    assert (edits > 0) == (Signature.of(after) != before)
    check(after, Signature.of(after))
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    assert step.apply(after).edits == 0
    assert Signature.of(model) == before
    feed = seeded_feed(input_specs(model))
    names = [v.name or "" for v in after.graph.outputs]
    left = {spec.name: feed[spec.name] for spec in input_specs(after)}
    assert_equal(Evaluator(model, outputs=names).run(feed), Evaluator(after).run(left))
    return after


def inputs(model: ir.Model) -> list[str | None]:
    return [v.name for v in model.graph.inputs]


def outputs(model: ir.Model) -> list[str | None]:
    return [v.name for v in model.graph.outputs]


def test_what_only_the_others_needed_goes() -> None:
    after = kept(build(TEXT, **WEIGHTS), KeepOutputs("scores"))
    assert operators(after) == ["Mul", "Neg"]
    assert list(constants(after)) == ["w"]
    assert inputs(after) == ["x", "u"]


def test_unused_inputs_when_asked() -> None:
    after = kept(build(TEXT, **WEIGHTS), KeepOutputs("scores", unused_inputs=True))
    assert inputs(after) == ["x"]


def test_inputs_that_are_still_read_stay() -> None:
    after = kept(build(TEXT, **WEIGHTS), KeepOutputs("mask", unused_inputs=True))
    assert inputs(after) == ["x", "u"]
    assert operators(after) == ["Mul", "Add", "Mul", "Abs"]


def test_an_output_that_another_needs_becomes_an_inner_value() -> None:
    after = kept(build(TEXT, **WEIGHTS), KeepOutputs("mask"))
    assert outputs(after) == ["mask"]
    assert not next(v for n in after.graph for v in n.outputs if v.name == "features").is_graph_output()


def test_the_order_is_the_models() -> None:
    assert outputs(kept(build(TEXT, **WEIGHTS), KeepOutputs(" mask ,scores,"))) == ["scores", "mask"]


@pytest.mark.parametrize("names", ["", " , ", "mask,features,scores"])
def test_nothing_to_cut(names: str) -> None:
    """Not even dead nodes, which are another pass's."""
    model = build(TEXT.replace("h = Mul(x, w)", "h = Mul(x, w) dead = Exp(x)"), **WEIGHTS)
    assert "Exp" in operators(kept(model, KeepOutputs(names)))


def test_unused_inputs_alone() -> None:
    model = build("g (float[2] x, float[2] u) => (float[2] y) { y = Neg(x) }")
    assert inputs(kept(model, KeepOutputs(unused_inputs=True))) == ["x"]


def test_an_input_that_a_body_reads_stays() -> None:
    text = (
        "g (float[2] x, bool c, float[2] u) => (float[2] y, float[2] z) { y = If(c) <"
        "then_branch = t () => (float[2] p) { p = Neg(x) },"
        "else_branch = e () => (float[2] r) { r = Abs(u) }> z = Neg(u) }"
    )
    assert inputs(kept(build(text), KeepOutputs("y", unused_inputs=True))) == ["x", "c", "u"]


def test_an_unused_input_goes_with_its_default() -> None:
    model = build("g (float[2] x, float[2] w) => (float[2] y) { y = Neg(x) }", w=np.float32([1, 2]))
    KeepOutputs(unused_inputs=True).apply(model)
    assert inputs(model) == ["x"]
    assert not model.graph.initializers


def test_an_input_that_is_an_output_stays() -> None:
    model = build("g (float[2] x, float[2] u) => (float[2] y, float[2] z) { y = Neg(x) z = Neg(y) }")
    model.graph.outputs[1] = model.graph.inputs[1]
    KeepOutputs("u", unused_inputs=True).apply(model)
    assert inputs(model) == ["u"]
    assert not operators(model)


def test_an_unknown_name() -> None:
    model = build(TEXT, **WEIGHTS)
    with pytest.raises(PassError, match="no output 'logits', only scores, features, mask"):
        KeepOutputs("scores,logits").apply(model)
    assert outputs(model) == ["scores", "features", "mask"]


def test_spec_round_trips() -> None:
    step = KeepOutputs("scores,mask", unused_inputs=True)
    assert parse(step.spec) == step
    assert parse("keep-outputs{names: scores}") == KeepOutputs("scores")
