"""A file whose large tensors are copied into it is the file that protobuf would have written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.checker
import onnx_ir as ir
import pytest

from edgewise.optimizer import files, stream
from edgewise.runtime.evaluate import Evaluator

BRANCH = """
<ir_version: 10, opset_import: ["" : 21]>
g (bool c, float[2] x) => (float[2] y) <float[2] top = {1, 2}, string[2] words = {"a", "bc"}>
{
    y = If (c) <
        then_branch = t () => (float[2] p) <float[2] inner = {3, 4}> { p = Add (x, inner) },
        else_branch = e () => (float[2] q) { q = Mul (x, top) }
    >
}
"""


def as_before(model: ir.Model, path: Path) -> onnx.ModelProto:
    """What is read of a file that was written in one piece."""
    ir.save(ir.external_data.load_to_model(model.clone()), path)
    return onnx.load(path)


def as_now(model: ir.Model, path: Path) -> onnx.ModelProto:
    stream.save(model.clone(), path)
    onnx.checker.check_model(os.fspath(path), full_check=True)
    return onnx.load(path)


def branch(**more: Any) -> ir.Model:
    """The graph above with its numbers as an array, as a pass would write them."""
    model = ir.from_proto(onnx.parser.parse_model(BRANCH))
    model.graph.initializers["top"].const_value = ir.Tensor(np.array([1, 2], np.float32), name="top", **more)
    return model


def with_tensors(*tensors: ir.TensorProtocol) -> ir.Model:
    """That graph, holding these."""
    model = branch()
    for tensor in tensors:
        value = ir.Value(name=tensor.name, shape=tensor.shape, const_value=tensor)
        value.type = ir.TensorType(tensor.dtype)
        model.graph.register_initializer(value)
    return model


@pytest.mark.parametrize("large", [0, 2**20])
def test_a_model_with_a_branch_and_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int) -> None:
    monkeypatch.setattr(stream, "_LARGE", large)
    model = branch(doc_string="why", metadata_props={"a": "b"})
    model.graph.doc_string, model.producer_name = "a graph", "somebody"
    model.graph.metadata_props["k"], model.metadata_props["m"] = "v", "w"
    assert as_now(model, tmp_path / "now.onnx") == as_before(model, tmp_path / "before.onnx")


@pytest.mark.parametrize(
    "dtype",
    ["float32", "float16", "int64", "bool", "bfloat16", "float8_e4m3fn", "int4", "uint4"],
)
def test_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """An odd number of elements, so that the last byte of what is packed is half full."""
    monkeypatch.setattr(stream, "_LARGE", 0)
    array = np.arange(7).astype(getattr(ml_dtypes, dtype, dtype))
    model = with_tensors(ir.Tensor(array, name="w"), ir.Tensor(array.reshape(7, 1)[::-1], name="v"))
    now = as_now(model, tmp_path / "now.onnx")
    assert now == as_before(model, tmp_path / "before.onnx")
    found = onnx.numpy_helper.to_array(now.graph.initializer[-2])
    np.testing.assert_array_equal(found.astype(np.float32), array.astype(np.float32))


@pytest.mark.parametrize("size", [0, 1, 100, 127, 128, 16383, 16384, 2**21 - 1, 2**21])
def test_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Each needs another number of bytes for the sizes of tensor, entry and graph, or nearly does."""
    monkeypatch.setattr(stream, "_LARGE", 0)
    model = with_tensors(ir.Tensor(np.arange(size).astype(np.uint8), name="w"))
    assert as_now(model, tmp_path / "now.onnx") == as_before(model, tmp_path / "before.onnx")


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 2**31 - 1, 2**35])
def test_numbers_are_written_as_protobuf_does(number: int) -> None:
    """Field 1 of this message is a number."""
    written = onnx.ModelProto(ir_version=number).SerializeToString()
    assert written[1:] == stream._varint(number)


def test_large_tensors_are_never_made_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as a whole nor as a message: they go from their array, or their file, to the file."""

    class Watched(ir.Tensor):
        def tobytes(self) -> bytes:
            raise AssertionError("a copy in memory")

    monkeypatch.setattr(stream, "_LARGE", 1000)
    array = np.arange(1000, dtype=np.float32)
    monkeypatch.setattr(ir.ExternalTensor, "tobytes", Watched.tobytes)
    (tmp_path / "w.data").write_bytes(array.tobytes())
    place = ("w.data", 0, array.nbytes, ir.DataType.FLOAT)
    mapped = ir.ExternalTensor(*place, shape=ir.Shape([1000]), name="v", base_dir=tmp_path)
    found = as_now(with_tensors(Watched(array, name="w"), mapped), tmp_path / "now.onnx").graph.initializer
    assert [t.name for t in found] == ["top", "words", "w", "v"]
    for tensor in found[2:]:
        assert not tensor.external_data
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), array)


def test_a_runtime_reads_it(model: ir.Model, images: np.ndarray, tmp_path: Path) -> None:
    before = Evaluator(model).run({"image": images})
    for large in (0, 2**20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stream, "_LARGE", large)
            out = files.save(model, tmp_path / f"{large}.onnx")
        again = Evaluator(out).run({"image": images})
        np.testing.assert_array_equal(before["scores"], again["scores"])


def test_the_model_in_memory_keeps_its_weights(model: ir.Model, tmp_path: Path) -> None:
    before = ir.to_proto(model).SerializeToString()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_LARGE", 0)
        files.save(model, tmp_path / "out.onnx")
    assert ir.to_proto(model).SerializeToString() == before
