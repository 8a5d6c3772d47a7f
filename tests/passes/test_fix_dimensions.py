"""fix-dimensions: names and axes get sizes everywhere; what cannot be said is unknown, not wrong."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from rewrites import assert_equal, build, operators

from edgewise.passes import EXACT_CHAIN, PASSES, parse
from edgewise.passes.base import PassError
from edgewise.passes.fix_dimensions import FixDimensions
from edgewise.passes.verify import Signature, check
from edgewise.runtime.evaluate import Evaluator, input_specs, seeded_feed

ROWS = "g (float[batch, width] x) => (float[batch, width] y) { a = Neg(x) y = Abs(a) }"


def fixed(model: ir.Model, dims: str) -> ir.Model:
    """The model after the pass, checked to be sound and to compute the same."""
    after = model.clone()
    before = Signature.of(model)
    outcome = FixDimensions(dims).apply(after)
    assert (Signature.of(after) != before) == (outcome.edits > 0)
    check(after, Signature.of(after))
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    assert Signature.of(model) == before
    feed = seeded_feed(input_specs(after))
    assert_equal(Evaluator(model).run(feed), Evaluator(after).run(feed))
    return after


def shape_of(model: ir.Model, name: str) -> list[int | str | None]:
    found = [v for v in (*model.graph.inputs, *(o for n in model.graph for o in n.outputs)) if v.name == name]
    assert found[0].shape is not None
    return [d if isinstance(d, int) else d.value for d in found[0].shape]


def test_a_name_everywhere() -> None:
    after = fixed(build(ROWS), "batch=3")
    assert [shape_of(after, name) for name in "xay"] == [[3, "width"]] * 3


def test_several_names() -> None:
    after = fixed(build(ROWS), " batch=3, width = 4 ,")
    assert [shape_of(after, name) for name in "xay"] == [[3, 4]] * 3


def test_an_axis_takes_its_name_along() -> None:
    text = "g (float[n, 2] x, float[n, 2] z) => (float[n, 2] y) { y = Add(x, z) }"
    after = fixed(build(text), "x.0=5")
    assert [shape_of(after, name) for name in "xzy"] == [[5, 2]] * 3


@pytest.mark.parametrize("dim", [None, "?", "None", -1])
def test_an_axis_without_a_name_stands_for_itself(dim: int | str | None) -> None:
    model = build("g (float[n, 2] x, float[n, 2] z) => (float[n, 2] y) { y = Add(x, z) }", shapes=False)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape([dim, 2])
    after = model.clone()
    assert FixDimensions("x.0=1").apply(after).edits >= 1
    assert shape_of(after, "x") == [1, 2]
    assert shape_of(after, "z") == [dim, 2]


def test_input_names_with_dots() -> None:
    model = build("g (float[n] x) => (float[n] y) { y = Neg(x) }", shapes=False)
    model.graph.inputs[0].name = "image.0"
    model.graph.inputs[0].shape = ir.Shape([None])
    assert FixDimensions("image.0.0=2").apply(model).edits == 2  # the output takes its shape from there
    assert shape_of(model, "image.0") == [2]


def test_a_symbol_that_looks_like_an_axis() -> None:
    model = build("g (float[n] x) => (float[n] y) { y = Neg(x) }", shapes=False)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape(["x.1"])
    assert FixDimensions("x.1=2").apply(model).edits == 2
    assert shape_of(model, "x") == shape_of(model, "y") == [2]


@pytest.mark.parametrize(
    ("noted", "expected"),
    [
        ("2*width", 8),
        ("width + batch", "batch + 4"),
        ("floor(width/2) - 1", 1),
        ("width/8", None),  # no whole number
        ("-width", None),
        ("strange(width)", None),
        ("width$", None),
        ("floor(width, 2)", None),
        ("width % (4 - width)", None),
        ("widths", "widths"),
        ("2*batch", "2*batch"),
        ("other", "other"),
        (7, 7),
        (None, None),
    ],
)
def test_what_is_noted_becomes_right_or_unknown(noted: int | str | None, expected: int | str | None) -> None:
    model = build(
        "g (float[batch, width] x) => (float[k] y) { a = Neg(x) y = Reshape(a, s) }", s=np.int64([-1])
    )
    model.graph.outputs[0].shape = ir.Shape([noted])
    FixDimensions("width=4").apply(model)
    assert shape_of(model, "y") == [expected]
    assert shape_of(model, "a") == ["batch", 4]


def test_outputs_that_are_named_otherwise() -> None:
    text = (
        "g (float[n, 3] x) => (float[unk__7, 6] y, float[rows, k] z)"
        "{ y = Concat<axis = 1>(x, x) z = Relu(y) }"
    )
    after = fixed(build(text, shapes=False), "n=2")
    assert shape_of(after, "y") == shape_of(after, "z") == [2, 6]


def test_outputs_that_cannot_be_told_stay_open() -> None:
    text = "g (float[n] x) => (float[1, found] y) { i = NonZero(x) y = Cast<to = 1>(i) }"
    after = fixed(build(text, shapes=False), "n=2")
    assert shape_of(after, "y") == [1, "found"]


def test_a_model_that_contradicts_itself_keeps_its_outputs() -> None:
    text = "g (float[n, 3] x) => (float[k, 4] y) { a = Gemm(x, w) y = Relu(a) }"
    model = build(text, shapes=False, w=np.ones((5, 4), np.float32))
    assert FixDimensions("n=2").apply(model).edits == 1
    assert shape_of(model, "y") == ["k", 4]


def test_bodies() -> None:
    text = (
        "g (float[n, 2] x, bool c) => (float[n, 2] y) { y = If(c) <"
        "then_branch = t () => (float[n, 2] p) { q = Neg(x) p = Abs(q) },"
        "else_branch = e () => (float[n, 2] r) { r = Abs(x) }> }"
    )
    after = fixed(build(text), "n=3")
    values = [v for g in after.graphs() for n in g for v in n.outputs]
    assert [str(v.shape) for v in values] == ["[3,2]"] * 4


def test_a_shared_shape_is_not_written_into() -> None:
    model = build("g (float[n] x) => (float[n] y) { y = Neg(x) }")
    shape = ir.Shape(["n"], denotations=["DATA_BATCH"], frozen=True)
    model.graph.inputs[0].shape = model.graph.outputs[0].shape = shape
    FixDimensions("n=2").apply(model)
    assert shape == ["n"]
    assert shape_of(model, "x") == shape_of(model, "y") == [2]
    assert model.graph.inputs[0].shape.get_denotation(0) == "DATA_BATCH"


def test_what_it_unlocks() -> None:
    """With the batch known the target of the Reshape is a constant."""
    text = """g (float[batch, 2, 3] x) => (float[batch, k] y) {
        s = Shape(x) n = Gather<axis = 0>(s, zero) f = Unsqueeze(n, zeros) t = Concat<axis = 0>(f, rest)
        y = Reshape(x, t)
    }"""
    model = build(text, zero=np.int64(0), zeros=np.int64([0]), rest=np.int64([-1]))
    after = fixed(model, "batch=4")
    for spec in EXACT_CHAIN:
        parse(spec).apply(after)
    assert "Shape" not in operators(after)
    x = {"x": np.arange(24, dtype=np.float32).reshape(4, 2, 3)}
    assert_equal(Evaluator(model).run(x), Evaluator(after).run(x))


@pytest.mark.parametrize("dims", ["", " , ", "x.1=3"])
def test_nothing_to_do(dims: str) -> None:
    model = build("g (float[n, 3] x) => (float[n, 3] y) { y = Neg(x) }")
    assert FixDimensions(dims).apply(model).edits == 0


def test_sizes_that_are_there_already() -> None:
    model = build("g (float[n, 3] x) => (float[n, 3] y) { y = Neg(x) }")
    once = FixDimensions("x.0=2")
    assert once.apply(model).edits == 2
    assert once.apply(model).edits == 0


def test_a_name_is_gone_once_it_has_a_size() -> None:
    model = build("g (float[n, 3] x) => (float[n, 3] y) { y = Neg(x) }")
    FixDimensions("n=2").apply(model)
    with pytest.raises(PassError, match="'n', all inputs have fixed sizes"):
        FixDimensions("n=2").apply(model)


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ("height=2", "no open dimension 'height', only batch, x.2"),
        ("y.0=2", "no open dimension 'y.0', only batch, x.2"),
        ("x.first=2", "no open dimension 'x.first', only batch, x.2"),
        ("x.4=2", "no x.4, input 'x' has 3 dimensions"),
        ("x.1=4", "x.1 is 3 already, it cannot become 4"),
        ("batch=1,batch=2", "batch is given two sizes, 1 and 2"),
        ("batch=1,x.0=2", "x.0 is given two sizes, 1 and 2"),
        ("batch", "'batch' is not NAME=SIZE"),
        ("=1", "'=1' is not NAME=SIZE"),
        ("batch=many", "'batch=many' is not NAME=SIZE"),
        ("batch=0", "'batch=0' is not NAME=SIZE"),
        ("batch=-1", "'batch=-1' is not NAME=SIZE"),
        ("batch=1.5", "'batch=1.5' is not NAME=SIZE"),
    ],
)
def test_what_cannot_be_fixed(dims: str, message: str) -> None:
    model = build("g (float[batch, 3, h] x) => (float[batch, 3, h] y) { y = Neg(x) }")
    model.graph.inputs[0].shape = ir.Shape(["batch", 3, None])
    before = Signature.of(model)
    with pytest.raises(PassError) as raised:
        FixDimensions(dims).apply(model)
    assert message in str(raised.value)
    assert Signature.of(model) == before


@pytest.mark.parametrize("dims", ["batch=1", "batch=1,height=224", "image.0=1", "a: b=1", "it's=1"])
def test_spec_round_trips(dims: str) -> None:
    step = FixDimensions(dims)
    assert parse(step.spec) == step


def test_spec_as_people_write_it() -> None:
    assert parse("fix-dimensions{dims: batch=1}") == FixDimensions("batch=1")
    assert parse('fix-dimensions{dims: "batch=1,x.2=8"}') == FixDimensions("batch=1,x.2=8")


def test_passes_that_change_the_signature_are_in_no_chain() -> None:
    changing = {name for name, kind in PASSES.items() if not kind.keeps_signature}
    assert changing >= {"fix-dimensions", "keep-outputs", "uint8-input"}
    assert not changing & {parse(spec).name for spec in EXACT_CHAIN}
