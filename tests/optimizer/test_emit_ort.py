"""emit_ort: the file answers as its source, the list names its operators, and failures leave nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgewise.optimizer import emit_ort as module
from edgewise.optimizer.emit_ort import OrtFiles, emit_ort
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.evaluate import Evaluator

BRANCHES = """<ir_version: 8, opset_import: ["" : 17]>
g (float[2] x, bool c) => (float[2] y) {
    y = If(c) <then_branch = t () => (float[2] p) { p = Erf(x) },
               else_branch = e () => (float[2] r) { r = Sinh(x) }>
}"""


def saved(text: str, path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def test_it_answers_as_its_source(model_path: Path, images: np.ndarray, tmp_path: Path) -> None:
    feeds = [{"image": images[:1]}, {"image": images[1:4]}]
    made = emit_ort(model_path, tmp_path / "out.ort", feeds)
    assert made.model == tmp_path / "out.ort"
    assert made.bytes == made.model.stat().st_size
    assert made.model.read_bytes()[4:8] == b"ORTM"
    assert made.error < 1e-5
    expected = Evaluator(model_path).run(feeds[1])["scores"]
    np.testing.assert_allclose(Evaluator(made.model).run(feeds[1])["scores"], expected, rtol=1e-4, atol=1e-5)


def test_feeds_are_made_up_where_none_are_given(model_path: Path, tmp_path: Path) -> None:
    assert emit_ort(model_path, tmp_path / "out.ort").error < 1e-5


def test_nothing_else_is_written(model_path: Path, tmp_path: Path) -> None:
    before = model_path.read_bytes()
    made = emit_ort(model_path, tmp_path / "out.ort")
    assert set(tmp_path.iterdir()) == {model_path, made.model, made.operators}
    assert model_path.read_bytes() == before
    assert made.operators.name == "out.required_operators.config"


def required_by_the_file(made: OrtFiles) -> dict[tuple[str, int], tuple[str, ...]]:
    """The operators as onnxruntime's own tools read them from the .ort file."""
    tools = pytest.importorskip("onnxruntime.tools.ort_format_model")
    found: dict[str, dict[int, set[str]]] = {}
    tools.OrtFormatModelProcessor(str(made.model), found, None).process()
    return {(d, v): tuple(sorted(ops)) for d, sets in found.items() for v, ops in sets.items()}


def test_the_list_holds_what_the_file_needs(model_path: Path, tmp_path: Path) -> None:
    """The Relu is fused into the Conv, in onnxruntime's own domain; the Identity is gone."""
    made = emit_ort(model_path, tmp_path / "out.ort")
    assert made.required == required_by_the_file(made)
    assert ("com.microsoft", 1) in made.required
    names = {op for ops in made.required.values() for op in ops}
    assert {"FusedConv", "Gemm"} <= names
    assert "Identity" not in names


def test_the_list_as_a_file(model_path: Path, tmp_path: Path) -> None:
    made = emit_ort(model_path, tmp_path / "out.ort")
    first, *lines = made.operators.read_text().splitlines()
    assert first == "# Operators of out.ort"
    assert lines == [
        f"{domain};{version};{','.join(ops)}" for (domain, version), ops in made.required.items()
    ]


def test_as_plain_values(model_path: Path, tmp_path: Path) -> None:
    made = emit_ort(model_path, tmp_path / "out.ort")
    data = json.loads(json.dumps(made.to_dict()))
    assert data["model"] == str(tmp_path / "out.ort")
    assert data["required"]["ai.onnx;13"] == list(made.required["ai.onnx", 13])
    assert (data["bytes"], data["error"]) == (made.bytes, made.error)


def test_operators_of_branches(tmp_path: Path) -> None:
    made = emit_ort(saved(BRANCHES, tmp_path / "net.onnx"), tmp_path / "out.ort")
    assert made.required == required_by_the_file(made)
    assert made.required["ai.onnx", 13] == ("Erf",)
    assert made.required["ai.onnx", 9] == ("Sinh",)


def test_a_model_with_external_data(model_path: Path, tmp_path: Path) -> None:
    proto = onnx.load(model_path)
    path = tmp_path / "external.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="external.data", size_threshold=0)
    made = emit_ort(path, tmp_path / "out.ort")
    (tmp_path / "external.data").unlink()
    Evaluator(made.model)


def test_the_name_must_say_the_format(model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no name for an"):
        emit_ort(model_path, tmp_path / "out.onnx")


@pytest.mark.parametrize("name", ["out.ort", "out.required_operators.config"])
def test_what_exists_is_kept(name: str, model_path: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"{name} exists"):
        emit_ort(model_path, tmp_path / "out.ort")
    assert (tmp_path / name).read_text() == "mine"
    made = emit_ort(model_path, tmp_path / "out.ort", force=True)
    assert made.model.stat().st_size > 4
    assert made.operators.read_text() != "mine"


def test_a_model_too_large(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LIMIT", 100)
    with pytest.raises(InputError, match="holds more than"):
        emit_ort(model_path, tmp_path / "out.ort")


def test_a_model_that_onnxruntime_cannot_load(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "mine" : 1]>
    g (float[2] x) => (float[2] y) { y = mine.Secret(x) }"""
    with pytest.raises(InputError, match="Secret"):
        emit_ort(saved(text, tmp_path / "net.onnx"), tmp_path / "out.ort", [{"x": np.zeros(2, np.float32)}])
    assert not (tmp_path / "out.ort").exists()


def test_a_file_that_answers_otherwise_is_not_kept(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands for a defect of the converter: it converts a model with other weights."""
    proto = onnx.load(model_path)
    (bias,) = [t for t in proto.graph.initializer if t.name == "fc_b"]
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(5, 9, np.float32), "fc_b"))
    other = tmp_path / "other.onnx"
    onnx.save(proto, other)
    save = module._save
    monkeypatch.setattr(module, "_save", lambda _source, target, kind: save(other, target, kind))
    with pytest.raises(EdgewiseError, match="answers otherwise") as raised:
        emit_ort(model_path, tmp_path / "out.ort")
    assert raised.value.exit_code == 1
    assert set(tmp_path.iterdir()) == {model_path, other}
