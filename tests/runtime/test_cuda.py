"""CUDA, granted and measured by the same code as the CPU.

These tests run where onnxruntime-gpu is installed and a graphics card answers, and are skipped elsewhere.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from edgewise.runtime.conditions import Conditions
from edgewise.runtime.latency import measure
from edgewise.runtime.profile import profile
from edgewise.runtime.session import Grant, ProviderError, check_provider, grant_of, open_session

NET = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 3, 16, 16] x) => (float[N, 5] y) <float[8, 3, 3, 3] w, float[5, 8] f>
    {
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        r = Relu (c)
        p = GlobalAveragePool (r)
        v = Flatten (p)
        y = Gemm <transB = 1> (v, f)
    }"""

PARTS = """<ir_version: 8, opset_import: ["": 17, "ai.onnx.ml": 3]>
    g (float[4, 8] x) => (float[4, 8] y) <float[4, 8] n>
    { a = Exp (x) n = ai.onnx.ml.Normalizer <norm = "L2"> (a) b = Exp (n) y = Sqrt (b) }"""


def write(path: Path, text: str) -> Path:
    """The model as a file, its weights drawn with a seed."""
    proto = onnx.parser.parse_model(text)
    weights = [v for v in proto.graph.value_info if v.name in ("w", "f")]
    rng = np.random.default_rng(0)
    for value in weights:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        array = (0.2 * rng.standard_normal(shape)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
        proto.graph.value_info.remove(value)
    onnx.save(proto, path)
    return path


@pytest.fixture(autouse=True)
def _cuda() -> None:
    try:
        check_provider("cuda")
        open_session(onnx.parser.parse_model(PARTS).SerializeToString(), provider="cuda")
    except ProviderError as error:
        pytest.skip(str(error))


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """A small classifier of images, all of which CUDA takes."""
    return write(tmp_path / "net.onnx", NET)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A model with a Normalizer, which CUDA does not know."""
    return write(tmp_path / "parts.onnx", PARTS)


def test_all_nodes_are_granted(net: Path) -> None:
    session = open_session(net, provider="cuda", record_assignment=True, optimize=False)
    grant = grant_of(session, "cuda")
    assert grant == Grant("cuda", {"CUDAExecutionProvider": 5}, {})
    assert grant.complete
    assert str(grant) == "cuda runs all 5 nodes"


def test_the_answers_are_those_of_the_cpu(net: Path) -> None:
    x = np.random.default_rng(1).standard_normal((4, 3, 16, 16)).astype(np.float32)
    cpu, other = (open_session(net, provider=p).run(None, {"x": x})[0] for p in ("cpu", "cuda"))
    np.testing.assert_allclose(other, cpu, rtol=1e-2, atol=1e-3)  # TF32 has 10 bits of mantissa


def test_a_part_is_told(parts: Path) -> None:
    grant = grant_of(open_session(parts, provider="cuda", record_assignment=True), "cuda")
    assert not grant.complete
    assert grant.elsewhere["Normalizer"] == 1
    assert set(grant.assigned) == {"CUDAExecutionProvider", "CPUExecutionProvider"}
    assert sum(grant.assigned.values()) == 4
    assert "on the CPU: " in str(grant)
    assert "Normalizer 1" in str(grant)


def test_latency_is_measured_as_on_the_cpu(net: Path) -> None:
    """The same call, the same numbers; only the provider is another."""
    for provider in ("cpu", "cuda"):
        conditions = Conditions(provider=provider, threads=1, batch=2)
        x = np.zeros((2, 3, 16, 16), np.float32)
        report = measure({"a": net, "b": net}, feed={"x": x}, conditions=conditions, max_seconds=1.0)
        assert report.conditions.provider == provider
        for model in report.models:
            assert model.failed is None
            assert 0 < model.min_ms <= model.median_ms <= model.p99_ms
            assert model.grant is not None
            assert model.grant.complete
            assert model.grant.provider == provider
        assert len(report.ratios) == 1
        assert "CUDAExecutionProvider" in report.machine.providers


def test_a_part_is_measured_and_refused_when_strict(parts: Path) -> None:
    loose = measure({"parts": parts}, conditions=Conditions("cuda"), max_seconds=0.5)
    assert loose.models[0].failed is None
    assert loose.models[0].grant is not None
    assert not loose.models[0].grant.complete
    strict = measure({"parts": parts}, conditions=Conditions("cuda", strict=True), max_seconds=0.5)
    assert "Normalizer 1" in str(strict.models[0].failed)


def test_the_profile_says_what_ran_where(parts: Path) -> None:
    found = profile(parts, provider="cuda", runs=5)
    assert not found.grant.complete
    shares = found.share_by_provider()
    assert set(shares) == {"CUDAExecutionProvider", "CPUExecutionProvider"}
    assert sum(shares.values()) == pytest.approx(1)


def test_inputs_and_outputs_stay_on_the_device(net: Path) -> None:
    """Bound by default; without, every run copies. Both ways are measured."""
    for io_binding in (None, True, False):
        conditions = Conditions("cuda", io_binding=io_binding)
        (model,) = measure({"net": net}, conditions=conditions, max_seconds=0.5).models
        assert model.failed is None
        assert model.median_ms > 0


def test_copies_around_a_node_of_the_cpu_are_counted(parts: Path) -> None:
    assert profile(parts, provider="cuda", runs=5).copies() >= 2


def test_the_driver_is_in_the_report(net: Path) -> None:
    assert measure({"net": net}, conditions=Conditions("cuda"), max_seconds=0.5).machine.gpus


def test_strict_takes_a_whole_model(net: Path) -> None:
    (model,) = measure({"net": net}, conditions=Conditions("cuda", strict=True), max_seconds=0.5).models
    assert model.failed is None
