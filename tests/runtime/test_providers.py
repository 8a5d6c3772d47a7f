"""Execution providers beside the CPU, granted and measured by the same code.

OpenVINO's runs on any x86 processor where onnxruntime-openvino is installed, CUDA's where onnxruntime-gpu
is and a graphics card answers. Elsewhere these tests are skipped, with the reason.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from edgewise.runtime.conditions import Conditions
from edgewise.runtime.errors import InputError
from edgewise.runtime.latency import measure
from edgewise.runtime.profile import profile
from edgewise.runtime.session import PROVIDERS, Grant, ProviderError, check_provider, grant_of, open_session

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


TOLERANCES = {"openvino": 1e-4, "cuda": 1e-2}  # TF32 has 10 bits of mantissa


@pytest.fixture(params=["openvino", "cuda"])
def provider(request: pytest.FixtureRequest) -> str:
    """The short name of a provider that is here."""
    return available(request.param)


@pytest.fixture
def openvino() -> str:
    return available("openvino")


@pytest.fixture
def cuda() -> str:
    return available("cuda")


def available(provider: str) -> str:
    """Skips the test where the provider is not installed or does not start."""
    try:
        check_provider(provider)
        open_session(onnx.parser.parse_model(PARTS).SerializeToString(), provider=provider)
    except ProviderError as error:
        pytest.skip(str(error))
    return provider


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """A small classifier of images, all of which the providers take."""
    return write(tmp_path / "net.onnx", NET)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A model with a Normalizer, which only the CPU knows."""
    return write(tmp_path / "parts.onnx", PARTS)


def test_all_nodes_are_granted(provider: str, net: Path) -> None:
    session = open_session(net, provider=provider, record_assignment=True, optimize=False)
    grant = grant_of(session, provider)
    assert grant == Grant(provider, {PROVIDERS[provider][0]: 5}, {})
    assert grant.complete
    assert str(grant) == f"{provider} runs all 5 nodes"


def test_the_answers_are_those_of_the_cpu(provider: str, net: Path) -> None:
    x = np.random.default_rng(1).standard_normal((4, 3, 16, 16)).astype(np.float32)
    cpu, other = (open_session(net, provider=p).run(None, {"x": x})[0] for p in ("cpu", provider))
    np.testing.assert_allclose(other, cpu, rtol=TOLERANCES[provider], atol=TOLERANCES[provider] / 10)


def test_a_part_is_told(provider: str, parts: Path) -> None:
    grant = grant_of(open_session(parts, provider=provider, record_assignment=True), provider)
    assert not grant.complete
    assert grant.elsewhere["Normalizer"] == 1
    assert set(grant.assigned) == {PROVIDERS[provider][0], "CPUExecutionProvider"}
    assert sum(grant.assigned.values()) == 4
    assert "on the CPU: " in str(grant)
    assert "Normalizer 1" in str(grant)


def test_latency_is_measured_as_on_the_cpu(provider: str, net: Path) -> None:
    """The same call, the same numbers; only the provider is another."""
    for name in ("cpu", provider):
        conditions = Conditions(provider=name, threads=1, batch=2)
        x = np.zeros((2, 3, 16, 16), np.float32)
        report = measure({"a": net, "b": net}, feed={"x": x}, conditions=conditions, max_seconds=1.0)
        assert report.conditions.provider == name
        for model in report.models:
            assert model.failed is None
            assert 0 < model.min_ms <= model.median_ms <= model.p99_ms
            assert model.grant is not None
            assert model.grant.complete
            assert model.grant.provider == name
        assert len(report.ratios) == 1
        assert PROVIDERS[provider][0] in report.machine.providers


def test_a_part_is_measured_and_refused_when_strict(provider: str, parts: Path) -> None:
    loose = measure({"parts": parts}, conditions=Conditions(provider), max_seconds=0.5)
    assert loose.models[0].failed is None
    assert loose.models[0].grant is not None
    assert not loose.models[0].grant.complete
    strict = measure({"parts": parts}, conditions=Conditions(provider, strict=True), max_seconds=0.5)
    assert "Normalizer 1" in str(strict.models[0].failed)


def test_the_profile_says_what_ran_where(provider: str, parts: Path) -> None:
    found = profile(parts, provider=provider, runs=5)
    assert not found.grant.complete
    shares = found.share_by_provider()
    assert set(shares) == {PROVIDERS[provider][0], "CPUExecutionProvider"}
    assert sum(shares.values()) == pytest.approx(1)


def test_what_its_compiler_refuses_is_one_line(openvino: str, tmp_path: Path) -> None:
    """Behind a Normalizer of unknown rank it wants to compile what it cannot."""
    path = write(tmp_path / "odd.onnx", PARTS.replace("<float[4, 8] n>", ""))
    with pytest.raises(InputError, match="cannot load the model on OpenVINOExecutionProvider: ") as error:
        open_session(path, provider=openvino)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["cifar_resnet20", "mnv1_050_160_tf_qdq"])
def test_models_of_the_corpus(openvino: str, corpus: Path, name: str) -> None:
    session = open_session(corpus / "models" / f"{name}.onnx", provider=openvino, record_assignment=True)
    assert grant_of(session, openvino).complete


def test_inputs_and_outputs_stay_on_the_device(cuda: str, net: Path) -> None:
    """Bound by default; without, every run copies. Both ways are measured."""
    for io_binding in (None, True, False):
        conditions = Conditions(cuda, io_binding=io_binding)
        (model,) = measure({"net": net}, conditions=conditions, max_seconds=0.5).models
        assert model.failed is None
        assert model.median_ms > 0


def test_copies_around_a_node_of_the_cpu_are_counted(cuda: str, parts: Path) -> None:
    assert profile(parts, provider=cuda, runs=5).copies() >= 2


def test_the_driver_is_in_the_report(cuda: str, net: Path) -> None:
    assert measure({"net": net}, conditions=Conditions(cuda), max_seconds=0.5).machine.gpus


def test_strict_takes_a_whole_model(cuda: str, net: Path) -> None:
    (model,) = measure({"net": net}, conditions=Conditions(cuda, strict=True), max_seconds=0.5).models
    assert model.failed is None
