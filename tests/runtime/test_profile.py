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

from edgewise.runtime.errors import InputError
from edgewise.runtime.profile import NodeTime, Profile, profile
from edgewise.runtime.profile import _in_float as in_float
from edgewise.runtime.profile import _node_times as node_times
from edgewise.runtime.session import PROVIDERS, ProviderError, import_onnxruntime

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
        assert report.assigned in ({}, {"CPUExecutionProvider": 3})
        assert report.copies() == 0

    def test_adds_up(self, tmp_path: Path) -> None:
        report = profile(save(tmp_path, CHAIN), {"x": np.ones((5000, 4), np.float32)}, threads=1, runs=5)
        assert sum(node.share for node in report.nodes) == pytest.approx(1)
        assert sum(op.ms for op in report.by_op()) == pytest.approx(sum(n.ms for n in report.nodes))
        assert sum(op.nodes for op in report.by_op()) == 3
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
        assert len(data["nodes"]) == 3
        assert {op["op_type"] for op in data["by_op"]} == {"Exp", "Sin", "Relu"}
        assert (
            NodeTime(**{**data["nodes"][0], "sources": tuple(data["nodes"][0]["sources"])}) == report.nodes[0]
        )

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


def event(name: str, op: str, start: int, duration: int) -> dict[str, Any]:
    args = {"op_name": op, "provider": "CPUExecutionProvider"}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": duration, "args": args}


class TestNodeTimes:
    WINDOWS = ({"ts": 100, "dur": 100}, {"ts": 200, "dur": 100})

    def times(self, *events: dict[str, Any]) -> dict[str, tuple[int, float]]:
        return {n.name: (n.calls, n.ms) for n in node_times(events, self.WINDOWS, {})}

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
