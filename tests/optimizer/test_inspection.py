"""What a model costs and holds, counted by hand and by the program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgewise.optimizer import files
from edgewise.optimizer.inspection import Macs, count_macs, inspect, list_passes
from edgewise.passes import PASSES
from edgewise.runtime.errors import InputError


def parse(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}'))


def with_weights(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> ir.Model:
    """Register ones under the names that the nodes read and nobody produces."""
    for name, shape in shapes.items():
        tensor = ir.tensor(np.ones(shape, np.float32), name=name)
        kind = ir.TensorType(tensor.dtype)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=kind, const_value=tensor)
        readers = {v for n in model.graph.all_nodes() for v in n.inputs if v is not None and v.name == name}
        for reader in readers:
            reader.replace_all_uses_with(value)
        model.graph.register_initializer(value)
    return model


# Name, graph, weights, multiply-accumulates.
COSTS = {
    "convolution": (
        "g (float[1,3,8,8] x) => (float[1,4,8,8] y) { y = Conv <pads = [1,1,1,1]> (x, w) }",
        {"w": (4, 3, 3, 3)},
        4 * 8 * 8 * 3 * 9,
    ),
    "strided": (
        "g (float[1,3,8,8] x) => (float[1,4,4,4] y) { y = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w) }",
        {"w": (4, 3, 3, 3)},
        4 * 4 * 4 * 3 * 9,
    ),
    "depthwise": (
        "g (float[1,6,8,8] x) => (float[1,6,6,6] y) { y = Conv <group = 6> (x, w) }",
        {"w": (6, 1, 3, 3)},
        6 * 6 * 6 * 9,
    ),
    "transposed convolution": (
        "g (float[1,4,5,5] x) => (float[1,2,6,6] y) { y = ConvTranspose (x, w) }",
        {"w": (4, 2, 2, 2)},
        4 * 5 * 5 * 2 * 4,
    ),
    "gemm": (
        "g (float[2,3] x) => (float[2,5] y) { y = Gemm (x, w) }",
        {"w": (3, 5)},
        2 * 3 * 5,
    ),
    "transposed gemm": (
        "g (float[3,2] x) => (float[2,5] y) { y = Gemm <transA = 1, transB = 1> (x, w) }",
        {"w": (5, 3)},
        2 * 3 * 5,
    ),
    "batched product": (
        "g (float[2,7,3] x, float[2,3,4] z) => (float[2,7,4] y) { y = MatMul (x, z) }",
        {},
        2 * 7 * 3 * 4,
    ),
    "LSTM": (
        "g (float[6,2,3] x) => (float[6,1,2,5] y) { y = LSTM <hidden_size = 5> (x, w, r) }",
        {"w": (1, 20, 3), "r": (1, 20, 5)},
        6 * 2 * 20 * (3 + 5),
    ),
    "GRU in two directions": (
        """g (float[6,2,3] x) => (float[6,2,2,5] y)
        { y = GRU <hidden_size = 5, direction = "bidirectional"> (x, w, r) }""",
        {"w": (2, 15, 3), "r": (2, 15, 5)},
        6 * 2 * 2 * 15 * (3 + 5),
    ),
    "nothing that multiplies": ("g (float[2,3] x) => (float[2,3] y) { y = Relu (x) }", {}, 0),
    "shapes in between are inferred": (
        "g (float[1,3,8,8] x) => (float[1,4,4,4] y) { r = Relu (x) c = Conv (r, w) y = Conv (c, v) }",
        {"w": (5, 3, 3, 3), "v": (4, 5, 3, 3)},
        5 * 36 * 3 * 9 + 4 * 16 * 5 * 9,
    ),
    "both branches": (
        """g (bool c, float[2,3] x) => (float[2,4] y) {
            y = If (c) <then_branch = a () => (float[2,4] p) { p = MatMul (x, w) },
                        else_branch = b () => (float[2,4] q) { q = MatMul (x, w) }> }""",
        {"w": (3, 4)},
        2 * 2 * 3 * 4,
    ),
}


@pytest.mark.parametrize("kind", COSTS)
def test_multiply_accumulates(kind: str) -> None:
    text, weights, macs = COSTS[kind]
    model = with_weights(parse(text), weights)
    assert count_macs(model) == Macs(macs, (), 0)


def test_a_dynamic_batch_counts_as_one(model: ir.Model) -> None:
    before = str(model.graph)
    assert count_macs(model) == Macs(16 * 8 * 8 * 3 * 9 + 5 * 16, ("N",), 0)
    assert str(model.graph) == before


def test_unknown_dimensions_count_as_one_and_are_named() -> None:
    model = parse("g (float[B,S,8] x, float[8,4] w) => (float[B,S,4] y) { y = MatMul (x, w) }")
    assert count_macs(model) == Macs(8 * 4, ("B", "S"), 0)
    model.graph.inputs[0].shape = ir.Shape((None, None, 8))
    assert count_macs(model) == Macs(8 * 4, ("x[0]", "x[1]"), 0)


def test_unknown_shapes_are_told() -> None:
    model = parse("g (float[2,3] x, float[3,4] w) => (float[2,4] y) { m = Odd (x) y = MatMul (m, w) }")
    model.graph[0].domain = "com.example"
    model.opset_imports["com.example"] = 1
    assert count_macs(model).unknown == 1


def test_everything_is_reported(model_path: Path) -> None:
    facts = inspect(model_path)
    assert (facts.path, facts.ir_version, facts.opsets) == (str(model_path), 8, {"": 17})
    assert facts.bytes == model_path.stat().st_size
    assert facts.sha256 == files.sha256(model_path)
    (image,), (scores,) = facts.inputs, facts.outputs
    assert (image.name, image.dtype, image.shape) == ("image", "FLOAT", ("N", 3, 8, 8))
    assert (scores.name, scores.shape) == ("scores", ("N", 5))
    assert facts.parameters == 16 * 27 + 16 * 5 + 5 * 16 + 5
    assert 0 < facts.compressed_bytes < facts.bytes
    assert dict(facts.operators)["Conv"] == 1
    assert facts.metadata == {}
    assert facts.int8["Gemm"] == 1
    assert sum(facts.int8.values()) + sum(facts.not_int8.values()) == 5  # Conv, Relu, pool, Flatten, Gemm
    json.dumps(facts.to_dict(), allow_nan=False)


def test_zero_channels_are_found(model_path: Path) -> None:
    """The norm zeroes four channels; folded into the convolution they are its own."""
    found = [c for c in inspect(model_path).channels if c.channels == 16]
    assert found
    assert all((c.zero, c.removable) == (4, 4) for c in found)


def test_what_is_not_int8_has_a_reason(tmp_path: Path) -> None:
    model = parse("g (float[2,3] x) => (float[2,3] y) { s = Sin (x) y = Exp (s) }")
    facts = inspect(files.save(model, tmp_path / "m.onnx"))
    assert facts.int8 == {}
    assert sum(facts.not_int8.values()) == 2


def test_default_inputs_are_no_inputs(tmp_path: Path) -> None:
    """In IR 3 every initializer is listed as an input as well."""
    model = parse("g (float[2,3] x, float[2,3] w) => (float[2,3] y) { y = Add (x, w) }")
    w = model.graph.inputs[1]
    w.const_value = ir.tensor(np.ones((2, 3), np.float32), name="w")
    model.graph.register_initializer(w)
    assert [t.name for t in inspect(files.save(model, tmp_path / "m.onnx")).inputs] == ["x"]


def test_weights_in_constant_nodes_are_parameters(tmp_path: Path) -> None:
    text = "g (float[3] x) => (float[3] y) { w = Constant <value = float[3] {1, 2, 3}> () y = Add (x, w) }"
    assert inspect(files.save(parse(text), tmp_path / "m.onnx")).parameters == 3


def test_external_data_counts(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_ONE_FILE_LIMIT", 10)
    out = files.save(files.load(model_path), tmp_path / "out.onnx")
    assert inspect(out).bytes == out.stat().st_size + (tmp_path / "out.onnx.data").stat().st_size


def test_sequences_and_unknown_ranks(tmp_path: Path) -> None:
    text = "g (float[N,4] x) => (seq(float[N,2]) y) { y = SplitToSequence <axis = 1> (x) }"
    (y,) = inspect(files.save(parse(text), tmp_path / "m.onnx")).outputs
    assert "Sequence" in y.dtype


def test_an_unknown_target(model_path: Path) -> None:
    with pytest.raises(InputError, match="toaster"):
        inspect(model_path, target="toaster")


def test_every_pass_is_listed() -> None:
    listed = list_passes().passes
    assert [p.name for p in listed] == list(PASSES)
    for facts in listed:
        assert facts.about.endswith(".")
        assert "\n" not in facts.about
        assert len(facts.about) < 300


def test_the_corpus(corpus: Path) -> None:
    """Published figures: MobileNetV2 300 million, ResNet-20 41 million, DS-CNN 2.7 million."""
    for name, macs in (
        ("mnv2_100_224_tfqat_fp32", 300_775_552),
        ("cifar_resnet20", 40_551_040),
        ("mlperftiny_kws_dscnn", 2_656_768),
    ):
        assert count_macs(files.load(corpus / "models" / f"{name}.onnx")).total == macs
