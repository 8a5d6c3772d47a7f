"""Profiles of files, one alone and two against each other, and how they are shown."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from rich.console import Console

from edgewise.optimizer import profile
from edgewise.optimizer.console import view
from edgewise.optimizer.profiling import ProfileReport
from edgewise.optimizer.report import plain
from edgewise.runtime.costs import KINDS
from edgewise.runtime.errors import EdgewiseError, InputError
from edgewise.runtime.machine import describe
from edgewise.runtime.peaks import Peaks
from edgewise.runtime.profile import NodeTime, Profile
from edgewise.runtime.profile_difference import difference
from edgewise.runtime.session import Grant

PEAKS = Peaks("cpu", 1, 100.0, 200.0, 10.0, None)


def node(name: str, ms: float, *sources: str, **changed: object) -> NodeTime:
    whole = NodeTime(
        name=name,
        op_type="Conv",
        kind="convolution",
        dtype="float32",
        provider="CPUExecutionProvider",
        calls=1,
        ms=ms,
        share=ms / 10,
        macs=int(ms * 25e6),
        bytes=int(ms * 1e6),
        sources=sources,
    )
    return dataclasses.replace(whole, **changed)  # type: ignore[arg-type]


def report(*profiles: Profile, peaks: Peaks | None = PEAKS, top: int = 10) -> ProfileReport:
    names = ("float", "int8")[: len(profiles)]
    found = difference(*profiles, names=("float", "int8")) if len(profiles) == 2 else None
    return ProfileReport(describe(), "x float32[1]", names, profiles, peaks, found, top)


def made(*nodes: NodeTime, grant: Grant | None = None, in_float: tuple[str, ...] | None = ()) -> Profile:
    return Profile("m.onnx", "cpu", 1, 10, 11.0, nodes, grant or Grant("cpu", {}, {}), in_float)


LONG = "StatefulPartitionedCall/MobilenetV1/MobilenetV1/Conv2d_1_depthwise"
FLOAT = made(
    node("c", 6.0, f"{LONG}/conv", f"{LONG}/batch_norm", f"{LONG}/relu", f"{LONG}/sum"),
    node("d", 3.0, "second", kind="group convolution"),
    node("t", 1.0, op_type="Transpose", kind="layout", macs=0),
)
INT8 = made(
    node("t", 5.0, "q", op_type="Transpose", kind="layout", macs=0, dtype="uint8"),
    node("c", 3.0, f"{LONG}/conv", op_type="QLinearConv", dtype="uint8"),
    node("d", 2.0, "second", kind="group convolution"),
    in_float=("d",),
)


def shown(answer: ProfileReport) -> str:
    console = Console(width=80, highlight=False, file=io.StringIO(), force_terminal=False)
    console.print(view(answer))
    return console.file.getvalue()  # type: ignore[attr-defined]


def words(answer: ProfileReport) -> str:
    """What is shown, without the breaks of lines and columns."""
    return " ".join(shown(answer).split())


class TestView:
    @pytest.mark.parametrize("answer", [report(FLOAT), report(INT8, peaks=None), report(FLOAT, INT8)])
    def test_fits_a_terminal(self, answer: ProfileReport) -> None:
        assert max(map(len, shown(answer).splitlines())) <= 80

    def test_speed_beside_the_peak(self) -> None:
        text = shown(report(FLOAT))
        assert "6.00  60.0%   50.0      50%" in text  # 2 x 25e6 multiply-accumulates in a millisecond
        assert "100 GFLOP/s float32, 200 GOP/s int8, 10 GB/s copying float32" in words(report(FLOAT))
        assert "of peak" not in shown(report(FLOAT, peaks=None))

    def test_what_was_merged(self) -> None:
        text = words(report(FLOAT))
        assert "…/batch_norm + …/relu + 1 more" in text
        assert "…netV1/Conv2d_1_depthwise/conv + " in text
        assert "inserted: t" in text

    def test_a_bar_by_kind(self) -> None:
        bar = shown(report(FLOAT)).splitlines()[1].rstrip()
        assert bar == "█" * 47 + "▓" * 23 + "▒" * 8
        legend = words(report(FLOAT))
        assert "█ convolution 6.00 ms 60% ▓ group convolution 3.00 ms 30% ▒ layout 1.00 ms 10%" in legend

    def test_only_the_longest_nodes(self) -> None:
        assert "second" in shown(report(FLOAT))
        assert "second" not in shown(report(FLOAT, top=1))

    def test_the_difference_comes_first(self) -> None:
        lines = shown(report(FLOAT, INT8)).splitlines()
        assert lines[0].startswith("int8 takes as long as float (10.00 ms): it wins 3.00 ms")
        text = " ".join(" ".join(lines).split())
        assert "Conv -> QLinearConv 6.00 3.00 -3.00" in text
        assert "layout Transpose 1.00 5.00 +4.00" in text
        assert "inserted by onnxruntime Transpose 1.00 -1.00" in text

    def test_bars_of_two_share_their_scale(self) -> None:
        half = made(node("c", 3.0, "c"), node("d", 2.0, "d", kind="layout"))
        lines = shown(report(made(node("c", 10.0, "c")), half)).splitlines()
        bars = [line.rstrip() for line in lines if line.startswith("█")]
        assert [len(bar) for bar in bars] == [78, 39]

    def test_says_loudly_what_runs_in_float(self) -> None:
        assert "1 quantized node runs in float after all (2.00 ms): Conv second" in words(report(INT8))
        assert "in float" not in shown(report(FLOAT))

    def test_says_loudly_what_runs_elsewhere(self) -> None:
        grant = Grant("cuda", {"CUDAExecutionProvider": 5, "CPUExecutionProvider": 1}, {"NonZero": 1})
        copy = node(
            "m", 1.0, op_type="MemcpyToHost", kind="copy between devices", provider="CUDAExecutionProvider"
        )
        found = dataclasses.replace(made(node("c", 9.0, "c"), copy, grant=grant), provider="cuda")
        text = words(report(found))
        assert f"granted in part: {grant}" in text
        assert "NonZero 1" in text
        assert "CPUExecutionProvider 90%, CUDAExecutionProvider 10%; 1 copy between devices a run" in text

    def test_says_what_cannot_be_seen(self) -> None:
        assert "does not show the graph" in shown(report(dataclasses.replace(FLOAT, in_float=None)))

    def test_every_kind_has_a_color(self) -> None:
        nodes = [node(k, 1.0, k, kind=k) for k in KINDS]
        text = shown(report(made(*nodes)))
        assert all(k in text for k in KINDS)


class TestProfile:
    def test_of_one(self, model_path: Path) -> None:
        found = profile([model_path], threads=1, runs=2, peaks=False)
        assert found.names == ("net",)
        assert (found.difference, found.peaks) == (None, None)
        assert found.profiles[0].threads == 1
        assert found.inputs == "image float32[1, 3, 8, 8] (random, seed 0)"
        assert {n for node in found.profiles[0].nodes for n in node.sources} >= {"c", "r", "p"}
        json.dumps(plain(found.to_dict()), allow_nan=False)

    def test_of_two_with_samples(self, model_path: Path, images: np.ndarray, tmp_path: Path) -> None:
        other = tmp_path / "other.onnx"
        other.write_bytes(model_path.read_bytes())
        np.savez(tmp_path / "data.npz", image=images)
        stages: list[str] = []
        found = profile(
            [model_path, other],
            batch=4,
            data=str(tmp_path / "data.npz"),
            threads=1,
            runs=2,
            peaks=False,
            progress=lambda stage, _done, _total: stages.append(stage),
        )
        assert found.inputs.startswith("image float32[4, 3, 8, 8] (")
        assert found.difference is not None
        assert all(change.before and change.after for change in found.difference.nodes if change.sources)
        assert stages[:2] == ["profile net.onnx", "profile other.onnx"]

    def test_what_it_refuses(self, model_path: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="3 were given"):
            profile([model_path] * 3)
        with pytest.raises(InputError, match="runs must be 2"):
            profile([model_path], runs=1)
        with pytest.raises(InputError, match="threads must be 1"):
            profile([model_path], threads=0)
        with pytest.raises(InputError, match="timeout must be above 0"):
            profile([model_path], timeout=0)
        with pytest.raises(InputError, match=r"missing\.onnx"):
            profile([tmp_path / "missing.onnx"])

    def test_models_that_take_different_inputs(self, model_path: Path, tmp_path: Path) -> None:
        text = '<ir_version: 8, opset_import: ["" : 17]> g (float[4] x) => (float[4] y) { y = Sin (x) }'
        onnx.save(onnx.parser.parse_model(text), tmp_path / "sin.onnx")
        with pytest.raises(InputError, match=r"sin.onnx takes x \(float32\)"):
            profile([model_path, tmp_path / "sin.onnx"])

    def test_a_model_that_does_not_end(self, tmp_path: Path) -> None:
        text = """<ir_version: 8, opset_import: ["" : 17]>
            g (int64 n, float[4] x) => (float[4] y) <bool on = {1}> {
                y = Loop(n, on, x) <body = b (int64 i, bool c, float[4] a) => (bool d, float[4] z) {
                    d = Identity(c) z = Sin(a)
                }>
            }"""
        onnx.save(onnx.parser.parse_model(text), tmp_path / "endless.onnx")
        np.savez(tmp_path / "data.npz", n=np.array([10**9]), x=np.ones((1, 4), np.float32))
        with pytest.raises(EdgewiseError, match=r"endless.onnx could not be profiled: no answer within 2 s"):
            profile([tmp_path / "endless.onnx"], data=str(tmp_path / "data.npz"), timeout=2.0, peaks=False)
