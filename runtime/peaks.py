"""How fast this machine is at best, by onnxruntime's own kernels: what a node's speed is held against.

Each peak is the best of a few runs of one large operator: a product of square matrices, whose second
factor is constant as a weight is, and a copy (two tensors joined into one) that no cache holds.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgewise.runtime.errors import EdgewiseError
from edgewise.runtime.evaluate import Array
from edgewise.runtime.isolated import IsolatedModel, WorkerFailed
from edgewise.runtime.machine import cores_for
from edgewise.runtime.session import PROVIDERS, open_session
from edgewise.runtime.trace import record, tracing

_OPSET = 17
_IR_VERSION = 8
_CPU_SIZE, _DEVICE_SIZE = 768, 4096  # rows of a square matrix
_CPU_BYTES, _DEVICE_BYTES = 2**26, 2**28  # of one tensor that is copied
_DEVICES = frozenset({"cuda", "tensorrt", "dml"})
_PASSES, _RUNS = 2, 7
_INT8 = frozenset({"int8", "uint8"})


@dataclass(frozen=True)
class Peaks:
    """The fastest of each kind seen on the provider and with the threads asked for.

    `float_gflops` and `int8_gops` are billions of operations a second, a multiply-accumulate being two;
    the copies are billions of bytes a second, read and written. None where the provider has no kernel.
    """

    provider: str
    threads: int | None
    float_gflops: float | None
    """float32 x float32."""
    int8_gops: float | None
    """uint8 x int8, summed in int32."""
    float_copy_gbps: float | None
    int8_copy_gbps: float | None

    def operations(self, dtype: str) -> float | None:
        """The peak of arithmetic in `dtype`."""
        return {"float32": self.float_gflops}.get(dtype, self.int8_gops if dtype in _INT8 else None)

    def copy(self, dtype: str) -> float | None:
        """The peak of moving tensors of `dtype`."""
        return self.int8_copy_gbps if dtype in _INT8 else self.float_copy_gbps

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Peaks:
        """The peaks that `to_dict` wrote."""
        return cls(**data)


def measure_peaks_isolated(
    provider: str = "cpu", threads: int | None = None, *, timeout: float = 120.0
) -> Peaks:
    """`measure_peaks` in a process of its own, pinned to as many cores as `threads`.

    Raises `EdgewiseError` with the cause where it fails, `ProviderError` where the provider is not to be had.
    """
    cores = () if threads is None else cores_for(threads)
    with (
        tempfile.TemporaryDirectory(prefix="edgewise-") as folder,
        IsolatedModel(Path(folder) / "log", threads=threads, timeout=timeout) as worker,
    ):
        try:
            worker.wait_until_ready()
            reply = worker.ask("peaks", cores=cores, provider=provider, threads=threads)
        except WorkerFailed as failure:
            raise EdgewiseError(f"the peaks could not be measured: {failure}") from None
    return Peaks.from_dict(reply["peaks"])


def measure_peaks(provider: str = "cpu", threads: int | None = None) -> Peaks:
    """Measure in this process, in a second or two.

    Raises `ProviderError` where the provider is not to be had.
    """
    size = _DEVICE_SIZE if provider in _DEVICES else _CPU_SIZE
    length = _DEVICE_BYTES if provider in _DEVICES else _CPU_BYTES
    floats, ints = np.ones((size, size), np.float32), np.ones((size, size), np.uint8)
    tasks: dict[str, tuple[int, ir.Model, Array]] = {
        "float_gflops": (2 * size**3, _product("MatMul", floats, floats), floats),
        "int8_gops": (2 * size**3, _product("MatMulInteger", ints, ints.astype(np.int8)), ints),
        "float_copy_gbps": (4 * length, _copy(ir.DataType.FLOAT), np.ones(length // 4, np.float32)),
        "int8_copy_gbps": (4 * length, _copy(ir.DataType.UINT8), np.ones(length, np.uint8)),
    }
    rates: dict[str, float | None] = dict.fromkeys(tasks)
    for _ in range(_PASSES):  # what slows a shared machine seldom lasts as long as all of them
        for name, (amount, model, array) in tasks.items():
            seconds = _fastest(model, array, provider, threads)
            if seconds is not None:
                rates[name] = max(rates[name] or 0.0, amount / seconds / 1e9)
    return Peaks(provider=provider, threads=threads, **rates)


def _product(op_type: str, first: Array, second: Array) -> ir.Model:
    """x times a constant."""
    weight = ir.tensor(second, name="w")
    constant = ir.Value(
        name="w", type=ir.TensorType(weight.dtype), shape=ir.Shape(second.shape), const_value=weight
    )
    given = ir.Value(
        name="x", type=ir.TensorType(ir.DataType.from_numpy(first.dtype)), shape=ir.Shape(first.shape)
    )
    result = ir.DataType.INT32 if weight.dtype == ir.DataType.INT8 else weight.dtype
    return _model(ir.node(op_type, [given, constant]), given, result, constant)


def _copy(dtype: ir.DataType) -> ir.Model:
    """x twice, one after the other: reads as many bytes as it writes."""
    given = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(["n"]))
    return _model(ir.node("Concat", [given, given], {"axis": 0}), given, dtype)


def _model(node: ir.Node, given: ir.Value, dtype: ir.DataType, *constants: ir.Value) -> ir.Model:
    result = node.outputs[0]
    result.name, result.type = "y", ir.TensorType(dtype)
    graph = ir.Graph(
        [given], [result], nodes=[node], initializers=constants, opset_imports={"": _OPSET}, name="peak"
    )
    return ir.Model(graph, ir_version=_IR_VERSION)


def _fastest(model: ir.Model, array: Array, provider: str, threads: int | None) -> float | None:
    """The shortest time of the one node, in seconds; None if the provider leaves it to another or fails."""
    with tempfile.TemporaryDirectory(prefix="edgewise-") as name:
        path = Path(name) / "peak.onnx"
        ir.save(model, path)
        session = tracing(open_session(path, provider=provider, threads=threads), path, Path(name), None)
        try:
            trace = record(session, {"x": array}, _RUNS)
        except EdgewiseError:
            return None
    calls = [(microseconds, event["args"]["provider"]) for _, _, event, microseconds in trace.calls()]
    if {where for _, where in calls} != {PROVIDERS[provider][0]}:
        return None
    return min(microseconds for microseconds, _ in calls) / 1e6
