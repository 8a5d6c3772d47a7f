"""Make an ONNX model smaller and faster on the machine it will run on, and prove that it still does its job.

Importing this package costs next to nothing: what it offers is imported when it is first used.
"""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgewise.optimizer.benchmarking import benchmark
    from edgewise.optimizer.files import load, save
    from edgewise.optimizer.inspection import inspect
    from edgewise.optimizer.jobs import calibrate, compare, prune, quantize
    from edgewise.optimizer.optimization import optimize
    from edgewise.optimizer.profiling import profile
    from edgewise.optimizer.teaching import distill, finetune
    from edgewise.optimizer.torch_export import export

__all__ = [
    "benchmark",
    "calibrate",
    "compare",
    "distill",
    "export",
    "finetune",
    "inspect",
    "load",
    "optimize",
    "profile",
    "prune",
    "quantize",
    "save",
]

# No module may be named like a function: importing it would put the module in the function's place.
_HOMES = MappingProxyType(
    {
        "benchmark": "benchmarking",
        "calibrate": "jobs",
        "compare": "jobs",
        "distill": "teaching",
        "export": "torch_export",
        "finetune": "teaching",
        "inspect": "inspection",
        "load": "files",
        "optimize": "optimization",
        "profile": "profiling",
        "prune": "jobs",
        "quantize": "jobs",
        "save": "files",
    }
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
