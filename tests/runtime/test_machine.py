"""The machine is read from files of the system; here from a folder that stands for its root."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from edgewise.runtime import machine
from edgewise.runtime.evaluate import Evaluator
from edgewise.runtime.machine import Machine, cores_for, cpu_limit, describe
from edgewise.runtime.session import import_onnxruntime

XEON = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_int8\n\n"
NEOVERSE = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def describe_as(monkeypatch: pytest.MonkeyPatch, root: Path, architecture: str, cpuinfo: str) -> Machine:
    monkeypatch.setattr(platform, "machine", lambda: architecture)
    return describe(write(root, {"proc/cpuinfo": cpuinfo}))


class TestDescribe:
    def test_this_machine(self) -> None:
        here = describe()
        assert here.cpu
        assert 1 <= here.physical_cores <= here.logical_cores
        assert 1 <= here.usable_cores <= here.logical_cores
        assert here.memory_gb > 0
        assert here.python == platform.python_version()
        assert "CPUExecutionProvider" in here.providers
        assert here.build == import_onnxruntime().get_build_info() != ""

    def test_survives_json(self) -> None:
        here = describe()
        assert Machine.from_dict(json.loads(json.dumps(here.to_dict(), allow_nan=False))) == here

    def test_reads_what_an_earlier_version_wrote(self) -> None:
        old = describe().to_dict()
        del old["build"], old["turbo"]
        assert Machine.from_dict(old) == dataclasses.replace(describe(), build="", turbo=None)

    def test_intel(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        here = describe_as(monkeypatch, tmp_path, "x86_64", XEON)
        assert here.cpu == "Intel(R) Xeon(R)"
        assert here.isa == ("avx2", "avx512f", "avx512_vnni", "amx_int8")
        assert not here.int8_saturates

    def test_arm_has_no_name_and_does_not_saturate(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        here = describe_as(monkeypatch, tmp_path, "aarch64", NEOVERSE)
        assert here.cpu == "ARM implementer 0x41 part 0xd0c"
        assert here.isa == ("asimd", "asimddp", "i8mm")
        assert not here.int8_saturates

    def test_x86_without_vnni_saturates(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert describe_as(monkeypatch, tmp_path, "x86_64", "flags : avx2 fma\n").int8_saturates

    def test_governor(self, tmp_path: Path) -> None:
        assert describe(tmp_path).governor is None
        write(tmp_path, {"sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n"})
        assert describe(tmp_path).governor == "powersave"

    @pytest.mark.parametrize(
        ("name", "text", "turbo"),
        [
            ("intel_pstate/no_turbo", "0\n", True),
            ("intel_pstate/no_turbo", "1\n", False),
            ("cpufreq/boost", "1\n", True),
            ("cpufreq/boost", "0\n", False),
            ("other", "1", None),
        ],
    )
    def test_turbo(self, tmp_path: Path, name: str, text: str, turbo: bool | None) -> None:
        assert describe(write(tmp_path, {f"sys/devices/system/cpu/{name}": text})).turbo is turbo

    def test_macos_names_its_instruction_sets_otherwise(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        told = "hw.optional.AdvSIMD: 1\nhw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\n"
        monkeypatch.setattr(platform, "system", lambda: "Darwin")
        monkeypatch.setattr(machine, "_output_of", lambda *command: told if command[0] == "sysctl" else None)
        assert describe(tmp_path).isa == ("asimd", "asimddp")

    def test_graphics_cards(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\necho 'NVIDIA A10, 570.1'\necho 'NVIDIA T4, 570.1'\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        assert describe().gpus == ("NVIDIA A10, 570.1", "NVIDIA T4, 570.1")
        tool.write_text("#!/bin/sh\necho 'no devices were found'\nexit 6\n")
        assert describe().gpus == ()


class TestDifferences:
    HERE = Machine(
        cpu="AMD EPYC",
        architecture="x86_64",
        isa=("avx2",),
        physical_cores=2,
        logical_cores=4,
        usable_cores=4,
        cpu_limit=None,
        governor="performance",
        memory_gb=16.6,
        os="Linux-6.1",
        python="3.11.7",
        onnxruntime="1.31.1",
        distributions=("onnxruntime",),
        providers=("CPUExecutionProvider",),
        gpus=(),
        build="build type=Release",
        turbo=True,
    )

    def test_none(self) -> None:
        assert self.HERE.differences(self.HERE) == ()

    @pytest.mark.parametrize(
        ("field", "value", "line"),
        [
            ("cpu", "Xeon", "CPU: AMD EPYC -> Xeon"),
            ("isa", ("avx2", "avx512f"), "instruction sets: avx2 -> avx2, avx512f"),
            ("physical_cores", 4, "cores: 2 physical, 4 logical -> 4 physical, 4 logical"),
            ("usable_cores", 1, "usable cores: 4 -> 1"),
            ("cpu_limit", 1.5, "CPU limit: none -> 1.5 cores"),
            ("governor", "powersave", "governor: performance -> powersave"),
            ("turbo", False, "turbo: on -> off"),
            ("memory_gb", 8.0, "memory: 17 GB -> 8 GB"),
            ("os", "Linux-6.2", "system: Linux-6.1 -> Linux-6.2"),
            ("onnxruntime", "1.24.1", "onnxruntime: 1.31.1 (onnxruntime) -> 1.24.1 (onnxruntime)"),
            ("distributions", (), "onnxruntime: 1.31.1 (onnxruntime) -> 1.31.1 (own build)"),
            ("build", "Debug", "onnxruntime's build: build type=Release -> Debug"),
            ("gpus", ("T4, 570.1",), "GPU: none -> T4, 570.1"),
        ],
    )
    def test_that_matter(self, field: str, value: object, line: str) -> None:
        assert self.HERE.differences(dataclasses.replace(self.HERE, **{field: value})) == (line,)

    @pytest.mark.parametrize(
        ("field", "value"),
        [("governor", None), ("turbo", None), ("build", ""), ("isa", ()), ("python", "3.14.0")],
    )
    def test_that_are_not_known_or_do_not_matter(self, field: str, value: object) -> None:
        other = dataclasses.replace(self.HERE, **{field: value})
        assert self.HERE.differences(other) == other.differences(self.HERE) == ()


def test_saturation_is_what_onnxruntime_shows() -> None:
    """255 x 127, added up: what a kernel without VNNI cuts off is what the machine is said to lose."""
    text = """<ir_version: 8, opset_import: ["": 13]>
        g (uint8[4, 64] a, int8[64, 8] b) => (int32[4, 8] y) { y = MatMulInteger(a, b) }"""
    model = onnx.parser.parse_model(text).SerializeToString()
    feed = {"a": np.full((4, 64), 255, np.uint8), "b": np.full((64, 8), 127, np.int8)}
    exact = 64 * 255 * 127
    found = Evaluator(model, threads=1).run(feed)["y"]
    assert bool((found < exact).all()) == describe().int8_saturates


class TestCpuLimit:
    def test_none(self, tmp_path: Path) -> None:
        assert cpu_limit(tmp_path) is None

    def test_version_2_counts_the_groups_above(self, tmp_path: Path) -> None:
        groups = {
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/outer/inner/cpu.max": "max 100000\n",
        }
        assert cpu_limit(write(tmp_path, groups)) == 1.5

    def test_version_2_inside_a_container(self, tmp_path: Path) -> None:
        groups = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000"}
        assert cpu_limit(write(tmp_path, groups)) == 4.0

    def test_version_1(self, tmp_path: Path) -> None:
        groups = {
            "proc/self/cgroup": "3:memory:/job\n2:cpu,cpuacct:/job\n1:name=systemd:/\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        }
        assert cpu_limit(write(tmp_path, groups)) == 0.5

    def test_version_1_without_limit(self, tmp_path: Path) -> None:
        groups = {
            "proc/self/cgroup": "2:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        }
        assert cpu_limit(write(tmp_path, groups)) is None


class TestCoresFor:
    @pytest.fixture(autouse=True)
    def _eight_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "usable_cores", lambda: tuple(range(8)))

    def test_away_from_core_0(self, tmp_path: Path) -> None:
        assert cores_for(3, tmp_path) == (5, 6, 7)

    def test_no_more_than_there_are(self, tmp_path: Path) -> None:
        assert cores_for(20, tmp_path) == tuple(range(8))

    def test_one_thread_a_physical_core_first(self, tmp_path: Path) -> None:
        pairs = {
            f"sys/devices/system/cpu/cpu{c}/topology/thread_siblings_list": f"{c % 4},{c % 4 + 4}"
            for c in range(8)
        }
        write(tmp_path, pairs)
        assert cores_for(4, tmp_path) == (4, 5, 6, 7)
        assert cores_for(5, tmp_path) == (3, 4, 5, 6, 7)

    def test_siblings_written_as_a_range(self, tmp_path: Path) -> None:
        pairs = {
            f"sys/devices/system/cpu/cpu{c}/topology/thread_siblings_list": f"{c // 2 * 2}-{c // 2 * 2 + 1}"
            for c in range(8)
        }
        assert cores_for(4, write(tmp_path, pairs)) == (1, 3, 5, 7)

    @pytest.mark.parametrize("name", ["cpu_capacity", "cpufreq/cpuinfo_max_freq"])
    def test_the_fast_kind_first(self, tmp_path: Path, name: str) -> None:
        speeds = {f"sys/devices/system/cpu/cpu{c}/{name}": "1024" if c < 2 else "400" for c in range(8)}
        assert cores_for(3, write(tmp_path, speeds)) == (0, 1, 7)
