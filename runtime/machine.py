"""What a latency was measured on: the facts without which a number means nothing."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

from edgewise.runtime.session import import_onnxruntime, installed_runtimes

_TELLING_FLAGS = (  # the ones onnxruntime's CPU kernels choose by
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
_MACOS_FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "avx2_0": "avx2",
        "avx512f": "avx512f",
        "avx512vnni": "avx512_vnni",
        "neon": "asimd",
        "AdvSIMD": "asimd",
        "arm.FEAT_FP16": "asimdhp",
        "arm.FEAT_DotProd": "asimddp",
        "arm.FEAT_I8MM": "i8mm",
        "arm.FEAT_BF16": "bf16",
    }
)
_VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
_X86 = frozenset({"x86_64", "amd64", "i386", "i686", "x86"})
_ROOT = Path("/")
_PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class Machine:
    """The hardware, its limits and the software that a measurement depends on."""

    cpu: str
    architecture: str
    isa: tuple[str, ...]
    physical_cores: int
    logical_cores: int
    usable_cores: int
    """The cores this process may be scheduled on."""
    cpu_limit: float | None
    """Cores' worth of time the control group allows; None without a limit."""
    governor: str | None
    memory_gb: float
    os: str
    python: str
    onnxruntime: str
    distributions: tuple[str, ...]
    providers: tuple[str, ...]
    gpus: tuple[str, ...]
    """One "name, driver version" each, as nvidia-smi tells it."""
    build: str = ""
    """How this onnxruntime was built, in its own words; empty in results of before this was noted."""
    turbo: bool | None = None
    """Whether the clock may rise for a while; None where the system does not tell."""

    @property
    def int8_saturates(self) -> bool:
        """Whether unsigned times signed bytes lose bits on the CPU.

        Without VNNI an x86 kernel adds two products in 16 bits (vpmaddubsw): 255 x 127 twice is
        beyond 32,767 and is cut off. Weights of 7 bits, or unsigned weights, avoid it.
        """
        return self.architecture in _X86 and _VNNI.isdisjoint(self.isa)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def differences(self, other: Machine) -> tuple[str, ...]:
        """A line "what: here -> there" for each fact in which `other` differs and that a latency depends on.

        What one of the two does not know is left out.
        """
        here, there = self._facts(), other._facts()
        return tuple(
            f"{what}: {here[what]} -> {there[what]}"
            for what in here
            if here[what] and there[what] and here[what] != there[what]
        )

    def _facts(self) -> dict[str, str]:
        """What a latency depends on, in words; empty where it is not known."""
        return {
            "CPU": self.cpu,
            "instruction sets": ", ".join(self.isa),
            "cores": f"{self.physical_cores} physical, {self.logical_cores} logical",
            "usable cores": str(self.usable_cores),
            "CPU limit": "none" if self.cpu_limit is None else f"{self.cpu_limit:g} cores",
            "governor": self.governor or "",
            "turbo": "" if self.turbo is None else "on" if self.turbo else "off",
            "memory": f"{self.memory_gb:.0f} GB",
            "system": self.os,
            "onnxruntime": f"{self.onnxruntime} ({', '.join(self.distributions) or 'own build'})",
            "onnxruntime's build": self.build,
            "GPU": "; ".join(self.gpus) or "none",
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Machine:
        """The machine that `to_dict` wrote."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**fields)


def describe(root: Path = _ROOT) -> Machine:
    """This machine, as seen through the files of a Linux system below `root`; elsewhere what Python knows."""
    ort = import_onnxruntime()
    fields = _cpu_fields(root)
    logical = psutil.cpu_count() or 1
    return Machine(
        cpu=_cpu_name(fields),
        architecture=platform.machine().lower(),
        isa=_telling_flags(fields) or _flags_of_macos(),
        physical_cores=psutil.cpu_count(logical=False) or logical,
        logical_cores=logical,
        usable_cores=len(usable_cores()),
        cpu_limit=cpu_limit(root),
        governor=_read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        os=platform.platform(),
        python=platform.python_version(),
        onnxruntime=ort.__version__,
        distributions=installed_runtimes(),
        providers=tuple(ort.get_available_providers()),
        gpus=_gpus(),
        build=ort.get_build_info(),
        turbo=_turbo(root),
    )


def _read(path: Path) -> str | None:
    """The file's text, or None where the system does not tell."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def _cpu_fields(root: Path) -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo."""
    first = (_read(root / "proc/cpuinfo") or "").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cpu_name(fields: Mapping[str, str]) -> str:
    """The marketing name; an ARM core has only numbers for its maker and its design."""
    if name := fields.get("model name"):
        return name
    if "CPU part" in fields:
        return f"ARM implementer {fields.get('CPU implementer', '?')} part {fields['CPU part']}"
    if platform.system() == "Darwin":
        return _output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def _telling_flags(fields: Mapping[str, str]) -> tuple[str, ...]:
    here = set((fields.get("flags") or fields.get("Features") or "").split())
    return tuple(flag for flag in _TELLING_FLAGS if flag in here)


def _flags_of_macos() -> tuple[str, ...]:
    """The same, under the names that Linux gives them."""
    text = _output_of("sysctl", "hw.optional") if platform.system() == "Darwin" else None
    here = {line.removeprefix("hw.optional.").partition(":")[0] for line in _enabled(text or "")}
    names = {linux for mac, linux in _MACOS_FLAGS.items() if mac in here}
    return tuple(flag for flag in _TELLING_FLAGS if flag in names)


def _enabled(text: str) -> Iterator[str]:
    return (line for line in text.splitlines() if line.endswith(": 1"))


def _turbo(root: Path) -> bool | None:
    """Of Intel's own driver, or of any other."""
    folder = root / "sys/devices/system/cpu"
    off, on = _read(folder / "intel_pstate/no_turbo"), _read(folder / "cpufreq/boost")
    if off is not None:
        return off == "0"
    return None if on is None else on == "1"


def usable_cores() -> tuple[int, ...]:
    """The numbers of the logical cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def cores_for(threads: int, root: Path = _ROOT) -> tuple[int, ...]:
    """The cores to pin `threads` threads to: the fastest first, one thread a physical core where they last.

    Among equals the highest numbers come first, away from core 0 where interrupts usually land.
    """
    cores = [(_sibling_rank(root, c), -_speed(root, c), -c) for c in usable_cores()]
    return tuple(sorted(-c for _, _, c in sorted(cores)[:threads]))


def _sibling_rank(root: Path, core: int) -> int:
    """How many usable hardware threads of the same physical core have a higher number."""
    text = _read(root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    siblings = set(_numbers(text)) if text else {core}
    return sum(other > core for other in siblings & set(usable_cores()))


def _numbers(text: str) -> Iterator[int]:
    """The numbers of a kernel list such as "0-2,7"."""
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _speed(root: Path, core: int) -> int:
    """A number that is higher for the faster kind of core of a hybrid processor."""
    folder = root / f"sys/devices/system/cpu/cpu{core}"
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        if (text := _read(folder / name)) and text.isdecimal():
            return int(text)
    return 0


def cpu_limit(root: Path = _ROOT) -> float | None:
    """Cores' worth of CPU time the control group (version 1 or 2) or one above it allows."""
    limits = [
        limit
        for folder in _control_groups(root)
        for limit in (_limit_v2(folder), _limit_v1(folder))
        if limit is not None
    ]
    return min(limits, default=None)


def _control_groups(root: Path) -> Iterator[Path]:
    """The folders of the groups this process is in, and of all groups above them."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        inside = mount / path.strip("/")
        yield from (inside, *(p for p in inside.parents if p.is_relative_to(mount)))


def _limit_v2(folder: Path) -> float | None:
    """`cpu.max` holds "QUOTA PERIOD" in microseconds, or "max PERIOD"."""
    found = re.fullmatch(r"(\d+) (\d+)", _read(folder / "cpu.max") or "")
    return int(found[1]) / int(found[2]) if found else None


def _limit_v1(folder: Path) -> float | None:
    """The quota is -1 where there is no limit."""
    quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    if quota is None or period is None or int(quota) <= 0:
        return None
    return int(quota) / int(period)


def _gpus() -> tuple[str, ...]:
    text = _output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return tuple(line.strip() for line in (text or "").splitlines() if line.strip())


def _output_of(*command: str) -> str | None:
    """What a tool of the system prints, or None where it is missing, fails or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
