"""A session runs where it was asked to, or says in one line why it cannot."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from edgewise.runtime import session as module
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.session import (
    PROVIDERS,
    ProviderError,
    check_provider,
    first_line,
    import_onnxruntime,
    installed_runtimes,
    open_session,
    runtime_errors,
    serialize,
    weight_bytes,
)

TEXT = """<ir_version: 8, opset_import: ["": 17]>
    g (float[1, 4] x) => (float[1, 4] y) <float[4] w = {1, 2, 3, 4}> { z = Relu(x) y = Mul(z, w) }"""
X = np.array([[-1.0, 1.0, 1.0, 1.0]], np.float32)
Y = [[0.0, 2.0, 3.0, 4.0]]


@pytest.fixture
def model() -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(TEXT))


@pytest.fixture
def path(model: ir.Model, tmp_path: Path) -> Path:
    ir.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


class TestOpenSession:
    @pytest.mark.parametrize("form", ["model", "bytes", "path", "text"])
    def test_takes_a_model_in_every_form(self, model: ir.Model, path: Path, form: str) -> None:
        sources = {"model": model, "bytes": path.read_bytes(), "path": path, "text": str(path)}
        (y,) = open_session(sources[form]).run(None, {"x": X})
        assert y.tolist() == Y

    def test_sets_what_was_asked_for(self, path: Path) -> None:
        config = {"session.disable_prepacking": "1"}
        session = open_session(path, threads=2, optimize=False, spinning=False, config=config)
        options = session.get_session_options()
        ort = import_onnxruntime()
        assert options.intra_op_num_threads == 2
        assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert options.get_session_config_entry("session.disable_prepacking") == "1"

    def test_spins_and_optimizes_unless_told_otherwise(self, path: Path) -> None:
        options = open_session(path).get_session_options()
        ort = import_onnxruntime()
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "1"
        assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL

    @pytest.mark.parametrize("content", [b"", b"junk" * 100])
    def test_bad_files_are_the_users_matter(self, tmp_path: Path, content: bytes) -> None:
        file = tmp_path / "bad.onnx"
        file.write_bytes(content)
        with pytest.raises(InputError, match="cannot load the model") as error:
            open_session(file)
        assert "\n" not in str(error.value)

    def test_so_is_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot load the model"):
            open_session(tmp_path / "missing.onnx")

    def test_a_model_too_large_for_protobuf_goes_through_a_file(
        self, model: ir.Model, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_PROTOBUF_LIMIT", 8)
        (y,) = open_session(model).run(None, {"x": X})
        assert y.tolist() == Y

    def test_no_room_for_that_file(self, model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*arguments: Any, **options: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module, "_PROTOBUF_LIMIT", 8)
        monkeypatch.setattr(ir, "save", full)
        with pytest.raises(EdgewiseError, match="no room for a temporary copy"):
            open_session(model)


class TestProviders:
    def test_cpu_is_always_there(self) -> None:
        assert check_provider("cpu") == "CPUExecutionProvider"

    def test_unknown(self) -> None:
        with pytest.raises(ProviderError, match="unknown execution provider 'gpu': choose from cpu, cuda"):
            check_provider("gpu")

    def test_absent_names_the_package_to_install(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        ort = SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"])
        monkeypatch.setattr(module, "import_onnxruntime", lambda: ort)
        monkeypatch.setattr(module, "installed_runtimes", lambda: ("onnxruntime",))
        for short in set(PROVIDERS) - {"cpu"}:
            name, package = PROVIDERS[short]
            with pytest.raises(ProviderError, match=f"no {name}: .*pip install {package}$"):
                check_provider(short)

    def test_a_silent_fallback_to_the_cpu_is_an_error(
        self, monkeypatch: pytest.MonkeyPatch, path: Path
    ) -> None:
        """onnxruntime drops a provider whose libraries are missing, and says so in its log only."""
        monkeypatch.setattr(module, "check_provider", lambda provider: "CUDAExecutionProvider")
        ort = import_onnxruntime()
        real = ort.InferenceSession
        monkeypatch.setattr(ort, "InferenceSession", lambda model, options, **_: real(model, options))
        with pytest.raises(ProviderError, match=r"fell back to CPUExecutionProvider: .*onnxruntime-gpu"):
            open_session(path, provider="cuda")

    def test_are_the_users_matter(self) -> None:
        assert issubclass(ProviderError, InputError)
        assert ProviderError("x").exit_code == 2


class TestInstallation:
    def test_finds_the_distributions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        names = ["numpy", "ONNXRuntime-GPU", "onnxruntime", None]
        found = [SimpleNamespace(metadata={"Name": name}) for name in names]
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
        assert installed_runtimes() == ("onnxruntime", "onnxruntime-gpu")

    def test_this_one_has_a_runtime(self) -> None:
        assert installed_runtimes()

    def test_none_at_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
        with pytest.raises(InputError, match="pip install onnxruntime"):
            import_onnxruntime()


def test_runtime_errors_are_what_onnxruntime_raises(path: Path) -> None:
    with pytest.raises(runtime_errors()):
        open_session(path).run(None, {"x": np.zeros((1, 9), np.float32)})
    with pytest.raises(runtime_errors()):
        open_session(path).run(None, {})


@pytest.mark.parametrize(
    ("text", "line"), [("one", "one"), ("\n one\ntwo", "one"), ("", "RuntimeError"), ("  \n", "RuntimeError")]
)
def test_first_line(text: str, line: str) -> None:
    assert first_line(RuntimeError(text)) == line


def test_serialize_is_what_onnx_reads(model: ir.Model) -> None:
    onnx.checker.check_model(onnx.load_from_string(serialize(model)), full_check=True)


def test_weight_bytes_counts_subgraphs() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (bool c) => (float[2] y) <float[2] w = {1, 2}> {
            y = If (c) <
                then_branch = t () => (float[2] a) <float[2] v = {3, 4}> { a = Add(v, w) },
                else_branch = e () => (float[2] b) { b = Relu(w) }
            >
        }"""
    assert weight_bytes(ir.from_proto(onnx.parser.parse_model(text))) == 16


def test_a_worker_starts_without_onnx_ir() -> None:
    """It would quadruple the start of every measured process and double its memory."""
    code = "import sys, edgewise.runtime.worker; raise SystemExit('onnx_ir' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
