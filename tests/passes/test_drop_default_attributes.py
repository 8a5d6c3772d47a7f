"""Attributes at their default leave; others stay."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from edgewise.passes.drop_default_attributes import DropDefaultAttributes
from edgewise.runtime.evaluate import Evaluator, input_specs, seeded_feed


def build(node: str, inputs: str = "float[1, 2, 5, 5] x, float[2, 2, 3, 3] w", opset: int = 17) -> ir.Model:
    text = f'<ir_version: 8, opset_import: ["" : {opset}]>\ng ({inputs}) => (float[N...] y) {{ y = {node} }}'
    return ir.from_proto(onnx.parser.parse_model(text.replace("float[N...] y", "float y")))


def attributes_after(model: ir.Model) -> tuple[int, set[str]]:
    outcome = DropDefaultAttributes().apply(model)
    return outcome.edits, set(model.graph[0].attributes)


@pytest.mark.parametrize(
    ("node", "edits", "left"),
    [
        (
            "Conv<dilations=[1, 1], group=1, kernel_shape=[3, 3], pads=[0, 0, 0, 0]>(x, w)",
            3,
            {"kernel_shape"},
        ),
        ('Conv<strides=[1, 1], auto_pad="NOTSET">(x, w)', 2, set()),
        (
            "Conv<strides=[2, 1], pads=[0, 0, 1, 0], dilations=[1, 2]>(x, w)",
            0,
            {"strides", "pads", "dilations"},
        ),
        ("Softmax<axis=-1>(x)", 1, set()),
        ("Softmax<axis=1>(x)", 0, {"axis"}),
        ("LeakyRelu<alpha=0.01>(x)", 1, set()),
        ("LeakyRelu<alpha=0.1>(x)", 0, {"alpha"}),
        ("Transpose<perm=[3, 2, 1, 0]>(x)", 0, {"perm"}),
    ],
)
def test_attributes(node: str, edits: int, left: set[str]) -> None:
    assert attributes_after(build(node)) == (edits, left)


def test_default_is_that_of_the_models_opset() -> None:
    """Softmax counted its axis from 1 before opset 13 and from -1 since."""
    node = "Softmax<axis=1>(x)"
    assert attributes_after(build(node, "float[2, 3] x", opset=11)) == (1, set())
    assert attributes_after(build(node, "float[2, 3] x", opset=13)) == (0, {"axis"})


def test_other_domains_keep_theirs() -> None:
    model = build("Softmax<axis=-1>(x)")
    model.graph[0].domain = "com.example"
    assert attributes_after(model) == (0, {"axis"})


def test_outputs_are_the_same() -> None:
    model = build("Conv<dilations=[1, 1], group=1, strides=[1, 1], pads=[0, 0, 0, 0]>(x, w)")
    feed = seeded_feed(input_specs(model))
    before = Evaluator(model).run(feed)["y"]
    DropDefaultAttributes().apply(model)
    np.testing.assert_array_equal(Evaluator(model).run(feed)["y"], before)
