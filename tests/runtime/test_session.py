"""A session runs where it was asked to, or says in one line why it cannot."""

from __future__ import annotations

import importlib.metadata
import platform
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
    Grant,
    ProviderError,
    check_provider,
    first_line,
    grant_of,
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
        session = open_session(
            path, threads=2, inter_op_threads=3, optimize=False, spinning=False, config=config
        )
        options = session.get_session_options()
        ort = import_onnxruntime()
        assert options.intra_op_num_threads == 2
        assert options.inter_op_num_threads == 3
        assert options.execution_mode == ort.ExecutionMode.ORT_PARALLEL
        assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert options.get_session_config_entry("session.disable_prepacking") == "1"

    def test_spins_and_optimizes_unless_told_otherwise(self, path: Path) -> None:
        options = open_session(path).get_session_options()
        ort = import_onnxruntime()
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "1"
        assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        assert options.execution_mode == ort.ExecutionMode.ORT_SEQUENTIAL

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

    @pytest.fixture
    def _without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An onnxruntime with nothing but the CPU, installed from the package of that name, on Linux."""
        ort = SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"], __version__="1.99")
        monkeypatch.setattr(module, "import_onnxruntime", lambda: ort)
        monkeypatch.setattr(module, "installed_runtimes", lambda: ("onnxruntime",))
        monkeypatch.setattr(platform, "system", lambda: "Linux")

    @pytest.mark.usefixtures("_without")
    @pytest.mark.parametrize(
        ("short", "system", "words"),
        [
            ("cuda", "Linux", "pip uninstall onnxruntime && pip install onnxruntime-gpu"),
            ("tensorrt", "Windows", "pip uninstall onnxruntime && pip install onnxruntime-gpu"),
            ("cuda", "Darwin", "it exists for Linux and Windows only, and this is macOS"),
            ("openvino", "Linux", "pip uninstall onnxruntime && pip install onnxruntime-openvino"),
            ("coreml", "Linux", "it exists for macOS only, and this is Linux"),
            ("coreml", "Darwin", "pip install --force-reinstall onnxruntime"),
            ("qnn", "Linux", "it exists for Windows only, and this is Linux"),
            ("qnn", "Windows", "pip uninstall onnxruntime && pip install 'onnxruntime-qnn<2'"),
            ("dml", "Linux", "it exists for Windows only, and this is Linux"),
            ("dml", "Windows", "pip uninstall onnxruntime && pip install onnxruntime-directml"),
            (
                "xnnpack",
                "Linux",
                "no package on PyPI brings it, it takes an onnxruntime built with --use_xnnpack",
            ),
        ],
    )
    def test_absent_says_what_to_do(
        self, monkeypatch: pytest.MonkeyPatch, short: str, system: str, words: str
    ) -> None:
        monkeypatch.setattr(platform, "system", lambda: system)
        with pytest.raises(ProviderError) as error:
            check_provider(short)
        assert str(error.value) == f"onnxruntime 1.99 has no {PROVIDERS[short][0]}: {words}"

    @pytest.mark.usefixtures("_without")
    def test_runtimes_over_each_other_are_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whichever was installed last has overwritten the files of the other."""
        monkeypatch.setattr(module, "installed_runtimes", lambda: ("onnxruntime", "onnxruntime-gpu"))
        with pytest.raises(ProviderError) as error:
            check_provider("cuda")
        assert str(error.value).endswith(
            "onnxruntime, onnxruntime-gpu are installed over each other and only one can be: "
            "pip uninstall onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
        )

    @pytest.mark.usefixtures("_without")
    def test_a_build_of_ones_own_is_nothing_to_uninstall(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "installed_runtimes", lambda: ())
        with pytest.raises(ProviderError, match=r"it comes with the package onnxruntime-gpu$"):
            check_provider("cuda")

    @pytest.mark.usefixtures("_without")
    @pytest.mark.parametrize("short", sorted(set(PROVIDERS) - {"cpu"}))
    def test_no_session_on_the_cpu_instead(self, path: Path, short: str) -> None:
        with pytest.raises(ProviderError, match=f"has no {PROVIDERS[short][0]}"):
            open_session(path, provider=short)

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

    def test_a_provider_that_cannot_take_the_model(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        """Not the model's fault: the CPU might well run it. The cause stands last."""

        def compile_it(*arguments: Any, **options: Any) -> None:
            raise RuntimeError(
                "[ONNXRuntimeError] : 1 : FAIL : basic_backend.cc:136\nCheck failed\nno ranks\n\n"
            )

        monkeypatch.setattr(module, "check_provider", lambda provider: PROVIDERS[provider][0])
        monkeypatch.setattr(import_onnxruntime(), "InferenceSession", compile_it)
        with pytest.raises(
            InputError, match=r"cannot load the model on OpenVINOExecutionProvider: no ranks$"
        ):
            open_session(path, provider="openvino")

    @pytest.mark.parametrize(
        ("short", "threads", "wanted"),
        [
            ("cpu", 2, [("CPUExecutionProvider", {})]),
            ("cuda", 2, [("CUDAExecutionProvider", {}), ("CPUExecutionProvider", {})]),
            (
                "openvino",
                2,
                [("OpenVINOExecutionProvider", {"num_of_threads": "2"}), ("CPUExecutionProvider", {})],
            ),
            ("openvino", None, [("OpenVINOExecutionProvider", {}), ("CPUExecutionProvider", {})]),
            (
                "xnnpack",
                1,
                [("XnnpackExecutionProvider", {"intra_op_num_threads": "1"}), ("CPUExecutionProvider", {})],
            ),
            (
                "tensorrt",
                None,
                [
                    ("TensorrtExecutionProvider", {}),
                    ("CUDAExecutionProvider", {}),
                    ("CPUExecutionProvider", {}),
                ],
            ),
        ],
    )
    def test_are_asked_in_turn_and_for_the_same_threads(
        self, monkeypatch: pytest.MonkeyPatch, path: Path, short: str, threads: int | None, wanted: Any
    ) -> None:
        seen: list[Any] = []
        ort = import_onnxruntime()
        everything = [name for name, _ in PROVIDERS.values()]

        def session(model: Any, options: Any, providers: Any, **_: Any) -> Any:
            seen.extend(providers)
            return SimpleNamespace(get_providers=lambda: everything)

        monkeypatch.setattr(ort, "get_available_providers", lambda: everything)
        monkeypatch.setattr(ort, "InferenceSession", session)
        open_session(path, provider=short, threads=threads)
        assert seen == wanted

    def test_are_the_users_matter(self) -> None:
        assert issubclass(ProviderError, InputError)
        assert ProviderError("x").exit_code == 2


class TestGrant:
    def test_of_the_cpu(self, path: Path) -> None:
        grant = grant_of(open_session(path, record_assignment=True, optimize=False), "cpu")
        assert grant == Grant("cpu", {"CPUExecutionProvider": 2}, {})
        assert grant.complete
        assert str(grant) == "cpu runs all 2 nodes"

    @staticmethod
    def granted(provider: str, **parts: list[str]) -> Grant:
        """Of a session whose providers took nodes of these types."""
        info = [
            SimpleNamespace(ep_name=name, get_nodes=lambda ops=ops: [SimpleNamespace(op_type=o) for o in ops])
            for name, ops in parts.items()
        ]
        session: Any = SimpleNamespace(get_provider_graph_assignment_info=lambda: info)
        return grant_of(session, provider)

    def test_in_part(self) -> None:
        cpu = ["Gather", "Shape", "Gather", "Gather", "Shape", "Loop"]
        grant = self.granted("cuda", CUDAExecutionProvider=["Conv"] * 8, CPUExecutionProvider=cpu)
        assert not grant.complete
        assert str(grant) == "cuda runs 8 of 14 nodes; on the CPU: Gather 3, Shape 2, Loop 1"

    def test_not_at_all(self) -> None:
        """The session lists the provider, and nothing runs there."""
        grant = self.granted("openvino", CPUExecutionProvider=["Conv", "Relu"])
        assert not grant.complete
        assert str(grant) == "openvino runs none of 2 nodes; on the CPU: Conv 1, Relu 1"

    def test_with_another_provider_between(self) -> None:
        parts = {
            "TensorrtExecutionProvider": ["Conv"],
            "CUDAExecutionProvider": ["TopK"],
            "CPUExecutionProvider": ["Shape"],
        }
        grant = self.granted("tensorrt", **parts)
        assert str(grant) == "tensorrt runs 1 of 3 nodes; on other providers: TopK 1, Shape 1"

    def test_without_a_record(self) -> None:
        """Before onnxruntime 1.24. The CPU takes everything; of others nobody knows."""
        session: Any = SimpleNamespace()
        assert grant_of(session, "cpu").complete
        grant = grant_of(session, "cuda")
        assert not grant.complete
        assert str(grant) == "cuda: onnxruntime keeps no record of where nodes run"


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
