"""Fingerprints: what changes them and what does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from edgewise.passes.fingerprint import fingerprint

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (float[N, 2] x) => (float[N, 2] y)
<float[2, 2] w = {1, 2, 3, 4}, float[2] b = {0.5, -0.5}>
{
    h = Gemm <transB = 1, alpha = 0.5> (x, w, b)
    k = Constant <value = float[2] {1, 2}> ()
    s = Add (h, k)
    y = LeakyRelu <alpha = 0.1> (s)
}"""


def model(text: str = TEXT) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(text))


CHANGES = {
    "weight": ("{1, 2, 3, 4}", "{1, 2, 3, 5}"),
    "weight shape": ("float[2, 2] w = {1, 2, 3, 4}", "float[4] w = {1, 2, 3, 4}"),
    "constant": ("float[2] {1, 2}", "float[2] {1, 3}"),
    "attribute": ("alpha = 0.1", "alpha = 0.2"),
    "attribute left out": ("transB = 1, ", ""),
    "operator": ("Add", "Mul"),
    "order of operands": ("Add (h, k)", "Add (k, h)"),
    "name of a value": ("h", "hh"),
    "name of the output": ("y", "z"),
    "input shape": ("float[N, 2] x", "float[3, 2] x"),
    "input type": ("float[N, 2] x", "double[N, 2] x"),
    "opset": ('"" : 17', '"" : 16'),
    "operator's domain": ("Add", "custom.Add"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_model_computes_counts(change: str) -> None:
    old, new = CHANGES[change]
    assert old in TEXT
    assert fingerprint(model(TEXT.replace(old, new))) != fingerprint(model())


def test_it_is_stable() -> None:
    assert fingerprint(model()) == fingerprint(model())
    assert fingerprint(model().clone()) == fingerprint(model())
    assert len(fingerprint(model())) == 64


def test_notes_do_not_count() -> None:
    noted = model()
    noted.doc_string = "hello"
    noted.producer_name = "someone"
    noted.metadata_props["key"] = "value"
    noted.graph.name = "renamed"
    noted.graph.doc_string = "words"
    for node in noted.graph:
        node.name = f"renamed_{node.name}"
        node.doc_string = "words"
        node.metadata_props["key"] = "value"
        for value in node.outputs:
            if not value.is_graph_output():
                value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["N", 2])
    assert fingerprint(noted) == fingerprint(model())


def test_the_order_of_initializers_and_attributes_does_not_count() -> None:
    proto = onnx.parser.parse_model(TEXT)
    for field in (proto.graph.initializer, proto.graph.node[0].attribute):
        items = list(field)[::-1]
        del field[:]
        field.extend(items)
    assert fingerprint(ir.from_proto(proto)) == fingerprint(model())


def test_where_the_weights_are_stored_does_not_count(tmp_path: Path) -> None:
    ir.save(model(), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    assert (tmp_path / "m.data").stat().st_size > 0
    assert fingerprint(ir.load(tmp_path / "m.onnx")) == fingerprint(model())


def test_string_tensors_count() -> None:
    def with_string(text: bytes) -> ir.Model:
        tensor = helper.make_tensor("t", onnx.TensorProto.STRING, [1], [text])
        node = helper.make_node("Constant", [], ["y"], value=tensor)
        output = helper.make_tensor_value_info("y", onnx.TensorProto.STRING, [1])
        return ir.from_proto(helper.make_model(helper.make_graph([node], "g", [], [output])))

    assert fingerprint(with_string(b"ab")) != fingerprint(with_string(b"ac"))


def test_bodies_of_control_flow_count() -> None:
    def with_branch(op: str) -> ir.Model:
        out = helper.make_tensor_value_info("o", onnx.TensorProto.FLOAT, [1])
        weight = numpy_helper.from_array(np.ones(1, np.float32), "w")
        then = helper.make_graph([helper.make_node(op, ["x"], ["o"])], "then", [], [out], [weight])
        other = helper.make_graph([helper.make_node("Neg", ["x"], ["o"])], "else", [], [out])
        node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
        inputs = [
            helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1]),
        ]
        output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
        return ir.from_proto(helper.make_model(helper.make_graph([node], "g", inputs, [output])))

    assert fingerprint(with_branch("Abs")) != fingerprint(with_branch("Exp"))
    assert fingerprint(with_branch("Abs")) == fingerprint(with_branch("Abs"))


def test_functions_count() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    agraph (float[2] x) => (float[2] y) { y = local.f (x) }
    <domain: "local", opset_import: ["" : 17]>
    f (a) => (b) { b = Abs (a) }"""
    assert fingerprint(model(text)) != fingerprint(model(text.replace("Abs", "Neg")))
