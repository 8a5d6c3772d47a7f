"""What released versions of onnxruntime read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import onnx
import onnx_ir as ir

from edgewise.passes.graph import opset
from edgewise.runtime.errors import EdgewiseError, InputError

_VERSION = re.compile(r"(\d+)\.(\d+)(\.\d+)?")

_ONNX_OF: Mapping[tuple[int, int], str] = MappingProxyType(
    {
        (1, 6): "1.8.0",
        (1, 7): "1.8.0",
        (1, 8): "1.9.0",
        (1, 9): "1.10.0",
        (1, 10): "1.10.0",
        (1, 11): "1.11.0",
        (1, 12): "1.12.0",
        (1, 13): "1.12.0",
        (1, 14): "1.13.0",
        (1, 15): "1.14.0",
        (1, 16): "1.14.1",
        (1, 17): "1.15.0",
        (1, 18): "1.16.0",
        (1, 19): "1.16.1",
        (1, 20): "1.16.1",
        (1, 21): "1.16.1",
        (1, 22): "1.16.1",
        (1, 23): "1.18.0",
    }
)
"""A release of onnxruntime and the release of onnx whose operators it has, by onnxruntime's release notes.

1.21 and 1.22 are built with onnx 1.17, of whose operator set 22 they lack kernels; it brought nothing but
types. What is newer than the last of them reads at least what that reads.
"""


@dataclass(frozen=True)
class Limits:
    """The newest that `runtime` reads: operator sets of the standard and of ai.onnx.ml, and IR version."""

    runtime: str
    opset: int
    ml_opset: int
    ir_version: int

    def check(self, model: ir.Model) -> None:
        """Raise `EdgewiseError` where `model` is newer than that."""
        held = (opset(model), model.opset_imports.get("ai.onnx.ml", 0), model.ir_version)
        names = ("operator set", "operator set of ai.onnx.ml", "IR version")
        for name, has, most in zip(names, held, (self.opset, self.ml_opset, self.ir_version), strict=True):
            if has > most:
                raise EdgewiseError(
                    f"onnxruntime {self.runtime} reads {name} {most} and older, and the model has {has}: "
                    "export it for an older one"
                )


def limits_of(runtime: str) -> Limits:
    """The limits of a version such as 1.16 or 1.16.3; `InputError` where it is none, or too old."""
    match = _VERSION.fullmatch(runtime)
    if match is None:
        raise InputError(f"runtime: {runtime!r} is no version of onnxruntime such as 1.16")
    wanted = (int(match[1]), int(match[2]))
    if wanted < min(_ONNX_OF):
        oldest = ".".join(map(str, min(_ONNX_OF)))
        raise InputError(f"runtime: onnxruntime {runtime} is older than {oldest}, the oldest that is known")
    release = _ONNX_OF[max(version for version in _ONNX_OF if version <= wanted)]
    row = next(row for row in onnx.helper.VERSION_TABLE if row[0] == release)
    return Limits(runtime, opset=row[2], ml_opset=row[3], ir_version=row[1])
