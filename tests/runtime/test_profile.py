"""Profiles of small models: what ran, what it stands for, and that the times add up."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from edgewise.optimizer.inspection import count_macs
from edgewise.runtime import trace as tracing
from edgewise.runtime.costs import Operand
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.profile import Profile, profile, profile_isolated
from edgewise.runtime.profile import _Graphs as Graphs
from edgewise.runtime.profile import _in_float as in_float
from edgewise.runtime.profile import _inputs as inputs
from edgewise.runtime.profile import _node_times as node_times
from edgewise.runtime.session import PROVIDERS, Grant, ProviderError, import_onnxruntime
from edgewise.runtime.trace import Trace

HEADER = '<ir_version: 8, opset_import: ["": 17]>'
CHAIN = "g (float[n, 4] x) => (float[n, 4] y) { a = Exp(x) b = Sin(a) y = Relu(b) }"
LOOP = """g (float[4] x) => (float[4] y) <int64 n = {5}, bool on = {1}> {
    y = Loop(n, on, x) <body = b (int64 i, bool c, float[4] a) => (bool d, float[4] z) {
        d = Identity(c) z = Sin(a)
    }>
}"""
QUANTIZED = """g (float[1, 8] x) => (float[1, 8] y)
    <float s = {0.1}, uint8 z = {128}, float t = {0.01}, uint8 m = {100}> {
    q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z)
    b = Sin(a)
    p = QuantizeLinear(b, t, m) y = DequantizeLinear(p, t, m)
}"""


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


def save(folder: Path, graph: str, *names: str) -> Path:
    """The model of `graph` with `names` for its first nodes."""
    model = onnx.parser.parse_model(HEADER + graph)
    for node, name in zip(model.graph.node, names, strict=False):
        node.name = name
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def sources(report: Profile) -> dict[tuple[str, ...], str]:
    return {node.sources: node.op_type for node in report.nodes}


class TestProfile:
    def test_tells_the_nodes_of_the_file(self, tmp_path: Path) -> None:
        report = profile(save(tmp_path, CHAIN, "one", "two", "three"), threads=1, runs=5)
        assert sources(report) == {("one",): "Exp", ("two",): "Sin", ("three",): "Relu"}
        assert report.runs == 5
        assert all(node.calls == 1 for node in report.nodes)
        assert all(node.provider == "CPUExecutionProvider" for node in report.nodes)
        assert report.grant == Grant("cpu", {"CPUExecutionProvider": 3}, {})
        assert report.assigned == {"CPUExecutionProvider": 3}
        assert report.elsewhere == {}
        assert report.copies() == 0

    def test_adds_up(self, tmp_path: Path) -> None:
        report = profile(save(tmp_path, CHAIN), {"x": np.ones((5000, 4), np.float32)}, threads=1, runs=5)
        assert sum(node.share for node in report.nodes) == pytest.approx(1)
        assert sum(op.ms for op in report.by_op()) == pytest.approx(sum(n.ms for n in report.nodes))
        assert sum(op.nodes for op in report.by_op()) == 3
        assert [(k.kind, k.nodes, k.dtypes) for k in report.by_kind()] == [("elementwise", 3, ("float32",))]
        assert report.by_kind()[0].bytes == 3 * 2 * 5000 * 4 * 4
        assert report.share_by_provider() == pytest.approx({"CPUExecutionProvider": 1})
        assert [n.ms for n in report.nodes] == sorted((n.ms for n in report.nodes), reverse=True)
        assert 0 < sum(n.ms for n in report.nodes) < report.run_ms

    @pytest.mark.parametrize("names", [(), ("", "Exp_0"), ("Relu_1", "", "")])
    def test_nodes_without_a_name(self, tmp_path: Path, names: tuple[str, ...]) -> None:
        path = save(tmp_path, CHAIN, *names)
        before = path.read_bytes()
        report = profile(path, threads=1, runs=2)
        assert sorted(sources(report).values()) == ["Exp", "Relu", "Sin"]
        assert len({node.sources for node in report.nodes}) == 3
        own = {name for names in sources(report) for name in names} - set(names)
        assert own <= {"a", "b", "y"}  # called after what they give, as in any version of the file
        assert path.read_bytes() == before

    def test_a_fused_node_names_what_is_in_it(self, tmp_path: Path) -> None:
        graph = """g (float[1, 3, 8, 8] x) => (float[1, 3, 8, 8] y) {
            a = Conv(x, w) y = Relu(a)
        }"""
        path = save(tmp_path, graph, "conv", "relu")
        model = onnx.load(path)
        model.graph.initializer.append(numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "w"))
        onnx.save(model, path)
        report = profile(path, threads=1, runs=2)
        assert ("conv", "relu") in sources(report)

    def test_bodies_of_loops(self, tmp_path: Path) -> None:
        report = profile(save(tmp_path, LOOP, "loop"), threads=1, runs=2)
        calls = {node.op_type: node.calls for node in report.nodes}
        assert calls["Loop"] == 1
        assert calls["Sin"] == 5

    def test_a_quantized_node_that_stays_in_float(self, tmp_path: Path) -> None:
        report = profile(save(tmp_path, QUANTIZED, "quantize", "dequantize", "sine"), threads=1, runs=2)
        assert report.in_float == ("sine",)

    def test_as_json(self, tmp_path: Path) -> None:
        report = profile(save(tmp_path, CHAIN), threads=1, runs=2)
        data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert {op["op_type"] for op in data["by_op"]} == {"Exp", "Sin", "Relu"}
        assert [k["kind"] for k in data["by_kind"]] == ["elementwise"]
        assert Profile.from_dict(data) == report

    def test_what_cannot_be_profiled(self, tmp_path: Path) -> None:
        path = save(tmp_path, CHAIN)
        with pytest.raises(InputError, match="does not run on these inputs"):
            profile(path, {"x": np.ones((1, 9, 9), np.float32)})
        with pytest.raises(InputError, match="runs must be 2 or more"):
            profile(path, runs=1)
        with pytest.raises(InputError, match="cannot load"):
            profile(tmp_path / "missing.onnx")
        here = import_onnxruntime().get_available_providers()
        with pytest.raises(ProviderError, match="pip install"):
            profile(path, provider=next(s for s, (name, _) in PROVIDERS.items() if name not in here))


class TestInFloat:
    def names(self, text: str) -> set[str]:
        graph = ir.from_proto(onnx.parser.parse_model(HEADER + text)).graph
        for node in graph:
            node.name = node.outputs[0].name
        return set(in_float(graph))

    def test_a_chain_between_the_two(self) -> None:
        text = """g (uint8[4] x) => (uint8[4] y) <float s = {0.1}, uint8 z = {128}> {
            a = DequantizeLinear(x, s, z) b = Sin(a) c = Relu(b) y = QuantizeLinear(c, s, z)
        }"""
        assert self.names(text) == {"b", "c"}

    def test_not_what_is_float_at_the_beginning_or_the_end(self) -> None:
        text = """g (float[4] x) => (float[4] y) <float s = {0.1}, uint8 z = {128}> {
            a = Sin(x) b = QuantizeLinear(a, s, z) c = DequantizeLinear(b, s, z) y = Softmax(c)
        }"""
        assert self.names(text) == set()

    def test_not_what_only_reads_quantized_weights(self) -> None:
        text = """g (float[2] x) => (uint8[2] y) <float s = {0.1}, uint8 z = {128}, uint8[2] w = {1, 2}> {
            a = DequantizeLinear(w, s, z) b = Add(x, a) y = QuantizeLinear(b, s, z)
        }"""
        assert self.names(text) == set()


def event(name: str, op: str, start: int, duration: int, **more: Any) -> dict[str, Any]:
    args = {"op_name": op, "provider": "CPUExecutionProvider", **more}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": duration, "args": args}


class TestNodeTimes:
    WINDOWS = ({"ts": 100, "dur": 100}, {"ts": 200, "dur": 100})
    NOTHING = Graphs({}, {}, {})

    def times(self, *events: dict[str, Any]) -> dict[str, tuple[int, float]]:
        found = node_times(Trace(events, self.WINDOWS), self.NOTHING)
        return {n.name: (n.calls, n.ms) for n in found}

    def test_are_means_over_the_runs_without_the_warm_up(self) -> None:
        events = [event("a", "Exp", 10, 90), event("a", "Exp", 110, 20), event("a", "Exp", 210, 40)]
        assert self.times(*events) == {"a": (1, pytest.approx(0.030))}

    def test_leave_the_body_to_its_nodes(self) -> None:
        run = [("loop", "Loop", 110, 50), ("z", "Sin", 115, 10), ("z", "Sin", 130, 10), ("y", "Exp", 160, 5)]
        events = [event(n, op, start + shift, d) for shift in (0, 100) for n, op, start, d in run]
        assert self.times(*events) == {
            "loop": (1, pytest.approx(0.030)),
            "z": (2, pytest.approx(0.020)),
            "y": (1, pytest.approx(0.005)),
        }

    def test_of_bodies_in_bodies(self) -> None:
        run = [("outer", "If", 110, 60), ("inner", "If", 120, 40), ("z", "Sin", 130, 10)]
        events = [event(n, op, start + shift, d) for shift in (0, 100) for n, op, start, d in run]
        found = {name: ms for name, (_, ms) in self.times(*events).items()}
        assert found == pytest.approx({"outer": 0.020, "inner": 0.030, "z": 0.010})

    def test_a_model_without_nodes(self) -> None:
        assert self.times() == {}

    def test_what_is_done_counts_every_call_of_one_run(self) -> None:
        shapes = {
            "input_type_shape": [{"float": [2, 8]}, {"float": [8, 4]}],
            "output_type_shape": [{"float": [2, 4]}],
        }
        calls = [event("a", "MatMul", start, 10, **shapes) for start in (110, 130, 210, 230)]
        (node,) = node_times(Trace(calls, self.WINDOWS), self.NOTHING)
        assert (node.calls, node.macs, node.bytes) == (2, 2 * 2 * 4 * 8, 2 * 4 * (16 + 32 + 8))
        assert (node.kind, node.dtype) == ("matrix product", "float32")
        assert node.gflops == pytest.approx(2 * node.macs / 20e-6 / 1e9)
        assert node.gbps == pytest.approx(node.bytes / 20e-6 / 1e9)

    def test_nodes_elsewhere(self) -> None:
        copy = {"op": "MemcpyToHost", "provider": "CUDAExecutionProvider"}
        events = [
            e
            for start in (110, 210)
            for e in (event("a", "Exp", start, 10), event("b", **copy, start=start + 10, duration=30))
        ]
        nodes = node_times(Trace(events, self.WINDOWS), self.NOTHING)
        found = Profile("m.onnx", "cuda", None, 2, 0.1, nodes, Grant("cuda", {}, {}), None)
        assert found.elsewhere == {"CPUExecutionProvider": {"Exp": 1}}
        assert found.copies() == 1
        assert found.share_by_provider() == pytest.approx(
            {"CPUExecutionProvider": 0.25, "CUDAExecutionProvider": 0.75}
        )


def test_inputs_that_onnxruntime_no_longer_holds() -> None:
    text = """g (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y)
        <float[2, 2, 1, 1] w = {1, 2, 3, 4}, float[2] b = {1, 2}> {
        y = Conv(x, w, b)
    }"""
    (node,) = ir.from_proto(onnx.parser.parse_model(HEADER + text)).graph
    data, weight, bias = (Operand("float32", s) for s in ((1, 2, 4, 4), (2, 2, 1, 1), (2,)))
    assert list(inputs(node, [data, weight, bias])) == [data, weight, bias]
    assert list(inputs(node, [data, bias])) == [data, weight, bias]
    assert list(inputs(node, [data])) == [data, weight, bias]
    assert list(inputs(node, [])) == [None, weight, bias]


@pytest.mark.parametrize(
    "name",
    [
        "cifar_resnet20",
        "dtln_1",
        "mlperftiny_ad_autoencoder",
        "mlperftiny_kws_dscnn",
        "mlperftiny_vww_mobilenetv1_025",
        "mnv1_050_160_tf_qdq",
        "squeezenet_fp32",
        "ultraface_rfb_320",
    ],
)
def test_the_work_is_that_of_the_file(corpus: Path, name: str) -> None:
    """Whatever was fused, quantized, or padded to full blocks of channels."""
    path = corpus / "models" / f"{name}.onnx"
    found = profile(path, threads=1, runs=2)
    assert sum(node.macs or 0 for node in found.nodes) == count_macs(ir.load(path)).total
    assert all(node.macs is not None for node in found.nodes)


def test_channels_that_fill_a_block_do_not_count(tmp_path: Path) -> None:
    graph = "g (float[1, 3, 8, 8] x) => (float[1, 19, 8, 8] y) { a = Conv(x, w) b = Relu(a) y = Conv(b, v) }"
    path = save(tmp_path, graph, "one", "relu", "two")
    model = onnx.load(path)
    for name, shape in (("w", (17, 3, 1, 1)), ("v", (19, 17, 1, 1))):
        model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    onnx.save(model, path)
    counts = {n.sources: n.macs for n in profile(path, threads=1, runs=2).nodes if n.kind == "convolution"}
    assert counts == {("one", "relu"): 64 * 17 * 3, ("two",): 64 * 19 * 17}


class TestRuns:
    def test_as_many_as_asked_for(self, tmp_path: Path) -> None:
        assert profile(save(tmp_path, CHAIN), threads=1, runs=7).runs == 7

    def test_fewer_of_a_slow_model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tracing, "_SECONDS", 0.0)
        assert profile(save(tmp_path, CHAIN), threads=1).runs == 3

    def test_not_without_end_of_a_fast_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tracing, "_SECONDS", 1e9)
        assert profile(save(tmp_path, CHAIN), threads=1).runs == 30


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_a_graph_that_cannot_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
    """The nodes of the file are all that is known then: those that kept their name stand for themselves."""
    if provider == "cpu":
        monkeypatch.setattr("edgewise.runtime.profile._SHOWS_ITS_GRAPH", frozenset())
    elif PROVIDERS[provider][0] not in import_onnxruntime().get_available_providers():
        pytest.skip(f"the onnxruntime installed here has no {provider}")
    found = profile(save(tmp_path, CHAIN, "one", "two", "three"), provider=provider, threads=1, runs=2)
    assert found.in_float is None
    if provider == "cpu":
        assert {node.sources for node in found.nodes} == {("one",), ("two",), ("three",)}


def test_a_folder_that_cannot_take_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving is a help; a profile without it is better than none."""
    real = tracing.tracing

    def elsewhere(session: Any, path: Path, folder: Path, executed: Path | None) -> Any:
        return real(session, path, folder, folder / "missing" / "executed.onnx")

    monkeypatch.setattr("edgewise.runtime.profile.tracing", elsewhere)
    assert profile(save(tmp_path, CHAIN), threads=1, runs=2).in_float is None


class TestIsolated:
    def test_is_the_same_profile(self, tmp_path: Path) -> None:
        path = save(tmp_path, CHAIN, "one", "two", "three")
        found = profile_isolated(path, {"x": np.ones((7, 4), np.float32)}, threads=1, runs=3)
        assert sources(found) == {("one",): "Exp", ("two",): "Sin", ("three",): "Relu"}
        assert {node.bytes for node in found.nodes} == {2 * 7 * 4 * 4}
        assert found.runs == 3

    def test_seeded_inputs(self, tmp_path: Path) -> None:
        assert len(profile_isolated(save(tmp_path, CHAIN), threads=1, runs=2, seed=3).nodes) == 3

    def test_what_does_not_run_is_one_line(self, tmp_path: Path) -> None:
        path = save(tmp_path, CHAIN)
        with pytest.raises(
            EdgewiseError, match=r"model.onnx could not be profiled: .*does not run"
        ) as caught:
            profile_isolated(path, {"x": np.ones((1, 9, 9), np.float32)}, threads=1)
        assert len(str(caught.value).splitlines()) == 1

    def test_a_provider_that_is_not_there(self, tmp_path: Path) -> None:
        here = import_onnxruntime().get_available_providers()
        missing = next(short for short, (name, _) in PROVIDERS.items() if name not in here)
        with pytest.raises(ProviderError, match="pip install"):
            profile_isolated(save(tmp_path, CHAIN), provider=missing)

    def test_a_model_that_hangs(self, tmp_path: Path) -> None:
        endless = """g (float[4] x) => (float[4] y) <int64 n = {1000000000}, bool on = {1}> {
            y = Loop(n, on, x) <body = b (int64 i, bool c, float[4] a) => (bool d, float[4] z) {
                d = Identity(c) z = Sin(a)
            }>
        }"""
        with pytest.raises(EdgewiseError, match="could not be profiled: no answer within 2 s"):
            profile_isolated(save(tmp_path, endless), threads=1, timeout=2.0)

    def test_a_model_that_crashes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A process that reads this model dies of a signal, whatever the model."""
        (tmp_path / "sitecustomize.py").write_text(
            "import onnx_ir, os, signal\nonnx_ir.load = lambda *_: os.kill(os.getpid(), signal.SIGSEGV)\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(EdgewiseError, match="could not be profiled: onnxruntime crashed with SIGSEGV"):
            profile_isolated(save(tmp_path, CHAIN), threads=1, timeout=30.0)


def test_on_a_gpu(tmp_path: Path) -> None:
    if "CUDAExecutionProvider" not in import_onnxruntime().get_available_providers():
        pytest.skip("no GPU: onnxruntime here has no CUDA")
    found = profile_isolated(save(tmp_path, CHAIN, "one", "two", "three"), provider="cuda", runs=3)
    assert found.in_float == ()
    assert "CUDAExecutionProvider" in found.share_by_provider()
    assert {name for node in found.nodes for name in node.sources} == {"one", "two", "three"}
